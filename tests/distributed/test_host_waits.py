"""How often a host waits for its device in a step: once. And what that one look prevents."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from tests.kit import runs
from tests.kit.waits import HostWaits
from titan_hd.components import host_moments, update
from titan_hd.distributed.parallel_dims import local_part


def argv(folder: Path, name: str, **changes) -> list[str]:
    if not (folder / "records.jsonl").exists():
        runs.write_records(folder / "records.jsonl")
        runs.write_model(folder / "model", num_key_value_heads=2, intermediate_size=38)
    base = {"training__global_batch_size": 8, "training__max_norm": 1.0}
    return runs.options(folder / "model", folder / "records.jsonl", folder / name, **{**base, **changes})


def waits_of_a_step(argv: list[str]) -> list[str]:
    """Of the third step. On a GPU batches, counts of tokens, and the optimizer's count of steps lie on the host, and
    the host does not ask for the norm before the optimizer's step: a fused one does that on the GPU."""
    run = runs.trainer(argv)
    for _ in range(2):  # constants are made, and what "default" means for the gathers is decided
        run.train_step()
    waits = HostWaits()
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            *((run, "_read_batches"), (run, "_count_tokens"), (run.update.optimizer, "step")),
            *((update, "step_if_finite"), (host_moments, "step_if_finite")),
        ):
            patch.setattr(owner, name, waits.host(getattr(owner, name)))
        with waits:
            run.train_step()
    run.close()
    return waits.places


MESHES = {
    "hdpissa": (2, {"hdpissa__num_adapters": 4}),
    "offload": (2, {"training__enable_cpu_offload": "true", "hdpissa__offload_moments": "true"}),
    "local": (2, {"hdpissa__local_steps": 3, "hdpissa__num_adapters": 2}),
    "dense": (2, {"hdpissa__exchange": "dense", "hdpissa__num_adapters": 2}),
    "all": (2, {"hdpissa__samples": "all", "hdpissa__num_adapters": 2}),
    "bf16": (2, {"training__master_dtype": "bfloat16", "hdpissa__num_adapters": 2}),
    "replicas": (4, {"parallelism__data_parallel_replicate_degree": 2, "hdpissa__num_adapters": 2}),
    "recompute": (1, {"activation_checkpoint__mode": "full"}),
    "selective": (1, {"activation_checkpoint__mode": "selective", "activation_checkpoint__keep": "[]"}),
    "tp": (2, {"parallelism__tensor_parallel_degree": 2}),
    "packed": (1, {"data__pack": "true"}),
    "lora": (2, {"adapter__method": "lora", "adapter__dropout": 0.1}),
    "lora-tp": (2, {"adapter__method": "lora", "parallelism__tensor_parallel_degree": 2}),
    "full": (2, {"adapter__method": "full"}),
}


@pytest.mark.parametrize("case", MESHES)
def test_once_a_step(case: str, workers, tmp_path: Path):
    size, changes = MESHES[case]
    for places in workers.run(size, waits_of_a_step, argv(tmp_path, case, **changes)):
        assert places == ["tolist in _read_results"]


def spoiled_step(argv: list[str], what: str) -> tuple[str, dict[str, bool]]:
    """A third step in which the last rank's gradient, or what it proposes to fold, is no number in one place. Its
    message; whether the weights and the optimizer's moments are as before the step, bit for bit."""
    run = runs.trainer(argv)
    for _ in range(2):
        run.train_step()
    last = dist.get_rank() == dist.get_world_size() - 1
    name = {"gradient": "finish_gradients", "update": "propose"}[what]
    original = getattr(run.update, name)

    def spoiled(*args) -> torch.Tensor:
        if what == "gradient" and last:
            gradients = (local_part(p.grad) for p in run.update.trainable)
            next(g for g in gradients if g.numel()).view(-1)[0] = math.nan
        if what == "update" and last:
            optimizer, deltas = run.update.optimizer, run.update.registry.deltas.detach()
            step = optimizer.step
            optimizer.step = lambda: (step(), deltas[:1].fill_(math.inf))
        return original(*args)

    setattr(run.update, name, spoiled)
    before = held(run)
    with pytest.raises(FloatingPointError) as error:
        run.train_step()
    after = held(run)
    kinds = {key.partition(".")[0] for key in after}
    same = {kind: all(torch.equal(after[k], before[k]) for k in after if k.startswith(kind)) for kind in kinds}
    run.close()
    return str(error.value), same


def held(run) -> dict[str, torch.Tensor]:
    """Copies of what a checkpoint would hold."""
    state = run.update.state(changed_only=False)
    return {k: (local_part(v) if isinstance(v, DTensor) else v).clone() for k, v in state.items()}


GRADIENT = "step 3: the gradient of model.layers.0.self_attn.q_proj is not finite; W is as it was before the step"
SPOILED = {
    "hdpissa": ("gradient", {"optimizer__weight_decay": 0.1}, GRADIENT),
    "hdpissa-bf16": ("gradient", {"training__master_dtype": "bfloat16"}, GRADIENT),
    "offload": ("gradient", {"hdpissa__offload_moments": "true", "training__enable_cpu_offload": "true"}, GRADIENT),
    "update": ("update", {"optimizer__weight_decay": 0.1}, GRADIENT.replace("gradient", "update")),
    "lora": ("gradient", {"adapter__method": "lora"}, "step 3: the gradient norm is nan; W is as before the step"),
    "full": ("gradient", {"adapter__method": "full"}, "step 3: the gradient norm is nan; W is as before the step"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_step_that_is_not_finite_changes_no_weight(case: str, workers, tmp_path: Path):
    what, changes, message = SPOILED[case]
    for said, same in workers.run(2, spoiled_step, argv(tmp_path, case, **changes), what):
        assert said == message
        assert set(same) >= {"model", "optimizer"}
        if what == "update":  # proposed by gradients that were finite
            assert not same.pop("optimizer")
        assert all(same.values()), same
