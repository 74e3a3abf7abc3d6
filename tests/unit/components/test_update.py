"""What an update keeps of its optimizer in a checkpoint. Steps need workers: tests/distributed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.metadata import TensorProperties as Properties

from titan_hd.adapters.full import FullFineTuning
from titan_hd.components import update as updates
from titan_hd.components.update import FoldUpdate, OptimizerUpdate
from titan_hd.config.job_config import JobConfig


def update(steps: int) -> OptimizerUpdate:
    """Of a model of two parameters, after so many steps."""
    model = nn.Linear(3, 2)
    built = OptimizerUpdate(model, FullFineTuning(), None, JobConfig())
    built.build_optimizer(torch.device("cpu"))
    for step in range(steps):
        built.begin_step(0.1, step)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        built.apply(0.1, step)
    return built


def moments(of: OptimizerUpdate) -> dict[str, torch.Tensor]:
    return {key: value for key, value in of.state(changed_only=False).items() if key.startswith("optimizer.")}


def test_state_is_keyed_by_the_parameters_name():
    """The count of steps is one for all."""
    state = moments(update(1))
    tensors = {f"optimizer.{n}.{k}" for n in ("weight", "bias") for k in ("exp_avg", "exp_avg_sq")}
    assert set(state) == tensors | {"optimizer.step"}
    assert state["optimizer.weight.exp_avg"].shape == (2, 3)
    assert state["optimizer.step"] == 1


def test_state_is_allocated_as_the_checkpoint_has_it():
    """A fresh optimizer gets tensors of the same keys, shapes and dtypes; other entries are passed over."""
    saved = moments(update(1))
    entries = {
        key: TensorStorageMetadata(Properties(dtype=value.dtype), value.shape, []) for key, value in saved.items()
    }
    other = TensorStorageMetadata(Properties(dtype=torch.float32), torch.Size((2, 3)), [])
    entries |= {"model.b": other, "optimizer.unknown.exp_avg": other, "optimizer.bias.text": BytesStorageMetadata()}
    fresh = update(0)
    fresh.allocate(Metadata(entries))
    made = moments(fresh)
    assert made.keys() == saved.keys()
    for key, value in saved.items():
        assert (made[key].shape, made[key].dtype) == (value.shape, value.dtype), key
        made[key].copy_(value)
    fresh.start(9)
    assert [state["step"] for state in fresh.optimizer.state.values()] == [1, 1]


def test_a_fold_comes_after_every_few_steps_and_after_the_last():
    """With the learning rates since the one before; what waits for it is in a checkpoint."""
    config, folds, kept = JobConfig(), [], []
    config.hdpissa.local_steps = 3
    fold_update = SimpleNamespace(
        config=config, fold=lambda *at: folds.append(at), _rates=[0.0], _last_step=7, head_optimizer=None
    )
    for step in range(8):
        FoldUpdate.apply(fold_update, 2.0**step, step)
        kept.append(fold_update._unfolded)
    assert folds == [(1 + 2 + 4, 2), (8 + 16 + 32, 5), (64 + 128, 7)]
    both = ("residuals.", "unfolded.")
    assert kept == [both, both, (), both, both, (), both, ()]
    config.hdpissa.local_steps, config.hdpissa.exchange_dtype = 1, "int8"
    FoldUpdate.apply(fold_update, 0.1, 8)
    assert (folds[-1], fold_update._unfolded) == ((0.1, 8), ("residuals.",))


NEVER_ANEW = "hdpissa.refresh_steps: 10 is not below the run's 10 steps: no slice is taken anew"
ONE_FOLD = "hdpissa.local_steps: 11 is more than the run's 10 steps: there is one fold, after the last"


@pytest.mark.parametrize(
    ("refresh_steps", "local_steps", "said"),
    [(0, 1, []), (9, 1, []), (10, 1, [NEVER_ANEW]), (0, 10, []), (0, 11, [ONE_FOLD])],
)
def test_periods_that_never_end_are_said(refresh_steps: int, local_steps: int, said: list, monkeypatch, caplog):
    config = JobConfig()
    config.hdpissa.refresh_steps, config.training.mixed_precision_param = refresh_steps, "float32"
    config.hdpissa.local_steps = local_steps
    for name in ("fold_plan", "Fold"):
        monkeypatch.setattr(updates, name, lambda *_: SimpleNamespace(table=str, prepare=lambda: None))
    monkeypatch.setattr(updates, "SAMPLES", {"own": lambda *_: None})
    registry = SimpleNamespace(start=lambda *_: None, entries={}, method=SimpleNamespace(samples="own"))
    dims = SimpleNamespace(dp_replicate=1, dp_shard=1)
    fold_update = SimpleNamespace(config=config, registry=registry, dims=dims, method=SimpleNamespace(num_adapters=1))
    fold_update._spread_numbers = lambda: None
    FoldUpdate.start(fold_update, total_steps=10)
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == said
