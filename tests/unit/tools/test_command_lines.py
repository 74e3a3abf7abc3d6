"""All tools take options alike, show examples, and answer a mistyped option with the nearest."""

from __future__ import annotations

import argparse
import importlib
import io
import re
import sys
from collections.abc import Iterator

import pytest
from tqdm import tqdm

from tests.kit.commands import REPOSITORY, call_tool, error_lines
from titan_hd import console
from titan_hd.config.command_line import ToolParser

_LAUNCHERS = ("quickstart",)  # takes the arguments of a run's launcher
TOOLS = [p.stem for p in sorted((REPOSITORY / "tools").glob("*.py")) if "\ndef main(" in p.read_text("utf-8")]
TOOLS = [name for name in TOOLS if name not in _LAUNCHERS]
BENCHMARKS = [p.stem for p in sorted((REPOSITORY / "benchmarks").glob("bench_*.py"))]


class Caught(BaseException):
    pass


def parser_of(module: str, monkeypatch) -> ToolParser:
    """The one with which a tool's `main` reads its command line."""

    def catch(self, args=None, namespace=None):
        raise Caught(self)

    with monkeypatch.context() as patched:
        patched.setattr(ToolParser, "parse_known_args", catch)
        with pytest.raises(Caught) as caught:
            importlib.import_module(module).main()
    return caught.value.args[0]


def with_commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.values()


@pytest.mark.parametrize("name", TOOLS)
def test_a_tool_has_examples_and_says_what_every_option_is(name: str, monkeypatch):
    parser = parser_of(name, monkeypatch)
    assert re.search(rf"^ +python (tools/{name}\.py|-m tools\.{name})\b", parser.format_help(), re.M)
    unsaid = [action.dest for part in with_commands(parser) for action in part._actions if not action.help]
    assert unsaid in ([], ["command"])


@pytest.mark.parametrize("module", [*TOOLS, *(f"benchmarks.{name}" for name in BENCHMARKS)])
def test_dashes_and_underscores_are_alike(module: str, monkeypatch):
    for parser in with_commands(parser_of(module, monkeypatch)):
        for action in parser._actions:
            action.required = False
            action.nargs = action.nargs if action.option_strings else "?"
        options = {option: action for action in parser._actions for option in action.option_strings}
        assert not any("_" in option for option in options)
        for option, action in options.items():
            if "-" not in option[2:]:
                continue
            words = [] if action.nargs == 0 else [str([*(action.choices or [3])][-1])]
            words *= action.nargs if isinstance(action.nargs, int) else 1
            found = [parser.parse_args([name, *words]) for name in (option, "--" + option[2:].replace("-", "_"))]
            assert vars(found[0]) == vars(found[1])
            assert getattr(found[0], action.dest) != action.default


@pytest.mark.parametrize(
    ("tool", "words", "line"),
    [
        ("generate", "model --max_new_token_s=3", "--max-new-token-s: unknown option; did you mean --max-new-tokens?"),
        ("generate", "model --zzz", "--zzz: unknown option; --help"),
        ("generate", "model other", "other: unexpected argument"),
        ("convert_checkpoint", "dcp-to-hf a b --assets c --max-shard-size 3 --maximal 1", "--maximal: unknown option"),
        ("estimate_memory", "--cart 80", "--cart: unknown option; did you mean --card?"),
        ("estimate_memory", "--lr 1", "--lr: unknown option; did you mean --optimizer.lr?"),
        ("same_losses", "a b --step-s 3", "--step-s: unknown option; did you mean --steps?"),
        ("precompute_svd", "--share 3", "--share: must be i/n with i from 0 to n - 1, not '3'"),
    ],
)
def test_a_mistyped_option_is_one_line_with_the_nearest(tool: str, words: str, line: str):
    (said,) = error_lines(call_tool(importlib.import_module(tool).main, *words.split()))
    assert said.startswith(f"titan_hd: error: {line}")


def test_libraries_draw_no_bars_where_a_tool_has_begun(monkeypatch):
    """A parser alone, that of a module that is imported say, changes nothing in its process."""
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(tqdm, "__init__", console._TQDM_INIT)
    with console.kept():
        parser = ToolParser()
        assert vars(tqdm)["__init__"] is console._TQDM_INIT
        parser.parse_args([])
        assert vars(tqdm)["__init__"] is not console._TQDM_INIT
    assert vars(tqdm)["__init__"] is console._TQDM_INIT


def test_values_and_a_runs_keys_stay_as_they_are():
    parser = ToolParser()
    parser.add_argument("--two-words")
    found, rest = parser.parse_with_run_options(["--two_words=a_b", "--job.dump_folder", "x_y", "--config=r_1.toml"])
    assert found.two_words == "a_b"
    assert rest == ["--job.dump_folder", "x_y", "--config=r_1.toml"]
    assert parser.parse_known_args(["--", "--a_b"])[1] == ["--", "--a_b"]
