"""One adapted layer on the host: how it starts, and float64 autograd through the plain loops of a test's formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from titan_hd.adapters.adapter_linear import AdapterLinear
from titan_hd.adapters.frozen_linear import FoldingLinear

# fp32 sums of some tens of terms against float64, relative to the largest element.
TOLERANCE = 2e-6

# x [in], weight [out, in], adapter tensors by name -> y [out], all float64
Reference = Callable[..., list[Tensor]]


def make(method: type[AdapterLinear], out: int, inner: int, bias: bool = True, **settings) -> AdapterLinear:
    """A layer with random adapter tensors, in fp32 on the CPU; as it starts, every method is the frozen layer."""
    generator = torch.Generator().manual_seed(3)
    with torch.device("meta"):
        linear = nn.Linear(inner, out, bias=bias).requires_grad_(False)
    layer = method(linear, **settings).to_empty(device="cpu")
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 0, 0.5, generator=generator)
    return layer


def started(
    layer_class: type[AdapterLinear], shape: tuple[int, int] = (30, 20), bias: bool = True, **settings: Any
) -> tuple[AdapterLinear, torch.Tensor]:
    """A layer of `shape` [out, in] with its first values, and the W that it was given."""
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


def adapter_tensors(layer: AdapterLinear) -> dict[str, nn.Parameter]:
    return {name: getattr(layer, name) for name in layer.adapter_names}


def merged(layer: AdapterLinear) -> Tensor:
    """The weight [out, in] with which a plain layer computes the same."""
    return layer.merged(layer.weight.detach(), **{n: t.detach() for n, t in adapter_tensors(layer).items()})


def assert_close(found: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert found.shape == expected.shape
    assert expected.abs().max() > 0
    error = (found.double() - expected).abs().max() / expected.abs().max()
    assert error < tolerance, f"relative error {error:.2g}"


def inputs(shape: tuple[int, ...]) -> Tensor:
    """An x of its own for every shape, with a gradient to come."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(5)).requires_grad_(True)


def loss_of(y: Tensor) -> Tensor:
    """Some loss whose gradient differs from element to element and depends on y."""
    return (y.sin() * torch.arange(y.numel(), dtype=y.dtype).view_as(y).cos()).sum()


def pass_with_dropout(layer: FoldingLinear, x: Tensor) -> tuple[Tensor, Tensor]:
    """Both passes of `loss_of` through a layer with dropout: y, and what its adapter has left of x."""
    torch.manual_seed(11)
    y = layer(x)
    loss_of(y).backward()
    torch.manual_seed(11)
    left = nn.functional.dropout(x.detach(), layer.dropout)
    assert (left == 0).any()
    return y, left


def check_layer(layer: AdapterLinear, reference: Reference, shape: tuple[int, ...] = (2, 3)) -> None:
    """Output, every gradient and the merged weight of a layer equal the reference's; the frozen tensors get none."""
    x = inputs((*shape, layer.in_features))
    y = layer(x)
    mix = torch.arange(y.numel(), dtype=y.dtype).view_as(y).cos()
    (y.sin() * mix).sum().backward()

    exact = {n: p.detach().double().requires_grad_(True) for n, p in layer.named_parameters()}
    x64 = x.detach().double().requires_grad_(True)
    tensors = {n: exact[n] for n in adapter_tensors(layer)}
    rows = [torch.stack(reference(row, exact["weight"], **tensors)) for row in x64.flatten(0, -2)]
    y64 = torch.stack(rows).view_as(y)
    if layer.bias is not None:
        y64 = y64 + exact["bias"]
    (y64.sin() * mix.double()).sum().backward()

    assert_close(y, y64)
    assert_close(x.grad, x64.grad)
    for name, parameter in adapter_tensors(layer).items():
        assert_close(parameter.grad, exact[name].grad)
    assert layer.weight.grad is None

    assert_close(x.detach() @ merged(layer).T, x64.detach() @ merged_exactly(reference, exact["weight"], tensors).T)


@torch.no_grad()
def merged_exactly(reference: Reference, weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    """W + dW [out, in] in float64: the reference of every unit vector."""
    unit = torch.eye(weight.shape[1], dtype=torch.float64)
    return torch.stack([torch.stack(reference(row, weight, **tensors)) for row in unit], 1)


def check_start(layer: AdapterLinear, zero: list[str]) -> None:
    """`initial` depends on its generator alone, has the tensors' shapes, and leaves the frozen layer as it is."""
    weight = layer.weight.detach()
    first, again = (layer.initial(weight, torch.Generator().manual_seed(1)) for _ in range(2))
    other = layer.initial(weight, torch.Generator().manual_seed(2))
    assert {n: t.shape for n, t in first.items()} == {n: p.shape for n, p in adapter_tensors(layer).items()}
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        assert bool((tensor == 0).all()) == (name in zero)
        assert torch.equal(tensor, other[name]) == (name in zero)
    assert torch.equal(layer.merged(weight, **first), weight)


def check_dropout(layer: AdapterLinear) -> None:
    """What is dropped is the adapter's input alone, and nothing outside of training."""
    x = torch.randn(4, layer.in_features, generator=torch.Generator().manual_seed(5))
    plain = nn.functional.linear(x, layer.weight, layer.bias)
    torch.manual_seed(0)
    y = layer.train()(x)
    torch.manual_seed(0)
    kept = nn.functional.dropout(x, layer.dropout)
    change = merged(layer) - layer.weight
    assert_close(y - plain, (kept @ change.T).double())
    assert_close(layer.eval()(x) - plain, (x @ change.T).double())


def check_compiled(layer: AdapterLinear) -> None:
    """One graph (fullgraph), whose results and gradients are the eager ones up to rounding."""
    x = inputs((4, layer.in_features))
    results = []
    for run in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        layer.zero_grad(set_to_none=True)
        x.grad = None
        y = run(x)
        y.sin().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in adapter_tensors(layer).values())])
    for eager, compiled in zip(*results):
        assert_close(compiled, eager.double())
