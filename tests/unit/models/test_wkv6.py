"""The recurrence in chunks against its definition, token by token in float64."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch

from tests.kit.rwkv import recurrence
from titan_hd.models import wkv6

HEADS, KEYS, VALUES = 2, 4, 3
# fp32 sums of a few dozen products, in another order.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
EXACT = {"rtol": 1e-10, "atol": 1e-10}  # float64


def operands(
    length: int, batch: int = 2, decays: tuple[float, float] = (-6.0, 2.0), seed: int = 0
) -> list[torch.Tensor]:
    """r, k, v, decay, bonus in float64. decays: from e^-e^ of the first, nearly 1, to e^-e^ of the second."""
    g = torch.Generator().manual_seed(seed)
    keys, values = (batch, length, HEADS, KEYS), (batch, length, HEADS, VALUES)
    r, k, v = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in (keys, keys, values))
    low, high = decays
    decay = low + (high - low) * torch.rand(keys, generator=g, dtype=torch.float64)
    return [r, k, v, decay, torch.randn(HEADS, KEYS, generator=g, dtype=torch.float64)]


def with_gradients(function, tensors: list[torch.Tensor], *rest):
    """The output, and the gradients of all tensors for one and the same gradient of the output."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    y = function(*leaves, *rest)
    y = y[0] if isinstance(y, tuple) else y
    gy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(y.dtype)
    y.backward(gy)
    return [y.detach(), *(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 77, 128])
def test_chunks_are_the_recurrence(length: int):
    tensors = operands(length)
    wanted = with_gradients(recurrence, tensors)
    for got, want in zip(with_gradients(wkv6.wkv6, tensors), wanted, strict=True):
        torch.testing.assert_close(got, want, **EXACT)
    for got, want in zip(with_gradients(wkv6.wkv6, [t.float() for t in tensors]), wanted, strict=True):
        torch.testing.assert_close(got, want.float(), **TOLERANCE)


@pytest.mark.parametrize("decays", [(2.0, 5.0), (20.0, 100.0), (-30.0, -20.0), (-8.0, 6.0)], ids=str)
def test_strong_and_weak_decays(decays: tuple[float, float]):
    """Decays whose products no fp32 holds (e^-e^5 of every token), and those that forget nothing."""
    tensors = operands(70, decays=decays)
    got = with_gradients(wkv6.wkv6, [t.float() for t in tensors])
    wanted = with_gradients(recurrence, [*tensors[:3], tensors[3].clamp(max=12.0), tensors[4]])
    for one, want in zip(got, wanted, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, want.float(), **TOLERANCE)


def test_one_strong_decay_does_not_blur_the_weak_ones_behind_it():
    """A sum of logarithms from the chunk's begin would lose the small ones beside the large one."""
    tensors = operands(32, decays=(-9.0, -7.0))
    tensors[3][:, 3] = 9.0
    got = with_gradients(wkv6.wkv6, [t.float() for t in tensors])
    for one, want in zip(got, with_gradients(recurrence, tensors), strict=True):
        torch.testing.assert_close(one, want.float(), **TOLERANCE)


def test_documents_do_not_see_each_other():
    """Borders at and beside those of chunks, documents of one token, and other documents in another row."""
    tensors, ends = operands(70), torch.zeros(2, 70, dtype=torch.bool)
    ends[0, [0, 1, 31, 32, 40, 63, 69]] = True
    ends[1, [5, 62, 69]] = True
    got = with_gradients(wkv6.wkv6, tensors, ends)
    for one, want in zip(got, with_gradients(recurrence, tensors, ends), strict=True):
        torch.testing.assert_close(one, want, **EXACT)
    alone = wkv6.wkv6(*(t[:1, 33:41] for t in tensors[:4]), tensors[4])
    torch.testing.assert_close(got[0][:1, 33:41], alone, **EXACT)


def test_a_state_goes_on():
    """A prompt at once, then token by token; rows of unequal lengths, whose padding leaves no trace."""
    r, k, v, decay, bonus = operands(40)
    lengths = torch.tensor([35, 37])
    with torch.no_grad():
        y, state = wkv6.wkv6_with_state(r[:, :37], k[:, :37], v[:, :37], decay[:, :37], bonus, None, lengths)
        for row, length in enumerate(lengths):
            wanted, behind = recurrence(*(t[row : row + 1, :length] for t in (r, k, v, decay)), bonus)
            torch.testing.assert_close(y[row : row + 1, :length], wanted, **EXACT)
            torch.testing.assert_close(state[row : row + 1], behind, **EXACT)
        step = [t[:, 39:40] for t in (r, k, v, decay)]
        one, after = wkv6.wkv6_with_state(*step, bonus, state, torch.tensor([1, 1]))
        wanted, behind = recurrence(*step, bonus, state=state)
        torch.testing.assert_close(one, wanted, **EXACT)
        torch.testing.assert_close(after, behind, **EXACT)


def test_nothing_but_the_operands_is_kept():
    """In the dtype in which they came: chunks, states and scores are computed again."""
    tensors = [t.bfloat16().requires_grad_() for t in operands(64)]
    kept: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t.nbytes) and t, lambda t: t):
        wkv6.wkv6(*tensors)
    assert sum(kept.values()) <= sum(t.nbytes for t in tensors)


def install(monkeypatch, kernel) -> None:
    """A stand-in for flash-linear-attention. None: a package that lacks it."""
    package, ops = ModuleType("fla"), ModuleType("fla.ops.rwkv6")
    package.__spec__ = ModuleSpec("fla", None)
    if kernel is not None:
        ops.chunk_rwkv6 = kernel
    monkeypatch.setitem(sys.modules, "fla", package)
    monkeypatch.setitem(sys.modules, "fla.ops.rwkv6", ops)


def older(r, k, v, g, u, scale=None, initial_state=None, output_final_state=False, checkpoint_level=0):
    """Heads in front of tokens."""


def newest(r, k, v, w, u, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None, **deprecated):
    """Tokens in front of heads."""


@pytest.mark.parametrize(
    ("kernel", "used", "says"),
    [(newest, newest, ""), (older, None, "heads in front of tokens"), (None, None, "cannot be imported")],
)
def test_only_a_package_that_takes_tokens_in_front_is_used(kernel, used, says: str, monkeypatch, caplog):
    install(monkeypatch, kernel)
    wkv6._kernel.cache_clear()
    try:
        assert wkv6._kernel() is used
    finally:
        wkv6._kernel.cache_clear()
    assert says in caplog.text


def test_a_kernel_in_place_of_the_chunks(monkeypatch):
    """Asked as flash-linear-attention's documentation says, through a stand-in for the package; documents, too."""

    def chunk_rwkv6(r, k, v, w, u, scale=None, initial_state=None, head_first=True):
        assert not head_first
        assert scale == 1.0  # it would take K^-1/2
        assert w.min() >= -100  # sums of larger ones leave nothing of the others
        return recurrence(r, k, v, torch.log(-w), u)[0], None

    install(monkeypatch, chunk_rwkv6)
    monkeypatch.setattr(wkv6, "_kernel_for", lambda r: wkv6._kernel())
    wkv6._kernel.cache_clear()
    tensors, ends = operands(40), torch.zeros(2, 40, dtype=torch.bool)
    ends[0, 20], ends[1, 5], ends[1, 6] = True, True, True
    try:
        got = with_gradients(wkv6.wkv6, tensors, ends)
    finally:
        wkv6._kernel.cache_clear()
    for mine, want in zip(got, with_gradients(recurrence, tensors, ends), strict=True):
        torch.testing.assert_close(mine, want, **EXACT)


def test_without_the_package_or_a_gpu_there_is_no_kernel():
    assert wkv6._kernel_for(torch.zeros(1)) is None
