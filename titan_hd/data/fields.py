"""Fields of records: texts, values that mean nothing, and the fields that a run does not use."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable
from typing import Any

from titan_hd.data.sources import Record
from titan_hd.errors import UserError

INPUT_FIELDS = ("input", "context")
SYSTEM_FIELDS = ("system", "system_prompt")
_SURROGATES = re.compile("[\ud800-\udfff]")
logger = logging.getLogger("titan_hd")


def is_given(value: Any) -> bool:
    """Whether a field's value says something: null, "", [] and {} do not."""
    return value is not None and value not in ("", [], {})


def text_of(record: Record, name: str) -> str:
    """A field that must be a text.

    Raises:
        UserError: it is none.
    """
    if not isinstance(record.get(name), str):
        raise UserError(f"{name}: must be a string")
    if _SURROGATES.search(record[name]):
        raise UserError(f"{name}: holds half of a surrogate pair, which is no text")
    return record[name]


def given_field(record: Record, names: Iterable[str]) -> str:
    """The first field of `names` that says something; "" if there is none."""
    return next((name for name in names if is_given(record.get(name))), "")


def optional_text(record: Record, names: Iterable[str]) -> tuple[str, str]:
    """The first field of `names` that says something, and its text; two empty strings if there is none.

    Raises:
        UserError: it is no text.
    """
    name = given_field(record, names)
    return (name, text_of(record, name)) if name else ("", "")


def is_json(value: Any) -> bool:
    """Whether JSON can hold a value: not all that tables can (times, bytes) can stand in it."""
    if isinstance(value, dict | list):
        return all(map(is_json, value.values() if isinstance(value, dict) else value))
    return value is None or isinstance(value, str | int | float)


def without_nulls(value: Any) -> Any:
    """A value without the keys that are null, at every depth.

    A table has the same keys in every row: what one row's tools or arguments hold, all others have as null.
    """
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def log_unused(source: str, fields: Collection[str]) -> None:
    """Name the fields of a source that are not used. source: what messages call it."""
    if fields:
        logger.warning("%s: fields that are not used: %s", source, ", ".join(sorted(fields)))
