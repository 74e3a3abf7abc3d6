"""What the fields of a record mean: each format turns one into token ids and labels.

Every `encode` raises UserError without naming the record; who calls it knows where the record is from.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Protocol

from titan_hd.config.job_config import Data
from titan_hd.data.messages import read_messages, read_tools
from titan_hd.data.sources import Record
from titan_hd.data.text.chat import ChatTurns, load_chat_template
from titan_hd.data.text.chat_spans import TurnFinder
from titan_hd.data.text.templates import Template, load_template
from titan_hd.data.text.tokenizer_base import Tokenizer
from titan_hd.data.tokens.records import IGNORE, Example
from titan_hd.errors import UserError

_SURROGATES = re.compile("[\ud800-\udfff]")
PROMPT_FIELDS = ("instruction", "query", "question", "prompt")
RESPONSE_FIELDS = ("output", "response", "answer", "completion")
CHAT_FIELDS = ("messages", "conversations")


class Format(Protocol):
    def encode(self, record: Record) -> Example: ...


def detect_format(config: Data, record: Record) -> tuple[str, str]:
    """data.format "auto": the format of the first record, and what tells.

    Raises:
        UserError: its fields are those of no format.
    """
    prompt = [f for f in (config.prompt_field, *PROMPT_FIELDS) if f in record]
    response = [f for f in (config.response_field, *RESPONSE_FIELDS) if f in record]
    chat = [f for f in CHAT_FIELDS if f in record]
    if "input_ids" in record:
        return "tokens", "input_ids"
    if chat and not (config.prompt_field or config.response_field):
        return "chat", chat[0]
    if prompt or response or config.prompt_field or config.response_field:
        return "instruction", " and ".join([*prompt[:1], *response[:1]])
    if config.text_field in record:
        return "text", config.text_field
    raise UserError(
        f"{record.where}: data.format: auto knows none of its fields ({', '.join(record)}); set data.format, and "
        "data.prompt_field and data.response_field, or data.text_field"
    )


def build_format(config: Data, name: str, first: Record, vocab_size: int, tokenizer: Callable[[], Tokenizer]) -> Format:
    """The format of that name.

    first: a record of the data set, by which an instruction's fields are found.
    tokenizer: called only where the format needs one.

    Raises:
        UserError: the tokenizer has more ids than the model, a field or a template is missing.
    """
    if name == "tokens":
        return TokensFormat(vocab_size)
    tokens = tokenizer()
    if tokens.vocab_size > vocab_size:
        raise UserError(
            f"model.hf_assets_path: the tokenizer has {tokens.vocab_size} ids, the model's vocabulary {vocab_size}"
        )
    if name == "instruction":
        return InstructionFormat(config, tokens, load_template(config.template, tokens), first)
    return (ChatFormat if name == "chat" else TextFormat)(config, tokens)


class TokensFormat:
    """{"input_ids": [...], "labels": [...]}, taken as they are."""

    def __init__(self, vocab_size: int):
        self._vocab_size = vocab_size

    def encode(self, record: Record) -> Example:
        ids, labels, size = record.get("input_ids"), record.get("labels"), self._vocab_size
        for name, values in (("input_ids", ids), ("labels", labels)):
            if not isinstance(values, list) or not all(type(v) is int for v in values):
                raise UserError(f"{name}: must be a list of whole numbers")
        if len(ids) != len(labels):
            raise UserError(f"labels: has {len(labels)} entries, input_ids has {len(ids)}; they must agree")
        if not ids:
            raise UserError("input_ids: is empty")
        if not all(0 <= v < size for v in ids):
            raise UserError(f"input_ids: must be from 0 to {size - 1}, the model's vocabulary")
        if not all(v == IGNORE or 0 <= v < size for v in labels):
            raise UserError(f"labels: must be {IGNORE} or from 0 to {size - 1}")
        return Example(ids, labels)


class InstructionFormat:
    """Prompt and response as the template writes them; loss on the response and its end, or on all tokens.

    first: where the fields are looked for if the configuration names none.
    """

    def __init__(self, config: Data, tokenizer: Tokenizer, template: Template | ChatTurns, first: Record):
        self.tokenizer, self.template = tokenizer, template
        self._train_on_prompt = config.train_on_prompt
        self._prompt_field = config.prompt_field or _detect(first, PROMPT_FIELDS, "data.prompt_field")
        self._response_field = config.response_field or _detect(first, RESPONSE_FIELDS, "data.response_field")

    def parts(self, record: Record) -> tuple[str, str, str]:
        """Prompt, input (or "") and response."""
        prompt, response = (text_of(record, name) for name in (self._prompt_field, self._response_field))
        if not response.strip():
            raise UserError(f"{self._response_field}: is empty")
        return prompt, text_of(record, "input") if isinstance(record.get("input"), str) else "", response

    def question(self, record: Record) -> list:
        return list(self.parts(record))

    def write(self, question: list) -> str:
        """The text in front of the response."""
        prompt, extra, _ = question
        return self.template.write(prompt, extra)

    def prompt_ids(self, question: list) -> list[int]:
        prompt, extra, _ = question
        return self.template.prompt_ids(self.tokenizer, prompt, extra)

    def stop_ids(self) -> frozenset[int]:
        return self.template.stop_ids(self.tokenizer)

    def encode(self, record: Record) -> Example:
        """Prompt and response are encoded as one text; only what the template calls the response carries labels."""
        ids, start, stop = self.template.encode(self.tokenizer, *self.parts(record))
        if self._train_on_prompt:
            return Example(ids, ids)
        return Example(ids, [IGNORE] * start + ids[start:stop] + [IGNORE] * (len(ids) - stop))


class ChatFormat:
    """A conversation as the model's chat template writes it; loss on what the assistant says, or on all tokens."""

    def __init__(self, config: Data, tokenizer: Tokenizer):
        self._tokenizer, self._train_on_prompt = tokenizer, config.train_on_prompt
        self._chat = load_chat_template(tokenizer)
        self._turns = TurnFinder(self._chat, tokenizer)

    def question(self, record: Record) -> list:
        """The conversation up to its last assistant turn, the tools, and what the assistant says there."""
        messages = read_messages(record)
        last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=len(messages))
        return [messages[:last], read_tools(record), "".join(m["content"] or "" for m in messages[last : last + 1])]

    def write(self, question: list) -> str:
        """The text in front of the last assistant turn."""
        messages, tools, _ = question
        return self._chat.render(messages, add_generation_prompt=True, tools=tools)

    def prompt_ids(self, question: list) -> list[int]:
        return self._tokenizer.encode(self.write(question), special=True)

    def stop_ids(self) -> frozenset[int]:
        return ChatTurns(self._tokenizer).stop_ids(self._tokenizer)

    def encode(self, record: Record) -> Example:
        """The conversation is encoded as one text, as transformers' apply_chat_template does it. Every assistant turn
        and its end-of-turn token carry labels, wherever in the conversation; a user's turn at the end does not.
        """
        messages, tools = read_messages(record), read_tools(record)
        whole = self._chat.render(messages, tools=tools)
        ids = self._tokenizer.encode(whole, special=True)
        if self._train_on_prompt:
            return Example(ids, ids)
        labels = [IGNORE] * len(ids)
        for start, stop in self._turns.spans(messages, tools, whole, ids):
            labels[start:stop] = ids[start:stop]
        return Example(ids, labels)


class TextFormat:
    """A document; loss on all tokens, with BOS (if the family has one) and the end-of-sequence token."""

    def __init__(self, config: Data, tokenizer: Tokenizer):
        self._field, self._tokenizer = config.text_field, tokenizer

    def encode(self, record: Record) -> Example:
        text, tokenizer = text_of(record, self._field), self._tokenizer
        if not text.strip():
            raise UserError(f"{self._field}: is empty")
        bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        ids = [*bos, *tokenizer.encode(text), tokenizer.eos_id]
        return Example(ids, ids)


def text_of(record: Record, name: str) -> str:
    """A field that must be a text."""
    if not isinstance(record.get(name), str):
        raise UserError(f"{name}: must be a string")
    if _SURROGATES.search(record[name]):
        raise UserError(f"{name}: holds half of a surrogate pair, which is no text")
    return record[name]


def _detect(record: Record, candidates: tuple[str, ...], key: str) -> str:
    for name in candidates:
        if name in record:
            return name
    fields = ", ".join(record)
    raise UserError(f"{record.where}: none of {', '.join(candidates)} is there (found {fields}); set {key}")
