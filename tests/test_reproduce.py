"""train_configs/paper and docs/reproduce.md: every file plans a run at the true sizes, every command is one that its
program takes."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import compare_methods
import download_hf
import estimate_memory
import evaluate
import pytest
import rank_analysis
import scaling
import torch
from compare.arms import parse_arms, parse_grid

from tests.kit.commands import call_tool
from titan_hd.adapters.methods import METHODS
from titan_hd.config import manager
from titan_hd.evaluation.tasks import TASKS
from titan_hd.preflight import RunPlan, plan_run

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIGS = sorted((REPOSITORY / "train_configs" / "paper").glob("*.toml"))
TEXT = (REPOSITORY / "docs" / "reproduce.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    ((?:NGPU=\d+ )?(?:\./run_train\.sh|python tools/)\S* .*)$", TEXT, re.MULTILINE)
# Where each model's weights would lie; its sizes are known without them.
FLAVORS = {"Llama-2-7b-hf": "7B", "Llama-3.1-8B": "8B", "Mistral-7B-v0.1": "7B", "Llama-3.2-3B": "3B"}
FLAVORS |= {"rwkv6-3B": "3B", "rwkv6-7B": "7B", "roberta-base": "base"}


def plan(argv: list[str], gpus: int) -> RunPlan:
    """On GPUs, without weights and data."""
    assets = manager.load(argv).model.hf_assets_path
    config = manager.load([*argv, f"--model.flavor={FLAVORS[Path(assets).name]}"])
    return plan_run(config, gpus, needs_files=False, device_type="cuda", unseen_files=torch.bfloat16)


_NODE = 8  # GPUs that a command has which names no number


def words_of(line: str) -> list[str]:
    return shlex.split(line, comments=True)


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(REPOSITORY)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_file_plans_a_run(path: Path):
    run = plan(["--config", str(path)], 1 if "#   NGPU=1 " in path.read_text() else _NODE)
    if run.config.adapter.method == "hdpissa":
        assert (run.config.hdpissa.aggregate, run.num_adapters) == ("sum", 8)
        assert run.config.optimizer.lr == 2e-5
    assert path.name in TEXT, "docs/reproduce.md says what it is for"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_what_a_file_says_to_run_stands_in_the_page(path: Path):
    """Its comment has the command, perhaps broken into lines."""
    comment = " ".join(line[1:] for line in path.read_text().splitlines() if line.startswith("#"))
    name = f"train_configs/paper/{path.name}"
    assert f"--config {name}" in comment
    assert any(name in command for command in COMMANDS)


def check_run(arguments: list[str], gpus: int) -> None:
    plan(arguments, gpus)


def check_compare(arguments: list[str]) -> None:
    with mock.patch.object(sys, "argv", ["tool", *arguments]):
        args, argv = compare_methods.parse_arguments()
    for arm in parse_arms(args.methods, parse_grid(args.grid)):
        plan([*argv, *(f"--{key}={value}" for key, value in arm.changes.items())], 8)


def check_evaluate(arguments: list[str]) -> None:
    args = _parsed(evaluate.parse_arguments, arguments)
    assert set(args.tasks.split(",")) <= {*TASKS, "mt_bench"}
    assert args.model.parts[-1] == "hf"


def check_rank_analysis(arguments: list[str]) -> None:
    assert len(_parsed(rank_analysis.parse_arguments, arguments).trained) == 3


def check_memory(arguments: list[str]) -> None:
    result = call_tool(estimate_memory.main, *arguments)
    assert "fits on" in result.stdout, result.stderr
    gb = re.search(r"estimated.*: ([\d.]+) GB", result.stdout)[1]
    assert f"{float(gb):.0f} GB" in TEXT


def check_scaling(arguments: list[str], hours: str) -> None:
    """The hours behind the command are those of its row."""
    result = call_tool(scaling.main, *arguments)
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines() if " factors " in line]
    assert hours in [row[-1] for row in rows if row[1] == "8"]


def check_download(arguments: list[str]) -> None:
    with mock.patch.object(download_hf, "download", return_value=[Path("a")]) as download:
        assert call_tool(download_hf.main, *arguments).returncode == 0
    assert download.call_count == 1


def _parsed(parse: Callable, arguments: list[str]):
    with mock.patch.object(sys, "argv", ["tool", *arguments]):
        return parse()


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_is_one_that_its_program_takes(line: str):
    words = words_of(line)
    gpus = int(words.pop(0).removeprefix("NGPU=")) if words[0].startswith("NGPU=") else _NODE
    if words[0] == "./run_train.sh":
        check_run(words[1:], gpus)
        return
    tool, arguments = Path(words[1]).name, words[2:]
    assert (REPOSITORY / words[1]).is_file()
    if tool == "scaling.py":
        check_scaling(arguments, re.search(r"# ([\d.]+) h$", line)[1])
        return
    {
        "compare_methods.py": check_compare,
        "evaluate.py": check_evaluate,
        "rank_analysis.py": check_rank_analysis,
        "estimate_memory.py": check_memory,
        "download_hf.py": check_download,
    }[tool](arguments)


def test_no_two_commands_write_into_one_folder():
    folders = [
        manager.load(words[words.index("--config") :]).job.dump_folder.removeprefix("./")
        for words in map(words_of, COMMANDS)
        if "./run_train.sh" in words
    ]
    assert len(folders) == len(set(folders))


def test_pefts_comparison_has_every_method():
    runs = [words for words in map(words_of, COMMANDS) if "train_configs/paper/peft_llama32_3b.toml" in words]
    trainings = [words for words in runs if words[:2] == ["NGPU=1", "./run_train.sh"]]
    methods = {manager.load(words[2:]).adapter.method for words in trainings}
    assert methods == METHODS.keys() - {"miss"}
