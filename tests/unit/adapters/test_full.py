"""Full fine-tuning: which parameters are trained."""

from __future__ import annotations

import pytest
import torch

from titan_hd.adapters.full import FullFineTuning
from titan_hd.adapters.hdpissa import HDPissa
from titan_hd.models.decoder import Decoder
from titan_hd.models.registry import flavor_config


@pytest.fixture
def model() -> Decoder:
    with torch.device("meta"):
        return Decoder(flavor_config("llama3", "debugmodel"))


def test_everything_is_trained(model: Decoder):
    model.requires_grad_(False)
    names = FullFineTuning().apply(model, None)
    assert names == [name for name, _ in model.named_parameters()]
    assert all(p.requires_grad for p in model.parameters())


def test_only_the_targets(model: Decoder):
    names = FullFineTuning().apply(model, ["o_proj", "gate_proj"])
    assert names == [f"model.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn.o_proj", "mlp.gate_proj")]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.weight" for name in names}


def test_a_target_that_matches_nothing(model: Decoder):
    with pytest.raises(ValueError, match=r"adapter.target_modules: 'q' is no linear layer"):
        FullFineTuning().apply(model, ["q"])


def test_what_the_trainer_asks_of_a_method():
    assert (FullFineTuning().num_adapters, FullFineTuning().folds) == (1, False)
    assert (HDPissa(8, 4).num_adapters, HDPissa(8, 4).folds) == (8, True)
