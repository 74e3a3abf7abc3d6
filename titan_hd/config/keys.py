"""The keys that there are, their types and their documentation, which stands below each field of `job_config`."""

from __future__ import annotations

import ast
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
        "A list is a,b or JSON, a switch alone means true, and none leaves a key unset.",
        "",
    ]
    for section, cls in sections.items():
        shown = [key for key in documented(cls) if not topics or {section, f"{section}.{key.name}"} & {*topics}]
        helped = (f"  --{section}.{key.name}  ({key.type}; default {key.default})\n      {key.text}" for key in shown)
        lines += [f"[{section}]", *helped, ""] if shown else []
    return "\n".join(lines)


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}
_IN_A_LIST = {int: "whole numbers", str: "strings"}


def kind_of(annotation: Any) -> str:
    """What a field of this type takes, in words: "a whole number", "a list of strings, or none", '"mean" or "sum"'."""
    args = typing.get_args(annotation)
    if type(None) in args:
        (inner,) = (arg for arg in args if arg is not type(None))
        return f"{kind_of(inner)}, or none"
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        texts = [json.dumps(arg) for arg in args]
        return " or ".join(texts) if len(texts) < 3 else f"one of {', '.join(texts)}"
    if origin is list:
        return f"a list of {_IN_A_LIST[args[0]] if args[0] in _IN_A_LIST else kind_of(args[0])}"
    return "a path, or a list of paths or tables" if args else _KINDS[annotation]


class Key(typing.NamedTuple):
    """A key of a section as it is documented: what it takes, in words, and its default as in JSON, or none."""

    name: str
    type: str
    default: str
    text: str


def documented(section: type) -> list[Key]:
    """The keys of a section's dataclass, or of a table in a list."""
    texts, found = field_docs()[section.__name__], []
    for name, kind in fields(section).items():
        default = getattr(section(), name)
        found.append(Key(name, kind_of(kind), "none" if default is None else json.dumps(default), texts[name]))
    return found
