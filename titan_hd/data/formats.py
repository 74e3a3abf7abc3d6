"""What the fields of a record mean: each format turns a record into token ids and labels.

Adding a format is a class here, its entry in FORMATS and its name in the Literals of config/job_config.py. Every
`encode` raises UserError without naming the record; its caller knows where the record is from.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from titan_hd.config.job_config import Data
from titan_hd.data.example import IGNORE, Example
from titan_hd.data.sources import Record
from titan_hd.data.text.chat import load_chat_template
from titan_hd.data.text.chat_encoding import ConversationEncoder, Trained
from titan_hd.data.text.templates import load_template
from titan_hd.data.text.tokenizer_base import Tokenizer
from titan_hd.errors import UserError

PROMPT_FIELDS = ("instruction", "query", "question", "prompt")
RESPONSE_FIELDS = ("output", "response", "answer", "completion")
CHAT_FIELDS = ("messages", "conversations")
SPELLED = (
    "spell control tokens, as a rendered chat does; they are encoded as letters (data.parse_control_tokens makes them "
    "tokens)"
)
_SURROGATES = re.compile("[\ud800-\udfff]")
# ShareGPT's names of who speaks -> roles of chat templates.
_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_SPEAKERS |= {"tool": "tool", "observation": "tool"}


class Format(ABC):
    """A way to read records.

    Attributes:
        name: the value of data.format.
        needs_tokenizer: texts are encoded, with `tokenizer`.
        needs_template: data.template says how the text is written.
        own_labels: a record brings its labels along. They are stored as they are, and a record without any is kept.
    """

    name: ClassVar[str]
    needs_tokenizer: ClassVar[bool] = True
    needs_template: ClassVar[bool] = False
    own_labels: ClassVar[bool] = False
    tokenizer: Tokenizer

    def __init__(self, config: Data, tokenizer: Tokenizer):
        self.config, self.tokenizer = config, tokenizer

    @classmethod
    def create(cls, config: Data, vocab_size: int, tokenizer: Callable[[], Tokenizer], first: Record) -> Format:
        """The format as the [data] section sets it up.

        vocab_size: the model's. tokenizer: called only if it is needed. first: a record of the dataset, in which
            fields are looked for that [data] does not name.

        Raises:
            UserError: the tokenizer has more ids than the model, a field or a template is missing.
        """
        return cls(config, tokenizer().fitting(vocab_size))

    @classmethod
    @abstractmethod
    def recognize(cls, config: Data, record: Record) -> str | None:
        """The fields by which a record is seen to be of this format, for the log; None if it is not."""

    @abstractmethod
    def encode(self, record: Record) -> Example:
        """The example that a record is.

        Raises:
            UserError: it is a bad record.
        """


class QuestionFormat(Format):
    """A format whose records ask for an answer, so that the model's own can be compared with it.

    A question is what is kept of a record for that: a list of what JSON can hold, with the reference answer at the end.
    """

    def _labelled(self, trained: Trained) -> Example:
        """The example that has labels where it is trained on, or everywhere with data.train_on_prompt."""
        ids, labels = trained.ids, [IGNORE] * len(trained.ids)
        for start, stop in [(0, len(ids))] if self.config.train_on_prompt else trained.spans:
            labels[start:stop] = ids[start:stop]
        return Example(ids, labels, trained.notes)

    @abstractmethod
    def question(self, record: Record) -> list: ...

    @abstractmethod
    def write(self, question: list) -> str:
        """The text in front of the response."""

    @abstractmethod
    def prompt_ids(self, question: list) -> list[int]:
        """The token ids in front of the response, from which generation starts."""

    @abstractmethod
    def stop_ids(self) -> frozenset[int]:
        """Token ids that end a generated response."""


class TokensFormat(Format):
    """{"input_ids": [...], "labels": [...]}, taken as they are."""

    name = "tokens"
    needs_tokenizer = False
    own_labels = True

    @classmethod
    def recognize(cls, config: Data, record: Record) -> str | None:
        return "input_ids" if "input_ids" in record else None

    @classmethod
    def create(cls, config: Data, vocab_size: int, tokenizer: Callable[[], Tokenizer], first: Record) -> Format:
        return cls(vocab_size)

    def __init__(self, vocab_size: int):
        self._vocab_size = vocab_size

    def encode(self, record: Record) -> Example:
        ids, labels = _whole_numbers(record, "input_ids"), _whole_numbers(record, "labels")
        size = self._vocab_size
        if len(ids) != len(labels):
            raise UserError(f"labels: has {len(labels)} entries, input_ids has {len(ids)}; they must agree")
        if not ids:
            raise UserError("input_ids: is empty")
        if not all(0 <= v < size for v in ids):
            raise UserError(f"input_ids: must be from 0 to {size - 1}, the model's vocabulary")
        if not all(v == IGNORE or 0 <= v < size for v in labels):
            raise UserError(f"labels: must be {IGNORE} or from 0 to {size - 1}")
        return Example(ids, labels)


def _whole_numbers(record: Record, name: str) -> list[int]:
    values = record.get(name)
    if not isinstance(values, list) or not all(type(v) is int for v in values):
        raise UserError(f"{name}: must be a list of whole numbers")
    return values


class InstructionFormat(QuestionFormat):
    """Prompt and response as the template writes them; loss on the response and its end, or on all tokens."""

    name = "instruction"
    needs_template = True

    @classmethod
    def recognize(cls, config: Data, record: Record) -> str | None:
        prompt = [f for f in (config.prompt_field, *PROMPT_FIELDS) if f in record]
        response = [f for f in (config.response_field, *RESPONSE_FIELDS) if f in record]
        if prompt or response or config.prompt_field or config.response_field:
            return " and ".join([*prompt[:1], *response[:1]])
        return None

    @classmethod
    def create(cls, config: Data, vocab_size: int, tokenizer: Callable[[], Tokenizer], first: Record) -> Format:
        return cls(config, tokenizer().fitting(vocab_size), first)

    def __init__(self, config: Data, tokenizer: Tokenizer, first: Record):
        super().__init__(config, tokenizer)
        self._template = load_template(config.template, tokenizer, config.encoding == "joint")
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
        return self._template.write(prompt, extra)

    def prompt_ids(self, question: list) -> list[int]:
        prompt, extra, _ = question
        return self._template.prompt_ids(self.tokenizer, prompt, extra)

    def stop_ids(self) -> frozenset[int]:
        return self._template.stop_ids(self.tokenizer)

    def encode(self, record: Record) -> Example:
        """Only what the template calls the response carries labels, or all."""
        encode = self._template.encode_all if self.config.train_on_prompt else self._template.encode
        return self._labelled(encode(self.tokenizer, *self.parts(record)))


class ChatFormat(QuestionFormat):
    """A conversation as the model's chat template writes it; loss on what the assistant says, or on all tokens."""

    name = "chat"

    @classmethod
    def recognize(cls, config: Data, record: Record) -> str | None:
        by_name = config.prompt_field or config.response_field
        return None if by_name else next((name for name in CHAT_FIELDS if name in record), None)

    def __init__(self, config: Data, tokenizer: Tokenizer):
        super().__init__(config, tokenizer)
        self._chat = load_chat_template(tokenizer)
        self._conversations = ConversationEncoder(self._chat, tokenizer, config.encoding == "joint")

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
        return self.tokenizer.encode(self.write(question), special=True)

    def stop_ids(self) -> frozenset[int]:
        return self._conversations.stop_ids()

    def encode(self, record: Record) -> Example:
        """Every assistant turn and its end-of-turn token carry labels, wherever in the conversation; a user's turn at the
        end does not. Or what the template marks by {% generation %}, or all.
        """
        conversations = self._conversations
        encode = conversations.encode_all if self.config.train_on_prompt else conversations.encode
        return self._labelled(encode(read_messages(record), read_tools(record)))


class TextFormat(Format):
    """A document; loss on all tokens, with BOS (if the family has one) and the end-of-sequence token.

    With data.parse_control_tokens neither is added where the text brings it: BOS at its beginning, any control token at
    its end, perhaps with white space behind it.
    """

    name = "text"

    def __init__(self, config: Data, tokenizer: Tokenizer):
        super().__init__(config, tokenizer)
        self._control = re.compile("|".join(map(re.escape, tokenizer.control_tokens)) or "(?!)")

    @classmethod
    def recognize(cls, config: Data, record: Record) -> str | None:
        return config.text_field if config.text_field in record else None

    def encode(self, record: Record) -> Example:
        field, tokenizer = self.config.text_field, self.tokenizer
        text = text_of(record, field)
        if not text.strip():
            raise UserError(f"{field}: is empty")
        bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        ids = tokenizer.encode(text, special=self.config.parse_control_tokens)
        if not self.config.parse_control_tokens:
            notes = (SPELLED,) if self._control.search(text) else ()
            ids = [*bos, *ids, tokenizer.eos_id]
            return Example(ids, ids, notes)
        ends = text.rstrip().endswith(tuple(tokenizer.control_tokens))
        ids = [*([] if ids[:1] == bos else bos), *ids, *([] if ends else [tokenizer.eos_id])]
        return Example(ids, ids)


FORMATS: dict[str, type[Format]] = {f.name: f for f in (TokensFormat, ChatFormat, InstructionFormat, TextFormat)}
"""In the order in which data.format = "auto" tries them."""


def detect_format(config: Data, record: Record) -> tuple[str, str]:
    """data.format "auto": the format of the first record, and the fields by which it is recognized.

    Raises:
        UserError: its fields are those of no format.
    """
    for name, format in FORMATS.items():
        fields = format.recognize(config, record)
        if fields is not None:
            return name, fields
    raise UserError(
        f"{record.where}: data.format: auto knows none of its fields ({', '.join(record)}); set data.format, and "
        "data.prompt_field and data.response_field, or data.text_field"
    )


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


def read_messages(record: Record) -> list[dict[str, Any]]:
    """The conversation in the field `messages` or `conversations`, with every key that a chat template may read.

    Raises:
        UserError: it is no list of messages, one has no text, or the assistant says nothing.
    """
    name = "conversations" if "messages" not in record and "conversations" in record else "messages"
    messages = record.get(name)
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{name}: must be a list of messages, and not empty")
    return [_message(message, f"{name}[{place}]") for place, message in enumerate(messages)]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise UserError(f"{where}: must be an object with role and content, not {type(message).__name__}")
    if "from" in message and "role" not in message:
        message = {"role": _role(message["from"], where), "content": message.get("value")}
    if not isinstance(message.get("role"), str):
        raise UserError(f"{where}.role: must be a string")
    content = message.get("content")
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise UserError(f"{where}.content: must be a string")
    if message["role"] == "assistant" and not (content or "").strip() and not message.get("tool_calls"):
        raise UserError(f"{where}.content: is empty")
    # In Parquet every message has all keys; templates ask whether tool_calls is there.
    return {key: value for key, value in message.items() if value is not None or key == "content"}


def _role(speaker: Any, where: str) -> str:
    if not isinstance(speaker, str) or speaker not in _SPEAKERS:
        raise UserError(f"{where}.from: must be one of {', '.join(_SPEAKERS)}, not {speaker!r}")
    return _SPEAKERS[speaker]


def read_tools(record: Record) -> list[Any] | None:
    """The field `tools`, which some templates write in front of the conversation."""
    tools = record.get("tools")
    if not isinstance(tools, (list, type(None))):
        raise UserError("tools: must be a list")
    return tools or None
