"""The documentation: what it names exists, what is made of the code is complete, the site builds without a warning."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import docs_messages
import docs_pages
import pytest

from tests.kit.commands import REPOSITORY
from titan_hd.components.rates import StepResult
from titan_hd.config import manager
from titan_hd.config.keys import every_key
from titan_hd.in_process import RunResult

DOCS = sorted((REPOSITORY / "docs").glob("*.md"))
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in (*DOCS, *map(REPOSITORY.joinpath, ("README.md",)))}
TEXTS["CONTRIBUTING.md"] = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
SOURCES = [
    path for folder in ("titan_hd", "tools", "benchmarks", "train_configs") for path in (REPOSITORY / folder).rglob("*")
]
# Where docs name files as `adapters/svd.py`, that is in the package.
_PLACES = (REPOSITORY, *(REPOSITORY / "titan_hd" / room for room in ("", "components", "distributed")))
_PATH = re.compile(r"`((?:[a-z_]+/)+[\w.-]*\.(?:py|toml|sh|txt|jsonl))`")
_FUNCTION = re.compile(r"`([a-z_/]+\.py)` `(\w+(?:\.\w+)*)`")
_ANCHOR = re.compile(r"\]\(([^)#\s]*)(?:#([^)]+))?\)")
_WRITTEN = ("outputs/", "assets/hf/", "assets/data/", "assets/eval/", "dump_folder/")


def found(path: str) -> Path | None:
    return next((place / path for place in _PLACES if (place / path).exists()), None)


@pytest.mark.parametrize("page", TEXTS)
def test_every_file_that_a_page_names_exists(page: str):
    names = [name for name in _PATH.findall(TEXTS[page]) if not name.startswith(_WRITTEN) and "NAME" not in name]
    assert [name for name in names if found(name) is None] == []


@pytest.mark.parametrize("page", TEXTS)
def test_every_page_that_a_text_names_exists(page: str):
    """As docs/data.md, or as data.md within docs/."""
    names = set(re.findall(r"(?<![\w/.-])(?:docs/)?([a-z_]+\.md)\b", TEXTS[page]))
    known = {path.name for path in DOCS} | {"table.md"}  # a file of a comparison
    assert names <= known | docs_pages.made_pages().keys()


def test_every_page_that_the_code_names_exists():
    named = {
        (path.relative_to(REPOSITORY), name)
        for path in SOURCES
        if path.suffix in (".py", ".toml", ".sh") and path.is_file()
        for name in re.findall(r"\bdocs/([a-z_]+\.md)\b", path.read_text(encoding="utf-8"))
    }
    assert named
    assert {(path, name) for path, name in named if name not in {doc.name for doc in DOCS}} == set()


@functools.cache
def definitions(path: Path) -> set[str]:
    """Functions and classes of a file, methods with their class's name, and what is assigned at its top."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


@pytest.mark.parametrize("page", ["method.md", "extending.md"])
def test_every_function_that_a_line_names_exists(page: str):
    pairs = _FUNCTION.findall(TEXTS[page])
    assert len(pairs) > 5
    assert [(file, name) for file, name in pairs if name not in definitions(REPOSITORY / "titan_hd" / file)] == []


def test_links_within_the_repository_lead_somewhere():
    """Files, and headings in them as GitHub and mkdocs write their anchors; mkdocs checks its own."""
    for page, text in TEXTS.items():
        folder = REPOSITORY / ("docs" if page in {path.name for path in DOCS} else "")
        for target, anchor in _ANCHOR.findall(re.sub(r"^ {4}.*$|`[^`]*`", "", text, flags=re.MULTILINE)):
            if target.startswith("http"):
                continue
            path = folder / target if target else folder / page
            assert path.exists() or path.name in docs_pages.made_pages(), f"{page}: {target}"
            if anchor and path.exists():
                headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
                slugs = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
                assert anchor in slugs, f"{page}: {target}#{anchor}"


def test_the_page_of_the_keys_is_made_of_them():
    page = docs_pages.configuration_page()
    anchors = re.findall(r"^### `(\S+)` \{ #(\S+) \}$", page, re.MULTILINE)
    names = [name for name, _ in anchors if not name.startswith("data.train[]")]
    assert names == list(every_key())
    assert len({anchor for _, anchor in anchors}) == len(anchors)
    assert '`"mean" or "sum"`, default `"mean"`' in page
    assert all(target in {anchor for _, anchor in anchors} for target in re.findall(r"\]\(#([^)]+)\)", page))


def test_the_text_of_a_key_is_no_markup():
    shown = docs_pages._prose('lists [{"a": *}], <b>, a_b and data.max_skipped', "data.train")
    assert shown == ('lists \\[\\{"a": \\*\\}\\], &lt;b&gt;, a\\_b and [`data.max_skipped`](#data.max_skipped)')


def test_names_of_pages_become_links():
    titles = {"data.md": "Data", "svd.md": "Slices", "contributing.md": "Contributing"}
    text = (
        "See docs/data.md, svd.md, `docs/data.md`, x/data.md and CONTRIBUTING.md.\n\n    docs/data.md\n\n[a](data.md)"
    )
    linked = "See [Data](data.md), [Slices](svd.md), `docs/data.md`, x/data.md and [Contributing](contributing.md).\n\n"
    assert docs_pages.with_links(text, titles, "other.md") == linked + "    docs/data.md\n\n[a](data.md)"
    assert docs_pages.with_links("docs/data.md", titles, "data.md") == "docs/data.md"


def test_what_belongs_to_an_item_of_a_list_is_indented_by_four():
    text = "* one\n  goes on\n\n  and on\n\n      code\n* two\n* three\n\nend\n\n    code\n\n```\n* x\n  y\n```"
    wide = "* one\n    goes on\n\n    and on\n\n        code\n\n* two\n* three\n\nend\n\n    code\n\n```\n* x\n  y\n```"
    assert docs_pages.with_wide_lists(text) == wide


def test_a_page_shows_the_source_that_it_names():
    shown = docs_pages.completed("a\n\n<!-- source: titan_hd/adapters/bone.py BoneLinear -->\n\nb")
    assert shown.startswith("a\n\n```python\nclass BoneLinear(AdapterLinear):\n")
    assert shown.endswith("return 6 * self.miss_block.numel()\n```\n\nb")
    assert docs_pages.source_of(REPOSITORY / "titan_hd/models/decoder_config.py", "ARCHITECTURES").startswith(
        "ARCHITECTURES"
    )
    with pytest.raises(ValueError, match="has no"):
        docs_pages.source_of(REPOSITORY / "titan_hd/adapters/bone.py", "Bones")


def test_what_the_page_on_python_names_exists():
    """What is set on the Trainer itself, and its methods; the fields of what is returned."""
    tree, text = ast.parse((REPOSITORY / "titan_hd" / "train.py").read_text(encoding="utf-8")), TEXTS["python.md"]
    trainer = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Trainer")
    known = {node.name for node in trainer.body if isinstance(node, ast.FunctionDef)}
    stored = [node for node in ast.walk(trainer) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)]
    known |= {node.attr for node in stored if isinstance(node.value, ast.Name) and node.value.id == "self"}
    named = set(re.findall(r"\btrainer\.(\w+)", text))
    assert {"train_step", "add_hook", "model"} <= named <= known
    (steps,) = re.findall(r"a `StepResult` with (.*) \|$", text, re.MULTILINE)
    assert {"loss", "tokens"} <= set(re.findall(r"`(\w+)`", steps)) <= set(StepResult._fields)
    (run,) = re.findall(r"^\* It returns a `RunResult`: ((?:.|\n)*?)\n\*", text, re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", run)) == {*RunResult.__dataclass_fields__, "records"}
    assert set(re.findall(r"\bresult\.(\w+)", text)) <= {*RunResult.__dataclass_fields__, *StepResult._fields}


def python_blocks(text: str) -> list[str]:
    """Code blocks that begin with an import, or with a definition."""
    fenced = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    indented = re.findall(r"(?:^ {4}.*\n|^\n(?= {4}))+", text, re.MULTILINE)
    blocks = [*fenced, *(re.sub(r"^ {4}", "", block, flags=re.MULTILINE) for block in indented)]
    return [block for block in blocks if re.match(r"\s*(?:from \S+ import |import |class |def )", block)]


@pytest.mark.parametrize("page", [page for page, text in TEXTS.items() if python_blocks(text)])
def test_python_in_a_page_is_python_and_what_it_imports_of_titan_hd_exists(page: str):
    for block in python_blocks(TEXTS[page]):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("titan_hd"):
                module = importlib.import_module(node.module)
                assert [name.name for name in node.names if not hasattr(module, name.name)] == []


def test_the_home_page_is_the_readme():
    text = docs_pages._relative(
        "![a](docs/study/a.png) [b](docs/data.md) [c](CONTRIBUTING.md) [d](LICENSE) [e](https://f)"
    )
    assert text == "![a](study/a.png) [b](data.md) [c](contributing.md) d [e](https://f)"


def refused(key: str, values: dict[str, object], words: Sequence[str] = ()) -> list[str]:
    """What is said against the type of a key's value, in a file or in words of the command line."""
    try:
        manager.load([*words, "--job.print_plan"]) if words else manager.load_file(None, values)
    except manager.ConfigError as told:
        return [line for line in told.errors if line.startswith(f"{key}: must be ")]
    return []


class TestMessages:
    @pytest.fixture
    def groups(self) -> list[list[str]]:
        return [match.split() for match in docs_pages._MESSAGES.findall(TEXTS["troubleshooting.md"])]

    def test_every_message_has_its_place(self, groups: list[list[str]]):
        """In one group, whose section says what to do; a new file with messages must be put into one."""
        prefixes = [prefix for group in groups for prefix in group]
        assert all((REPOSITORY / prefix).exists() for prefix in prefixes)
        placed = [message for group in groups for message in docs_messages.of_files(group)]
        assert sorted(placed) == sorted(docs_messages.all_messages())
        assert all(docs_messages.of_files(group) for group in groups)

    def test_every_raise_is_found(self):
        """As it stands in the source, up to a line's end or a quotation mark; what has no two words is part of one."""
        raised = re.compile(r'raise (?:UserError|ConfigError|FloatingPointError)\(\s*\[?\s*(f?)"([^"\\]+)"')
        told: dict[str, list[str]] = {}
        for message in docs_messages.all_messages():
            told.setdefault(message.file, []).append(message.text)
        seen, lost = 0, []
        for path in (path for path in SOURCES if path.suffix == ".py" and path.parts[-2] != "benchmarks"):
            name = str(path.relative_to(REPOSITORY))
            for formatted, text in raised.findall(path.read_text(encoding="utf-8")):
                begins = re.sub(r"\{[^{}]*\}", "…", text) if formatted else text
                if not re.search(r"[a-z]+ [a-z]+", begins) or (formatted and "{" in begins):
                    continue
                seen += 1
                lost += [] if any(text.startswith(begins) for text in told.get(name, ())) else [(name, begins)]
        assert seen > 200
        assert lost == []

    def test_the_lines_of_the_launcher_and_of_the_watch(self):
        """Each first cell of the tables of lines is one that the code can say."""
        rooms = (REPOSITORY / "titan_hd" / "process").glob("*.py")
        files = [*rooms, REPOSITORY / "titan_hd" / "distributed" / "watch.py"]
        nodes = [node for path in files for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
        said = [docs_messages._text(node) or "" for node in nodes if isinstance(node, (ast.Constant, ast.JoinedStr))]
        said = [text.removeprefix("titan_hd: ") for text in said if len(re.findall(r"[a-z]{2,}", text)) > 2]
        said += [text.partition("; ")[0] for text in said]
        forms = [re.compile(".+".join(map(re.escape, re.split("…+", text)))) for text in said]
        tables = re.findall(r"^\| line \|.*\n\|---.*\n((?:\|.*\n)+)", TEXTS["troubleshooting.md"], re.MULTILINE)
        lines = [line for table in tables for line in re.findall(r"^\| `(.*?)` \|", table, re.MULTILINE)]
        assert len(lines) == 15
        lines = [line.removeprefix("error: ").removesuffix("; ...") for line in lines]
        assert [line for line in lines if not any(form.fullmatch(line) for form in forms)] == []

    def test_the_values_of_the_table_of_types(self):
        """Those that are said to be right are, and those that are said to be wrong are refused with these words."""
        keys = {"a whole number": "adapter.rank", "a number": "optimizer.lr", "true or false": "compile.enable"}
        keys |= {"a string": "job.dump_folder", '"mean" or "sum"': "hdpissa.aggregate"}
        keys |= {"a list of strings": "data.ignore_fields", "a list of whole numbers": "profiling.profile_steps"}
        keys |= {"a path, or a list of paths or tables": "data.train", "(or none)": "training.steps"}
        (table,) = re.findall(r"^\| must be \|.*\n\|---.*\n((?:\|.*\n)+)", TEXTS["troubleshooting.md"], re.MULTILINE)
        rows = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in table.splitlines()]
        assert [kind for kind, *_ in rows] == list(keys)
        for kind, in_file, typed in rows:
            key = keys[kind]
            for cell, is_file in ((in_file, True), (typed, False)):
                right, _, wrong = (re.findall(r"`(.*?)`", part) for part in cell.partition(", not "))
                for text in (*right, *wrong):
                    value = manager.tomllib.loads(f"x = {text}") if is_file else {}
                    lines = refused(key, {key: value.get("x")}, () if is_file else (f"--{key}", *shlex.split(text)))
                    assert [line.partition(", not ")[0] for line in lines] == (
                        [f"{key}: must be {kind}"] if text in wrong else []
                    ), (key, text)

    def test_each_form_of_a_message(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(docs_messages, "ROOT", tmp_path)
        (tmp_path / "a.py").write_text(
            '"""training.steps: a docstring."""\n'
            'raise UserError(f"{where}: is " f"not {a}")\n'
            'errors.append("first line")\n'
            'errors += [f"second {line}"]\n'
            'def f(): return "training.steps: must be positive"\n'
            'logger.warning("%s: cannot be %.4g", a, b)\n'
            'line = "said later"\nraise UserError(line)\n'
            'logger.info("nothing to mend")\n'
            'raise ValueError("a bug of ours")\n'
        )
        texts = [(m.kind, m.text) for m in docs_messages.messages_of(tmp_path / "a.py")]
        assert texts == [
            ("error", "…: is not …"),
            ("error", "first line"),
            ("error", "second …"),
            ("error", "training.steps: must be positive"),
            ("warning", "…: cannot be …"),
            ("error", "said later"),
        ]


def test_the_site_builds_without_a_warning(tmp_path: Path):
    """All pages in the navigation, all links and anchors: mkdocs' strict mode ends with status 1 at a warning."""
    for package in ("mkdocs", "material"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install mkdocs-material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    for page in (*DOCS, *map(Path, docs_pages.made_pages())):
        name = "index.html" if page.stem == "index" else f"{page.stem}/index.html"
        text = re.sub(r"<pre.*?</pre>", "", (tmp_path / "site" / name).read_text(encoding="utf-8"), flags=re.DOTALL)
        assert not re.search(r"^(?:<p>)?[*-] ", text, re.MULTILINE), f"{name}: a list that is none"
    page = (tmp_path / "site" / "troubleshooting" / "index.html").read_text(encoding="utf-8")
    assert "training.steps: give either training.steps or training.epochs" in page
    assert "https://fonts" not in page, "nothing is fetched from elsewhere"
