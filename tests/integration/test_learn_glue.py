"""A small encoder learns a task of GLUE, from its files as they are published, far above the largest class."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kit.commands import CPU_ONLY, REPOSITORY


@pytest.mark.slow
def test_far_above_the_largest_class(shared_data: Path, tmp_path: Path):
    """Two minutes of a core."""
    pytest.importorskip("sklearn")
    command = [sys.executable, "-m", "benchmarks.learn_glue", "--glue", shared_data / "glue", "--out", tmp_path / "out"]
    run = subprocess.run(command, cwd=REPOSITORY, env=CPU_ONLY, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    accuracy, largest = re.search(r"sst2: accuracy ([\d.]+) \(largest class ([\d.]+)\)", run.stdout).groups()
    assert float(accuracy) > float(largest) + 0.15
