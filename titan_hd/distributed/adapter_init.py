"""First values of the adapters that stand beside a weight, and the merged weights, on a sharded model.

What depends on a whole weight (PiSSA's decomposition, a merge) is computed once, by one rank, all ranks at once; see
`distributed.regroup`. What does not is drawn by every rank, which keeps its part.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from titan_hd.adapters.adapter_linear import AdapterLinear, adapter_layers
from titan_hd.distributed.collectives import gather_on_rank_zero
from titan_hd.distributed.parallel_dims import ParallelDims, owned_block
from titan_hd.distributed.regroup import collect, cut, hand_back, sharded, waves
from titan_hd.models.model import Model
from titan_hd.seeding import stable_seed


@torch.no_grad()
def initialize_adapters(model: Model, dims: ParallelDims, seed: int) -> Iterator[list[dict[str, Any]]]:
    """Set the tensors of every adapted layer and, for methods that change it, the base weight. Collective.

    Yields the reports of each wave of layers, on rank 0. Deterministic on any number of workers.
    """
    layers = adapter_layers(model)
    for layer in layers.values():
        if not layer.reads_weight:
            _draw(layer, dims, seed)
    reading = [name for name, layer in layers.items() if layer.reads_weight]
    for wave in waves(sorted(reading, key=lambda n: (-layers[n].weight.numel(), n)), dims):
        yield _initialize_wave([layers[name] for name in wave], dims, seed)


def _draw(layer: AdapterLinear, dims: ParallelDims, seed: int) -> None:
    values = layer.initial(None, generator_of(seed, layer.name))
    for key in layer.adapter_names:
        part = sharded(getattr(layer, key))
        block = owned_block(part.shape, part.split, dims.place(dims.rank), dims)
        part.local.copy_(cut(values[key], block))


def _initialize_wave(wave: list[AdapterLinear], dims: ParallelDims, seed: int) -> list[dict[str, Any]]:
    weight = collect([sharded(layer.weight) for layer in wave], dims)
    values, report = {}, None
    if weight is not None:
        mine = wave[dims.rank]
        values = mine.initial(weight.float(), generator_of(seed, mine.name))
        report = mine.report
    keys = (*wave[0].adapter_names, "weight") if wave[0].changes_weight else wave[0].adapter_names
    for key in keys:
        tensors = [sharded(getattr(layer, key)) for layer in wave]
        for tensor, part in zip(tensors, hand_back(tensors, values.get(key), dims)):
            tensor.local.copy_(part)
    return gather_on_rank_zero(report or None)


def generator_of(seed: int, name: str) -> torch.Generator:
    """What the first values of a layer's adapter are drawn from."""
    return torch.Generator().manual_seed(stable_seed("adapter", seed, name))


def collect_tensors(wave: list[AdapterLinear], dims: ParallelDims) -> dict[str, torch.Tensor]:
    """The adapter's tensors of layer number `rank` of the wave, whole, by name; none on ranks beyond the wave's length.
    Collective."""
    keys = wave[0].adapter_names
    tensors = {key: collect([sharded(getattr(layer, key)) for layer in wave], dims) for key in keys}
    return {key: tensor for key, tensor in tensors.items() if tensor is not None}


@torch.no_grad()
def merged_weights(model: Model, dims: ParallelDims) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Waves of (name of a weight, this rank's part of it in fp32 with its adapter merged in). Collective.

    The model stays as it is.
    """
    layers = adapter_layers(model)
    for names in waves(list(layers), dims):
        wave = [layers[name] for name in names]
        weights = [sharded(layer.weight) for layer in wave]
        whole = collect(weights, dims)
        tensors = collect_tensors(wave, dims)
        if whole is not None:
            whole = wave[dims.rank].merged(whole.float(), **tensors)
        yield [(f"{name}.weight", part) for name, part in zip(names, hand_back(weights, whole, dims))]
