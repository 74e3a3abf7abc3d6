"""How an instruction becomes a prompt, and a prompt with its response token ids."""

from __future__ import annotations

import copy
import re
from pathlib import Path

from titan_hd.data.text.borders import CUT, SHARED, encode_with_borders
from titan_hd.data.text.chat_encoding import ChatTurns, Trained
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
    joint: prompt and response are encoded as one text, of which the first len(prompt_ids) ids are the prompt's (Alpaca,
        PiSSA), whatever is in the last of them.
    heads: what stands for {system} in records without a system text, without and with an input. line: what follows a
        system text that is there.
    """

    def __init__(
        self,
        text: str,
        text_with_input: str,
        ending: str,
        special: bool = False,
        joint: bool = False,
        heads: tuple[str, str] = ("", ""),
        line: str = "",
    ):
        self._text, self._text_with_input, self.ending = text, text_with_input, ending
        self._special, self._joint, self._heads, self._line = special, joint, heads, line
        self.writes_system, self.writes_input = "{system}" in text, "{input}" in text_with_input

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

    def prompt_ids(self, tokenizer: Tokenizer, prompt: str, extra: str, cue: str = "") -> list[int]:
        """BOS (if the family has one), the prompt and what the response is to begin with: generation starts there."""
        return [*self._bos(tokenizer), *tokenizer.encode(self.write(prompt, extra) + cue, self._special)]

    def encode(self, tokenizer: Tokenizer, prompt: str, extra: str, response: str) -> Trained:
        """Prompt, response and end. The ids begin with those of `prompt_ids`, and all behind them is trained on."""
        before, whole = self.texts(prompt, extra, response)
        encoded = encode_with_borders(tokenizer, whole, [len(before)], self._special, self._joint)
        bos, (start,) = self._bos(tokenizer), encoded.places
        ids = [*bos, *encoded.ids, tokenizer.eos_id]
        notes = ((SHARED if self._joint else CUT),) if encoded.shared else ()
        return Trained(ids, [(min(len(bos) + start, len(ids)), len(ids))], notes)

    def encode_all(self, tokenizer: Tokenizer, prompt: str, extra: str, response: str) -> Trained:
        """As `encode`, for a record that is trained on as a whole."""
        return self.encode(tokenizer, prompt, extra, response)

    def stop_ids(self, tokenizer: Tokenizer) -> frozenset[int]:
        """What ends a generated response."""
        return tokenizer.stop_ids

    def _bos(self, tokenizer: Tokenizer) -> list[int]:
        return [] if tokenizer.bos_id is None else [tokenizer.bos_id]


def load_template(name: str, tokenizer: Tokenizer | None = None, joint: bool = False) -> Template | ChatTurns:
    """A template by its name in the configuration, or from a text file with {prompt} and perhaps {input} and {system}.

    A record's system text takes the place of Alpaca's heading, and stands in front of a prompt that has none. pissa is
    the form of PiSSA's and HD-PiSSA's experiments: Alpaca's heading, the response followed by a newline. chat is the
    model's own chat template, which is found beside the tokenizer. A file may spell control tokens such as
    <|im_start|>; then they are parsed in the whole text, records included.

    tokenizer: without it (before it is read) only the name is checked. joint: as Template has it.

    Raises:
        UserError: neither a known name nor a readable file with {prompt}.
    """
    if name == "chat":
        return ChatTurns(tokenizer, joint)
    if name == "none":
        return Template("{system}{prompt}", "{system}{prompt}\n{input}", "", joint=joint, line="\n")
    if name in ("alpaca", "pissa"):
        return Template(_ALPACA, _ALPACA_INPUT, "\n" if name == "pissa" else "", joint=joint, heads=_HEADS)
    text = _read(name)
    special = tokenizer is not None and not tokenizer.control_ids.isdisjoint(tokenizer.encode(text, special=True))
    return Template(text, text, "", special, joint)


def template_file(name: str) -> Path | None:
    """The file that a template is read from, if it is none of the known names."""
    return None if name in ("chat", "none", "alpaca", "pissa") else Path(name)


def _read(name: str) -> str:
    try:
        text = Path(name).read_text(encoding="utf-8-sig")  # Windows editors put a byte order mark in front
    except (OSError, UnicodeDecodeError):
        raise UserError(f"data.template: {name!r} is neither alpaca, pissa, chat or none nor a text file") from None
    if "{prompt}" not in text:
        raise UserError(f"data.template: {name} holds no {{prompt}}")
    return text


def _fill(text: str, values: dict[str, str]) -> str:
    """Replace {prompt}, {input} and {system} in one pass: the same words inside a record are left alone."""
    return re.sub(r"\{(prompt|input|system)\}", lambda m: values[m[1]], text)
