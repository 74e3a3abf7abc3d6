"""DoRA on one layer, against its equation with a dense B A and autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.kit import layers
from titan_hd.adapters.dora import DoRALinear, squared_row_norms

SCALE = 1.5


def dora(x, weight, lora_A, lora_B, lora_magnitude_delta, dropped=None):
    """y [out] of one x [in], as in the paper: m / ||W + s B A|| times a dense product, the norm without gradient."""
    magnitude, update = weight.norm(dim=1) + lora_magnitude_delta, SCALE * lora_B @ lora_A
    y = weight @ x + update @ (x if dropped is None else dropped)
    return list(magnitude / (weight + update).norm(dim=1).detach() * y)


@pytest.mark.parametrize(("out", "inner", "rank"), [(30, 20, 4), (20, 30, 4), (7, 5, 1), (5, 7, 5)])
def test_layer_is_the_formula(out: int, inner: int, rank: int):
    """The bias is not scaled."""
    for bias, shape in ((True, (2, 3)), (False, (4,)), (True, (1, 2, 3))):
        layers.check_layer(layers.make(DoRALinear, out, inner, bias=bias, rank=rank, scale=SCALE), dora, shape)


def test_start_and_compile():
    layer = layers.make(DoRALinear, 12, 10, rank=3, scale=SCALE)
    layers.check_start(layer, zero=["lora_B", "lora_magnitude_delta"])
    layers.check_compiled(layer)


def test_norms_without_a_dense_product():
    weight, a, b = torch.randn(30, 20), torch.randn(4, 20), torch.randn(30, 4)
    base, adapted = squared_row_norms(weight, a, b, 0.7).sqrt()
    torch.testing.assert_close(base, weight.norm(dim=1))
    torch.testing.assert_close(adapted, (weight + 0.7 * b @ a).norm(dim=1))


def test_dropout_leaves_the_frozen_term_alone():
    layer = layers.make(DoRALinear, 30, 20, bias=False, rank=4, scale=SCALE, dropout=0.5)
    x, tensors = torch.randn(3, 20), layers.adapter_tensors(layer)
    torch.manual_seed(7)
    dropped = F.dropout(x, 0.5)
    torch.manual_seed(7)
    want = [torch.stack(dora(x[i], layer.weight, **tensors, dropped=dropped[i])) for i in range(3)]
    torch.testing.assert_close(layer(x), torch.stack(want))


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


def test_rows_of_zeros_start_as_zeros_and_are_trained():
    """Rows of length 0 have no direction at first. The other rows do not notice."""
    layer, _ = layers.started(DoRALinear, rank=4, scale=SCALE, bias=False)
    whole, x = layers.merged(layer), torch.randn(5, 20)
    with torch.no_grad():
        layer.weight[7:9] = 0
    assert torch.equal(layers.merged(layer)[9:], whole[9:])
    assert not layers.merged(layer)[7:9].any()
    optimizer = torch.optim.AdamW(layers.adapter_tensors(layer).values(), lr=1e-2)
    for step in range(4):
        optimizer.zero_grad()
        (layer(x) - 1).square().sum().backward()
        assert all(p.grad.isfinite().all() for p in layers.adapter_tensors(layer).values())
        assert layer.lora_B.grad[7:9].any() == (step != 1), "m is still 0 in the second step, and then is trained"
        optimizer.step()
    merged = layers.merged(layer)
    assert merged[7:9].norm() > 0
    torch.testing.assert_close(layer(x), x @ merged.T)
