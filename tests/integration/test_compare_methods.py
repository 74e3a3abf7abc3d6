"""tools/compare_methods.py as a user runs it: tables, runs that are not repeated, one that was cut off, bad input."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import pytest

from tests.kit import runs
from tests.kit.commands import CPU_ONLY, REPOSITORY


@pytest.fixture
def compare(tmp_path):
    runs.write_model(tmp_path / "model")
    runs.write_records(tmp_path / "records.jsonl")
    (tmp_path / "run.toml").write_text("[metrics]\nprogress_bar = false\n")

    def call(methods: str, *more: str, **overrides) -> subprocess.CompletedProcess:
        options = runs.options(tmp_path / "model", tmp_path / "records.jsonl", tmp_path, **overrides)
        arguments = ["--methods", methods, "--folder", str(tmp_path / "all"), "--workers", "1", *more]
        return subprocess.run(
            [sys.executable, "tools/compare_methods.py", *arguments, "--config", str(tmp_path / "run.toml"), *options],
            cwd=REPOSITORY,
            env={**CPU_ONLY, "PYTHON": sys.executable},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    return call


def started(done: subprocess.CompletedProcess) -> list[str]:
    assert done.returncode == 0, done.stderr[-3000:]
    return [line.removeprefix("== ") for line in done.stdout.splitlines() if line.startswith("== ")]


def test_two_methods_side_by_side(compare, tmp_path):
    names, folder = ["lora", "bone+optimizer.lr=1e-3"], tmp_path / "all"
    assert started(compare(",".join(names), "--match", "parameters")) == names
    rows = list(csv.DictReader((folder / "table.csv").open()))
    assert [row["run"] for row in rows] == names
    assert [row["rank"] for row in rows] == ["1", "2"], "bone's nearest block"
    assert rows[0]["step time / lora"] == "1.00"
    assert all(float(row["dW: entropy rank"]) >= 1 for row in rows)
    records = {n: (folder / n / "metrics.jsonl").read_text().splitlines() for n in names}
    first = {n: json.loads(lines[0]) for n, lines in records.items()}
    assert first["lora"]["loss"] == pytest.approx(first[names[1]]["loss"], rel=1e-6), "the same records"

    (folder / "lora" / "complete").unlink()  # as if it had been cut off after its last checkpoint
    assert started(compare(",".join(names), "--match", "parameters")) == ["lora"]
    assert (folder / "lora" / "metrics.jsonl").read_text().splitlines() == records["lora"]


def test_faults_of_all_runs_come_before_any(compare, tmp_path):
    done = compare("lora,bat,hdpissa+num_adapters=999", adapter__rank=2)
    assert done.returncode == 2
    lines = [line for line in done.stderr.splitlines() if line.startswith("titan_hd: error: ")]
    assert any("adapter.rank: method bat cuts weights" in line and line.endswith("(method bat)") for line in lines)
    assert any("singular directions" in line and "num_adapters=999)" in line for line in lines)
    assert not (tmp_path / "all").exists()
