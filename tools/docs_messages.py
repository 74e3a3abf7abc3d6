"""The messages that a user can get, read off the code: what is raised as the user's to mend, and what is warned of.

A message is a string, or an f-string whose values are shown as "…". It is found where it is raised (UserError,
ConfigError, FloatingPointError), collected as a fault of the configuration, printed by `exit_with`, or given to
`logger.warning`; and wherever a string begins with a key of the configuration and a colon, which is how each fault of
one is said.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from titan_hd.config.keys import every_key

ROOT = Path(__file__).resolve().parent.parent
_LISTS = ("errors", "faults")  # names of lists of lines that are raised together
_RAISED = ("UserError", "ConfigError", "FloatingPointError")
_KEYED = re.compile(r"(?:--)?([a-z_]+\.[a-z_]+)(?:, [a-z_]+\.[a-z_]+)*: ")


class Message(NamedTuple):
    """file: of the repository. kind: "error" or "warning"."""

    file: str
    line: int
    kind: str
    text: str


@functools.cache
def all_messages() -> tuple[Message, ...]:
    """Of the package and of the tools, in the order of the files."""
    files = [*sorted((ROOT / "titan_hd").rglob("*.py")), *sorted((ROOT / "tools").rglob("*.py"))]
    return tuple(message for path in files for message in messages_of(path))


def messages_of(path: Path) -> list[Message]:
    """Of one file, each text once."""
    tree, name = ast.parse(path.read_text(encoding="utf-8")), str(path.relative_to(ROOT))
    found: dict[str, Message] = {}
    for line, kind, text in _in_tree(tree):
        if sum(map(str.isalpha, text)) > 4 and text not in found:  # less than that is a part of one
            found[text] = Message(name, line, kind, text)
    return sorted(found.values(), key=lambda message: message.line)


def _in_tree(tree: ast.AST) -> Iterator[tuple[int, str, str]]:
    nodes = list(ast.walk(tree))
    no_message = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}  # docstrings
    no_message |= {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    named = _named_texts(nodes)
    for node in nodes:
        if not isinstance(node, (ast.expr, ast.stmt)):
            continue
        kind, given = _said(node)
        if kind == "warning":
            no_message |= {id(part) for part in given}  # their "%s" are shown below
            yield from ((node.lineno, kind, re.sub(r"%[\d.]*[a-z]", "…", text)) for text in _texts(given))
        elif kind:
            names = [name for part in given for name in named.get(getattr(part, "id", ""), ())]
            yield from ((node.lineno, kind, text) for text in _texts([*given, *names]))
        elif isinstance(node, (ast.Constant, ast.JoinedStr)) and id(node) not in no_message:
            text = _text(node)
            match = _KEYED.match(text or "")
            if text and match and match[1] in every_key():
                yield node.lineno, "error", text


def _named_texts(nodes: list[ast.AST]) -> dict[str, list[ast.expr]]:
    """What is assigned to each name somewhere in the file: `raise UserError(line)` raises what `line` was set to."""
    named: dict[str, list[ast.expr]] = {}
    for node in nodes:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            named.setdefault(node.targets[0].id, []).append(node.value)
    return named


def _said(node: ast.AST) -> tuple[str, list[ast.expr]]:
    """The kind of message that an expression says, and what holds its text; "" for another expression."""
    if isinstance(node, ast.AugAssign) and getattr(node.target, "id", "") in _LISTS:
        return "error", [node.value]
    if not isinstance(node, ast.Call):
        return "", []
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    owner = getattr(getattr(node.func, "value", None), "id", "")
    if name in _RAISED or name == "exit_with" or (name in ("append", "extend") and owner in _LISTS):
        return "error", node.args[:1]
    return ("warning", node.args[:1]) if name == "warning" and owner == "logger" else ("", [])


def _texts(nodes: list[ast.expr]) -> list[str]:
    """The strings that an argument may be: itself, the items of a list, either side of a choice."""
    found = []
    for node in nodes:
        if isinstance(node, (ast.List, ast.Tuple)):
            found += _texts(node.elts)
        elif isinstance(node, ast.IfExp):
            found += _texts([node.body, node.orelse])
        elif isinstance(node, ast.ListComp):
            found += _texts([node.elt])
        elif isinstance(node, ast.BoolOp):
            found += _texts(node.values)
        elif isinstance(node, ast.BinOp):  # two strings, or a list times whether there is the fault
            left, right = _texts([node.left]), _texts([node.right])
            found += [left[0] + right[0]] if left and right else left
        elif isinstance(node, (ast.Constant, ast.JoinedStr)) and (text := _text(node)):
            found.append(text)
    return found


def _text(node: ast.expr) -> str | None:
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) or "" if isinstance(part, ast.Constant) else "…" for part in node.values)
    return None


def of_files(prefixes: list[str]) -> list[Message]:
    """The messages of files and folders that are named by their paths in the repository."""
    return [m for m in all_messages() if any(m.file == p or m.file.startswith(f"{p}/") for p in prefixes)]


def tables(prefixes: list[str]) -> str:
    """One table of their messages, as Markdown."""
    rows = [f"| {_cell(m.text)} | {m.kind} | `{m.file.removeprefix('titan_hd/')}` |" for m in of_files(prefixes)]
    return "\n".join(["| message | | from |", "|---|---|---|", *rows])


def _cell(text: str) -> str:
    shown = " ".join(text.split()).replace("|", "\\|")
    return f"`` {shown} ``" if "`" in shown else f"`{shown}`"
