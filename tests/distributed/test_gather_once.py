"""W gathered once a step is W gathered for every micro-batch: the same numbers bit for bit, and far fewer bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from step_costs import fsdp_gathers
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.distributed.tensor import DTensor

from tests.kit import runs
from tests.kit.gathers import Gathers
from titan_hd.distributed import weight_gathers
from titan_hd.distributed.shards import base_parameters
from titan_hd.models.registry import read_hf_config

SETTINGS = ("always", "never", "default")
MICRO_BATCHES = 4  # of each of two workers


def counted_step(argv: list[str]) -> tuple[list[int], bool]:
    """Bytes of each all-gather of the second step's forward and backward passes; whether fold and optimizer met
    shards."""
    run = runs.trainer(argv)
    run.train_step()
    gathers, apply, sharded = Gathers(), run.update.apply, []

    def uncounted(*args):
        gathers.counting = False
        sharded.append(all(isinstance(p, DTensor) for _, p in base_parameters(run.model)))
        apply(*args)

    run.update.apply = uncounted
    with gathers:
        run.train_step()
    run.close()
    return gathers.received, all(sharded)


def argv(folder: Path, name: str, **changes) -> list[str]:
    if not (folder / "records.jsonl").exists():
        runs.write_records(folder / "records.jsonl")
        runs.write_model(folder / "model", num_key_value_heads=2, intermediate_size=38)
        runs.write_model(folder / "tied", num_key_value_heads=2, intermediate_size=38, tie_word_embeddings=True)
    base = {"hdpissa__num_adapters": 2, "training__global_batch_size": 8, "training__steps": 4}
    model = folder / ("tied" if changes.pop("tied", False) else "model")
    return runs.options(model, folder / "records.jsonl", folder / name, **{**base, **changes})


@pytest.mark.parametrize("method", ["hdpissa", "full"])
def test_bytes_of_a_step(method, workers, tmp_path: Path):
    """Never: each group once, whatever the number of micro-batches. Always: forward and backward of each of them."""
    counts = {}
    for setting in ("always", "never"):
        changes = {"adapter__method": method, "parallelism__fsdp_reshard_after_forward": setting}
        if method == "full":
            changes["hdpissa__num_adapters"] = 0
        for gathers, sharded in workers.run(2, counted_step, argv(tmp_path, setting, **changes)):
            counts[setting] = gathers
            assert sharded
    config = read_hf_config(tmp_path / "model")
    assert sorted(counts["never"]) == sorted(fsdp_gathers(config, 2, 4, passes=1))
    assert sorted(counts["always"]) == sorted(fsdp_gathers(config, 2, 4, method == "full") * MICRO_BATCHES)
    whole = sum(p.numel() for p in runs.Decoder(config).parameters()) * 4
    assert sum(counts["never"]) * 2 == pytest.approx(whole, rel=0.05)  # padding of odd rows


CASES = {
    "one": (1, {}),
    "two": (2, {}),
    "tied": (2, {"tied": True}),
    "full": (2, {"adapter__method": "full", "hdpissa__num_adapters": 0}),
    "full-tied": (2, {"adapter__method": "full", "hdpissa__num_adapters": 0, "tied": True}),
    "lora": (1, {"adapter__method": "lora", "hdpissa__num_adapters": 0, "adapter__dropout": 0.1}),
    "hsdp": (4, {"parallelism__data_parallel_replicate_degree": 2}),
    "tp": (4, {"parallelism__tensor_parallel_degree": 2}),
    "recompute": (2, {"activation_checkpoint__mode": "full"}),
    "one-micro-batch": (2, {"training__global_batch_size": 2}),
}


SLOW = ("one", "two", "tied", "full", "one-micro-batch")  # the others have what these have: hsdp two shards


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow if c in SLOW else ()) for c in CASES])
def test_settings_train_alike(case, workers, tmp_path: Path):
    """With a validation between steps, which gathers too, and a resume from a checkpoint of the middle."""
    world, changes = CASES[case]
    runs.write_records(tmp_path / "validation.jsonl", count=8, seed=1)
    validation = {"validation__enable": "true", "validation__freq": 1}
    validation["data__validation"] = tmp_path / "validation.jsonl"
    losses, logged = {}, {}
    for setting in SETTINGS:
        changes = {**changes, **validation, "parallelism__fsdp_reshard_after_forward": setting}
        saving = argv(tmp_path, setting, checkpoint__enable="true", checkpoint__interval=2, **changes)
        losses[setting] = workers.run(world, runs.train, saving)[0]
        lines = map(json.loads, (tmp_path / setting / "metrics.jsonl").read_text().splitlines())
        logged[setting] = [(line.get("grad_norm"), line.get("validation_loss")) for line in lines]
        resumed = argv(tmp_path, f"{setting}-resumed", checkpoint__enable="true", **changes)
        middle = Path("checkpoint", "step-2")
        shutil.copytree(tmp_path / setting / middle, tmp_path / f"{setting}-resumed" / middle)
        assert workers.run(world, runs.train, resumed)[0] == losses[setting][2:]
    assert losses["always"] == losses["never"] == losses["default"]
    assert logged["always"] == logged["never"] == logged["default"]
    exported = [runs.load_file(tmp_path / s / "hf" / "model.safetensors") for s in SETTINGS]
    assert all(torch.equal(exported[0][name], other[name]) for other in exported[1:] for name in exported[0])


def decided(argv: list[str], available: list[int]) -> tuple[bool, int]:
    """Whether a run keeps W gathered where this worker has so much memory, and the copy's size."""
    rank = torch.distributed.get_rank()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_gathers, "available_memory", lambda: available[rank])
        patch.setenv("LOCAL_WORLD_SIZE", "2")
        run = runs.trainer(argv)
        assert not run.gathers.kept
        run.train_step()
    run.close()
    return run.gathers.kept, run.gathers.copy_bytes


def test_default_decides_by_memory_and_all_workers_alike(workers, tmp_path: Path):
    plenty = 2**40
    both = workers.run(2, decided, argv(tmp_path, "both"), [plenty, plenty])
    one = workers.run(2, decided, argv(tmp_path, "one"), [plenty, 0])
    single = workers.run(2, decided, argv(tmp_path, "single", training__global_batch_size=2), [plenty, plenty])
    assert [kept for kept, _ in both + one + single] == [True, True, False, False, False, False]
    whole = sum(p.numel() for p in runs.Decoder(read_hf_config(tmp_path / "model")).parameters()) * 4
    assert both[0][1] == pytest.approx(whole, rel=0.05)


def counted_sums(argv: list[str]) -> tuple[int, int]:
    """How often a step sums gradients over workers, and the FSDP2 groups that have something to sum."""
    run = runs.trainer(argv)
    run.train_step()
    with pytest.MonkeyPatch.context() as patch:
        calls, original = [], _fsdp_param_group.foreach_reduce
        patch.setattr(_fsdp_param_group, "foreach_reduce", lambda *a, **k: calls.append(1) or original(*a, **k))
        run.train_step()
    run.close()
    layers = len(run.model.model.layers)
    return len(calls), layers + 2 if run.model.lm_head.weight.requires_grad else layers  # embedding; norm and head


@pytest.mark.parametrize(
    ("world", "replicate", "method", "once"),
    [(1, 1, "full", True), (2, 2, "full", True), (2, 1, "full", False), (2, 1, "lora", True)],
)
def test_gradients_are_summed_once_where_that_costs_little(world, replicate, method, once, workers, tmp_path: Path):
    """Of all of W in shards they are not: each worker would hold the whole gradient."""
    changes = {"adapter__method": method, "hdpissa__num_adapters": 0, "training__local_batch_size": 1}
    if method == "lora":
        changes["adapter__target_modules"] = "q_proj"
    options = argv(tmp_path, "sums", parallelism__data_parallel_replicate_degree=replicate, **changes)
    micro_batches = 8 // world
    for calls, groups in workers.run(world, counted_sums, options):
        assert calls == groups * (1 if once else micro_batches)
