"""Data sets of the Hugging Face Hub by name, through the package `datasets`, which is imported when it is needed."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterator
from typing import Any

from titan_hd.errors import UserError

# org/name, org/name:split or org/name:config:split
_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+?)(:(?P<config>[\w.-]+))?(:(?P<split>[\w.-]+))?")
_FILE = re.compile(r"\.(jsonl?|ndjson|parquet)(\.gz|\.zst)?$|^\.{1,2}/")


def is_hub_name(path: str) -> bool:
    """Whether a path is meant as a data set of the Hub: there is no such file, and none could be meant."""
    return not os.path.exists(path) and not _FILE.search(path) and _NAME.fullmatch(path) is not None


def check_library(path: str, key: str) -> Any:
    """The package `datasets`.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module("datasets")
    except ImportError:
        raise UserError(
            f"{key}: cannot read {path}: No such file or directory; as a data set of the Hub it needs the package "
            "datasets: pip install datasets, or titan_hd[hub]"
        ) from None


def read_dataset(path: str, key: str) -> Iterator[dict[str, Any]]:
    """The rows of org/name, org/name:split or org/name:config:split (default split: train), in their order.

    Raises:
        UserError: the package is not there, or it cannot load the data set.
    """
    yield from _load(path, key)


def fingerprint(path: str, key: str) -> str:
    """What stands for the content of a data set: another one for other rows."""
    return str(_load(path, key)._fingerprint)


def _load(path: str, key: str) -> Any:
    library, parts = check_library(path, key), _NAME.fullmatch(path)
    config, split = parts["config"], parts["split"]
    if split is None:
        config, split = None, config or "train"
    try:
        return library.load_dataset(parts["name"], config, split=split)
    except Exception as error:  # the package's, the network's and the builder's own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{key}: cannot read {path}: {reason}") from None
