"""Which samples an adapter learns from: what a micro-batch binds to the layers, and who adds up which gradients.

own: a sample of the global batch is one adapter's. A micro-batch binds this adapter, and its backward pass accumulates
where the optimizer reads. Workers that share an adapter add their gradients at the end.

all: every sample is every adapter's. A micro-batch binds all K adapters side by side, as one of rank K*r, so that every
worker has the gradients of all directions, of its own samples. In the last backward pass of a step, bucket by bucket
(the layers of a block):

1. as soon as the bucket's gradients are complete, every worker starts to reduce-scatter them: a holder receives the sum
   of its slices. At most `in_flight` buckets travel, beside the backward pass of the blocks below;
2. what has arrived is written where the optimizer reads;
3. at the end, workers that share an adapter add what they have received.

The sums travel in fp32. On one holder nothing travels.
"""

from __future__ import annotations

import functools
from collections import deque
from dataclasses import dataclass, field

import torch

from titan_hd.adapters.frozen_linear import FoldingLinear
from titan_hd.distributed.adapter_registry import DELTAS, AdapterEntry, AdapterRegistry
from titan_hd.distributed.collectives import all_gather, reduce_scatter, sum_in_place
from titan_hd.distributed.flat import lay_out
from titan_hd.distributed.update.plan import block_of

Bound = list[tuple[FoldingLinear, tuple[torch.Tensor, ...]]]  # what `bind` gets, layer by layer


class Samples:
    """Made when the registry was started, on all ranks at a time.

    compute_dtype: of the fixed factors that are bound. in_flight: buckets of gradients that travel at the same time.
    """

    def __init__(self, registry: AdapterRegistry, compute_dtype: torch.dtype, in_flight: int):
        self.registry = registry

    def factors_changed(self) -> None:
        """The registry has other fixed factors: bind these from now on. Collective."""
        raise NotImplementedError

    def zero_grad(self) -> None:
        """Before the first micro-batch of a step."""
        raise NotImplementedError

    def activate(self, slot: int, last: bool) -> None:
        """Bind what the next micro-batch trains. last: it is the step's last one."""
        raise NotImplementedError

    def finish(self) -> None:
        """After the last backward pass: the registry's gradients become sums over data-parallel workers. Collective."""
        if self.registry.mesh.size(1) > 1:
            sum_in_place(self.registry.gradients, self.registry.mesh.get_group("adapter_group"))


class OwnSamples(Samples):
    """Slot i is hosted adapter i. A hosted adapter's da and db are leaves that share the memory of `deltas`, and their
    gradients that of its gradient."""

    def __init__(self, registry: AdapterRegistry, compute_dtype: torch.dtype, in_flight: int):
        super().__init__(registry, compute_dtype, in_flight)
        # The products of the exact mute need the fixed factors alone, so that less than fp32 is enough.
        factors = registry.factors if registry.method.mute_scalar else registry.factors.to(compute_dtype)
        self._factors = factors
        self._bound: list[Bound] = [[] for _ in range(registry.hosted)]
        for entry in registry.entries.values():
            for slot, bound in enumerate(self._bound):
                fixed = [entry.pieces[key].of(factors)[slot] for key in DELTAS]
                leaves = [entry.pieces[key].of(registry.deltas.detach())[slot].requires_grad_(True) for key in DELTAS]
                for key, leaf in zip(DELTAS, leaves):
                    leaf.grad = entry.pieces[key].of(registry.gradients)[slot]
                bound.append((entry.layer, (*fixed, *leaves)))

    def factors_changed(self) -> None:
        self._factors.copy_(self.registry.factors)  # nothing to do where they are the same tensor

    def zero_grad(self) -> None:
        self.registry.zero_grad()

    def activate(self, slot: int, last: bool) -> None:
        for layer, tensors in self._bound[slot]:
            layer.bind(*tensors)


@dataclass
class _Bucket:
    """Gradients that travel together. parts: of each tensor, what this worker has for every holder, [n, elements];
    arrived: views of the registry's gradient that take the holder's own line of each. missing: parts that the last
    backward pass has not completed."""

    parts: list[torch.Tensor] = field(default_factory=list)
    arrived: list[torch.Tensor] = field(default_factory=list)
    missing: int = 0


class AllSamples(Samples):
    """There is one slot, with all K adapters: a [K*r, in] and b [out, K*r] in the compute dtype, gathered once.

    The exact mute does not read da and db: their leaves are views of the same zeros. Their gradients are parts of one
    flat tensor of K r (in + out) elements for each weight, in which those of db stand transposed, so that a holder's
    slices are contiguous.
    """

    def __init__(self, registry: AdapterRegistry, compute_dtype: torch.dtype, in_flight: int):
        super().__init__(registry, compute_dtype, in_flight)
        assert not registry.method.mute_scalar, "HDPissa.config_errors"
        self._holders, self._group = registry.mesh.size(0), registry.mesh.get_group("adapter")
        self._in_flight = in_flight
        self._last = False
        self._travelling: deque = deque()  # (bucket, what is sent, what arrives, what to wait for)
        self._buckets: dict[str, _Bucket] = {}
        directions = registry.num_adapters * registry.rank
        shapes = [(directions, size) for entry in registry.entries.values() for size in reversed(entry.local_shape)]
        self._flat = registry.factors.new_zeros(sum(count * size for count, size in shapes))
        views = (piece.of(self._flat) for piece in lay_out(shapes))
        self._zeros = self._flat.new_zeros(max(count * size for count, size in shapes))
        self._bound: Bound = []
        for name, entry in registry.entries.items():
            bucket = self._buckets.setdefault(block_of(name) or name, _Bucket())
            leaves = []
            for key, gradient in zip(DELTAS, views):  # [K*r, in], then [K*r, out]
                own = entry.pieces[key].of(registry.gradients)
                self._add_part(bucket, gradient, own if key == "delta_A" else own.transpose(1, 2))
                leaf = self._zeros[: gradient.numel()].view(gradient.shape)
                if key == "delta_B":
                    leaf, gradient = leaf.T, gradient.T
                leaves.append(leaf.requires_grad_(True))
                leaf.grad = gradient
                leaf.register_post_accumulate_grad_hook(functools.partial(self._completed, bucket))
            self._bound.append((entry.layer, (*self._gathered(entry, compute_dtype), *leaves)))

    def factors_changed(self) -> None:
        for entry, (_, (a, b, *_)) in zip(self.registry.entries.values(), self._bound):
            for bound, changed in zip((a, b), self._gathered(entry, a.dtype)):
                bound.copy_(changed)

    def zero_grad(self) -> None:
        self._flat.zero_()

    def activate(self, slot: int, last: bool) -> None:
        self._last = last
        for layer, tensors in self._bound:
            layer.bind(*tensors)

    def finish(self) -> None:
        for bucket in self._buckets.values():
            if bucket.missing:  # no micro-batch was said to be the last
                self._send(bucket)
            bucket.missing = len(bucket.parts)
        while self._travelling:
            self._receive()
        super().finish()

    def _add_part(self, bucket: _Bucket, gradient: torch.Tensor, own: torch.Tensor) -> None:
        """gradient [K*r, size] of all directions; own [k, r, size], of the hosted ones, a view."""
        bucket.parts.append(gradient.view(self._holders, -1))
        bucket.arrived.append(own)
        bucket.missing += 1

    def _gathered(self, entry: AdapterEntry, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Fixed factors of all adapters: [K*r, in] and [out, K*r]."""
        a, b = (entry.pieces[key].of(self.registry.factors).to(dtype) for key in DELTAS)
        if self._holders > 1:
            flat, work = all_gather(torch.cat([a.flatten(), b.flatten()]), self._holders, self._group)
            work.wait()
            a, b = flat.split([a.numel(), b.numel()], dim=1)
        out_features, in_features = entry.local_shape
        by_adapter = b.reshape(-1, out_features, self.registry.rank)  # [K, out, r]
        return a.reshape(-1, in_features).contiguous(), by_adapter.transpose(0, 1).flatten(1)

    def _completed(self, bucket: _Bucket, leaf: torch.Tensor) -> None:
        """A backward pass has added to the gradient of one of a bucket's leaves."""
        if self._last:
            bucket.missing -= 1
            if not bucket.missing:
                self._send(bucket)

    def _send(self, bucket: _Bucket) -> None:
        if self._holders == 1:
            self._write(bucket, bucket.parts)
            return
        if len(self._travelling) == self._in_flight:
            self._receive()
        lines = torch.cat(bucket.parts, dim=1)
        self._travelling.append((bucket, lines, *reduce_scatter(lines.view(-1), self._holders, self._group)))

    def _receive(self) -> None:
        bucket, _, arriving, work = self._travelling.popleft()
        work.wait()
        self._write(bucket, arriving.split([part.shape[1] for part in bucket.parts]))

    def _write(self, bucket: _Bucket, lines: tuple[torch.Tensor, ...] | list[torch.Tensor]) -> None:
        for view, line in zip(bucket.arrived, lines):
            view.copy_(line.view(view.shape))


# The values of hdpissa.samples.
SAMPLES: dict[str, type[Samples]] = {"own": OwnSamples, "all": AllSamples}
