"""DoRA on one layer, against its equation with a dense B A and autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.kit import layers
from titan_hd.adapters.dora import DoRALinear, squared_row_norms


def reference(layer: DoRALinear, x: torch.Tensor, dropped: torch.Tensor | None = None) -> torch.Tensor:
    """The paper's equation: m / ||W + s B A|| with the norm detached; the bias is not scaled."""
    magnitude = layer.weight.norm(dim=1) + layer.lora_magnitude_delta
    update = layer.scale * layer.lora_B @ layer.lora_A
    ratio = magnitude / (layer.weight + update).norm(dim=1).detach()
    y = F.linear(x, layer.weight) + F.linear(x if dropped is None else dropped, update)
    return ratio * y + (0 if layer.bias is None else layer.bias)


def gradients(layer: DoRALinear, y: torch.Tensor, x: torch.Tensor) -> list[torch.Tensor]:
    tensors = [x, *(getattr(layer, name) for name in layer.adapter_names)]
    return torch.autograd.grad(y.sin().sum(), tensors)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_the_equation_and_its_gradients(bias: bool, shape: tuple[int, int]):
    layer, _ = layers.started(DoRALinear, rank=4, scale=1.5, bias=bias, shape=shape)
    layers.trained(layer)
    x = torch.randn(3, 5, shape[1], requires_grad=True)
    got, want = layer(x), reference(layer, x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for g, w in zip(gradients(layer, got, x), gradients(layer, want, x), strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-5)


def test_norms_without_a_dense_product():
    weight, a, b = torch.randn(30, 20), torch.randn(4, 20), torch.randn(30, 4)
    base, adapted = squared_row_norms(weight, a, b, 0.7).sqrt()
    torch.testing.assert_close(base, weight.norm(dim=1))
    torch.testing.assert_close(adapted, (weight + 0.7 * b @ a).norm(dim=1))


def test_dropout_leaves_the_frozen_term_alone():
    layer, _ = layers.started(DoRALinear, rank=4, scale=1.5, dropout=0.5)
    layers.trained(layer)
    x = torch.randn(3, 20)
    torch.manual_seed(7)
    dropped = F.dropout(x, 0.5)
    torch.manual_seed(7)
    torch.testing.assert_close(layer(x), reference(layer, x, dropped))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_first_forward_pass_is_the_frozen_layers(dtype: torch.dtype):
    """To the last bit but for the bias, also where everything was gathered in bf16."""
    layer, weight = layers.started(DoRALinear, rank=4, scale=1.5, bias=False)
    layer.to(dtype)
    x = torch.randn(3, 20).to(dtype)
    assert torch.equal(layer(x), F.linear(x, weight.to(dtype)))


def test_a_small_change_of_the_magnitude_survives_bf16():
    """m / ||W|| = 1.01 would round to 1.0078 in bf16, and all outputs of the row would be as wrong."""
    layer, weight = layers.started(DoRALinear, rank=4, scale=1.0, bias=False, shape=(64, 512))
    with torch.no_grad():
        layer.lora_magnitude_delta.copy_(1e-2 * weight.norm(dim=1))
    layer.to(torch.bfloat16)
    x = torch.randn(2000, 512).bfloat16()
    frozen = F.linear(x, weight.bfloat16()).double()
    grown = (layer(x).double() * frozen).sum() / frozen.square().sum() - 1
    assert grown.item() == pytest.approx(1e-2, rel=0.1)


def test_merge():
    layer, _ = layers.started(DoRALinear, rank=4, scale=1.5)
    layers.check_merge(layers.trained(layer))
    layers.check_only_the_adapter_is_trained(layer)
