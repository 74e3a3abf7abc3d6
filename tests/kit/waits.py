"""Counts where a host would wait for its device, in a run on a CPU."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import titan_hd
from titan_hd.distributed import watch

_aten = torch.ops.aten
# A value that Python asks for; a tensor of Python's values, which a GPU gets by a copy; shapes that depend on values.
_OPERATORS = {
    _aten._local_scalar_dense.default,
    _aten.lift_fresh.default,
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten.equal.default,
}
_METHODS = {torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy}  # which need no operator on a CPU


class HostWaits:
    """While it is entered, `places` collects every operation for which a host would wait for its device, where, and
    whether it is not in `watch.waiting`.

    Work that is the host's own on a GPU as well, on tensors that lie there, is to be wrapped by `host`.
    """

    def __init__(self) -> None:
        self.places: list[str] = []
        self._counting = True

    def __enter__(self) -> HostWaits:
        counter = self

        class Functions(TorchFunctionMode):
            def __torch_function__(self, function, types, args=(), kwargs=None):
                if function in _METHODS:
                    counter._seen(function.__name__)
                return function(*args, **(kwargs or {}))

        class Operators(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                if function in _OPERATORS:
                    counter._seen(str(function))
                return function(*args, **(kwargs or {}))

        self._modes = contextlib.ExitStack()
        self._modes.enter_context(Functions())
        self._modes.enter_context(Operators())
        return self

    def __exit__(self, *error: object) -> None:
        self._modes.close()

    def host(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, not counted."""

        def uncounted(*args: Any, **kwargs: Any) -> Any:
            with self._paused():
                return function(*args, **kwargs)

        return uncounted

    @contextlib.contextmanager
    def _paused(self) -> Iterator[None]:
        before, self._counting = self._counting, False
        try:
            yield
        finally:
            self._counting = before

    def _seen(self, name: str) -> None:
        if self._counting:
            marked = "" if watch._now.waits else ", not marked as a wait"
            self.places.append(f"{name} in {_caller()}{marked}")


def _caller() -> str:
    """The innermost function of the package."""
    package = str(Path(titan_hd.__file__).parent)
    frames = traceback.extract_stack()
    return next((frame.name for frame in reversed(frames) if frame.filename.startswith(package)), "none of ours")
