"""titan_hd: an FSDP2 trainer for HD-PiSSA and the adapter methods it is compared with.

From Python, in one process (docs/python.md):

    from titan_hd import open_trainer, train

    result = train("run.toml", training__steps=100)

Importing it imports neither torch nor anything that needs torch; the first use of one of its names does.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

__version__ = "0.1.0"
__all__ = ["RunResult", "Trainer", "UserError", "__version__", "open_trainer", "train"]

_HOMES = {
    "RunResult": "titan_hd.in_process",
    "Trainer": "titan_hd.train",
    "UserError": "titan_hd.errors",
    "open_trainer": "titan_hd.in_process",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'titan_hd' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


class _Train:
    """`titan_hd.train` is a function, and the module of the Trainer. A call trains; attributes are the module's."""

    __slots__ = ()  # with no __dict__ of its own it shows the module's

    def __call__(
        self, config: str | os.PathLike | None = None, overrides: Mapping[str, Any] | None = None, **keywords: Any
    ) -> Any:
        """As `titan_hd.in_process.train`, which documents it."""
        return importlib.import_module("titan_hd.in_process").train(config, overrides, **keywords)

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module("titan_hd.train"), name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(importlib.import_module("titan_hd.train"), name, value)


_TRAIN = _Train()


class _Package(ModuleType):
    """Keeps `train` what it is when the import of the module of that name would put the module in its place."""

    train = property(lambda self: _TRAIN, lambda self, module: None)


sys.modules[__name__].__class__ = _Package
