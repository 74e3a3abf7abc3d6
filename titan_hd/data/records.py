"""JSONL records: read, checked, and turned into token ids with labels."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from titan_hd.config.errors import UserError
from titan_hd.data.chat import ChatTurns
from titan_hd.data.templates import Template
from titan_hd.data.tokenizer_base import Tokenizer

IGNORE = -100
_SURROGATES = re.compile("[\ud800-\udfff]")
_PROMPT_FIELDS = ("instruction", "query", "question", "prompt")
_RESPONSE_FIELDS = ("output", "response", "answer", "completion")


@dataclass(frozen=True)
class Example:
    """Token ids and labels of one record; label -100 is not trained on, position t predicts labels[t + 1]."""

    input_ids: list[int]
    labels: list[int]


def read_jsonl(path: str, key: str) -> list[dict[str, Any]]:
    """All records of a JSONL file; empty lines are passed over.

    Raises:
        ValueError: the file cannot be read (names the config key), or a line is not a JSON object (names file, line).
    """
    records = []
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    records.append(_parse(line, f"{path}:{number}"))
    except OSError as error:
        raise UserError(f"{key}: cannot read {path}: {error.strerror}") from None
    if not records:
        raise UserError(f"{key}: {path} holds no record")
    return records


def _parse(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except UnicodeDecodeError:
        raise UserError(f"{where}: not valid UTF-8") from None
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON: {error}") from None
    except RecursionError:
        raise UserError(f"{where}: not valid JSON: nested too deeply") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: must be a JSON object, not {type(record).__name__}")
    record["__where__"] = where
    return record


class TokenRecords:
    """format = "tokens": ids and labels as they are, cut at seq_len."""

    def __init__(self, records: list[dict[str, Any]], vocab_size: int, seq_len: int):
        self.seq_len = seq_len
        self._records = records
        for record in records:
            _check_tokens(record, vocab_size)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        record = self._records[index]
        return Example(record["input_ids"][: self.seq_len], record["labels"][: self.seq_len])


def _check_tokens(record: dict[str, Any], vocab_size: int) -> None:
    where, ids, labels = record["__where__"], record.get("input_ids"), record.get("labels")
    for name, values in (("input_ids", ids), ("labels", labels)):
        if not isinstance(values, list) or not all(type(v) is int for v in values):
            raise UserError(f"{where}: {name}: must be a list of whole numbers")
    if len(ids) != len(labels):
        raise UserError(f"{where}: labels: has {len(labels)} entries, input_ids has {len(ids)}; they must agree")
    if not ids:
        raise UserError(f"{where}: input_ids: is empty")
    if not all(0 <= v < vocab_size for v in ids):
        raise UserError(f"{where}: input_ids: must be from 0 to {vocab_size - 1}, the model's vocabulary")
    if not all(v == IGNORE or 0 <= v < vocab_size for v in labels):
        raise UserError(f"{where}: labels: must be {IGNORE} or from 0 to {vocab_size - 1}")


class InstructionRecords:
    """format = "instruction": prompt and response as the template writes them; loss on the response and its end."""

    def __init__(
        self,
        records: list[dict[str, Any]],
        tokenizer: Tokenizer,
        template: Template | ChatTurns,
        seq_len: int,
        prompt_field: str,
        response_field: str,
    ):
        self._records, self._tokenizer, self._template, self.seq_len = records, tokenizer, template, seq_len
        self._prompt_field = prompt_field or _detect(records[0], _PROMPT_FIELDS, "data.prompt_field")
        self._response_field = response_field or _detect(records[0], _RESPONSE_FIELDS, "data.response_field")
        for record in records:
            for name in (self._prompt_field, self._response_field):
                if not isinstance(record.get(name), str):
                    raise UserError(f"{record['__where__']}: {name}: must be a string")
                if _SURROGATES.search(record[name]):
                    raise UserError(f"{record['__where__']}: {name}: holds half of a surrogate pair, which is no text")
            if isinstance(record.get("input"), str) and _SURROGATES.search(record["input"]):
                raise UserError(f"{record['__where__']}: input: holds half of a surrogate pair, which is no text")
            if not record[self._response_field].strip():
                raise UserError(f"{record['__where__']}: {self._response_field}: is empty")
            _located(record, template.texts, *self._parts(record))
        self[0]  # a chat template may lack what ends a turn

    def __len__(self) -> int:
        return len(self._records)

    def prompt(self, index: int) -> str:
        """The text in front of the response."""
        return self._template.write(*self._parts(self._records[index])[:2])

    def prompt_ids(self, index: int) -> list[int]:
        """BOS (if the family or the chat template has one) and the prompt: what generation starts from."""
        return self._template.prompt_ids(self._tokenizer, *self._parts(self._records[index])[:2])

    def stop_ids(self) -> frozenset[int]:
        """Token ids that end a generated response."""
        return self._template.stop_ids(self._tokenizer)

    def response(self, index: int) -> str:
        return self._records[index][self._response_field]

    def __getitem__(self, index: int) -> Example:
        """Prompt and response are encoded as one text; only what the template calls the response carries labels."""
        record = self._records[index]
        ids, start, stop = _located(record, self._template.encode, self._tokenizer, *self._parts(record))
        labels = [IGNORE] * start + ids[start:stop] + [IGNORE] * (len(ids) - stop)
        return Example(ids[: self.seq_len], labels[: self.seq_len])

    def _parts(self, record: dict[str, Any]) -> tuple[str, str, str]:
        """Prompt, input (or "") and response."""
        extra = record.get("input")
        return record[self._prompt_field], extra if isinstance(extra, str) else "", record[self._response_field]


def _located(record: dict[str, Any], function: Callable, *args: Any) -> Any:
    """The function's result; its errors name the record's file and line."""
    try:
        return function(*args)
    except UserError as error:
        raise UserError(f"{record['__where__']}: {error}") from None


def _detect(record: dict[str, Any], candidates: tuple[str, ...], key: str) -> str:
    for name in candidates:
        if name in record:
            return name
    fields = ", ".join(name for name in record if name != "__where__")
    raise UserError(f"{record['__where__']}: none of {', '.join(candidates)} is there (found {fields}); set {key}")
