"""The tests' own pool of workers."""

import os

import pytest


def test_a_worker_that_dies_fails_one_test(workers, capfd: pytest.CaptureFixture[str]):
    with pytest.raises(RuntimeError, match="rank 0 of 1 ended with status -6"):
        workers.run(1, os.abort)
    said = capfd.readouterr().err
    assert "in _serve" in said, "where it was in Python"
    assert "frame #" in said, "and in C++"
    assert workers.run(1, os.getpid) != workers.run(2, os.getpid)[1]
