"""`titan-hd COMMAND`: which file each command becomes, with which words; nothing is trained here."""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path

import pytest

from tests.kit.commands import REPOSITORY, call_tool, error_lines
from titan_hd import cli
from titan_hd.bundle import ROOT, recipe

# Tools of those who work on titan_hd: they want its repository.
DEVELOPERS = {"make_quickstart.py", "same_losses.py", "connections.py"}
STARTED_BY_SCRIPTS = {"quickstart.py"}


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What takes this process's place, in its stead."""
    found: list[list[str]] = []

    def become(program: str, words: list[str]) -> None:
        assert os.environ["PYTHON"] == sys.executable, "the run has this Python"
        found.append([program, *words[1:]])
        raise SystemExit(0)

    monkeypatch.setattr(os, "execvp", become)
    monkeypatch.setenv("PYTHON", "another")
    return found


def test_train_and_plan_are_run_train(started: list[list[str]]):
    script = f"{REPOSITORY}/run_train.sh"
    assert call_tool(cli.main, "train", "--training.steps", "3").returncode == 0
    assert call_tool(cli.main, "train").returncode == 0
    assert call_tool(cli.main, "plan", "--quickstart").returncode == 0
    assert started == [
        ["bash", script, "--training.steps", "3"],
        ["bash", script],
        ["bash", script, "--job.print_plan", "--quickstart"],
    ]


@pytest.mark.parametrize("name", [name for name, found in cli.COMMANDS.items() if found.script != "run_train.sh"])
def test_every_other_command_is_its_tool(name: str, monkeypatch: pytest.MonkeyPatch):
    """Its --help is the tool's own, under the command's name."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHON", "another")
    result = call_tool(cli.main, name, "--help")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"usage: titan-hd {name} ")
    assert os.environ["PYTHON"] == sys.executable, "a comparison's runs have it, too"


def test_all_tools_for_users_are_there():
    """A new script in tools/ gets a command, or is for developers."""
    scripts = {path.name for path in (REPOSITORY / "tools").glob("*.py") if _is_script(path)}
    assert {Path(command.script).name for command in cli.COMMANDS.values()} - {
        "run_train.sh"
    } == scripts - DEVELOPERS - STARTED_BY_SCRIPTS


def _is_script(path: Path) -> bool:
    return any(isinstance(node, ast.If) and "__main__" in ast.unparse(node.test) for node in _body(path))


def _body(path: Path) -> list[ast.stmt]:
    return ast.parse(path.read_text(encoding="utf-8")).body


def test_the_help_has_every_command_and_where_the_recipes_are():
    for words in ([], ["--help"], ["help"]):
        result = call_tool(cli.main, *words)
        assert result.returncode == 0
        assert [line.split()[0] for line in result.stdout.splitlines() if line.startswith("  ")] == [*cli.COMMANDS]
        assert str(ROOT / "train_configs") in result.stdout
    assert call_tool(cli.main, "--version").stdout.startswith("titan_hd 0.")


def test_an_unknown_command_is_one_line():
    (line,) = error_lines(call_tool(cli.main, "tren", "--training.steps=3"))
    assert line.startswith("titan_hd: error: tren: unknown command; did you mean train?; there are train, evaluate, ")


def test_without_the_bundle_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("titan_hd.bundle.ROOT", tmp_path)
    (line,) = error_lines(call_tool(cli.main, "train"))
    assert line == f"titan_hd: error: {tmp_path}: has no run_train.sh: install titan_hd by pip, or use its repository"


def test_a_bundled_recipe_is_found_by_its_name(started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    bundled = f"{ROOT}/train_configs/paper/table1_math.toml"
    assert recipe("train_configs/paper/table1_math.toml") == recipe("paper/table1_math.toml") == bundled
    assert recipe("../assets/quickstart/template.txt") == "../assets/quickstart/template.txt", "not what lies beside"
    (tmp_path / "quickstart.toml").write_text("")
    assert recipe("quickstart.toml") == "quickstart.toml", "the user's own comes first"
    for name in ("none.toml", "x" * 300):
        assert recipe(name) == name, "the configuration says that it is not there"
    call_tool(cli.main, "train", "--config", "paper/table1_math.toml")
    call_tool(cli.main, "train", "--config=./train_configs/paper/table1_math.toml")
    assert [words[2:] for words in started] == [["--config", bundled], [f"--config={bundled}"]]
