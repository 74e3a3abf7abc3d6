"""LoRA, rsLoRA and OLoRA on one layer, against their equations."""

from __future__ import annotations

import math

import pytest
import torch

from tests.kit import layers
from titan_hd.adapters.lora import LoRALinear, OLoRALinear
from titan_hd.adapters.methods import build_method
from titan_hd.adapters.pissa import PiSSALinear
from titan_hd.config.job_config import JobConfig
from titan_hd.models.decoder import Decoder
from titan_hd.models.registry import flavor_config


def lora(x, weight, lora_A, lora_B, scale=1.5):
    """y [out] of one x [in]: W x + s B (A x), element by element."""
    low_rank = [sum(a[i] * x[i] for i in range(len(x))) for a in lora_A]
    return [w @ x + scale * sum(b[k] * low_rank[k] for k in range(len(b))) for w, b in zip(weight, lora_B)]


@pytest.mark.parametrize("method", [LoRALinear, OLoRALinear, PiSSALinear])
@pytest.mark.parametrize(("out", "inner", "rank"), [(12, 10, 3), (7, 5, 1), (5, 7, 5)])
def test_layer_is_the_formula(out: int, inner: int, rank: int, method: type[LoRALinear]):
    for bias, shape in ((True, (2, 3)), (False, (4,)), (True, (1, 2, 3))):
        layers.check_layer(layers.make(method, out, inner, bias=bias, rank=rank, scale=1.5), lora, shape)


@pytest.mark.parametrize("method", [LoRALinear, OLoRALinear, PiSSALinear])
def test_dropout_and_compile(method: type[LoRALinear]):
    layers.check_dropout(layers.make(method, 12, 10, rank=3, scale=1.5, dropout=0.4))
    layers.check_compiled(layers.make(method, 12, 10, rank=3, scale=1.5))


def test_first_values():
    """B is zero, A uniform within 1 / sqrt(in): kaiming_uniform(a = sqrt 5)."""
    layers.check_start(layers.make(LoRALinear, 12, 10, rank=3, scale=1.5), zero=["lora_B"])
    layer, _ = layers.started(LoRALinear, rank=8, scale=1.5, shape=(30, 400))
    bound = 1 / math.sqrt(400)
    assert layer.lora_A.abs().max() <= bound
    assert layer.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_olora_starts_from_the_qr_decomposition():
    for shape in ((30, 20), (20, 30)):
        layer, weight = layers.started(OLoRALinear, rank=4, scale=1.5, shape=shape)
        q, r = torch.linalg.qr(weight)
        torch.testing.assert_close(layer.lora_B.detach(), q[:, :4], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.lora_A.detach(), r[:4], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layers.merged(layer), weight)


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
