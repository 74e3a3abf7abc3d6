"""Records of a classification: which fields hold the texts and the label, and which number a label is."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from titan_hd.config.job_config import Data
from titan_hd.data.sources import Record
from titan_hd.errors import UserError
from titan_hd.models.classification import label_of_score

# Names that published data sets have, GLUE's among them; a text without a second one is a class's all.
_TEXTS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("#1 String", "#2 String"),
    ("text1", "text2"),
    ("sentence", ""),
    ("text", ""),
)
_WHOLE = re.compile(r"-?\d+")
_NUMBER = re.compile(r"[0-9]{1,9}")  # of a class
_LABELS = ("label", "gold_label", "score", "Quality", "is_duplicate")


class Fields(NamedTuple):
    """Names of the fields of a record; second: "" where there is one text."""

    first: str
    second: str
    label: str


def classification_fields(config: Data, record: Record) -> Fields:
    """data.prompt_field, data.input_field and data.response_field name the texts and the label; what they do not name
    is looked for in a record.

    Raises:
        UserError: no field has a known name.
    """
    first, second = config.prompt_field, config.input_field
    if not first:
        pairs = (pair for pair in _TEXTS if all(name in record for name in pair if name))
        found = next(pairs, None)
        if found is None:
            raise _unknown(record, "data.prompt_field (and data.input_field for a second text)")
        first, second = found[0], second or found[1]
    label = config.response_field or next((name for name in _LABELS if name in record), "")
    if not label:
        raise _unknown(record, "data.response_field, with the label")
    return Fields(first, second, label)


def _unknown(record: Record, keys: str) -> UserError:
    return UserError(f"{record.where}: no field of a classification has a known name ({', '.join(record)}); set {keys}")


def label_id(value: Any, name: str, labels: Sequence[str]) -> int:
    """The label of a record: the number of its class, or, where there is one label, what stands for its score
    (`models.classification.label_of_score`).

    value: the class by its name or its number, or the score. name: the field. labels: data.labels.

    Raises:
        UserError: it is none.
    """
    if value is None or value == "":
        raise UserError(f"{name}: is missing")
    if isinstance(value, (list, dict)):
        raise UserError(f"{name}: must be a text or a number, not a {type(value).__name__}")
    if len(labels) == 1:
        return label_of_score(_score(value, name))
    if str(value) in labels and not isinstance(value, bool):
        return labels.index(str(value))
    number = int(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value
    named = any(_WHOLE.fullmatch(label) for label in labels)  # then a number that is none of them is a fault
    if type(number) is int and 0 <= number < len(labels) and not named:
        return number
    raise UserError(f"{name}: must be one of {', '.join(labels)} (data.labels), not {str(value)[:40]!r}")


def _score(value: Any, name: str) -> float:
    try:
        score = math.nan if isinstance(value, bool) else float(value)
    except (OverflowError, TypeError, ValueError):
        score = math.nan
    if not abs(score) < 1e30:
        raise UserError(f"{name}: must be a number, the score, not {str(value)[:40]!r}")
    return score
