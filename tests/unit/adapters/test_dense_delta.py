"""What HiRA and Bat (column form) keep from the forward to the backward pass: never a dense [out, in] beside W."""

from __future__ import annotations

import functools

import pytest
import torch

from tests.kit.layers import adapter_tensors, make
from titan_hd.adapters.adapter_linear import AdapterLinear
from titan_hd.adapters.bat import BatLinear
from titan_hd.adapters.hira import HiraLinear

OUT, IN = 24, 16
LAYERS = {
    "hira": functools.partial(make, HiraLinear, OUT, IN, rank=2),
    "bat": functools.partial(make, BatLinear, OUT, IN, block=4),
}


def kept(layer: AdapterLinear, run) -> list[torch.Tensor]:
    """Tensors of W's size that a forward pass of `run` saves for the backward pass, without W itself."""
    saved = []
    x = torch.randn(3, 5, IN, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = run(x)
    y.sum().backward()
    assert all(p.grad is not None for p in adapter_tensors(layer).values())
    return [t for t in saved if t.numel() >= OUT * IN and t.data_ptr() != layer.weight.data_ptr()]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("method", LAYERS)
def test_no_dense_change_is_kept(method: str, dropout: float):
    layer = LAYERS[method](dropout=dropout)
    assert kept(layer, layer) == []
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager_decomp_partition")
    assert kept(layer, compiled) == []
