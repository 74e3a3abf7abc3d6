"""tools/scaling.py: its arithmetic by hand, what its rows say, its faults. Its bytes: tests/distributed."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from dataclasses import replace

import estimate_memory
import pytest
import scaling
from scaling import common_options, main, recipe, recipes, settings, table
from step_costs import (
    Cluster,
    Estimate,
    Work,
    authors_estimate,
    best,
    compute_seconds,
    estimate,
    fsdp_gathers,
    host_seconds,
    memory_of,
    plan_of,
)

from tests.kit.commands import REPOSITORY, call_tool
from titan_hd.distributed.update.topology import Topology
from titan_hd.fitting import estimate_run
from titan_hd.models.registry import flavor_config, parameter_shapes

LLAMA_8B = Work(flavor_config("llama3", "8B"))
SMALL = Work(flavor_config("llama3", "debugmodel"), rank=2, length=64)
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


def test_memory_is_that_of_adapters_that_learn_from_all_samples():
    """Gradients and factors of all 1,024 directions; and of two blocks what is sent, with the holder's 64th."""
    few, block = replace(LLAMA_8B, tokens=8, length=8), sum(map(sum, LLAMA_8B.config.linear_shapes().values()))
    own, together = (
        memory_of(few, plan_of(few, Topology(64, 16, 8, 8, samples=samples), "factors")) for samples in ("own", "all")
    )
    assert own.held["gradients of all adapters"] == 0
    zeros = 4 * 1024 * 14336  # that stand for the deltas of any layer
    assert together.held["gradients of all adapters"] == 32 * 4 * 1024 * block + zeros
    assert together.held["their copies in the compute dtype"] == 32 * 2 * 1024 * block
    assert together.passing["gradients to their holders"] == 2 * (4 * 1024 * block + 4 * 16 * block)


def test_memory_is_that_of_the_model_and_shards_that_are_asked_for():
    """The estimate remembers a model and its groups. fp32 masters of what is adapted, and the rest in bf16."""
    for work, shards in ((LLAMA_8B, 8), (SMALL, 8), (SMALL, 2), (LLAMA_8B, 2)):
        adapted = sum(out * width for out, width in work.shapes().values())
        everything = sum(shape.numel() for shape in parameter_shapes(work.config).values())
        held = memory_of(work, plan_of(work, Topology(8, work.rank, 1, shards), "factors")).held
        assert held["weights"] == (4 * adapted + 2 * (everything - adapted)) / shards


def test_a_step_waits_for_what_is_not_hidden():
    """Gathers, launches and gradients of all samples run beside the compute; the fold and the host's gap do not."""
    row = Estimate(8, 8, "1 x 8", "factors", 1.0, 0.5, 0.2, 0.0, 0.0, 0.0, beside=0.25, host=0.9, gap=0.3)
    assert (row.step, row.efficiency, row.bound) == (1.5, pytest.approx(1 / 1.5), "compute")
    assert (replace(row, gathers=1.0).step, replace(row, gathers=1.0).bound) == (1.75, "gathers")
    assert (replace(row, host=2.0).step, replace(row, host=2.0).bound) == (2.5, "host")
    assert replace(row, exchange=3.0).bound == "exchange"


def test_the_host_launches_every_layer_of_every_micro_batch():
    """60.0 ms of 32 layers without checkpointing, 100.1 ms with "full", 5.6 ms of a step; docs/benchmarks.md."""
    work = replace(LLAMA_8B, micro_batches=3, checkpointing="none")
    assert host_seconds(work, CLUSTER) == pytest.approx((0.180, 0.0056))
    assert host_seconds(replace(work, checkpointing="full"), replace(CLUSTER, host=2.0)) == pytest.approx(
        (0.6006, 0.0112)
    )
    short = estimate(replace(LLAMA_8B, tokens=512), Topology(8, 16, 1, 8), "factors", CLUSTER)
    assert short.bound == "host", "512 tokens are computed in 0.08 s and launched in 0.1 s"


def test_a_model_that_fits_nowhere_is_said_to():
    """The mesh that needs least is shown."""
    lines = table(SMALL, [16], [4], replace(CLUSTER, memory=1.0)).splitlines()
    assert all(line.endswith("does not fit") for line in lines[1:])
    assert "1 x 16 " in lines[1]


@pytest.mark.parametrize("gpus", [1, 64])
def test_a_recipe_is_a_run_that_fits(gpus: int):
    """Its options are those of a run, which is dealt as it says and estimates the memory that it shows."""
    found = recipe(LLAMA_8B, gpus, 8, CLUSTER)
    words = shlex.split(f"{common_options(LLAMA_8B, 8, 'own')} {found.options()}")
    argv = [f"{key}={value}" for key, value in zip(words[::2], words[1::2])]
    plan = estimate_memory.plan_of(
        ["--model.name=llama3", "--model.flavor=8B", "--training.steps=1", "--data.train=x", *argv], gpus
    )
    assert f"{plan.dp_replicate} x {plan.dp_shard}" == found.row.mesh
    assert plan.global_batch_size == found.global_batch == max(8, gpus)
    assert estimate_run(plan, "cuda").total == found.row.memory < CLUSTER.memory
    assert found.row.step * found.tokens_per_second == pytest.approx(found.global_batch * 8192)


def test_a_recipe_takes_what_is_fastest_and_fits():
    """Without recomputation if there is room, and short of memory where not; bf16 masters if nothing else fits."""

    def given(room: float):
        return recipe(SMALL, 8, 8, replace(compute_alone, memory=room))

    compute_alone = replace(CLUSTER, nvlink=1e18, nvlink_latency=0.0, fold_rate=1e20, host=0.0)
    ways = {
        (masters, mode): best(
            replace(SMALL, tokens=64, masters=masters, checkpointing=mode), 8, 8, "auto", compute_alone
        ).memory
        for masters in ("float32", "bfloat16")
        for mode in ("none", "selective", "full")
    }
    roomy = given(ways["float32", "none"])
    assert (roomy.work.checkpointing, roomy.work.masters, roomy.short) == ("selective", "float32", False)
    tight = given(ways["float32", "full"])
    assert (tight.work.checkpointing, tight.work.masters, tight.short) == ("full", "float32", True)
    half = given(ways["bfloat16", "full"])
    assert (half.work.checkpointing, half.work.masters) == ("full", "bfloat16")
    assert given(ways["bfloat16", "full"] - 1) is None
    assert "does not fit, whatever is set" in recipes(SMALL, [8], 8, replace(CLUSTER, memory=1.0))


def test_a_global_batch_is_kept_on_more_gpus(monkeypatch):
    monkeypatch.setattr(scaling, "_SEQUENCES", (1, 4))
    rows = [recipe(SMALL, gpus, 4, CLUSTER, global_batch=32) for gpus in (1, 2, 8, 32)]
    assert {row.global_batch for row in rows} == {32}
    assert [row.work.micro_batches * row.sequences for row in rows] == [32, 16, 4, 1]
    assert rows[0].work.micro_batches % 4 == 0, "four adapters share the one GPU"
    lines = recipes(SMALL, [8, 64], 4, CLUSTER, global_batch=32).splitlines()
    assert lines[2].endswith("a global batch of 32 cannot be dealt to 64")
    assert "--training.global_batch_size 32 " in lines[-1]


def test_settings_beside_each_other():
    """More is exchanged where adapters learn from all samples, and slices anew come on top, once in a while."""
    _, *lines = settings(LLAMA_8B, [8], 8, CLUSTER).splitlines()
    assert [line.split()[5:7] for line in lines] == [[s, w] for s in ("own", "all") for w in ("never", "every")]
    exchanged, gradients, anew = ([float(line.split()[column]) for line in lines] for column in (-4, -3, -2))
    adapter = 4 * 16 * sum(sum(shape) for shape in LLAMA_8B.shapes().values())
    assert gradients == pytest.approx([0, 0, *[7 * adapter / 1e9] * 2], abs=5e-4)
    assert exchanged[2] - exchanged[0] == pytest.approx(gradients[2], abs=2e-3)
    weights = 7 / 8 * 4 * sum(out * width for out, width in LLAMA_8B.shapes().values())
    least = (weights + 7 * adapter) / 8 / 1e9  # beside the cache
    assert anew[0] == anew[2] == 0
    assert least < anew[1] < anew[3]


def test_command_line_and_its_faults():
    argv = ["--flavor", "debugmodel", "--rank", "2", "--gpus", "8,16", "--tokens", "64", "--length", "64"]
    command = [sys.executable, str(REPOSITORY / "tools" / "scaling.py"), *argv]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 2 + 3 + 5
    assert len(call_tool(main, *argv, "--settings").stdout.splitlines()) == 2 + 2 * 4
    for argv, line in {
        ("--flavor", "9B"): "model.flavor: must be one of",
        ("--local-steps", "2", "--samples", "all"): "--local-steps: a number of steps, at least 1, and above that with",
        ("--local-steps", "2", "--settings"): "--local-steps: not with --settings",
        ("--adapters", "3"): "--adapters: 3 adapters cannot be dealt to 8 GPUs; one number must divide the other",
        ("--gpus", "12"): "--gpus: 12 GPUs are not whole nodes of 8",
        ("--gpus", "8,x"): "--gpus: numbers with commas between them, such as 8,64, not '8,x'",
        ("--global-batch", "8"): "--global-batch: is for --recipe",
    }.items():
        done = call_tool(main, *argv)
        assert done.returncode == 2
        assert done.stderr.startswith(f"titan_hd: error: {line}")
        assert len(done.stderr.splitlines()) == 1


def test_without_a_model_recipes_are_for_two(monkeypatch):
    """And without numbers of GPUs for those of each."""
    monkeypatch.setattr(scaling, "_SEQUENCES", (1,))
    monkeypatch.setattr(scaling, "_GROWING", {"debugmodel": [1, 2], "8B": [4]})
    lines = call_tool(main, "--recipe", "--rank", 2, "--adapters", 4).stdout.splitlines()
    assert [line.split(",")[0] for line in lines if line.startswith("llama3")] == ["llama3 debugmodel", "llama3 8B"]
    assert [line.split()[0] for line in lines if re.match(r" +\d+ ", line)] == ["1", "2", "4"]
    assert [line.split(": ")[0].strip() for line in lines if ": --" in line] == ["all", "1", "2", "all", "4"]


@pytest.mark.slow
def test_the_page_shows_what_the_command_says():
    page = (REPOSITORY / "docs" / "scaling.md").read_text(encoding="utf-8")
    said = call_tool(main, "--recipe").stdout + call_tool(main, "--settings", "--gpus", "8,64").stdout
    rows = [line for line in said.splitlines() if re.match(r" *\d+ ", line)]
    assert len(rows) == 13 + 8
    for row in rows:
        assert f"    {row}\n" in page


def test_hours_of_an_epoch():
    """Two records of 512 tokens in each of 8 micro-batches on 8 GPUs are the paper's 128 records a step."""
    work = Work(LLAMA_8B.config, tokens=1024, length=512, micro_batches=8, records=395_000)
    assert work.epoch_hours(8, 24.88) == pytest.approx(395_000 / 128 * 24.88 / 3600)
    (row,) = (line.split() for line in table(work, [8], [8], CLUSTER).splitlines() if "factors" in line)
    assert float(row[-1]) == pytest.approx(work.epoch_hours(8, best(work, 8, 8, "factors", CLUSTER).step), abs=0.06)
    assert "hours" not in table(LLAMA_8B, [8], [8], CLUSTER)
