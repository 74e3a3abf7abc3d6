"""Pieces of the trainer that need no workers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from titan_hd.adapters.hira import Hira
from titan_hd.adapters.lora import LoRA
from titan_hd.data.loader import Batch
from titan_hd.train import Trainer


@pytest.mark.parametrize(
    "seed",
    [
        42,
        2**23,
        20250131,
    ],
)
def test_dropout_takes_every_seed(seed: int):
    """A date makes a natural seed, and the configuration accepts it."""
    trainer = SimpleNamespace(
        update=SimpleNamespace(bind=lambda slot, last: None),
        placement=SimpleNamespace(slot=lambda m: 0, samples=lambda m: range(0, 1), micro_batches=1),
        config=SimpleNamespace(adapter=SimpleNamespace(dropout=0.1), training=SimpleNamespace(seed=seed)),
        plan=SimpleNamespace(global_batch_size=1),
        device=torch.device("cpu"),
        step=0,
        model=lambda ids, documents, targets: torch.ones((), requires_grad=True),
    )
    ids = torch.zeros(1, 3, dtype=torch.long)
    assert Trainer._forward_backward(trainer, 0, Batch(ids, ids, 3, 1), 3) > 0


@pytest.mark.parametrize("method", [Hira, LoRA])
def test_zeros_that_a_method_can_only_scale_are_named(method: type, caplog):
    trainer = SimpleNamespace(trained_layers=["layers.0.o_proj"], plan=SimpleNamespace(method=method))
    Trainer._warn_of_zeros(trainer, ["layers.0.o_proj.weight", "norm.weight"])
    named = "adapter.method: hira can never move weights that are zero: layers.0.o_proj.weight"
    assert [record.getMessage() for record in caplog.records] == ([named] if method is Hira else [])
