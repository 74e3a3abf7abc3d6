"""One adapted layer on the host, for the tests of the methods."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from titan_hd.adapters.adapter_linear import AdapterLinear


def started(
    layer_class: type[AdapterLinear], shape: tuple[int, int] = (30, 20), bias: bool = True, **settings: Any
) -> tuple[AdapterLinear, torch.Tensor]:
    """A layer [out, in] with its first values, and the W that it was given."""
    torch.manual_seed(0)
    linear = nn.Linear(shape[1], shape[0], bias=bias)
    weight = linear.weight.detach().clone()
    layer = layer_class(linear, **settings)
    layer.name = "model.layers.0.mlp.up_proj"
    values = layer.initial(weight if layer.reads_weight else None, torch.Generator().manual_seed(1))
    assert values.keys() == {*layer.adapter_names, *(["weight"] if layer.changes_weight else [])}
    with torch.no_grad():
        for name, value in values.items():
            assert value.dtype == torch.float32
            getattr(layer, name).copy_(value)
    return layer, weight


@torch.no_grad()
def trained(layer: AdapterLinear, size: float = 0.1) -> AdapterLinear:
    """As after some steps: every tensor has moved."""
    generator = torch.Generator().manual_seed(2)
    for name in layer.adapter_names:
        tensor = getattr(layer, name)
        tensor.add_(size * torch.randn(tensor.shape, generator=generator))
    return layer


def merged(layer: AdapterLinear) -> torch.Tensor:
    return layer.merged(layer.weight.detach(), **{n: getattr(layer, n).detach() for n in layer.adapter_names})


def plain(layer: AdapterLinear, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, weight, layer.bias)


def check_merge(layer: AdapterLinear) -> None:
    """The merged weight in a plain layer computes what the layer does, to 1e-5 in fp32."""
    x = torch.randn(3, 5, layer.in_features, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), plain(layer, merged(layer), x), rtol=1e-5, atol=1e-5)


def check_only_the_adapter_is_trained(layer: AdapterLinear) -> None:
    """Gradients reach the input and the adapter's tensors, and nothing else."""
    x = torch.randn(3, 5, layer.in_features, requires_grad=True)
    layer(x).square().sum().backward()
    assert x.grad is not None
    got = {name for name, p in layer.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert got <= set(layer.adapter_names)
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == set(layer.adapter_names)
