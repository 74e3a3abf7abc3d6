"""The adapter registry: which worker hosts which logical adapters, and their tensors as one DTensor each.

Every adapted layer has delta_A [K, r, in] and delta_B [K, out, r] (trainable) and the fixed factors A, B of the same
shapes, all Shard(0) over the mesh dimension "adapter" and replicated over "adapter_group" (the workers that share an
adapter where K < W). Under tensor parallelism the factor on the split side of W is split with it, the other one is
replicated over "tp". So checkpoints, resharding and optimizers need no code of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from titan_hd.adapters.frozen_linear import FoldingLinear
from titan_hd.adapters.method import FoldingMethod
from titan_hd.distributed.collectives import all_reduce
from titan_hd.distributed.parallel_dims import local_part


@dataclass
class AdapterEntry:
    """One adapted layer. a [K, r, in] and b [K, out, r] are the fixed factors, fp32.

    shape: (out, in) of the whole W; split: its dimension that is split over tp, or None; local_shape: the (out, in) of
    the tp-local matrix. leaves: per hosted adapter, da [r, in] and db [out, r].
    grads: this worker's parts of the gradients of delta_A and delta_B.
    """

    layer: FoldingLinear
    shape: tuple[int, int]
    split: int | None
    local_shape: tuple[int, int]
    a: DTensor = field(init=False)  # with b, by `set_factors`
    b: DTensor = field(init=False)
    leaves: list[tuple[torch.Tensor, torch.Tensor]] = field(init=False)  # with grads, by `materialize`
    grads: tuple[torch.Tensor, torch.Tensor] = field(init=False)

    def weight_rows(self) -> torch.Tensor:
        """This worker's rows of W, [rows, in]; writing to them changes W."""
        return local_part(self.layer.weight)


class AdapterRegistry:
    """Owns the adapters of a model whose layers were replaced by a method that folds.

    Life: construct (the parameters exist on the meta device and can be given to FSDP2 as ignored), materialise the
    model, `set_factors` for every layer, `materialize`; then per micro-batch `activate`, per step `finish_gradients`.
    """

    def __init__(self, model: nn.Module, method: FoldingMethod, mesh: DeviceMesh):
        self.mesh, self.method = mesh, method
        self.num_adapters, self.rank = method.num_adapters, method.rank
        self.hosted = self.num_adapters // mesh.size(0)
        self.entries: dict[str, AdapterEntry] = {}
        for name, layer in model.named_modules():
            if isinstance(layer, FoldingLinear):
                self.entries[name] = entry = self._entry(layer)
                for key, local in self._local_shapes(entry).items():
                    tensor = self._dtensor(torch.empty(local, device="meta"), key, entry)
                    layer.register_parameter(key, nn.Parameter(tensor))

    def parameters(self) -> set[nn.Parameter]:
        """The trainable tensors: FSDP2 must not touch them."""
        return {p for e in self.entries.values() for p in (e.layer.delta_A, e.layer.delta_B)}

    def set_factors(self, name: str, a: torch.Tensor, b: torch.Tensor) -> None:
        """Take the fixed factors of the hosted adapters: a [k, r, in], b [k, out, r], fp32 on the device."""
        entry = self.entries[name]
        expected = self._local_shapes(entry)
        assert (a.shape, b.shape) == (expected["delta_A"], expected["delta_B"])
        entry.a = self._dtensor(a.contiguous(), "delta_A", entry)
        entry.b = self._dtensor(b.contiguous(), "delta_B", entry)

    def empty_factors(self) -> None:
        """Allocate the fixed factors without values, for a checkpoint to fill."""
        for name, entry in self.entries.items():
            shapes, device = self._local_shapes(entry), entry.layer.delta_A.device
            a, b = (torch.empty(shapes[key], device=device) for key in ("delta_A", "delta_B"))
            self.set_factors(name, a, b)

    @torch.no_grad()
    def materialize(self) -> None:
        """Zero the trainable tensors and make, per hosted adapter, leaves that share their memory.

        A leaf's gradient is a slice of the parameter's gradient: backward accumulates where the optimizer reads.
        """
        for entry in self.entries.values():
            columns, parts = [], []
            for key in ("delta_A", "delta_B"):
                parameter = getattr(entry.layer, key)
                local = local_part(parameter)
                local.zero_()
                grads = torch.zeros_like(local)
                parameter.grad = self._dtensor(grads, key, entry)
                leaves = [local[i].detach().requires_grad_(True) for i in range(self.hosted)]
                for i, leaf in enumerate(leaves):
                    leaf.grad = grads[i]
                columns.append(leaves)
                parts.append(grads)
            entry.leaves, entry.grads = list(zip(*columns)), (parts[0], parts[1])

    def activate(self, slot: int) -> None:
        """Bind hosted adapter `slot` to every layer: the next forward and backward pass trains it."""
        for entry in self.entries.values():
            da, db = entry.leaves[slot]
            entry.layer.bind(entry.a.to_local()[slot], entry.b.to_local()[slot], da, db)

    @torch.no_grad()
    def zero_grad(self) -> None:
        torch._foreach_zero_(self._local_grads())

    @torch.no_grad()
    def finish_gradients(self) -> None:
        """After the last backward pass of a step: sum what workers have in parts, undo the mute scalar.

        Workers that share an adapter have its gradient of their samples; tp ranks have parts of the gradient of the
        factor that is not split.
        """
        grads = self._local_grads()
        if self.mesh.size(1) > 1:
            _sum_in_place(grads, self.mesh.get_group("adapter_group"))
        if self.mesh.size(2) > 1:
            # Where rows of W are split over tp, delta_A is whole on every rank; where columns are, delta_B.
            parts = [entry.grads[entry.split] for entry in self.entries.values() if entry.split is not None]
            _sum_in_place(parts, self.mesh.get_group("tp"))
        if self.method.mute_scalar:
            torch._foreach_div_(grads, self.method.mute_scalar)

    def _local_grads(self) -> list[torch.Tensor]:
        return [grad for entry in self.entries.values() for grad in entry.grads]

    def _entry(self, layer: FoldingLinear) -> AdapterEntry:
        split, local = None, layer.weight
        if isinstance(layer.weight, DTensor):
            (placement,) = layer.weight.placements
            assert isinstance(placement, Shard)
            split, local = placement.dim, layer.weight.to_local()
        out_features, in_features = local.shape
        return AdapterEntry(layer, (layer.out_features, layer.in_features), split, (out_features, in_features))

    def _local_shapes(self, entry: AdapterEntry) -> dict[str, tuple[int, int, int]]:
        out_features, in_features = entry.local_shape
        return {
            "delta_A": (self.hosted, self.rank, in_features),
            "delta_B": (self.hosted, out_features, self.rank),
        }

    def _dtensor(self, local: torch.Tensor, key: str, entry: AdapterEntry) -> DTensor:
        """A DTensor over the adapter mesh from this worker's part of delta_A (or A) or delta_B (or B)."""
        splits: dict[tuple[str, int | None], Placement] = {("delta_A", 1): Shard(2), ("delta_B", 0): Shard(1)}
        split = splits.get((key, entry.split), Replicate())
        return DTensor.from_local(local, self.mesh, (Shard(0), Replicate(), split), run_check=False)


def _sum_in_place(tensors: list[torch.Tensor], group: dist.ProcessGroup) -> None:
    flat = torch._utils._flatten_dense_tensors(tensors)
    all_reduce(flat, dist.get_world_size(group), group).wait()
    torch._foreach_copy_(tensors, torch._utils._unflatten_dense_tensors(flat, tensors))
