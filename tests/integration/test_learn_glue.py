"""A small encoder, trained in house, learns GLUE's tasks above the share of the largest class."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent.parent


@pytest.mark.slow
def test_above_the_largest_class(shared_data: Path, tmp_path: Path):
    """Matthews' correlation for CoLA, where the largest class has 0; accuracy for the others. As docs/reproduce.md has
    it, minutes of one core."""
    pytest.importorskip("sklearn")
    command = [sys.executable, "-m", "benchmarks.learn_glue", "--glue", shared_data / "glue", "--out", tmp_path / "out"]
    run = subprocess.run(
        [*map(str, command)],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = re.findall(
        r"(\w+): accuracy ([\d.]+) \(largest class ([\d.]+)\), F1 [\d.]+, Matthews (-?[\d.]+)", run.stdout
    )
    values = {name: tuple(map(float, rest)) for name, *rest in found}
    assert values.keys() == {"mrpc", "cola", "rte"}
    for name in ("mrpc", "rte"):
        accuracy, largest, _ = values[name]
        assert accuracy > largest, run.stdout
    assert values["cola"][2] > 0, run.stdout
