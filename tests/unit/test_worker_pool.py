"""The tests' own pool of workers."""

import os
from pathlib import Path

import pytest


def die(said: Path) -> None:
    os.dup2(os.open(said, os.O_CREAT | os.O_WRONLY), 2)
    os.abort()


def test_a_worker_that_dies_fails_one_test(workers, tmp_path: Path):
    with pytest.raises(RuntimeError, match="rank 0 of 1 ended with status -6"):
        workers.run(1, die, tmp_path / "said")
    said = (tmp_path / "said").read_text()
    assert "in _serve" in said, "where it was in Python"
    assert "frame #" in said, "and in C++"
    assert len(set(workers.run(2, os.getpid))) == 2, "new ones"
