"""Projections onto the directions that the fixed factors hold: V on the right of W, U on its left, K*r of each.

Each holder projects onto those of the adapters that it hosts; they are orthogonal to each other, so that projections,
and their squared norms, add up. Under tensor parallelism a factor on the split side of W is in parts.
"""

from __future__ import annotations

import torch

from titan_hd.distributed.adapter_registry import AdapterRegistry
from titan_hd.distributed.collectives import sum_in_place
from titan_hd.distributed.parallel_dims import local_part


class Directions:
    """registry: its factors are read when a method is called."""

    def __init__(self, registry: AdapterRegistry):
        self.registry = registry
        mesh = registry.mesh
        first = mesh.get_local_rank("adapter") * registry.hosted
        # Top slices are the same directions for every adapter: those of the first count.
        self._hosted = registry.hosted if registry.method.slices != "top" else min(1, max(0, 1 - first))
        self._counts = not mesh.get_local_rank("adapter_group") and not mesh.get_local_rank("tp")

    def project(self, name: str, vectors: torch.Tensor) -> torch.Tensor:
        """V V^T vectors, of this rank's columns of W: vectors and result [columns, p], float64. Collective."""
        entry = self.registry.entries[name]
        v = self._unit(local_part(entry.a)[: self._hosted].flatten(0, 1), entry.split == 1)
        seen = self._summed_over_tp(v @ vectors, entry.split == 1)
        projected = v.T @ seen
        if self.registry.mesh.size(0) > 1:
            sum_in_place(projected, self.registry.mesh.get_group("adapter"))
        return projected

    def left_energies(self, name: str, products: list[torch.Tensor]) -> list[torch.Tensor]:
        """||U^T product||^2 of each product [rows of the tp-local W, p], float64: this rank's terms of sums over all
        ranks, 0-dim. Collective."""
        entry = self.registry.entries[name]
        u = self._unit(local_part(entry.b)[: self._hosted].transpose(1, 2).flatten(0, 1), entry.split == 0)
        seen = self._summed_over_tp(u @ torch.cat(products, dim=1), entry.split == 0)
        return [part.square().sum() * self._counts for part in seen.split(products[0].shape[1], dim=1)]

    def _unit(self, rows: torch.Tensor, split: bool) -> torch.Tensor:
        """Rows [n, columns] of length one, float64; rows of zeros stay. split: over tp, by columns."""
        rows = rows.double()
        norms = self._summed_over_tp(rows.square().sum(1, keepdim=True), split).sqrt()
        return torch.where(norms > 0, rows / norms, 0.0)

    def _summed_over_tp(self, part: torch.Tensor, split: bool) -> torch.Tensor:
        if split and self.registry.mesh.size(2) > 1:
            sum_in_place(part, self.registry.mesh.get_group("tp"))
        return part
