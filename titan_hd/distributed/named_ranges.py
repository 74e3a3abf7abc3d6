"""Names for the parts of a step, in traces of torch.profiler and of NVIDIA's Nsight Systems.

    with named("fold"):
        ...

does nothing unless `name_ranges` has been called.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager

PREFIX = "titan_hd::"

Opener = Callable[[str], AbstractContextManager]

_UNNAMED = contextlib.nullcontext()
_openers: tuple[Opener, ...] = ()


def name_ranges(*openers: Opener) -> None:
    """From now on ranges are opened by all of these, such as torch.profiler.record_function; without any, by none."""
    global _openers
    _openers = openers


def named(name: str) -> AbstractContextManager:
    """What is done inside belongs to that part of a step. Ranges may lie in each other."""
    if not _openers:
        return _UNNAMED
    stack = contextlib.ExitStack()
    for opener in _openers:
        stack.enter_context(opener(PREFIX + name))
    return stack
