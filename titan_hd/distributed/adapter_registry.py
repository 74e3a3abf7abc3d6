"""The adapter registry: which worker hosts which logical adapters, and their tensors as one DTensor each.

Every adapted layer has delta_A [K, r, in] and delta_B [K, out, r] (trainable) and the fixed factors A, B of the same
shapes, all Shard(0) over the mesh dimension "adapter" and replicated over "adapter_group" (the workers that share an
adapter where K < workers). So checkpoints, resharding, optimizers and gradient norms need no code of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from titan_hd.adapters.hdpissa import HDPissa, HDPissaLinear

_PLACEMENTS = (Shard(0), Replicate())


@dataclass
class AdapterEntry:
    """One adapted layer. shape is W's (out, in); a [K, r, in] and b [K, out, r] are the fixed factors, fp32."""

    layer: HDPissaLinear
    shape: tuple[int, int]
    a: DTensor | None = None
    b: DTensor | None = None
    leaves: list[tuple[torch.Tensor, torch.Tensor]] | None = None  # per hosted adapter: da [r, in], db [out, r]

    def weight_rows(self) -> torch.Tensor:
        """This worker's rows of W, [rows, in]; writing to them changes W."""
        return self.layer.weight.to_local()


class AdapterRegistry:
    """Owns the adapters of a model whose layers were replaced by `HDPissa.apply`.

    Life: construct (the parameters exist on the meta device and can be given to FSDP2 as ignored), materialise the
    model, `set_factors` for every layer, `materialize`; then per micro-batch `activate`, per step `finish_gradients`.
    """

    def __init__(self, model: nn.Module, method: HDPissa, mesh: DeviceMesh):
        self.mesh, self.method = mesh, method
        self.num_adapters, self.rank = method.num_adapters, method.rank
        self.hosted = self.num_adapters // mesh.size(0)
        self.entries: dict[str, AdapterEntry] = {}
        for name, layer in model.named_modules():
            if isinstance(layer, HDPissaLinear):
                out_features, in_features = layer.weight.shape
                self.entries[name] = AdapterEntry(layer, (out_features, in_features))
                for attribute, local in self._local_shapes(out_features, in_features).items():
                    tensor = self._dtensor(torch.empty(local, device="meta"))
                    layer.register_parameter(attribute, nn.Parameter(tensor))

    def parameters(self) -> set[nn.Parameter]:
        """The trainable tensors: FSDP2 must not touch them."""
        return {p for e in self.entries.values() for p in (e.layer.delta_A, e.layer.delta_B)}

    def set_factors(self, name: str, a: torch.Tensor, b: torch.Tensor) -> None:
        """Take the fixed factors of the hosted adapters: a [k, r, in], b [k, out, r], fp32 on the device."""
        entry = self.entries[name]
        expected = self._local_shapes(*entry.shape)
        assert (a.shape, b.shape) == (expected["delta_A"], expected["delta_B"])
        entry.a, entry.b = self._dtensor(a.contiguous()), self._dtensor(b.contiguous())

    def empty_factors(self) -> None:
        """Allocate the fixed factors without values, for a checkpoint to fill."""
        for name, entry in self.entries.items():
            shapes, device = self._local_shapes(*entry.shape), entry.layer.delta_A.device
            a, b = (torch.empty(shapes[key], device=device) for key in ("delta_A", "delta_B"))
            self.set_factors(name, a, b)

    @torch.no_grad()
    def materialize(self) -> None:
        """Zero the trainable tensors and make, per hosted adapter, leaves that share their memory.

        A leaf's gradient is a slice of the parameter's gradient: backward accumulates where the optimizer reads.
        """
        for entry in self.entries.values():
            columns = []
            for parameter in (entry.layer.delta_A, entry.layer.delta_B):
                local = parameter.to_local()
                local.zero_()
                parameter.grad = self._dtensor(torch.zeros_like(local))
                grads = parameter.grad.to_local()
                leaves = [local[i].detach().requires_grad_(True) for i in range(self.hosted)]
                for i, leaf in enumerate(leaves):
                    leaf.grad = grads[i]
                columns.append(leaves)
            entry.leaves = list(zip(*columns))

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
        """After the last backward pass of a step: sum over workers that share an adapter, undo the mute scalar."""
        grads = self._local_grads()
        if self.mesh.size(1) > 1:
            flat = torch._utils._flatten_dense_tensors(grads)
            dist.all_reduce(flat, group=self.mesh.get_group("adapter_group"))
            torch._foreach_copy_(grads, torch._utils._unflatten_dense_tensors(flat, grads))
        if self.method.mute_scalar:
            torch._foreach_div_(grads, self.method.mute_scalar)

    def _local_grads(self) -> list[torch.Tensor]:
        return [p.grad.to_local() for e in self.entries.values() for p in (e.layer.delta_A, e.layer.delta_B)]

    def _local_shapes(self, out_features: int, in_features: int) -> dict[str, tuple[int, int, int]]:
        return {
            "delta_A": (self.hosted, self.rank, in_features),
            "delta_B": (self.hosted, out_features, self.rank),
        }

    def _dtensor(self, local: torch.Tensor) -> DTensor:
        return DTensor.from_local(local, self.mesh, _PLACEMENTS, run_check=False)
