"""Who computes the SVD of which weight, and who receives the slices.

Weights are dealt in waves of one weight per worker, the costliest first. In a wave, every worker sends its rows of
weight j to worker j (one all-to-all), worker j computes the factors of that one weight, and sends each holder the
slices of the adapters that it hosts (a second all-to-all each for A and B). So every SVD is computed once, all workers
compute at once, and nobody holds more than one whole weight and its factors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from titan_hd.adapters.svd import SvdSettings, cut_slices, exact_cost, random_factors
from titan_hd.adapters.svd_cache import cached_factors
from titan_hd.distributed.adapter_registry import AdapterRegistry
from titan_hd.distributed.collectives import exchange_lists
from titan_hd.distributed.parallel_dims import ParallelDims, shard_rows


@dataclass(frozen=True)
class SliceSettings:
    """slices: "orthogonal", "top" (both from the SVD of the current W) or "random" (no SVD); see `adapters.svd`."""

    slices: str = "orthogonal"
    seed: int = 0
    svd: SvdSettings = field(default_factory=SvdSettings)
    cache: str = ""


@torch.no_grad()
def compute_factors(
    registry: AdapterRegistry, dims: ParallelDims, settings: SliceSettings
) -> Iterator[list[dict[str, object]]]:
    """Fill the registry with the fixed factors of every layer; yields the reports of each wave, on every rank.

    Deterministic on any number of workers: whoever owns a weight computes the same from the same bits.
    """
    names = sorted(registry.entries, key=lambda n: (-exact_cost(registry.entries[n].shape), n))
    if settings.slices == "random":
        for name in names:
            _draw_factors(registry, name, settings.seed)
        return
    for start in range(0, len(names), dims.dp_size):
        wave = names[start : start + dims.dp_size]
        weight = _collect_rows(registry, dims, wave)
        factors, report = None, None
        if weight is not None:
            a, b, report = cached_factors(
                weight, registry.method.directions, settings.svd, wave[dims.dp_rank], settings.cache
            )
            factors = cut_slices(a, b, registry.num_adapters, registry.rank, settings.slices)
            del weight, a, b
        _deal_factors(registry, dims, wave, factors)
        reports: list[dict | None] = [None] * dims.dp_size
        dist.all_gather_object(reports, report, group=dims.dp_mesh.get_group())
        yield [r for r in reports if r is not None]


def _draw_factors(registry: AdapterRegistry, name: str, seed: int) -> None:
    entry = registry.entries[name]
    first = registry.mesh.get_local_rank("adapter") * registry.hosted
    hosted = range(first, first + registry.hosted)
    a, b = random_factors(entry.shape, hosted, registry.rank, seed, name)
    device = entry.layer.weight.device
    registry.set_factors(name, a.to(device), b.to(device))


def _collect_rows(registry: AdapterRegistry, dims: ParallelDims, wave: list[str]) -> torch.Tensor | None:
    """The whole weight that this worker owns in the wave, or None where the wave has no weight left for it."""
    local = [registry.entries[name].weight_rows() for name in wave]
    # Replicas hold the same rows: the first one sends.
    sends = dims.dp_rank < dims.dp_shard
    nothing = local[0].new_empty(0)
    send = [rows if sends else nothing for rows in local]
    send += [nothing] * (dims.dp_size - len(wave))
    shapes: list[tuple[int, ...]] = [(0,)] * dims.dp_size
    mine = dims.dp_rank if dims.dp_rank < len(wave) else None
    if mine is not None:
        out_features, in_features = registry.entries[wave[mine]].shape
        for shard, (lo, hi) in enumerate(shard_rows(out_features, dims.dp_shard)):
            shapes[shard] = (hi - lo, in_features)
    received = exchange_lists(send, shapes, dims.dp_mesh.get_group())
    return None if mine is None else torch.cat(received[: dims.dp_shard])


def _deal_factors(
    registry: AdapterRegistry,
    dims: ParallelDims,
    wave: list[str],
    factors: tuple[torch.Tensor, torch.Tensor] | None,
) -> None:
    """Send the factors of the wave's weights from their owners to the holders of the adapters."""
    group, k = dims.dp_mesh.get_group(), registry.hosted
    share = dims.dp_size // registry.mesh.size(0)  # workers per holder
    device = registry.entries[wave[0]].layer.weight.device
    results = []
    for side in (0, 1):
        if factors is None:
            send = [torch.empty(0, device=device)] * dims.dp_size
        else:
            send = [factors[side][w // share * k : (w // share + 1) * k] for w in range(dims.dp_size)]
        shapes: list[tuple[int, ...]] = [(0,)] * dims.dp_size
        for owner, name in enumerate(wave):
            out_features, in_features = registry.entries[name].shape
            shapes[owner] = (k, registry.rank, in_features) if side == 0 else (k, out_features, registry.rank)
        results.append(exchange_lists(send, shapes, group))
    for owner, name in enumerate(wave):
        registry.set_factors(name, results[0][owner], results[1][owner])
