"""What HiRA and Bat (column form) keep from the forward to the backward pass: never a dense [out, in] beside W."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.kit.layers import adapter_tensors, make
from titan_hd.adapters.adapter_linear import AdapterLinear
from titan_hd.adapters.bat import BatLinear
from titan_hd.adapters.hira import HiraLinear
from titan_hd.distributed.parallelize import _selective_contexts

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


@pytest.mark.parametrize("method", LAYERS)
def test_nor_by_selective_checkpointing(method: str):
    """Which keeps every second matrix product, and sees none of those that make the dense change."""
    layer, seen = LAYERS[method](), []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    run = functools.partial(checkpoint, layer, use_reentrant=False, context_fn=_selective_contexts)
    with Watch():
        assert kept(layer, run) == []
    assert any(f"titan_hd.{method}_linear" in name for name in seen)
    assert not any(name.startswith(("aten.mm", "aten.addmm", "aten.bmm")) for name in seen)
