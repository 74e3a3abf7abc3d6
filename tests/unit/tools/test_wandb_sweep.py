"""A comparison as sweeps of wandb: what its agent would start, by its own rules, is a command line that parses."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import compare_methods
import pytest
from compare.arms import parse_arms, parse_grid
from compare.wandb_sweep import SweepSettings, write_sweep

from tests.kit import runs
from tests.kit.commands import REPOSITORY, call_tool
from titan_hd.config import manager
from titan_hd.errors import UserError

yaml = pytest.importorskip("yaml")
utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")


def started_by_the_agent(sweep: dict, values: dict) -> list[str]:
    """What `wandb agent` makes of a sweep's command for a run with these values."""
    arguments = utils.create_sweep_command_args({"args": {key: {"value": value} for key, value in values.items()}})
    arguments["program"] = [sweep["program"]]
    command = []
    for part in utils.create_sweep_command(list(sweep["command"])):
        is_macro = part.startswith("${") and part.endswith("}")
        command += arguments[part[2:-1]] if is_macro else [part]
    return command


def test_the_sweeps_of_a_comparison(tmp_path: Path):
    runs.write_model(tmp_path / "model")
    runs.write_records(tmp_path / "records.jsonl")
    options = runs.options(tmp_path / "model", tmp_path / "records.jsonl", tmp_path / "unused")
    folder = tmp_path / "a sweep"
    result = call_tool(
        compare_methods.main,
        *("--wandb-sweep", "grid", "--methods", "lora,hdpissa+num_adapters=2", "--workers", 1, "--seeds", 2),
        *("--grid", "optimizer.lr=1e-4:1e-2:3", "--folder", folder, *options, "--metrics.wandb_project=mine"),
    )
    assert result.returncode == 0, result.stderr
    paths = [folder / "sweeps" / name for name in ("lora.yaml", "hdpissa+num_adapters=2.yaml")]
    assert result.stdout.splitlines() == [f"wandb sweep '{path}'" for path in paths]
    sweep = yaml.safe_load(paths[1].read_text())
    assert (sweep["project"], sweep["method"], sweep["run_cap"]) == ("mine", "grid", 6)
    assert sweep["metric"] == {"name": "loss", "goal": "minimize"}
    assert sweep["parameters"] == {
        "optimizer.lr": {"values": [0.0001, 0.001, 0.01]},
        "training.seed": {"values": [42, 43]},
    }
    values = {"optimizer.lr": 1e-05, "training.seed": 43}
    env, workers, shell, flag, script, program, *arguments = started_by_the_agent(sweep, values)
    assert (env, workers, shell, flag) == ("/usr/bin/env", "NGPU=1", "/bin/sh", "-c")
    assert program == str(REPOSITORY / "run_train.sh")
    assert script == f'exec "$0" "$@" --job.dump_folder=\'{folder}/sweeps/hdpissa+num_adapters=2\'/"$WANDB_RUN_ID"'
    config = manager.load([*arguments, "--job.dump_folder=x"])
    assert (config.optimizer.lr, config.training.seed, config.hdpissa.num_adapters) == (1e-05, 43, 2)
    assert (config.metrics.enable_wandb, config.metrics.wandb_group) == (True, "a sweep")


def test_what_is_drawn_between_the_ends_of_an_axis(tmp_path: Path):
    grid = parse_grid(["optimizer.lr=1e-6:1e-2:3", "adapter.rank=2:8:3", "hdpissa.aggregate=mean,sum"])
    (arm,) = parse_arms("hdpissa", grid)
    settings = SweepSettings(tmp_path, "bayes", "validation_exact_match", "maximize", "p", "", [42])
    sweep = yaml.safe_load(write_sweep(arm, [], settings).read_text())
    assert sweep["parameters"] == {
        "optimizer.lr": {"distribution": "log_uniform_values", "min": 1e-06, "max": 0.01},
        "adapter.rank": {"distribution": "q_log_uniform_values", "min": 2, "max": 8},
        "hdpissa.aggregate": {"values": ["mean", "sum"]},
        "training.seed": {"values": [42]},
    }
    assert (sweep["run_cap"], sweep["metric"]["goal"], "entity" in sweep) == (18, "maximize", False)
    assert sweep["command"][0] == "/bin/sh", "the agent's own number of workers"
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/sweeps: cannot be written: Not a directory$"):
        write_sweep(arm, [], dataclasses.replace(settings, folder=tmp_path / "file"))
