"""How an instruction becomes a prompt."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from titan_hd.config.errors import UserError

_HEAD = (
    "Below is an instruction that describes a task{extra}. Write a response that appropriately completes the request."
)
_ALPACA = _HEAD.format(extra="") + "\n\n### Instruction:\n{prompt}\n\n### Response:"
_ALPACA_INPUT = (
    _HEAD.format(extra=", paired with an input that provides further context")
    + "\n\n### Instruction:\n{prompt}\n\n### Input:\n{input}\n\n### Response:"
)


class Template:
    """Writes prompts; `ending` is what stands between a response and the end-of-sequence token."""

    def __init__(self, write: Callable[[str, str], str], ending: str):
        self.write, self.ending = write, ending


def load_template(name: str) -> Template:
    """A template by its name in the configuration, or from a text file with {prompt} and perhaps {input}.

    pissa is the form of PiSSA's and HD-PiSSA's experiments: Alpaca's heading, the response followed by a newline.

    Raises:
        ValueError: neither a known name nor a readable file with {prompt}.
    """
    if name == "none":
        return Template(lambda prompt, extra: f"{prompt}\n{extra}" if extra else prompt, "")
    if name in ("alpaca", "pissa"):

        def write(prompt: str, extra: str) -> str:
            return _fill(_ALPACA_INPUT if extra else _ALPACA, prompt, extra)

        return Template(write, "\n" if name == "pissa" else "")
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise UserError(f"data.template: {name!r} is neither alpaca, pissa or none nor a text file") from None
    if "{prompt}" not in text:
        raise UserError(f"data.template: {name} holds no {{prompt}}")
    return Template(lambda prompt, extra: _fill(text, prompt, extra), "")


def _fill(text: str, prompt: str, extra: str) -> str:
    """Replace {prompt} and {input} in one pass: the same words inside a record are left alone."""
    return re.sub(r"\{(prompt|input)\}", lambda m: prompt if m[1] == "prompt" else extra, text)
