"""First values of the fixed factors A, B: which rank computes the SVD of which weight, and who receives the slices.

Weights are dealt in waves of one weight per rank, the costliest first. In a wave, every rank sends its part of weight j
to rank j of its replica (`regroup`), and rank j computes the factors of that one weight. It sends one worker of each
holder the slices of the adapters that are hosted there (an all-to-all), and that worker tells those that share them (a
broadcast). So every SVD is computed once, all ranks compute at the same time, none holds more than one whole weight and
its factors, and nothing is sent to a rank twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from titan_hd.adapters.svd import FACTOR_SCALES, SvdSettings, cut_slices, exact_cost, random_factors
from titan_hd.adapters.svd_cache import cached_factors
from titan_hd.distributed.adapter_registry import AdapterEntry, AdapterRegistry
from titan_hd.distributed.collectives import broadcast, exchange_lists, gather_on_rank_zero
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
    group = dims.one_of_each_holder(registry.num_adapters)
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
        _deal(registry, dims, group, wave, factors)
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
    group: dist.ProcessGroup,
    wave: list[str],
    factors: tuple[torch.Tensor, torch.Tensor] | None,
) -> None:
    """Send the factors of the wave's weights from their owners to the holders of the adapters. group: has one worker of
    each holder (`one_of_each_holder`)."""
    mesh, k = registry.mesh, registry.hosted
    sharing, member = mesh.size(1), mesh.get_local_rank("adapter_group")
    entries = [registry.entries[name] for name in wave]
    shapes = [((k, registry.rank, e.local_shape[1]), (k, e.local_shape[0], registry.rank)) for e in entries]
    sizes = [math.prod(a) + math.prod(b) for a, b in shapes]
    # Weights by the place of their owner among the workers that share its adapters.
    owned = [[w for w in range(len(wave)) if w // dims.tp % sharing == m] for m in range(sharing)]
    received = {}
    if owned[member]:
        send = [registry.factors.new_empty(0)] * dist.get_world_size(group)
        if factors is not None:
            send = [_slices(registry, dims, *factors, entries[dims.rank], to) for to in range(len(send))]
        # Member o of the group is tp rank o % tp of the holder o // tp.
        owners = [(o // dims.tp * sharing + member) * dims.tp + o % dims.tp for o in range(len(send))]
        parts = exchange_lists(send, [(sizes[w],) if w < len(wave) else (0,) for w in owners], group)
        received[member] = torch.cat(parts)
    if sharing > 1:
        works = []
        for m, weights in enumerate(owned):
            if weights:
                flat = received.setdefault(m, registry.factors.new_zeros(sum(sizes[w] for w in weights)))
                works.append(broadcast(flat, mesh.get_group("adapter_group"), m))
        for work in works:
            work.wait()
    for m, flat in received.items():
        for w, values in zip(owned[m], flat.split([sizes[w] for w in owned[m]])):
            a, b = shapes[w]
            registry.set_factors(wave[w], values[: math.prod(a)].view(a), values[math.prod(a) :].view(b))


def _slices(
    registry: AdapterRegistry, dims: ParallelDims, a: torch.Tensor, b: torch.Tensor, entry: AdapterEntry, to: int
) -> torch.Tensor:
    """What number `to` of `one_of_each_holder` gets of a [K, r, in] and b [K, out, r]: flat, first of a."""
    holder, tp_rank = divmod(to, dims.tp)
    hosted = slice(holder * registry.hosted, (holder + 1) * registry.hosted)
    return torch.cat([part.flatten() for part in _tp_part(a[hosted], b[hosted], entry, dims.tp, tp_rank)])


def _tp_part(
    a: torch.Tensor, b: torch.Tensor, entry: AdapterEntry, degree: int, tp_rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A tp rank's part of a [k, r, in] and b [k, out, r]: the factor on the split side of W is split with it."""
    if entry.split == 1:
        a = a.chunk(degree, dim=2)[tp_rank]
    elif entry.split == 0:
        b = b.chunk(degree, dim=1)[tp_rank]
    return a, b
