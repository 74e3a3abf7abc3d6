"""The adapter registry: which worker hosts which logical adapters, and their tensors as one DTensor each.

Every adapted layer has delta_A [K, r, in] and delta_B [K, out, r] (trainable) and the fixed factors A, B of the same
shapes, all Shard(0) over the mesh dimension "adapter" and replicated over "adapter_group" (the workers that share an
adapter where K < W). Under tensor parallelism the factor on the split side of W is split with it, the other one is
replicated over "tp". So checkpoints and resharding need no code of their own.

What this worker has of them lies in flat tensors, one each for the deltas, their gradients and the factors: the
DTensors are views. What every step does to all of them (zero, sum, norm, clip, the optimizer) is a few kernels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from titan_hd.adapters.frozen_linear import FoldingLinear
from titan_hd.adapters.method import FoldingMethod
from titan_hd.distributed.collectives import sum_in_place
from titan_hd.distributed.flat import Piece, lay_out
from titan_hd.distributed.parallel_dims import local_part

DELTAS = ("delta_A", "delta_B")


@dataclass
class AdapterEntry:
    """One adapted layer. a [K, r, in] and b [K, out, r] are the fixed factors, fp32.

    shape: (out, in) of the whole W; split: its dimension that is split over tp, or None; local_shape: the (out, in) of
    the tp-local matrix. pieces: where this worker's part of delta_A, its gradient and A lie in the flat tensors, and
    of delta_B.
    """

    layer: FoldingLinear
    shape: tuple[int, int]
    split: int | None
    local_shape: tuple[int, int]
    pieces: dict[str, Piece] = field(default_factory=dict)
    a: DTensor = field(init=False)  # with b, by `materialize`
    b: DTensor = field(init=False)

    def weight_rows(self) -> torch.Tensor:
        """This worker's rows of W, [rows, in], perhaps on the host; writing to them changes W."""
        return local_part(self.layer.weight)


class AdapterRegistry:
    """Owns the adapters of a model whose layers were replaced by a method that folds.

    Life: construct (the parameters exist on the meta device and can be given to FSDP2 as ignored), give the model
    memory, `materialize`, `set_factors` for every layer (or let a checkpoint fill them), `start`. What micro-batches
    compute with, and who adds up the gradients, depends on which samples an adapter learns from (`adapter_samples`).

    deltas: all of this worker's trainable elements, the one parameter that the optimizer gets; its gradient is there
    after `start`. factors: the fixed ones, in the same places.
    """

    deltas: nn.Parameter
    factors: torch.Tensor

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
        self._lay_out()

    def parameters(self) -> set[nn.Parameter]:
        """The trainable tensors: FSDP2 must not touch them. `materialize` replaces them by views of `deltas`."""
        return {getattr(entry.layer, key) for entry in self.entries.values() for key in DELTAS}

    @torch.no_grad()
    def materialize(self, device: torch.device) -> None:
        """Allocate deltas, which are zero, and factors, which have no values yet."""
        for entry in self.entries.values():
            for key in DELTAS:
                setattr(entry.layer, key, None)  # frees what the model's `to_empty` gave it
        self.deltas = nn.Parameter(torch.zeros(self._size, device=device))
        self.factors = torch.empty(self._size, device=device)
        for entry in self.entries.values():
            entry.a, entry.b = self._views(self.factors, entry)
            for key, view in zip(DELTAS, self._views(self.deltas.detach(), entry)):
                setattr(entry.layer, key, nn.Parameter(view))

    @torch.no_grad()
    def set_factors(self, name: str, a: torch.Tensor, b: torch.Tensor) -> None:
        """Copy the fixed factors of the hosted adapters: a [k, r, in], b [k, out, r], fp32."""
        entry = self.entries[name]
        for view, values in ((entry.a, a), (entry.b, b)):
            assert local_part(view).shape == values.shape
            local_part(view).copy_(values)

    @torch.no_grad()
    def start(self) -> None:
        """All factors are there: allocate the gradients."""
        self.deltas.grad = torch.zeros_like(self.deltas)
        for entry in self.entries.values():
            for key, gradient in zip(DELTAS, self._views(self.deltas.grad, entry)):
                getattr(entry.layer, key).grad = gradient

    def zero_grad(self) -> None:
        self.gradients.zero_()

    @torch.no_grad()
    def zero_deltas(self) -> None:
        self.deltas.zero_()

    @property
    def gradients(self) -> torch.Tensor:
        """The flat gradient."""
        assert self.deltas.grad is not None, "`start` comes first"
        return self.deltas.grad

    def gradient_parts(self) -> list[tuple[torch.Tensor, int]]:
        """Flat parts of the gradient, each with the number of ranks that hold the same."""
        sharing, tp = self.mesh.size(1), self.mesh.size(2)
        return [(self.gradients[: self._split], sharing), (self.gradients[self._split :], sharing * tp)]

    @torch.no_grad()
    def finish_gradients(self) -> None:
        """When the gradients are sums over data-parallel workers (`Samples.finish`): add what tp ranks have in parts
        (the gradient of the factor that is not split), and undo the mute scalar."""
        if self.mesh.size(2) > 1:
            sum_in_place(self.gradients[self._split : self._whole], self.mesh.get_group("tp"))
        if self.method.mute_scalar:
            self.gradients.div_(self.method.mute_scalar)

    def named_views(self, flat: torch.Tensor) -> Iterator[tuple[str, DTensor]]:
        """A flat tensor that is laid out as `deltas` (an optimizer's moment): its part for every trainable tensor, by
        the tensor's name in the model."""
        for name, entry in self.entries.items():
            for key, view in zip(DELTAS, self._views(flat, entry)):
                yield f"{name}.{key}", view

    def _lay_out(self) -> None:
        """What is split over tp lies first, up to `_split`; then, up to `_whole`, what every tp rank has a part of the
        gradient of; then what is the same on all tp ranks."""
        places = [(entry, key) for entry in self.entries.values() for key in DELTAS]
        order: list[list[tuple[AdapterEntry, str]]] = [[], [], []]
        for entry, key in places:
            # Where rows of W are split over tp, delta_A is whole on every rank; where columns are, delta_B.
            order[2 if entry.split is None else 1 if key == DELTAS[entry.split] else 0].append((entry, key))
        ends = [0]
        for part in order:
            shapes = [self._local_shapes(entry)[key] for entry, key in part]
            for (entry, key), piece in zip(part, lay_out(shapes, ends[-1])):
                entry.pieces[key] = piece
            ends.append(ends[-1] + sum(map(math.prod, shapes)))
        _, self._split, self._whole, self._size = ends

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

    def _views(self, flat: torch.Tensor, entry: AdapterEntry) -> list[DTensor]:
        """Of delta_A and delta_B, or what lies in the same places."""
        return [self._dtensor(entry.pieces[key].of(flat), key, entry) for key in DELTAS]

    def _dtensor(self, local: torch.Tensor, key: str, entry: AdapterEntry) -> DTensor:
        """A DTensor over the adapter mesh from this worker's part of delta_A (or A) or delta_B (or B)."""
        splits: dict[tuple[str, int | None], Placement] = {("delta_A", 1): Shard(2), ("delta_B", 0): Shard(1)}
        split = splits.get((key, entry.split), Replicate())
        # `from_local` itself would copy what is not on the mesh's device, as moments on the host are not.
        nothing = DTensor.from_local(local.to("meta"), self.mesh, (Shard(0), Replicate(), split), run_check=False)
        return DTensor(local, nothing._spec, requires_grad=False)
