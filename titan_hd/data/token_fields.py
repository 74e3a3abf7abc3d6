"""What ready-made tokens bring along beside ids and labels: masks, positions, borders of documents.

A record of format tokens is trained as one document: positions from 0, causal attention over all of it, and the loss of
every label but -100. Fields that say the same are fine; what says something else would be trained wrongly, and is
refused.
"""

from __future__ import annotations

from typing import Any

from titan_hd.data.example import IGNORE
from titan_hd.data.sources import Record
from titan_hd.errors import UserError

_LOSS = ("loss_mask", "completion_mask", "assistant_masks", "assistant_mask", "loss_weights", "weights")
_POSITIONS = ("position_ids", "positions", "input_pos")
_DOCUMENTS = ("segment_ids", "sequence_ids", "document_ids", "doc_ids", "seq_idx")
_LENGTHS = ("seq_lengths", "seq_lens")
_OFFSETS = ("cu_seqlens", "cu_seq_lens")

UNDERSTOOD = frozenset(("attention_mask", *_LOSS, *_POSITIONS, *_DOCUMENTS, *_LENGTHS, *_OFFSETS))
_HINT = "data.ignore_fields leaves the field out"


def check_token_fields(record: Record, labels: list[int]) -> None:
    """See that no field of a record contradicts how its tokens are trained.

    labels: one for each token.

    Raises:
        UserError: one does.
    """
    given = {name: record[name] for name in record.keys() & UNDERSTOOD if record[name] is not None}
    if not given:
        return
    size = len(labels)
    for name in filter(given.__contains__, _LOSS):
        mask = _mask(name, given[name], size)
        wrong = next((i for i in range(1, size) if not mask[i] and labels[i] != IGNORE), None)
        if wrong is not None:
            raise UserError(f"{name}: leaves out token {wrong}, whose label is not {IGNORE}; {_HINT}")
    if "attention_mask" in given:
        _check_attention(_mask("attention_mask", given["attention_mask"], size), labels)
    for name in filter(given.__contains__, _POSITIONS):
        if _numbers(name, given[name], size) != list(range(size)):
            raise UserError(f"{name}: must be 0, 1, 2, ... over a whole record, one document; {_HINT}")
    for name in filter(given.__contains__, _DOCUMENTS):
        if len(set(_numbers(name, given[name], size))) > 1:
            raise _several(name)
    for names, one_document in ((_LENGTHS, [size]), (_OFFSETS, [0, size])):
        for name in filter(given.__contains__, names):
            if given[name] != one_document:
                raise _several(name)


def _check_attention(mask: list[int], labels: list[int]) -> None:
    """A token may be hidden if none that a label is predicted from sees it: padding at the right."""
    last = next((i for i in reversed(range(1, len(labels))) if labels[i] != IGNORE), 0)
    if not all(mask[:last]):
        raise UserError(
            f"attention_mask: hides token {mask.index(0)} from a token with a label, but a record is attended to as a "
            f"whole; take its padding out. {_HINT}"
        )


def _several(name: str) -> UserError:
    return UserError(f"{name}: tells of several documents, but a record is one; write each as a record. {_HINT}")


def _mask(name: str, value: Any, size: int) -> list[int]:
    mask = _numbers(name, value, size)
    if mask.count(0) + mask.count(1) != size:
        raise UserError(f"{name}: must be 0 or 1 for every token; {_HINT}")
    return mask


def _numbers(name: str, value: Any, size: int) -> list:
    if not isinstance(value, list) or len(value) != size or not all(isinstance(v, (int, float)) for v in value):
        raise UserError(f"{name}: must be a list of {size} numbers, one for each of input_ids; {_HINT}")
    return value
