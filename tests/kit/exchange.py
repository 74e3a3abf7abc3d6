"""Two blocks of linear layers under FSDP2 with a registry whose updates are drawn, and their fold."""

from __future__ import annotations

import torch
from torch import nn

from titan_hd.adapters.hdpissa import HDPissa
from titan_hd.distributed.adapter_registry import AdapterRegistry
from titan_hd.distributed.factor_init import SliceSettings, compute_factors
from titan_hd.distributed.parallel_dims import ParallelDims
from titan_hd.distributed.update.fold import Fold, FoldSettings
from titan_hd.distributed.update.plan import plan_update
from titan_hd.distributed.update.topology import Topology

# Two blocks: the first is one bucket of two weights of odd shapes.
SHAPES = {"layers.0.a": (37, 22), "layers.0.b": (8, 30), "layers.1.c": (22, 9), "layers.1.d": (64, 8)}


def draw(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(map(ord, name)) * 1000 + sum(shape)))


class Layers(nn.Module):
    """A container that FSDP2 accepts: it wants a forward method."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict(), nn.ModuleDict()])

    def forward(self):
        raise NotImplementedError


def build(num_adapters: int, replicate: int, shard: int, rank: int = 1, dtype: torch.dtype = torch.float32):
    """Plain linears under FSDP2, with a registry whose dA, dB are drawn, not trained."""
    from torch.distributed.fsdp import fully_shard

    dims = ParallelDims(replicate, shard, "cpu")
    model = Layers()
    for name, (out, width) in SHAPES.items():
        linear = nn.Linear(width, out, bias=False)
        linear.weight.data = draw(name, SHAPES[name]).to(dtype)
        model.layers[int(name[7])][name[9:]] = linear
    method = HDPissa(num_adapters, rank)
    method.apply(model, [name[9:] for name in SHAPES])
    registry = AdapterRegistry(model, method, dims.adapter_mesh(num_adapters))
    fully_shard(model, mesh=dims.fsdp_mesh, ignored_params=registry.parameters())
    registry.materialize(torch.device("cpu"))
    for _ in compute_factors(registry, dims, SliceSettings()):
        pass
    registry.start()
    return registry, dims


def prepared(num_adapters, replicate, shard, exchange="auto", cache_gb=None, rank=1, **options):
    registry, dims = build(num_adapters, replicate, shard, rank)
    wire = options.get("wire", torch.float32)
    topology = Topology(num_adapters, rank, replicate, shard, wire.itemsize)
    plan = plan_update({n: e.shape for n, e in registry.entries.items()}, topology, exchange, cache_gb)
    fold = Fold(registry, dims, plan, FoldSettings(**options))
    fold.prepare()
    return registry, fold
