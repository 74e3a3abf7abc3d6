"""How an instruction becomes a prompt, and a prompt with its response token ids."""

from __future__ import annotations

import copy
import re
from pathlib import Path

from titan_hd.data.text.chat import ChatTurns
from titan_hd.data.text.tokenizer_base import Tokenizer
from titan_hd.errors import UserError

_HEAD = (
    "Below is an instruction that describes a task{extra}. Write a response that appropriately completes the request."
)
_HEADS = (_HEAD.format(extra=""), _HEAD.format(extra=", paired with an input that provides further context"))
_ALPACA = "{system}\n\n### Instruction:\n{prompt}\n\n### Response:"
_ALPACA_INPUT = "{system}\n\n### Instruction:\n{prompt}\n\n### Input:\n{input}\n\n### Response:"


class Template:
    """Writes prompts from a text with {prompt}, or from one that also has {input} for records that have one; `ending`
    is what stands between a response and the end-of-sequence token.

    special: control tokens spelled in the text are parsed; otherwise records and headings are plain text.
    heads: what stands for {system} in records without a system text, without and with an input. line: what follows a
        system text that is there.
    """

    def __init__(
        self,
        text: str,
        text_with_input: str,
        ending: str,
        special: bool = False,
        heads: tuple[str, str] = ("", ""),
        line: str = "",
    ):
        self._text, self._text_with_input, self.ending, self._special = text, text_with_input, ending, special
        self._heads, self._line = heads, line
        self.writes_system = "{system}" in text

    def under(self, system: str) -> Template:
        """The same template for a record with a system text; without one itself."""
        if not system or not self.writes_system:
            return self
        template, head = copy.copy(self), system + self._line
        template._heads = head, head
        return template

    def write(self, prompt: str, extra: str) -> str:
        """The text in front of the response."""
        text, head = (self._text_with_input, self._heads[1]) if extra else (self._text, self._heads[0])
        return _fill(text, {"prompt": prompt, "input": extra, "system": head})

    def texts(self, prompt: str, extra: str, response: str) -> tuple[str, str]:
        """The text in front of the response, and the whole."""
        before = self.write(prompt, extra)
        return before, before + response + self.ending

    def prompt_ids(self, tokenizer: Tokenizer, prompt: str, extra: str) -> list[int]:
        """BOS (if the family has one) and the prompt: what generation starts from."""
        return self._sequence(tokenizer, self.write(prompt, extra))

    def encode(self, tokenizer: Tokenizer, prompt: str, extra: str, response: str) -> tuple[list[int], int, int]:
        """Ids of prompt, response and end, and from where to where they are trained on.

        Prompt and response are encoded as one text; the first len(prompt) ids are the prompt's (Alpaca, PiSSA).
        """
        before, whole = self.texts(prompt, extra, response)
        ids = [*self._sequence(tokenizer, whole), tokenizer.eos_id]
        return ids, min(len(self._sequence(tokenizer, before)), len(ids)), len(ids)

    def stop_ids(self, tokenizer: Tokenizer) -> frozenset[int]:
        """What ends a generated response."""
        return tokenizer.stop_ids

    def _sequence(self, tokenizer: Tokenizer, text: str) -> list[int]:
        bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        return bos + (tokenizer.encode(text, special=True) if self._special else tokenizer.encode(text))


def load_template(name: str, tokenizer: Tokenizer | None = None) -> Template | ChatTurns:
    """A template by its name in the configuration, or from a text file with {prompt} and perhaps {input} and {system}.

    A record's system text takes the place of Alpaca's heading, and stands in front of a prompt that has none. pissa is
    the form of PiSSA's and HD-PiSSA's experiments: Alpaca's heading, the response followed by a newline. chat is the
    model's own chat template, which is found beside the tokenizer. A file may spell control tokens such as
    <|im_start|>; then they are parsed in the whole text, records included.

    tokenizer: without it (before it is read) only the name is checked.

    Raises:
        UserError: neither a known name nor a readable file with {prompt}.
    """
    if name == "chat":
        return ChatTurns(tokenizer)
    if name == "none":
        return Template("{system}{prompt}", "{system}{prompt}\n{input}", "", line="\n")
    if name in ("alpaca", "pissa"):
        return Template(_ALPACA, _ALPACA_INPUT, "\n" if name == "pissa" else "", heads=_HEADS)
    text = _read(name)
    special = tokenizer is not None and not tokenizer.control_ids.isdisjoint(tokenizer.encode(text, special=True))
    return Template(text, text, "", special)


def template_file(name: str) -> Path | None:
    """The file that a template is read from, if it is none of the known names."""
    return None if name in ("chat", "none", "alpaca", "pissa") else Path(name)


def _read(name: str) -> str:
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise UserError(f"data.template: {name!r} is neither alpaca, pissa, chat or none nor a text file") from None
    if "{prompt}" not in text:
        raise UserError(f"data.template: {name} holds no {{prompt}}")
    return text


def _fill(text: str, values: dict[str, str]) -> str:
    """Replace {prompt}, {input} and {system} in one pass: the same words inside a record are left alone."""
    return re.sub(r"\{(prompt|input|system)\}", lambda m: values[m[1]], text)
