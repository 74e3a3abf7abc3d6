"""The benchmarks run, at sizes that say nothing about speed, and their variants agree with each other."""

from __future__ import annotations

import json
import os

import pytest

from tests.kit.forked import run_forked

TINY = {
    "linear": "--in-features 24 --out-features 16 --tokens 32 --hidden 64 --intermediate 48 --head-dim 8 --seq-len 16 "
    "--rank 2 --threads 1 --repetitions 1",
    "methods": "--hidden 32 --intermediate 48 --head-dim 8 --tokens 32 --seq-len 16 --rank 2 --repetitions 1",
    "update": "--cases 24x40k8r2 --workers 2 --repetitions 1",
    "tokenize": "--records 60 --num-proc 1 2",
    "loader": "--records 60 --mean-length 20 --seq-len 64 --seconds 0.05 --num-workers 0 1 --pack 50",
    "checkpoint": "--megabytes 5 --workers 2 --saves 1",
    "save_planning": "--flavor debugmodel --mesh 2x4 --adapters 2",
    "tensor_parallel": "--hidden 128 --intermediate 32 --layers 1 --vocabulary 32 --tokens 9 --repetitions 1",
    "loss": "--tokens 32 --hidden 16 --vocabulary 50 --repetitions 1",
    "checkpointing": "--layers 2 --repetitions 1",
    "host": "--repetitions 1",
    "adapter_shards": "--layers 2 --hidden 16 --rank 2 --micro-batches 2 --repetitions 1",
    "step": "--flavor llama3/debugmodel --tokens 16 --rank 2 --steps 1 --methods hdpissa,lora,full",
    "peers": "--flavor llama3/debugmodel --tokens 16 --rank 2 --micro-batches 2 --rounds 1 --profile "
    "--arms authors,hdpissa",
    "svd": "--sizes 48x32 --count 8 --threads 1 --repetitions 1",
}


@pytest.mark.parametrize("name", TINY)
def test_it_runs_and_ends_with_a_line_for_machines(name: str):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = run_forked(f"benchmarks.bench_{name}", *TINY[name].split(), environment=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    said = json.loads(done.stdout.strip().splitlines()[-1])
    if name == "tensor_parallel":
        losses = [result["loss"] for result in said["results"].values()]
        assert losses == pytest.approx([losses[0]] * 4, rel=1e-5)
    if name == "save_planning":
        planned = said["results"]["2 x 4"]
        # The shards of the first replica, and the first of four ranks for each adapter: ranks 0 to 3, and 4.
        weights, adapters = 12, 3 * 2 * 7  # A, B and their moments of seven layers of a block
        assert planned["writers"] == 5
        assert planned["most_items"] == weights + adapters + 1
        assert planned["items"] == 4 * weights + 2 * adapters + 1
    if name == "update":
        for variant, result in said["results"]["cases"]["24x40k8r2"].items():
            if variant != "products":
                limit = 1e-2 if "int8" in variant else 1e-5  # half a step of 127 in the largest element, twice
                assert result["difference"] < limit, f"{variant} is another update than the authors'"
