"""The cache filled offline is the one that a run reads: no SVD is computed twice."""

import json
import subprocess
import sys

import pytest

from tests.kit import runs
from tests.kit.commands import REPOSITORY


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
        adapter__svd_cache=tmp_path / "cache",
        training__global_batch_size=2,
        training__steps=1,
    )
    tool = [sys.executable, str(REPOSITORY / "tools" / "precompute_svd.py")]
    outputs = [
        subprocess.run([*tool, "--share", share, *argv], capture_output=True, text=True, check=True).stdout
        for share in ("0/2", "1/2")
    ]
    reports = [json.loads(line) for text in outputs for line in text.splitlines()]
    assert len(reports) == 14
    assert not any(r["cached"] for r in reports)

    workers.run(2, runs.train, argv)
    used = [json.loads(line) for line in (tmp_path / "dump" / "svd.jsonl").read_text().splitlines()]
    assert len(used) == 14
    assert all(r["cached"] for r in used)

    refused = subprocess.run([*tool, *argv[:-1], "--adapter.svd_cache="], capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "adapter.svd_cache: is missing" in refused.stderr
