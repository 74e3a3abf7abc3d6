"""tools/scaling.py: its arithmetic by hand, what its rows say, its faults. Its bytes: tests/distributed."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from tests.kit.commands import REPOSITORY, call_tool
from titan_hd.distributed.update.plan import plan_update
from titan_hd.distributed.update.topology import Topology
from titan_hd.models.registry import flavor_config
from tools.scaling import (
    Cluster,
    Work,
    authors_estimate,
    best,
    compute_seconds,
    estimate,
    fsdp_gathers,
    main,
    passing_bytes,
    table,
)

LLAMA_8B = Work(flavor_config("llama3", "8B"))
CLUSTER = Cluster()


def test_rings_use_the_links_of_all_members_of_a_node():
    cluster = Cluster(nvlink_latency=0.0, network_latency=0.0)
    assert cluster.ring(450e9, 8, 8) == 1.0
    assert cluster.ring(400e9, 64, 8) == 1.0, "eight links of 50 GB/s bring a node its data"
    assert cluster.ring(50e9, 8, 1) == 1.0
    assert cluster.all_to_all(50e9, 8, 1) == 1.0
    assert cluster.all_to_all(63e9, 64, 8) == pytest.approx(56 / 50), "56 of 63 parts come from other nodes"
    assert cluster.ring(1e9, 1, 1) == cluster.all_to_all(1e9, 1, 1) == 0.0
    assert CLUSTER.ring(0.0, 64, 8) == pytest.approx(7 * 5e-6 + 56 * 1e-6)


def test_gathers_of_llama_8b_by_hand():
    """On 8 shards: 7/8 of everything once in bf16, of the blocks twice; a trained embedding twice."""
    embedding = 128256 * 4096
    blocks = 32 * (2 * 4096**2 + 2 * 1024 * 4096 + 3 * 14336 * 4096 + 2 * 4096)
    once = embedding + 2 * blocks + (embedding + 4096)
    assert sum(fsdp_gathers(LLAMA_8B.config, 8, 2)) == 2 * once * 7 // 8
    assert sum(fsdp_gathers(LLAMA_8B.config, 8, 2, trained=True)) == 2 * (once + embedding) * 7 // 8
    assert len(fsdp_gathers(LLAMA_8B.config, 8, 2)) == 1 + 2 * 32 + 1


def test_compute_is_4n_and_the_recomputed_forward():
    """Blocks of 6.98e9 elements and a head of 0.525e9; attention of 8,192 tokens; a dense gradient is 2N more."""
    per_second = CLUSTER.peak * CLUSTER.utilisation / LLAMA_8B.tokens
    blocks = 32 * (2 * 4096**2 + 2 * 1024 * 4096 + 3 * 14336 * 4096)
    model = 4 * (blocks + 128256 * 4096) + 12 * 4096 * 8192 * 32 + 4 * 41.9e6
    again = 2 * blocks + 4 * 4096 * 8192 * 32
    assert compute_seconds(LLAMA_8B, CLUSTER) == pytest.approx((model + again) / per_second, rel=1e-4)
    dense = compute_seconds(LLAMA_8B, CLUSTER, dense_gradient=True) - compute_seconds(LLAMA_8B, CLUSTER)
    assert dense == pytest.approx(2 * blocks / per_second)


def test_more_gpus_cost_little_at_a_fixed_k():
    steps = [best(LLAMA_8B, gpus, 8, "factors", CLUSTER) for gpus in (8, 64, 512, 4096)]
    assert all(step.memory < CLUSTER.memory for step in steps)
    assert all(step.efficiency > 0.95 for step in steps)
    assert [step.gpus for step in steps] == [8, 64, 512, 4096]


def test_the_authors_scheme_grows_with_the_gpus():
    eight, many = (authors_estimate(LLAMA_8B, gpus, CLUSTER) for gpus in (8, 64))
    assert many.exchanged == pytest.approx(9 * eight.exchanged)
    ours = estimate(LLAMA_8B, Topology(64, 16, 1, 64), "factors", CLUSTER)
    assert many.exchange > 5 * ours.exchange
    assert "impossible: K * r = 2048 singular directions, the smallest weight has 1024" in table(
        LLAMA_8B, [128], [8], CLUSTER
    )


def test_int8_on_the_way_is_a_quarter_of_the_bytes():
    slow = Cluster(node=1, network=0.125e9)
    whole, rounded = (best(replace(LLAMA_8B, wire_bytes=size), 8, 8, "factors", slow) for size in (4, 1))
    assert whole.exchanged / rounded.exchanged == pytest.approx(4, rel=0.01)
    assert whole.exchange / rounded.exchange == pytest.approx(4, rel=0.01)
    sharing = [best(replace(LLAMA_8B, wire_bytes=size), 16, 8, "factors", slow).exchanged for size in (4, 1)]
    hosted = 4 * 16 * sum(sum(shape) for shape in LLAMA_8B.shapes().values())
    assert sharing[1] > hosted, "what two workers sum of an adapter's gradients stays in fp32"


def test_local_steps_divide_the_fold_alone():
    """Sixteen GPUs, of which two share an adapter: what these sum in every step stays."""
    slow, t = Cluster(node=2, network=0.125e9), Topology(8, 16, 8, 2)
    every, fourth = (
        estimate(replace(LLAMA_8B, local_steps=n), replace(t, local_steps=n), "factors", slow) for n in (1, 4)
    )
    shared = 4 * 16 * sum(sum(shape) for shape in LLAMA_8B.shapes().values())
    assert fourth.exchanged - shared == (every.exchanged - shared) / 4
    sums = 2 * slow.ring(shared / 2, 2, 2)
    assert fourth.exchange - sums == pytest.approx((every.exchange - sums) / 4)
    ten, four = (compute_seconds(replace(LLAMA_8B, local_steps=n), CLUSTER) for n in (4, 1))
    added = LLAMA_8B.tokens * 6 * shared / 4 / (CLUSTER.peak * CLUSTER.utilisation)
    assert ten - four == pytest.approx(added)


@pytest.mark.parametrize("samples", ["own", "all"])
def test_bytes_of_one_adapter_are_its_gradients(samples: str):
    """Eight GPUs add up what they have of its gradient, and nobody else's update comes."""
    t = Topology(1, 16, 1, 8, samples=samples)
    adapter = 4 * 16 * sum(sum(shape) for shape in LLAMA_8B.shapes().values())
    assert estimate(LLAMA_8B, t, "factors", CLUSTER).exchanged == 2 * 7 * adapter // 8


def test_gradients_on_their_way_take_memory():
    """Of two blocks what is sent, fp32 and 1,024 directions, and the holder's 64th; seen where logits are few."""
    few, block = replace(LLAMA_8B, tokens=8, length=8), sum(map(sum, LLAMA_8B.config.linear_shapes().values()))
    own, together = (
        passing_bytes(few, plan_update(few.shapes(), Topology(64, 16, 8, 8, samples=samples), "factors"))
        for samples in ("own", "all")
    )
    logits = 8 * 128256 * (2 + 3 * 4)
    assert together - own == 2 * (4 * 1024 * block + 4 * 16 * block) - logits


def test_a_model_that_fits_nowhere_is_said_to():
    assert "does not fit" in table(Work(flavor_config("llama3", "70B")), [8], [8], CLUSTER)


def test_command_line_and_its_faults():
    argv = ["--flavor", "debugmodel", "--rank", "2", "--gpus", "8,16", "--tokens", "64", "--length", "64"]
    command = [sys.executable, str(REPOSITORY / "tools" / "scaling.py"), *argv]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 2 + 3 + 5
    for argv, line in {
        ("--flavor", "9B"): "model.flavor: must be one of",
        ("--local-steps", "2", "--samples", "all"): "--local-steps: a number of steps, at least 1, and above that with",
        ("--adapters", "3"): "--adapters: 3 adapters cannot be dealt to 8 GPUs; one number must divide the other",
    }.items():
        done = call_tool(main, *argv)
        assert done.returncode == 2
        assert done.stderr.startswith(f"titan_hd: error: {line}")
        assert len(done.stderr.splitlines()) == 1


def test_hours_of_an_epoch():
    """Two records of 512 tokens in each of 8 micro-batches on 8 GPUs are the paper's 128 records a step."""
    work = Work(LLAMA_8B.config, tokens=1024, length=512, micro_batches=8, records=395_000)
    assert work.epoch_hours(8, 24.88) == pytest.approx(395_000 / 128 * 24.88 / 3600)
    (row,) = (line.split() for line in table(work, [8], [8], CLUSTER).splitlines() if "factors" in line)
    assert float(row[-1]) == pytest.approx(work.epoch_hours(8, best(work, 8, 8, "factors", CLUSTER).step), abs=0.06)
    assert "hours" not in table(LLAMA_8B, [8], [8], CLUSTER)
