"""tools/compare_methods.py as a user runs it: tables, runs that are not repeated, one that was cut off, bad input."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import pytest

from tests.kit import runs
from tests.kit.commands import CPU_ONLY, REPOSITORY
from tests.kit.forked import run_forked


@pytest.fixture
def compare(tmp_path):
    runs.write_model(tmp_path / "model")
    runs.write_records(tmp_path / "records.jsonl")
    (tmp_path / "run.toml").write_text("[metrics]\nprogress_bar = false\n")

    def call(methods: str, *more: str, forked: bool = True, **overrides) -> subprocess.CompletedProcess:
        """forked: in a process that need not import everything first."""
        options = runs.options(tmp_path / "model", tmp_path / "records.jsonl", tmp_path, **overrides)
        arguments = ["--methods", methods, "--folder", str(tmp_path / "all"), "--workers", "1", *more]
        words = ["tools/compare_methods.py", *arguments, "--config", str(tmp_path / "run.toml"), *options]
        environment = {**CPU_ONLY, "PYTHON": sys.executable}
        if forked:
            return run_forked(*words, environment=environment)
        return subprocess.run(
            [sys.executable, *words],
            cwd=REPOSITORY,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    return call


def made(done: subprocess.CompletedProcess) -> list[str]:
    """The runs that were made, by the lines that say how they ended."""
    assert done.returncode == 0, done.stderr[-3000:]
    return [line.split(" ")[1].rstrip(":") for line in done.stdout.splitlines() if "min left" in line]


def test_two_tuned_methods(compare, tmp_path):
    """Two rates, one of which diverges; what is complete is kept, what was cut off is made again, alike."""
    folder = tmp_path / "all"
    options = ["--match", "parameters", "--grid", "optimizer.lr=1e-3,1e30", "--parallel", "2", "--keep-weights", "all"]
    names = [f"{arm}/optimizer.lr={rate},seed=42" for arm in ("lora", "bone") for rate in ("1e-3", "1e30")]
    first = compare("lora,bone", *options, forked=False)
    assert sorted(made(first)) == sorted(names)
    rows = list(csv.DictReader((folder / "grid.csv").open()))
    assert [(row["arm"], row["optimizer.lr"], row["status"]) for row in rows] == [
        ("lora", "1e-3", "complete"),
        ("lora", "1e30", "diverged"),
        ("bone", "1e-3", "complete"),
        ("bone", "1e30", "diverged"),
    ]
    assert [row["rank"] for row in rows] == ["1", "1", "2", "2"], "bone's nearest block"
    assert all(float(row["dw_entropy"]) >= 1 for row in rows[::2])
    assert json.loads((folder / "comparison.json").read_text())["rank_by"] == "loss"
    assert "1 / 1" in (folder / "table.md").read_text(), "one complete, one failed"
    assert (folder / "comparison.html").exists()
    curves = list(csv.DictReader((folder / "losses.csv").open()))
    starts = [float(row["loss"]) for row in curves if row["step"] == "1"]
    assert starts[0] == pytest.approx(starts[1], rel=1e-6), "the same records"

    (folder / names[0] / "result.json").unlink()  # as if it had been killed after its last checkpoint
    assert made(compare("lora,bone", *options)) == [names[0]]
    timed = {"step_seconds", "seconds", "tokens_per_second", "peak_memory_gib"}
    again = list(csv.DictReader((folder / "grid.csv").open()))
    assert [{k: v for k, v in row.items() if k not in timed} for row in again] == [
        {k: v for k, v in row.items() if k not in timed} for row in rows
    ]


def test_faults_of_all_runs_come_before_any(compare, tmp_path):
    done = compare("lora,bat,hdpissa+num_adapters=999", adapter__rank=2)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("titan_hd: error: ")]
    assert any("adapter.rank: method bat cuts weights" in line and line.endswith("(method bat)") for line in lines)
    assert any("singular directions" in line and "num_adapters=999)" in line for line in lines)
    assert not (tmp_path / "all").exists()


def test_a_grid_of_a_key_that_there_is_not(compare):
    done = compare("lora", "--grid", "optimizer.lrate=1:2:3")
    assert done.returncode == 2
    assert "optimizer.lrate" in done.stderr
    assert "Traceback" not in done.stderr
