"""LoRA, rsLoRA and OLoRA on one layer, against their equations."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from tests.kit import layers
from titan_hd.adapters.lora import LoRALinear, OLoRALinear
from titan_hd.adapters.methods import build_method
from titan_hd.config.job_config import JobConfig
from titan_hd.models.decoder import Decoder
from titan_hd.models.registry import flavor_config


@pytest.mark.parametrize("bias", [True, False])
def test_the_equation(bias: bool):
    layer, weight = layers.started(LoRALinear, rank=4, scale=1.5, bias=bias)
    layers.trained(layer)
    x = torch.randn(3, 5, 20)
    want = F.linear(x, weight, layer.bias) + 1.5 * x @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(layer(x), want)
    layers.check_merge(layer)
    layers.check_only_the_adapter_is_trained(layer)


def test_first_values():
    """B is zero, A uniform within 1 / sqrt(in): kaiming_uniform(a = sqrt 5). The layer computes what it replaced."""
    layer, weight = layers.started(LoRALinear, rank=8, scale=1.5, shape=(30, 400))
    assert not layer.lora_B.any()
    bound = 1 / math.sqrt(400)
    assert layer.lora_A.abs().max() <= bound
    assert layer.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    x = torch.randn(2, 400)
    assert torch.equal(layer(x), F.linear(x, weight, layer.bias))
    again, _ = layers.started(LoRALinear, rank=8, scale=1.5, shape=(30, 400))
    assert torch.equal(layer.lora_A, again.lora_A)


def test_dropout_is_on_the_adapters_input_alone():
    layer, weight = layers.started(LoRALinear, rank=4, scale=1.0, dropout=0.5)
    layers.trained(layer)
    x = torch.randn(3, 20)
    torch.manual_seed(7)
    dropped = F.dropout(x, 0.5)
    torch.manual_seed(7)
    want = F.linear(x, weight, layer.bias) + dropped @ layer.lora_A.T @ layer.lora_B.T
    torch.testing.assert_close(layer(x), want)
    layer.eval()
    torch.testing.assert_close(layer(x), layers.plain(layer, layers.merged(layer), x))


def test_olora_starts_from_the_qr_decomposition():
    for shape in ((30, 20), (20, 30)):
        layer, weight = layers.started(OLoRALinear, rank=4, scale=1.5, shape=shape)
        q, r = torch.linalg.qr(weight)
        torch.testing.assert_close(layer.lora_B.detach(), q[:, :4], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.lora_A.detach(), r[:4], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layers.merged(layer), weight)
        layers.check_merge(layers.trained(layer))


def test_olora_rounds_before_it_forms_the_remainder():
    """In bf16 the sum is W to fp32's precision: what rounding takes from A and B is in the base weight."""
    layer, weight = layers.started(OLoRALinear, rank=4, scale=1.0, dtype=torch.bfloat16)
    assert torch.equal(layer.lora_A, layer.lora_A.bfloat16().float())
    torch.testing.assert_close(layers.merged(layer), weight, rtol=1e-6, atol=1e-6)


def config(**adapter) -> JobConfig:
    built = JobConfig()
    for key, value in {"method": "lora", "rank": 4, **adapter}.items():
        setattr(built.adapter, key, value)
    return built


@pytest.mark.parametrize(
    ("rank", "alpha", "rslora", "scale"),
    [(8, None, False, 1.0), (8, 12.0, False, 1.5), (8, 3, False, 0.375), (16, 8.0, True, 2.0), (16, None, True, 4.0)],
)
def test_scales(rank: int, alpha: float | None, rslora: bool, scale: float):
    """alpha / r is a real number: it is never floored."""
    assert build_method(config(rank=rank, alpha=alpha, rslora=rslora)).settings["scale"] == scale


def test_the_method_on_a_model():
    with torch.device("meta"):
        model = Decoder(flavor_config("llama3", "debugmodel"))
    before = {name for name, _ in model.named_parameters()}
    method = build_method(config(loraplus_lr_ratio=16.0))
    names = method.apply(model, ["q_proj", "down_proj"])
    assert names == [f"model.layers.{i}.{part}" for i in (0, 1) for part in ("self_attn.q_proj", "mlp.down_proj")]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.lora_{side}" for name in names for side in "AB"}
    assert {name for name, _ in model.named_parameters()} == before | trained, "the base keeps its names"
    assert (method.num_adapters, method.folds) == (1, False)
    assert method.lr_ratios == {"lora_B": 16.0}


def test_what_the_configuration_chooses():
    assert build_method(config(init="olora")).layer is OLoRALinear
    assert build_method(config()).lr_ratios == {}


def test_a_rank_that_does_not_fit():
    method = build_method(config(rank=33))
    assert method.shape_error("k_proj", (32, 64)) == (
        "adapter.rank: 33 is more than the smaller side of a weight, 32; k_proj has shape [32, 64]"
    )
    assert method.shape_error("q_proj", (64, 64)) is None
