"""The keys that there are, their types and their documentation, which stands below each field of `job_config`."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import json
import typing
from typing import Any

from titan_hd.config import job_config
from titan_hd.config.job_config import JobConfig
from titan_hd.errors import UserError


@functools.cache
def fields(cls: type) -> dict[str, Any]:
    """Name -> type of the fields of a dataclass."""
    return typing.get_type_hints(cls)


def every_key() -> list[str]:
    """All keys, as section.key."""
    return [f"{section}.{name}" for section, cls in fields(JobConfig).items() for name in fields(cls)]


def hint(word: str, known: typing.Iterable[str]) -> str:
    """The known name that is nearest to a mistyped one, as the end of a line; "" if none is near.

    A key that stands in another section counts as near: training.lr, or lr alone, is optimizer.lr.
    """
    names, last = list(known), word.rpartition(".")[2].lstrip("-")
    close = difflib.get_close_matches(word, names, n=1)
    elsewhere = [name for name in names if "." in name and name.rpartition(".")[2] == last]
    if elsewhere and not (close and close[0] in elsewhere):
        close = elsewhere[:3]
    return f"; did you mean {' or '.join(close)}?" if close else ""


@functools.cache
def field_docs() -> dict[str, dict[str, str]]:
    """Class name -> field -> the string literal under the field."""
    docs: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(job_config)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        texts = docs.setdefault(node.name, {})
        for statement, following in zip(node.body, node.body[1:]):
            match statement, following:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    texts[name] = " ".join(text.split())
    return docs


def help_text(topics: typing.Sequence[str] = ()) -> str:
    """Every key with its type, default and documentation; of topics, which are names of sections or keys, only those.

    Raises:
        UserError: a topic is neither.
    """
    sections = fields(JobConfig)
    topics = [topic.strip("[]").lstrip("-") for topic in topics]
    unknown = [topic for topic in topics if topic not in (*sections, *every_key())]
    if unknown:
        near = hint(unknown[0], [*sections, *every_key()])
        listed = ", ".join(sections)
        raise UserError(f"--help: {unknown[0]!r} is neither a section nor a key{near} (sections: {listed})")
    lines = [
        "usage: ./run_train.sh [--config FILE] [--section.key value ...]",
        "       ./run_train.sh --quickstart [--section.key value ...]",
        "       ./run_train.sh --help [SECTION or SECTION.KEY ...]",
        "",
    ]
    for section, cls in sections.items():
        shown = [key for key in documented(cls) if not topics or {section, f"{section}.{key.name}"} & {*topics}]
        helped = (f"  --{section}.{key.name}  ({key.type}; default {key.default})\n      {key.text}" for key in shown)
        lines += [f"[{section}]", *helped, ""] if shown else []
    return "\n".join(lines)


class Key(typing.NamedTuple):
    """A key of a section as it is documented: its type as in Python, its default as in JSON."""

    name: str
    type: str
    default: str
    text: str


def documented(section: type) -> list[Key]:
    """The keys of a section's dataclass, or of a table in a list."""
    default, texts = section(), field_docs()[section.__name__]
    found = dataclasses.fields(section)
    return [Key(f.name, str(f.type), json.dumps(getattr(default, f.name)), texts[f.name]) for f in found]
