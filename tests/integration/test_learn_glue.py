"""A small encoder learns tasks of GLUE, from its files as they are published, above the largest class."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kit.commands import CPU_ONLY, REPOSITORY


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "task", "more"),
    [((), "sst2", 0.15), (("--steps", "2000", "--tasks", "mrpc"), "mrpc", 0.02)],
    ids=["random-weights", "own-training"],
)
def test_above_the_largest_class(options, task: str, more: float, shared_data: Path, tmp_path: Path):
    """Two minutes of a core, and ten."""
    pytest.importorskip("sklearn")
    words = ["--glue", shared_data / "glue", "--out", tmp_path / "out", *options]
    command = [sys.executable, "-m", "benchmarks.learn_glue", *words]
    run = subprocess.run(command, cwd=REPOSITORY, env=CPU_ONLY, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    accuracy, largest = re.search(rf"{task}: accuracy ([\d.]+) \(largest class ([\d.]+)\)", run.stdout).groups()
    assert float(accuracy) > float(largest) + more
