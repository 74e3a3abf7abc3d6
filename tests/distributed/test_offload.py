"""Weights and moments on the host: the same numbers bit for bit, and checkpoints that either kind of run goes on from.

On a CPU the host is the device as well, but what is taken there and back is copied as it is for a GPU.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.fsdp import CPUOffloadPolicy

from tests.kit import runs
from titan_hd.components import host_moments

WEIGHTS = {"training__enable_cpu_offload": "true"}
MOMENTS = {"hdpissa__offload_moments": "true"}
HDPISSA = {"hdpissa__num_adapters": 4, "optimizer__weight_decay": 0.1, "training__max_norm": 1.0}
CASES = {
    "weights": (2, WEIGHTS, HDPISSA),
    "weights-bf16": (2, WEIGHTS, HDPISSA | {"training__master_dtype": "bfloat16", "hdpissa__exchange": "dense"}),
    "moments": (2, MOMENTS, HDPISSA),
    "moments-sgd": (1, MOMENTS, HDPISSA | {"optimizer__name": "SGD"}),
    "moments-adagrad": (1, MOMENTS, HDPISSA | {"optimizer__name": "Adagrad"}),
    "moments-radam": (1, MOMENTS, HDPISSA | {"optimizer__name": "RAdam"}),
    "both": (
        4,
        WEIGHTS | MOMENTS,
        HDPISSA | {"hdpissa__refresh_steps": 2, "parallelism__data_parallel_replicate_degree": 2},
    ),
    "tp": (2, WEIGHTS | MOMENTS, HDPISSA | {"parallelism__tensor_parallel_degree": 2}),
    "lora": (2, WEIGHTS, {"adapter__method": "lora"}),
    "pissa": (2, WEIGHTS, {"adapter__method": "pissa"}),
    "full": (2, WEIGHTS, {"adapter__method": "full", "training__max_norm": 1.0}),
}


def argv(folder: Path, name: str, **changes) -> list[str]:
    if not (folder / "records.jsonl").exists():
        runs.write_records(folder / "records.jsonl")
        runs.write_model(folder / "model", num_key_value_heads=2, intermediate_size=38)
    base = {"training__global_batch_size": 8}
    return runs.options(folder / "model", folder / "records.jsonl", folder / name, **{**base, **changes})


def train(argv: list[str], stop_after: int | None = None) -> list[float]:
    """As `runs.train`, with moments in parts so small that there are several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_moments, "PART_ELEMENTS", 256)
        return runs.train(argv, stop_after)


@pytest.mark.parametrize("case", CASES)
def test_nothing_changes(case: str, workers, tmp_path: Path):
    world, offload, changes = CASES[case]
    want = workers.run(world, train, argv(tmp_path, "here", **changes))[0]
    assert workers.run(world, train, argv(tmp_path, "host", **changes, **offload))[0] == want
    exported = [runs.load_file(tmp_path / name / "hf" / "model.safetensors") for name in ("here", "host")]
    assert all(torch.equal(exported[0][name], exported[1][name]) for name in exported[0])


@pytest.mark.parametrize("case", ["both", "full"])
@pytest.mark.parametrize("begins", ["here", "host"])
def test_a_run_goes_on_from_the_others_checkpoint(case: str, begins: str, workers, tmp_path: Path):
    world, offload, changes = CASES[case]
    whole = workers.run(world, train, argv(tmp_path, "whole", **changes))[0]
    saving = {**changes, "checkpoint__enable": "true"}
    first, then = (saving, saving | offload) if begins == "here" else (saving | offload, saving)
    losses = workers.run(world, train, argv(tmp_path, "dump", **first), 2)[0]
    assert losses + workers.run(world, train, argv(tmp_path, "dump", **then))[0] == whole


def where(argv: list[str]) -> tuple[bool, int, int]:
    """Whether every group of FSDP2 has its shards on the host; parts of the moments; elements of the deltas."""
    run = runs.trainer(argv)
    run.train_step()
    groups = [m._get_fsdp_state()._fsdp_param_group for m in run.model.modules() if hasattr(m, "_get_fsdp_state")]
    offloaded = all(isinstance(group.offload_policy, CPUOffloadPolicy) for group in groups if group)
    moments = run.update.optimizer
    assert isinstance(moments, host_moments.HostMoments)
    kept = moments.state[run.update.registry.deltas]
    assert {tuple(kept[key].shape) for key in ("exp_avg", "exp_avg_sq")} == {tuple(run.update.registry.deltas.shape)}
    assert not moments.optimizer.state, "nothing of it stays on the device"
    run.close()
    return offloaded, len(moments.parts), run.update.registry.deltas.numel()


def shared_moments(argv: list[str]) -> list[bool]:
    """Of a mesh of GPUs: whether each tensor of the optimizer that a checkpoint names is the optimizer's own memory."""
    run = runs.trainer(argv)
    run.train_step()
    own = {
        value.untyped_storage().data_ptr() for value in run.update.optimizer.state[run.update.registry.deltas].values()
    }
    run.update.registry.mesh._device_type = "cuda"
    state = run.update.state(changed_only=False)
    run.close()
    moments = [value for key, value in state.items() if key.startswith("optimizer.") and value.dim()]
    return [moment.to_local().untyped_storage().data_ptr() in own for moment in moments]


def test_a_checkpoint_is_read_into_the_moments_on_the_host(workers, tmp_path: Path):
    """Not into copies of them on the GPU, which nobody looks at again."""
    for shared in workers.run(2, shared_moments, argv(tmp_path, "dump", **HDPISSA, **MOMENTS)):
        assert len(shared) == 2 * 2 * 14, "two moments of dA and dB of 14 layers"
        assert all(shared)


def test_what_lies_on_the_host(workers, tmp_path: Path, monkeypatch):
    ((offloaded, parts, elements),) = workers.run(1, where, argv(tmp_path, "dump", **HDPISSA, **WEIGHTS, **MOMENTS))
    assert offloaded
    assert parts == -(-elements // host_moments.PART_ELEMENTS)


def test_a_state_that_comes_with_the_optimizer_does_not_stay_on_the_device():
    parameter = torch.nn.Parameter(torch.zeros(5))
    moments = host_moments.HostMoments(
        parameter, lambda parts: torch.optim.Adagrad(parts, initial_accumulator_value=0.5)
    )
    assert not moments.optimizer.state
    assert moments.state[parameter]["sum"].tolist() == [0.5] * 5
