"""Fold: what the optimizer added to every adapter goes onto the shards of W, and the adapters are zero again."""

from __future__ import annotations

import torch

from titan_hd.distributed.adapter_registry import AdapterRegistry
from titan_hd.distributed.parallel_dims import ParallelDims, shard_rows
from titan_hd.distributed.update.factors import apply_factors, exchange_b, gather_a


class Fold:
    """W <- (1 - lr * weight_decay) W + c * sum_i [dB_i A_i + (B_i + dB_i) dA_i], then dA_i = dB_i = 0.

    Keeps, per weight and worker, the static factors A [K*r, in] and its own rows of B [rows, K*r] in fp32.
    """

    def __init__(self, registry: AdapterRegistry, dims: ParallelDims, aggregate: str, weight_decay: float):
        self.registry = registry
        self.coefficient = 1.0 / registry.num_adapters if aggregate == "mean" else 1.0
        self.weight_decay = weight_decay
        self.group = registry.mesh.get_group("adapter")
        holders = registry.mesh["adapter"].mesh.tolist()  # global ranks that exchange with this one
        self._shard_of_holder = [rank % dims.dp_shard for rank in holders]
        self._shards = dims.dp_shard
        self._static: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    @torch.no_grad()
    def gather_static_factors(self) -> None:
        """Send the factors that never change; once, when they are known."""
        for name, entry in self.registry.entries.items():
            a, b = entry.a.to_local(), entry.b.to_local()
            self._static[name] = gather_a(a, self.group), exchange_b(b, self._rows(entry.shape[0]), self.group)

    @torch.no_grad()
    def __call__(self, lr: float) -> None:
        """Update every adapted weight in place; `lr` is the step's learning rate, for the weight decay."""
        for name, entry in self.registry.entries.items():
            delta_a, delta_b = entry.layer.delta_A.to_local(), entry.layer.delta_B.to_local()
            a, b_rows = self._static[name]
            da = gather_a(delta_a, self.group)
            db_rows = exchange_b(delta_b, self._rows(entry.shape[0]), self.group)
            w_rows = entry.layer.weight.to_local()
            if w_rows.numel():
                apply_factors(w_rows, a, b_rows, da, db_rows, self.coefficient, lr * self.weight_decay)
            delta_a.zero_()
            delta_b.zero_()

    def _rows(self, out_features: int) -> list[tuple[int, int]]:
        ranges = shard_rows(out_features, self._shards)
        return [ranges[shard] for shard in self._shard_of_holder]
