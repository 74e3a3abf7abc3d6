"""The recurrence of RWKV-6, in chunks for training and token by token for generation.

A head has a state S [K, V]. For each token, with receptance r, key k, decay w in (0, 1), bonus u (all [K]) and value v
[V]:

    y = r (S + (u k) v^T)        S <- w S + k v^T

So an earlier token i reaches token t by the sum over K of r_t k_i w_{i+1} ... w_{t-1}. The chunked form needs those
products of decays for pairs of tokens. As a quotient of two products from the chunk's begin on, the usual way, they
overflow where decays are strong. Here every pair is split at a border between its tokens: the decays in front of it go
to the key, those behind it to the receptance. Both are products of numbers below 1: nothing overflows, and what
underflows is zero. Within a chunk the borders are the middles of blocks of 2, 4, 8, ... tokens, for each pair has
exactly one block in whose left half one lies and in whose right half the other. Between chunks they are where the state
is handed on.

A document ends with a decay to nothing: `FORGET` in place of its last token's logarithm, and a key that nobody sees
later.

Shapes: B sequences, T tokens, H heads, K channels of keys, V of values; N chunks of C tokens. Everything is computed in
fp32 (float64 stays). `decay` is what the model makes of a token: w = e^-e^decay.

On a GPU with the package flash-linear-attention, its kernel does the chunks of a training step, but not within
`torch.compile`, which cannot trace it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

logger = logging.getLogger("titan_hd")

CHUNK = 32
FORGET = -1e5  # of which e to the power of it is 0 in every dtype
# The kernel takes differences of sums of logarithms: e^-60 is nothing, too, and leaves those of other tokens exact.
KERNEL_FORGET = -60.0


def wkv6(
    r: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    bonus: torch.Tensor,
    ends: torch.Tensor | None = None,
) -> torch.Tensor:
    """y [B, T, H, V] of r, k, decay [B, T, H, K], v [B, T, H, V], bonus [H, K], from an empty state on.

    ends: [B, T], whether a token is the last of its document.

    Only the arguments are kept for the backward pass, which computes the rest again.
    """
    if not torch.is_grad_enabled():
        return _of_documents(r, k, v, decay, bonus, ends)
    flags = {"use_reentrant": False, "preserve_rng_state": False, "determinism_check": "none"}
    return checkpoint(_of_documents, r, k, v, decay, bonus, ends, **flags)


def _of_documents(
    r: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    bonus: torch.Tensor,
    ends: torch.Tensor | None,
) -> torch.Tensor:
    kernel, given = _kernel_for(r), r.dtype
    r, k, v, bonus = _wide(r, k, v, bonus)
    y, log_decay = (r * bonus * k).sum(-1, keepdim=True) * v, log_decays(decay)
    if ends is not None:
        last = ends[:, :, None, None]
        k, log_decay = k.masked_fill(last, 0.0), log_decay.masked_fill(last, FORGET)
    if kernel is None:
        return y + chunked(r, k, v, log_decay)[0]
    r, k, v = (t.to(given) for t in (r, k, v))  # of bf16 the kernel's products are in bf16, its state is in fp32
    return y + kernel(r, k, v, log_decay.clamp(min=KERNEL_FORGET), torch.zeros_like(bonus), scale=1.0)[0]


def _kernel_for(r: torch.Tensor) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]] | None:
    """What does the chunks in place of `chunked`, if anything: (r, k, v, log decays, bonus, scale) -> (y, ...)."""
    return _kernel() if r.is_cuda and not torch.compiler.is_compiling() else None


@functools.cache
def _kernel() -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]] | None:
    """flash-linear-attention's, where it is installed and takes [B, T, H, K]: older versions had T behind H."""
    if importlib.util.find_spec("fla") is None:
        return None
    try:
        kernel = importlib.import_module("fla.ops.rwkv6").chunk_rwkv6
        takes = inspect.signature(kernel).parameters.keys() & {"head_first", "cu_seqlens"}
    except (ImportError, AttributeError, RuntimeError) as error:
        logger.warning("flash-linear-attention is not used: it cannot be imported: %s", error)
        return None
    if not takes:
        logger.warning("flash-linear-attention is not used: this version wants heads in front of tokens; update it")
        return None
    logger.info("the recurrence of RWKV-6 is computed by flash-linear-attention's kernel")
    return functools.partial(kernel, head_first=False) if "head_first" in takes else kernel


def wkv6_with_state(
    r: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    bonus: torch.Tensor,
    state: torch.Tensor | None,
    lengths: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y as of `wkv6`, and the state [B, H, K, V] behind the first `lengths` [B] tokens of each row; what follows them
    is padding. state: in front of them; None: an empty one."""
    r, k, v, bonus = _wide(r, k, v, bonus)
    y, log_decay = (r * bonus * k).sum(-1, keepdim=True) * v, log_decays(decay)
    padding = (torch.arange(r.shape[1], device=r.device) >= lengths[:, None])[:, :, None, None]
    k, log_decay = k.masked_fill(padding, 0.0), log_decay.masked_fill(padding, 0.0)
    if state is None:
        state = k.new_zeros(len(k), *k.shape[2:], v.shape[3])
    if r.shape[1] > 1:
        seen, state = chunked(r, k, v, log_decay, state)
        return y + seen, state
    r, k, v, w = (t[:, 0] for t in (r, k, v, log_decay.exp()))
    seen = (r[:, :, None] @ state)[:, :, 0]
    return y + seen[:, None], state * w[..., None] + k[..., None] * v[:, :, None]


def log_decays(decay: torch.Tensor) -> torch.Tensor:
    """Logarithms of the decays. Beyond e^12 a decay is 0 in every dtype; there the exponential, and its gradient, stay
    finite."""
    return -_wide(decay)[0].clamp(max=12.0).exp()


def chunked(
    r: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor, state: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each token has of those before it, [B, T, H, V], and the state behind the last one."""
    length = r.shape[1]
    missing = -length % CHUNK  # filled with tokens of no key and no decay
    r, k, v, w = (
        F.pad(t, (0, 0, 0, 0, 0, missing)).unflatten(1, (-1, CHUNK)).permute(0, 3, 1, 2, 4)  # [B, H, N, C, .]
        for t in (r, k, v, log_decay)
    )
    through = w.sum(-2).exp()[..., None]  # the decay of a whole chunk, [B, H, N, K, 1]
    added = (k * _behind(w).exp()).transpose(-1, -2) @ v  # what a chunk leaves behind, [B, H, N, K, V]
    if state is None:
        state = torch.zeros_like(added[:, :, 0])
    before = []
    for n in range(r.shape[2]):
        before.append(state)
        state = state * through[:, :, n] + added[:, :, n]
    y = (r * _ahead(w).exp()) @ torch.stack(before, 2) + _within(r, k, v, w)
    return y.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :length], state


def _within(r: torch.Tensor, k: torch.Tensor, v: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """What each token has of those before it in its own chunk, [..., C, V]."""
    y = torch.zeros_like(v)
    half = 1
    while half < CHUNK:
        (k_left, _), (v_left, _), (_, r_right), (w_left, w_right) = (
            t.unflatten(-2, (-1, 2, half)).unbind(-3) for t in (k, v, r, w)
        )
        scores = (r_right * _ahead(w_right).exp()) @ (k_left * _behind(w_left).exp()).transpose(-1, -2)
        right = (scores @ v_left)[..., None, :, :]  # [..., blocks, 1, half, V]
        y = y + F.pad(right, (0, 0, 0, 0, 1, 0)).flatten(-4, -2)
        half *= 2
    return y


def _ahead(w: torch.Tensor) -> torch.Tensor:
    """Sums of the logarithms [..., C, K] in front of each token."""
    return F.pad(w[..., :-1, :], (0, 0, 1, 0)).cumsum(-2)


def _behind(w: torch.Tensor) -> torch.Tensor:
    """Sums of the logarithms [..., C, K] behind each token."""
    return F.pad(w[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)


def _wide(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]
