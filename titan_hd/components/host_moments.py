"""An optimizer whose state lies on the host between steps."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from titan_hd.components.optimizer import step_if_finite

# Elements that are on the device at a time: 128 MiB of each of the optimizer's tensors.
PART_ELEMENTS = 2**25


class HostMoments:
    """Steps a flat parameter part by part: a part's moments come from the host, the optimizer takes its step, and they
    go back. Element by element this is the step of the whole.

    The copies are in order with the kernels of the device's stream, so the host waits for none of them: whoever reads
    `state` on the host must synchronize first.

    build: makes a torch optimizer over parameters with names. param_groups: that optimizer's. state: as an optimizer's,
    whole; tensors as large as the parameter lie on the host, pinned where there is a GPU.
    """

    def __init__(self, parameter: nn.Parameter, build: Callable[[Mapping[nn.Parameter, str]], torch.optim.Optimizer]):
        self.parameter = parameter
        self.parts = [nn.Parameter(part) for part in parameter.detach().split(PART_ELEMENTS)]
        self.optimizer = build(dict.fromkeys(self.parts, "deltas"))
        self.param_groups = self.optimizer.param_groups
        self.state: dict[nn.Parameter, dict[str, Any]] = defaultdict(dict)
        for part, place in zip(self.parts, self._places()):
            self._take(part, place)  # of Adagrad, which has its state from the start

    def allocate(self, dtype: torch.dtype) -> torch.Tensor:
        """On the host, as large as the parameter; zeros."""
        pinned = self.parameter.is_cuda
        return torch.zeros(self.parameter.shape, dtype=dtype, pin_memory=pinned)

    @torch.no_grad()
    def step(self, norm: torch.Tensor) -> None:
        """norm: see `step_if_finite`."""
        assert self.parameter.grad is not None
        before = dict(self.state[self.parameter])  # mostly empty in the first step: the optimizer makes its state
        for part, gradient, place in zip(self.parts, self.parameter.grad.split(PART_ELEMENTS), self._places()):
            if before:
                self.optimizer.state[part] = {key: self._to_device(value, place) for key, value in before.items()}
            part.grad = gradient
            step_if_finite(self.optimizer, norm)
            part.grad = None
            self._take(part, place)

    def _take(self, part: nn.Parameter, place: slice) -> None:
        """What the optimizer has of a part goes to the host."""
        whole = self.state[self.parameter]
        for key, value in self.optimizer.state.pop(part, {}).items():
            if isinstance(value, torch.Tensor) and value.shape == part.shape:
                if key not in whole:
                    whole[key] = self.allocate(value.dtype)
                whole[key][place].copy_(value, non_blocking=True)
            else:  # a number, the same for all parts
                whole[key] = value

    def _places(self) -> Iterator[slice]:
        return (slice(start, start + PART_ELEMENTS) for start in range(0, self.parameter.numel(), PART_ELEMENTS))

    def _to_device(self, value: Any, place: slice) -> Any:
        """A copy for the optimizer to change: of a part of a tensor, or of a number."""
        if not isinstance(value, torch.Tensor):
            return value
        if value.shape != self.parameter.shape:
            return value.clone()
        return value[place].to(self.parameter.device, non_blocking=True, copy=True)
