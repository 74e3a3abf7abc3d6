"""Finding and replacing the targeted layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from titan_hd.adapters.inject import find_linears, replace_linears
from titan_hd.models.decoder import Decoder
from titan_hd.models.registry import flavor_config


@pytest.fixture
def model() -> Decoder:
    with torch.device("meta"):
        return Decoder(flavor_config("llama3", "debugmodel"))


class Marked(nn.Linear):
    """A replacement that keeps the weight of what it replaces."""

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)
        self.weight, self.bias = linear.weight, linear.bias


def test_the_models_order_whatever_the_targets_order(model: Decoder):
    expected = [f"model.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn.k_proj", "mlp.down_proj")]
    assert find_linears(model, ["down_proj", "k_proj"]) == expected
    assert find_linears(model, ["k_proj", "down_proj", "k_proj"]) == expected


def test_the_last_part_of_the_name_must_be_equal(model: Decoder):
    """No prefixes, no parts, no modules that are not linear."""
    for target in ("proj", "_proj", "layers", "mlp", "embed_tokens", "norm", "input_layernorm", ""):
        with pytest.raises(ValueError, match=f"adapter.target_modules: '{target}' is no linear layer") as caught:
            find_linears(model, ["q_proj", target])
        assert "there are down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj" in str(caught.value)


def test_a_name_that_ends_with_another():
    model = nn.ModuleDict({"proj": nn.Linear(2, 2), "q_proj": nn.Linear(2, 2), "sub": nn.ModuleDict()})
    model["sub"]["proj"] = nn.Linear(2, 2)
    assert find_linears(model, ["proj"]) == ["proj", "sub.proj"]


def test_the_head_can_be_named(model: Decoder):
    assert find_linears(model, ["lm_head"]) == ["lm_head"]


def test_replaced_in_place(model: Decoder):
    weights = dict(model.named_parameters())
    replaced = replace_linears(model, ["q_proj", "up_proj"], Marked)
    assert list(replaced) == find_linears(model, ["q_proj", "up_proj"])
    for name, module in model.named_modules():
        assert isinstance(module, Marked) == (name in replaced)
        if name in replaced:
            assert module is replaced[name]
    after = dict(model.named_parameters())
    assert list(after) == list(weights)
    assert all(after[name] is p for name, p in weights.items())


def test_nothing_is_replaced_where_a_target_matches_nothing(model: Decoder):
    with pytest.raises(ValueError, match="'nothing' is no linear layer"):
        replace_linears(model, ["q_proj", "nothing"], Marked)
    assert not any(isinstance(module, Marked) for module in model.modules())


def test_replaced_layers_are_still_found(model: Decoder):
    replace_linears(model, ["q_proj"], Marked)
    assert len(find_linears(model, ["q_proj"])) == 2
