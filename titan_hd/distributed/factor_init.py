"""First values of the fixed factors A, B: which rank computes the SVD of which weight, and who receives the slices.

Weights are dealt in waves of one weight per rank, the costliest first. In a wave, every rank sends its part of weight j
to rank j (one all-to-all), rank j computes the factors of that one weight, and sends each holder the slices of the
adapters that it hosts (one more all-to-all each for A and B). So every SVD is computed once, all ranks compute at the
same time, and none holds more than one whole weight and its factors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from titan_hd.adapters.svd import FACTOR_SCALES, SvdSettings, cut_slices, exact_cost, random_factors
from titan_hd.adapters.svd_cache import cached_factors
from titan_hd.distributed.adapter_registry import AdapterEntry, AdapterRegistry
from titan_hd.distributed.collectives import exchange_lists, gather_on_rank_zero
from titan_hd.distributed.parallel_dims import ParallelDims
from titan_hd.distributed.regroup import Sharded, collect, waves


@dataclass(frozen=True)
class SliceSettings:
    """slices: "orthogonal", "minor", "top" (these from the SVD of the current W) or "random" (no SVD); factor_scale:
    "root" or "unit"; see `adapters.svd`."""

    slices: str = "orthogonal"
    factor_scale: str = "root"
    seed: int = 0
    svd: SvdSettings = field(default_factory=SvdSettings)
    cache: str = ""


@torch.no_grad()
def compute_factors(
    registry: AdapterRegistry, dims: ParallelDims, settings: SliceSettings
) -> Iterator[list[dict[str, object]]]:
    """Fill the registry with the fixed factors of every layer; yields the reports of each wave, on rank 0.

    Deterministic on any number of workers: whoever owns a weight computes the same from the same bits.
    """
    names = sorted(registry.entries, key=lambda n: (-exact_cost(registry.entries[n].shape), n))
    if settings.slices == "random":
        for name in names:
            _draw_factors(registry, dims, name, settings.seed)
        return
    for wave in waves(names, dims):
        entries = [registry.entries[name] for name in wave]
        weight = collect([Sharded(e.shape, e.split, e.weight_rows()) for e in entries], dims)
        factors, report = None, None
        if weight is not None:
            a, b, report = cached_factors(
                weight, registry.method.directions, settings.svd, wave[dims.rank], settings.cache
            )
            a, b = FACTOR_SCALES[settings.factor_scale](a, b)
            factors = cut_slices(a, b, registry.num_adapters, registry.rank, settings.slices)
            del weight, a, b
        _deal(registry, dims, wave, factors)
        yield gather_on_rank_zero(report)


def _draw_factors(registry: AdapterRegistry, dims: ParallelDims, name: str, seed: int) -> None:
    entry = registry.entries[name]
    first = registry.mesh.get_local_rank("adapter") * registry.hosted
    a, b = random_factors(entry.shape, range(first, first + registry.hosted), registry.rank, seed, name)
    a, b = _tp_part(a, b, entry, dims.tp, dims.tp_rank)
    registry.set_factors(name, a, b)


def _deal(
    registry: AdapterRegistry,
    dims: ParallelDims,
    wave: list[str],
    factors: tuple[torch.Tensor, torch.Tensor] | None,
) -> None:
    """Send the factors of the wave's weights from their owners to the holders of the adapters."""
    k, size = registry.hosted, dims.world_size
    sharing = dims.dp_size // registry.mesh.size(0)  # workers that share an adapter
    entries = [registry.entries[name] for name in wave]
    nothing = torch.empty(0, device=registry.factors.device)
    send_a, send_b = [nothing] * size, [nothing] * size
    if factors is not None:
        a, b = factors
        for rank in range(size):
            place = dims.place(rank)
            first = place.worker // sharing * k
            hosted = slice(first, first + k)
            send_a[rank], send_b[rank] = _tp_part(a[hosted], b[hosted], entries[dims.rank], dims.tp, place.tp_rank)
    absent: list[tuple[int, ...]] = [(0,)] * (size - len(wave))
    a_shapes = [(k, registry.rank, entry.local_shape[1]) for entry in entries] + absent
    b_shapes = [(k, entry.local_shape[0], registry.rank) for entry in entries] + absent
    a_all = exchange_lists(send_a, a_shapes)
    b_all = exchange_lists(send_b, b_shapes)
    for owner, name in enumerate(wave):
        registry.set_factors(name, a_all[owner], b_all[owner])


def _tp_part(
    a: torch.Tensor, b: torch.Tensor, entry: AdapterEntry, degree: int, tp_rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A tp rank's part of a [k, r, in] and b [k, out, r]: the factor on the split side of W is split with it."""
    if entry.split == 1:
        a = a.chunk(degree, dim=2)[tp_rank]
    elif entry.split == 0:
        b = b.chunk(degree, dim=1)[tp_rank]
    return a, b
