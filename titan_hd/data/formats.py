"""What the fields of a record mean: each format turns a record into token ids and labels.

Adding a format is a class here, its entry in FORMATS and its name in the Literals of config/job_config.py. Every
`encode` raises UserError without naming the record; its caller knows where the record is from.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from typing import ClassVar

from titan_hd.config.job_config import Data
from titan_hd.data.conversations import (
    CHAT_FIELDS,
    TOOL_FIELDS,
    Conversation,
    chat_field,
    keys_of_templates,
    read_conversation,
    system_fields,
)
from titan_hd.data.example import IGNORE, Example
from titan_hd.data.fields import INPUT_FIELDS, SYSTEM_FIELDS, given_field, is_given, is_json, optional_text, text_of
from titan_hd.data.labels import classification_fields, label_id
from titan_hd.data.sources import Record
from titan_hd.data.text.chat import load_chat_template
from titan_hd.data.text.chat_encoding import ChatTurns, ConversationEncoder, Trained
from titan_hd.data.text.templates import load_template
from titan_hd.data.text.tokenizer_base import Tokenizer
from titan_hd.data.token_fields import UNDERSTOOD, check_token_fields
from titan_hd.errors import UserError

PROMPT_FIELDS = ("instruction", "query", "question", "prompt")
RESPONSE_FIELDS = ("output", "response", "answer", "completion")
SPELLED = (
    "spell control tokens, as a rendered chat does; they are encoded as letters (data.parse_control_tokens makes them "
    "tokens)"
)


class Format(ABC):
    """A way to read records.

    Attributes:
        name: the value of data.format.
        needs_tokenizer: texts are encoded, with `tokenizer`.
        needs_template: data.template says how the text is written.
        own_labels: a record brings its labels along. They are stored as they are, and a record without any is kept.
        generates: a model that was trained on it writes texts, which end with the tokenizer's EOS.
        shortest: the fewest tokens to which it can cut.
    """

    name: ClassVar[str]
    needs_tokenizer: ClassVar[bool] = True
    needs_template: ClassVar[bool] = False
    own_labels: ClassVar[bool] = False
    generates: ClassVar[bool] = True
    shortest: int = 1
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

    def cut(self, example: Example, length: int) -> Example:
        """What is left of an example that is longer than `length` tokens."""
        return Example(example.input_ids[:length], example.labels[:length])

    @abstractmethod
    def used(self, record: Record) -> set[str]:
        """The fields of a record that `encode` uses."""

    def unused(self, record: Record) -> set[str]:
        """The fields of a record that say something and are not used."""
        return {name for name in record.keys() - self.used(record) if is_given(record[name])}


class QuestionFormat(Format):
    """A format whose records ask for an answer, so that the model's own can be compared with it.

    A question is what is kept of a record for that: a list of what JSON can hold, with the reference answer at the end.
    """

    def _labelled(self, trained: Trained, excluded: Collection[int] = ()) -> Example:
        """The example that has labels where it is trained on, or everywhere with data.train_on_prompt.

        excluded: the places of messages that have none.
        """
        ids, spans = trained.ids, trained.spans
        if excluded and None in trained.places:
            raise UserError(
                "turns are marked not to be trained on, but the marks of the chat template are not of turns"
            )
        without = [span for span, place in zip(spans, trained.places) if place in excluded]
        on_all = self.config.train_on_prompt
        labels = list(ids) if on_all else [IGNORE] * len(ids)
        for start, stop in () if on_all else spans:
            labels[start:stop] = ids[start:stop]
        for start, stop in without:
            labels[start:stop] = [IGNORE] * (stop - start)
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
    generates = False

    @classmethod
    def recognize(cls, config: Data, record: Record) -> str | None:
        return "input_ids" if "input_ids" in record else None

    @classmethod
    def create(cls, config: Data, vocab_size: int, tokenizer: Callable[[], Tokenizer], first: Record) -> Format:
        return cls(vocab_size)

    def __init__(self, vocab_size: int):
        self._vocab_size = vocab_size

    def encode(self, record: Record) -> Example:
        """input_ids and labels as they are. UserError: they are no whole numbers of the vocabulary, or not as many."""
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
        check_token_fields(record, labels)
        return Example(ids, labels)

    def used(self, record: Record) -> set[str]:
        return {"input_ids", "labels", *UNDERSTOOD}


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
        self._chat = ChatFormat(config, tokenizer) if isinstance(self._template, ChatTurns) else None
        self._prompt_field = config.prompt_field or _detect(first, PROMPT_FIELDS, "data.prompt_field")
        self._response_field = config.response_field or _detect(first, RESPONSE_FIELDS, "data.response_field")
        named = {
            "data.prompt_field": self._prompt_field,
            "data.response_field": self._response_field,
            "data.input_field": config.input_field,
            "data.system_field": config.system_field,
        }
        _check_different(named)
        # Optional fields are not looked for in what is something else already.
        self._taken = {name for name in named.values() if name}
        self._input_fields = [config.input_field] if config.input_field else self._free(INPUT_FIELDS)
        self._system_fields = [config.system_field] if config.system_field else self._free(SYSTEM_FIELDS)

    def _free(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if name not in self._taken]

    def question(self, record: Record) -> list:
        """[prompt, input, system text, earlier turns [question, answer], response]; "" and [] for what is not there."""
        prompt, response = (text_of(record, name) for name in (self._prompt_field, self._response_field))
        if not response.strip():
            raise UserError(f"{self._response_field}: is empty")
        extra, system = (optional_text(record, names)[1] for names in (self._input_fields, self._system_fields))
        return [prompt, extra, system, self._history(record), response]

    def _history(self, record: Record) -> list[list[str]]:
        turns = record.get("history")
        if not is_given(turns) or "history" in self._taken:
            return []
        if not isinstance(turns, list) or not all(
            isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn) for turn in turns
        ):
            raise UserError("history: must be a list of pairs [question, answer]")
        if self._chat is None:
            raise UserError(
                f'history: data.template = {self.config.template!r} writes no earlier turns; use "chat", or '
                "data.ignore_fields to leave the field out"
            )
        return turns

    def used(self, record: Record) -> set[str]:
        system = given_field(record, self._system_fields) if self._template.writes_system else ""
        input_field = given_field(record, self._input_fields) if self._template.writes_input else ""
        return {self._prompt_field, self._response_field, input_field, system, "history"}

    def _conversation(self, question: list) -> Conversation | None:
        """A question with earlier turns."""
        prompt, extra, system, history, response = question
        if not history:
            return None
        messages = [{"role": "system", "content": system}] if system else []
        for asked, answered in (*history, (f"{prompt}\n{extra}" if extra else prompt, response)):
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        return Conversation(messages)

    def write(self, question: list) -> str:
        """The text in front of the response."""
        conversation = self._conversation(question)
        if conversation and self._chat:
            return self._chat.write(conversation.question())
        prompt, extra, system = question[:3]
        return self._template.under(system).write(prompt, extra)

    def prompt_ids(self, question: list) -> list[int]:
        conversation = self._conversation(question)
        if conversation and self._chat:
            return self._chat.prompt_ids(conversation.question())
        prompt, extra, system = question[:3]
        return self._template.under(system).prompt_ids(self.tokenizer, prompt, extra)

    def stop_ids(self) -> frozenset[int]:
        return self._template.stop_ids(self.tokenizer)

    def encode(self, record: Record) -> Example:
        """Only what the template calls the response carries labels, or all. Of earlier turns the answers carry labels
        too, as in any chat.
        """
        question = self.question(record)
        conversation = self._conversation(question)
        if conversation and self._chat:
            return self._chat.encode_conversation(conversation)
        prompt, extra, system, _, response = question
        template = self._template.under(system)
        encode = template.encode_all if self.config.train_on_prompt else template.encode
        return self._labelled(encode(self.tokenizer, prompt, extra, response))


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

    def _read(self, record: Record) -> Conversation:
        return read_conversation(record, self.config.system_field, self.config.train_on_prompt)

    def used(self, record: Record) -> set[str]:
        system = given_field(record, system_fields(self.config.system_field))
        tools = given_field(record, TOOL_FIELDS)
        return {chat_field(record), system, *([tools] if self._chat.reads("tools", [tools] if tools else None) else [])}

    def unused(self, record: Record) -> set[str]:
        tools = [given_field(record, TOOL_FIELDS)] if given_field(record, TOOL_FIELDS) else None
        keys = {key for key in keys_of_templates(record) if not self._chat.reads(key, tools)}
        return super().unused(record) | {f"{chat_field(record)}[].{key}" for key in keys}

    def question(self, record: Record) -> list:
        """The conversation up to its last trained answer, the tools, and what the assistant says there. What messages
        have beside what the template reads is left out where JSON cannot hold it: a table's times."""
        messages, tools, answer = self._read(record).question()
        kept = [
            {key: value for key, value in message.items() if self._chat.reads(key, tools) or is_json(value)}
            for message in messages
        ]
        return [kept, tools, answer]

    def write(self, question: list) -> str:
        """The text in front of the last assistant turn."""
        messages, tools, _ = question
        return self._chat.render(messages, add_generation_prompt=True, tools=tools)

    def prompt_ids(self, question: list) -> list[int]:
        return self.tokenizer.encode(self.write(question), special=True)

    def stop_ids(self) -> frozenset[int]:
        return self._conversations.stop_ids()

    def encode(self, record: Record) -> Example:
        return self.encode_conversation(self._read(record))

    def encode_conversation(self, conversation: Conversation) -> Example:
        """Every assistant turn and its end-of-turn token carry labels, wherever in the conversation, but those that are
        excluded; a user's turn at the end does not. Or what the template marks by {% generation %}, or all.

        Raises:
            UserError: the template does not write what the conversation says, or its turns cannot be told apart.
        """
        messages, tools, excluded = conversation.messages, conversation.tools, conversation.excluded
        caller = next((place for place, message in enumerate(messages) if message.get("tool_calls")), None)
        if caller is not None and not self._chat.reads("tool_calls", tools):
            raise UserError(f"the chat template does not write tool_calls, which turn {caller + 1} has")
        on_all = self.config.train_on_prompt
        for place in sorted(excluded) if on_all else ():
            if messages[place]["role"] != "assistant":
                raise UserError(f"turn {place + 1} is marked not to be trained on, but data.train_on_prompt is true")
        encode = self._conversations.encode_all if on_all and not excluded else self._conversations.encode
        return self._labelled(encode(messages, tools), excluded)


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
        """The whole text, all of it trained. UserError: there is none."""
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

    def used(self, record: Record) -> set[str]:
        return {self.config.text_field}


class ClassificationFormat(Format):
    """One or two texts, <s> a </s> or <s> a </s></s> b </s>, with a label at the first token.

    (An `Example` predicts labels[t + 1] at position t: the label is labels[1].)
    """

    name = "classification"
    own_labels = True
    generates = False

    @classmethod
    def create(cls, config: Data, vocab_size: int, tokenizer: Callable[[], Tokenizer], first: Record) -> Format:
        return cls(config, tokenizer().fitting(vocab_size), first)

    def __init__(self, config: Data, tokenizer: Tokenizer, first: Record):
        super().__init__(config, tokenizer)
        if tokenizer.bos_id is None:
            raise UserError(
                f"model.hf_assets_path: {tokenizer.directory}: the tokenizer puts no token in front of a text"
            )
        self._begin, self._fields = tokenizer.bos_id, classification_fields(config, first)
        self.shortest = 6 if self._fields.second else 3  # a token of each text

    @classmethod
    def recognize(cls, config: Data, record: Record) -> str | None:
        """Never: the model says that it classifies (`DatasetBuilder`)."""

    def used(self, record: Record) -> set[str]:
        return {*self._fields}

    def encode(self, record: Record) -> Example:
        names = self._fields
        label = label_id(record.get(names.label), names.label, self.config.labels)
        texts = [text_of(record, name) for name in (names.first, names.second) if name]
        if not any(text.strip() for text in texts):
            raise UserError(f"{names.first}: is empty")
        return self._example([self.tokenizer.encode(text) for text in texts], label)

    def _example(self, parts: list[list[int]], label: int) -> Example:
        end = self.tokenizer.eos_id
        ids = [self._begin, *parts[0], end]
        for part in parts[1:]:
            ids += [end, *part, end]
        return Example(ids, [IGNORE, label] + [IGNORE] * (len(ids) - 2))

    def cut(self, example: Example, length: int) -> Example:
        """Texts lose their last tokens, the longer one first, and then both as many; what stands around them stays."""
        ids, end = example.input_ids, self.tokenizer.eos_id
        border = ids.index(end)  # a text spells no control token
        parts = [ids[1:border]] + ([ids[border + 2 : -1]] if border < len(ids) - 1 else [])
        room = length - 2 * len(parts)
        sizes = [room] if len(parts) == 1 else shares(room, *map(len, parts))
        return self._example([part[:size] for part, size in zip(parts, sizes)], example.labels[1])


def shares(room: int, first: int, second: int) -> list[int]:
    """How many tokens stay of two texts that have no room together: as of transformers' "longest_first"."""
    half = room // 2
    if first <= second:
        return [first, room - first] if first <= half else [half, room - half]
    return [room - second, second] if second <= half else [room - half, half]


FORMATS: dict[str, type[Format]] = {
    f.name: f for f in (TokensFormat, ChatFormat, InstructionFormat, TextFormat, ClassificationFormat)
}
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


def _detect(record: Record, candidates: tuple[str, ...], key: str) -> str:
    for name in candidates:
        if name in record:
            return name
    fields = ", ".join(record)
    raise UserError(f"{record.where}: none of {', '.join(candidates)} is there (found {fields}); set {key}")


def _check_different(fields: dict[str, str]) -> None:
    """No field can be two things. fields: key of the configuration -> field, or ""."""
    keys: dict[str, str] = {}
    for key, name in fields.items():
        if name and name in keys:
            raise UserError(f"{key}: is {name!r}, as {keys[name]} is")
        keys[name] = key
