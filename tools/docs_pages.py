"""The pages of the documentation that are made of the code, and how the others become a site.

    mkdocs serve        shows the site on this machine (pip install -e ".[docs]")

mkdocs.yml names this file as a hook. The home page is README.md, the page of the keys is made of the dataclasses, and
docs/troubleshooting.md is completed by the messages that the code has (`docs_messages`). Where the text of a page names
another one, as docs/data.md, the site has a link.
"""

from __future__ import annotations

import ast
import re
import sys
import typing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from docs_messages import tables

from titan_hd.config.job_config import DataSource, JobConfig
from titan_hd.config.keys import documented, every_key

ROOT = Path(__file__).resolve().parent.parent
COPIED = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
_MESSAGES = re.compile(r"^<!-- messages: (.+) -->$", re.MULTILINE)
_ITEM = re.compile(r"(?:[*+-]|\d+\.) ")
_SOURCE = re.compile(r"^<!-- source: (\S+) (\S+) -->$", re.MULTILINE)
_CODE = re.compile(r"(^ {4,}[^\n]*$|^```.*?^```|`[^`]*`|\]\([^)]*\))", re.MULTILINE | re.DOTALL)
_PAGE = re.compile(r"(?<![\w/.-])(?:docs/)?([A-Za-z_]+\.md)(?![\w/])")


def made_pages() -> dict[str, str]:
    """The text of each page that is no file of docs/, by its name."""
    copied = {page: _relative((ROOT / name).read_text(encoding="utf-8")) for page, name in COPIED.items()}
    return {**copied, "configuration.md": configuration_page()}


def _relative(text: str) -> str:
    """A text of the repository's top folder as a page: links lead from docs/; what is no page is named alone."""
    text = re.sub(r"\]\(docs/", "](", text)
    for page, name in COPIED.items():
        text = text.replace(f"]({name})", f"]({page})")
    return re.sub(r"\[([^\]]+)\]\((?!https?:)(?![^)]*\.(?:md|png|svg))[^)]*\)", r"\1", text)


def configuration_page() -> str:
    """Every key with its type, default and documentation."""
    lines = ["# Configuration", "", *_INTRODUCTION.splitlines()]
    for section, cls in typing.get_type_hints(JobConfig).items():
        lines += ["", f"## {section}"]
        lines += [line for key in documented(cls) for line in _key_lines(f"{section}.{key.name}", key)]
    lines += ["", "## Tables of data.train and data.validation", "", "The keys of one entry of a list (docs/data.md)."]
    lines += [line for key in documented(DataSource) for line in _key_lines(f"data.train[].{key.name}", key)]
    return "\n".join(lines) + "\n"


_INTRODUCTION = """\
    NGPU=n ./run_train.sh [--config FILE] [--section.key value ...]

A value on the command line wins over the file, the file over what it inherits by `base = "other.toml"`, that over the
default. In a file a key stands in the table of its section; on the command line a list is `a,b` or JSON, a switch alone
means true, and `none` unsets a key that can be unset. `./run_train.sh --help SECTION` prints what is here, and
`python -m titan_hd.config.manager FILE` what a file comes to. This page is made of `titan_hd/config/job_config.py`."""


def _key_lines(name: str, key) -> list[str]:
    anchor = name.replace("[]", "")
    return [
        "",
        f"### `{name}` {{ #{anchor} }}",
        "",
        f"`{key.type}`, default `{key.default}`",
        "",
        _prose(key.text, name),
    ]


def _prose(text: str, own: str) -> str:
    """Plain text as Markdown: nothing in it is markup; other keys that it names are links."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_{}\[\]|#])", r"\\\1", text)
    keys = {key.replace("_", "\\_"): key for key in every_key() if key != own}

    def linked(match: re.Match) -> str:
        return f"[`{keys[match[0]]}`](#{keys[match[0]]})" if match[0] in keys else match[0]

    return re.sub(r"[a-z]\w*(?:\\_\w+)*\.\w+(?:\\_\w+)*", linked, text)


def with_links(text: str, titles: dict[str, str], own: str) -> str:
    """A page in which the names of other pages, outside of code, are links with the pages' titles."""

    def linked(match: re.Match) -> str:
        page = made_of.get(match[1], match[1])
        return f"[{titles[page]}]({page})" if page in titles and page != own else match[0]

    made_of = {name: page for page, name in COPIED.items()}
    pieces = _CODE.split(text)
    pieces[::2] = [_PAGE.sub(linked, piece) for piece in pieces[::2]]
    return "".join(pieces)


def with_wide_lists(text: str) -> str:
    """A page whose lists are indented as Python's Markdown wants it: what belongs to an item by four signs, where
    CommonMark needs two, and code within an item by eight; an item behind one of several paragraphs stands apart."""
    lines, in_list, fenced, paragraphs = [], False, False, False
    for line in text.split("\n"):
        indent = len(line) - len(line.lstrip(" "))
        fenced ^= line.startswith("```")
        apart = not lines or not lines[-1].strip()
        if _ITEM.match(line):
            lines += [""] if paragraphs and not apart else []
            in_list, paragraphs = True, False
        elif line.strip() and indent == 0 and apart:
            in_list = False  # a paragraph of its own
        paragraphs |= in_list and indent > 0 and apart
        if in_list and not fenced and (indent in (2, 3) or indent >= 6):
            line = " " * (4 if indent < 4 else indent + 2) + line.lstrip(" ")
        lines.append(line)
    return "\n".join(lines)


def title_of(text: str) -> str:
    """The first heading of a page."""
    heading = re.search(r"^# (.+)$", text, re.MULTILINE)
    assert heading is not None, "every page begins with a heading"
    return heading[1]


def completed(text: str) -> str:
    """A page with what its places name: the messages of files, the source of a class or of a table."""
    text = _SOURCE.sub(lambda match: f"```python\n{source_of(ROOT / match[1], match[2])}\n```", text)
    return _MESSAGES.sub(lambda match: tables(match[1].split()), text)


def source_of(path: Path, name: str) -> str:
    """The lines of a class, a function, or what is assigned to a name at the top of a file."""
    text = path.read_text(encoding="utf-8")
    for node in ast.parse(text).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", node)
        if name in (getattr(node, "name", ""), getattr(target, "id", "")):
            return "\n".join(text.splitlines()[node.lineno - 1 : node.end_lineno])
    raise ValueError(f"{path}: has no {name}")


# ---------------------------------------------------------------------------------------------------------------------
# Hooks of mkdocs


def on_files(files, config):
    """Add the pages that are made; remember the titles of all."""
    from mkdocs.structure.files import File

    for name, text in made_pages().items():
        files.append(File.generated(config, name, content=text))
    config.extra["titles"] = {file.src_uri: title_of(file.content_string) for file in files.documentation_pages()}
    config.extra["titles"]["index.md"] = "Home"
    return files


def on_page_markdown(markdown, page, config, files):
    """Complete one page."""
    return with_wide_lists(completed(with_links(markdown, config.extra["titles"], page.file.src_uri)))
