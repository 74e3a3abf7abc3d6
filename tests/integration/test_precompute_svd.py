"""The cache filled offline is the one that a run reads: no SVD is computed twice."""

import json
import subprocess
import sys

import pytest

from tests.kit import runs
from tests.kit.commands import REPOSITORY, call_tool, error_lines
from tools import precompute_svd


@pytest.mark.parametrize("method", ["hdpissa", pytest.param("pissa", marks=pytest.mark.slow)])
def test_a_run_after_precompute_svd_computes_nothing(method, workers, tmp_path):
    runs.write_model(tmp_path / "model")
    runs.write_records(tmp_path / "records.jsonl")
    argv = runs.options(
        tmp_path / "model",
        tmp_path / "records.jsonl",
        tmp_path / "dump",
        adapter__method=method,
        hdpissa__num_adapters=2,
        hdpissa__slices="minor",  # which pissa does not read
        adapter__svd_cache=tmp_path / "cache",
        training__global_batch_size=2,
        training__steps=1,
    )
    tool = [sys.executable, str(REPOSITORY / "tools" / "precompute_svd.py")]
    shares = [
        call_tool(precompute_svd.main, "--share", "0/2", *argv),
        subprocess.run([*tool, "--share", "1/2", *argv], capture_output=True, text=True, check=True),
    ]
    reports = [json.loads(line) for share in shares for line in share.stdout.splitlines()]
    assert len(reports) == 14
    assert not any(r["cached"] for r in reports)

    workers.run(2, runs.train, argv)
    used = [json.loads(line) for line in (tmp_path / "dump" / "svd.jsonl").read_text().splitlines()]
    assert len(used) == 14
    assert all(r["cached"] for r in used)

    (line,) = error_lines(call_tool(precompute_svd.main, *argv[:-1], "--adapter.svd_cache="))
    assert "adapter.svd_cache: is missing" in line
