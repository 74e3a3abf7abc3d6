"""Results that are freed in the forward pass and computed again in the backward pass.

The decoder calls its steps in pairs, `in_turn(first, second, ...)`. Where `recompute_first` stands in the place of
`in_turn`, what `first` returns is there while `second` computes, and is then freed: its storage has no bytes. When the
gradient of the pair's result arrives, `first` computes again, and its results are put back into the same storages, in
time for the backward pass of `second`, which has saved them; what the operations inside `first` save is left out and
computed again with them, as by torch's checkpoint. So `second` itself never runs twice, and no dispatch mode stands
under the single operations. Megatron-Core calls it output-discarding recomputation.

The graph is that of `in_turn`, so that gradients are summed in the same order and come out bit for bit the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

Tensors = torch.Tensor | tuple[torch.Tensor, ...]


def in_turn(first: Callable[..., Tensors], second: Callable[..., torch.Tensor], inputs: tuple, *rest: Any):
    """second(*first(*inputs), *rest); nothing is freed."""
    return second(*_as_tuple(first(*inputs)), *rest)


def recompute_first(
    first: Callable[..., Tensors],
    second: Callable[..., torch.Tensor],
    inputs: tuple,
    *rest: Any,
    draws: bool = False,
) -> torch.Tensor:
    """`in_turn`, with the results of `first` computed again in the backward pass.

    first: returns new tensors, each the only one of its storage. second: returns one tensor, with new storage.
    draws: `first` draws random numbers (dropout), the same ones again.
    """
    if not torch.is_grad_enabled():
        return in_turn(first, second, inputs, *rest)
    if torch.compiler.is_compiling():  # as a region that the compiler recomputes, with what it fuses
        flags = {"use_reentrant": False, "preserve_rng_state": draws, "determinism_check": "none"}
        return second(*_as_tuple(checkpoint(first, *inputs, **flags)), *rest)
    recomputation = _Recomputation(first, inputs, draws)
    with saved_tensors_hooks(recomputation.leave_out, recomputation.fetch):
        results = _as_tuple(first(*inputs))
    recomputation.results = [result.untyped_storage() for result in results]
    with recomputation.outer_of_others():
        y = second(*results, *rest)
    if y.requires_grad:
        recomputation.free(y)
    return y


class _Recomputation:
    """One call of `first`: what it takes to repeat it, and what it saves once it is repeated.

    It holds no tensor with a way back to the graph, which refers to it: a circle would keep both alive. It lives as
    long as the graph, so it drops everything as soon as that is used.
    """

    _open: ClassVar[list[_Recomputation]] = []  # those whose `second` is computing, outermost first

    def __init__(self, first: Callable[..., Tensors], inputs: tuple, draws: bool):
        self.first: Callable[..., Tensors] | None = first
        # A detached tensor shares its storage with the original, whatever is freed and put back there.
        self.inputs = [t.detach().requires_grad_(t.requires_grad) if isinstance(t, torch.Tensor) else t for t in inputs]
        self.random_state = _random_state(inputs) if draws else None
        self.outer = self._open[-1] if self._open else None
        self.results: list[torch.UntypedStorage] = []
        self.left_out = 0
        self.saved: dict[int, torch.Tensor] = {}

    @contextlib.contextmanager
    def outer_of_others(self) -> Iterator[None]:
        """Recomputations that begin in here may have for inputs what this one frees."""
        self._open.append(self)
        try:
            yield
        finally:
            self._open.pop()

    def leave_out(self, _: torch.Tensor) -> int:
        """In the place of a tensor that an operation inside `first` saves: its number."""
        self.left_out += 1
        return self.left_out - 1

    def fetch(self, number: int) -> torch.Tensor:
        """The tensor that was left out, for the one operation that saved it."""
        self.restore()
        return self.saved.pop(number)

    def free(self, y: torch.Tensor) -> None:
        """Free the results until the gradient of y arrives."""
        for storage in self.results:
            storage.resize_(0)
        y.register_hook(self.restore)

    def restore(self, _: torch.Tensor | None = None) -> None:
        """Compute once more; put the results back, and have ready what was left out."""
        if self.first is None:
            return
        if self.outer is not None:
            self.outer.restore()

        def save(t: torch.Tensor) -> None:
            self.saved[len(self.saved)] = t

        with torch.enable_grad(), _replayed(self.random_state), saved_tensors_hooks(save, self.fetch):
            again = _as_tuple(self.first(*self.inputs))
        assert len(self.saved) == self.left_out, "the second computation is not the first"
        for storage, value in zip(self.results, again):
            new = value.untyped_storage()
            if not storage.nbytes():
                storage.resize_(new.nbytes())
                storage.copy_(new)  # the version of the tensor stays: what `second` has saved is as it was
        self.first, self.outer, self.inputs, self.results, self.random_state = None, None, [], [], None


def _random_state(inputs: tuple) -> tuple[torch.Tensor, torch.device, torch.Tensor | None]:
    """States of the generators of the host and of the first input's device."""
    device = inputs[0].device
    return torch.get_rng_state(), device, torch.cuda.get_rng_state(device) if device.type == "cuda" else None


@contextlib.contextmanager
def _replayed(state: tuple[torch.Tensor, torch.device, torch.Tensor | None] | None) -> Iterator[None]:
    """Random numbers as from `state` on; afterwards the generators are where they were. None: leave them alone."""
    if state is None:
        yield
        return
    host, device, cuda = state
    with torch.random.fork_rng([device] if cuda is not None else []):
        torch.set_rng_state(host)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)
        yield


def _as_tuple(value: Tensors) -> tuple[torch.Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)
