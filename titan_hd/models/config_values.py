"""Values of a config.json, checked one by one: sizes, numbers, switches, and what a model has not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from titan_hd.errors import UserError

_LARGEST = 2**31  # no size of a model; a larger one is a broken or a hostile file
_LARGEST_NUMBER = 2.0**100


def number_of(raw: dict[str, Any], key: str, where: str, default: float | None = None) -> float:
    """A number above 0.

    where: the file, or what stands for it, in front of every error.

    Raises:
        UserError: it is none, or missing without a default.
    """
    value = raw.get(key)
    if value is None:
        if default is None:
            raise UserError(f"{where}: {key}: is missing")
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < _LARGEST_NUMBER:
        raise UserError(f"{where}: {key}: must be a number above 0, not {str(value)[:40]}")
    return float(value)


def size_of(raw: dict[str, Any], key: str, where: str, default: int | None = None) -> int:
    """A whole number above 0; otherwise as `number_of`."""
    value = number_of(raw, key, where, default)
    if value != int(value) or value >= _LARGEST:
        raise UserError(f"{where}: {key}: must be a whole number above 0, not {str(raw[key])[:40]}")
    return int(value)


def flag_of(raw: dict[str, Any], key: str, where: str) -> bool:
    """A switch; one that is missing or null is off. UserError: it is something else."""
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise UserError(f"{where}: {key}: must be true or false, not {value!r}")
    return bool(value)


def refuse_unsupported(raw: dict[str, Any], unsupported: Mapping[str, tuple[Any, ...]], where: str) -> None:
    """UserError for a key that changes what a model computes. unsupported: the values of each key that do not."""
    for key, unused in unsupported.items():
        if key in raw and raw[key] not in unused:
            shown = "" if isinstance(raw[key], (dict, list)) else f" {raw[key]!r}"
            only = f"; only {unused[0]} is" if isinstance(unused[0], str) else ""
            raise UserError(f"{where}: {key}:{shown} is not supported{only}")
