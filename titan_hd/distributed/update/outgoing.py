"""What leaves the holders of dA and dB in a step, and what stays for the next one.

Where floats travel, everything leaves, and dA and dB are zero again.

Where int8 travels, each row of dA_i (of `in` elements) and each column of dB_i (of `out`) has a scale: its largest
magnitude / 127. What leaves is the nearest multiple of the scale for every element. The residual, at most half a scale,
stays where it is, and the optimizer adds its next step to it: error feedback. So nothing is lost: what is folded over
many steps is what the optimizer proposed, up to the last residual. And no memory is needed. A step may begin with a
residual in dA and dB because the exact mute reads neither, nor does an optimizer that adds to them without decay
(`HDPissa.config_errors`).

Whoever folds, folds what has left, the holder too: W is then a function of K, the seed and the batch on any mesh.
Workers that share an adapter have equal gradients, so equal residuals. A column of dB_i has one scale for all shards of
W, and under tensor parallelism one for all ranks that it is split over.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist

from titan_hd.distributed.adapter_registry import AdapterEntry, AdapterRegistry
from titan_hd.distributed.parallel_dims import local_part
from titan_hd.distributed.update.route import HostedFactors

_LARGEST = 127  # of int8, in both signs


class Outgoing:
    """Of floats. A fold calls `begin`, `take` for each weight once, `end`."""

    def __init__(self, registry: AdapterRegistry):
        self.registry = registry
        self._views = {name: _hosted_factors(entry) for name, entry in registry.entries.items()}

    def views(self, names: Iterable[str]) -> list[HostedFactors]:
        """The adapters as they are, fp32."""
        return [self._views[name] for name in names]

    def begin(self) -> None:
        """The optimizer has taken its step. Collective."""

    def take(self, names: Iterable[str]) -> list[HostedFactors]:
        """What leaves of these weights' dA and dB."""
        return self.views(names)

    def end(self) -> None:
        """All has left."""
        self.registry.zero_deltas()


class Int8Outgoing(Outgoing):
    """Of int8. Memory: the scales, two fp32 numbers for each row of A."""

    def __init__(self, registry: AdapterRegistry):
        super().__init__(registry)
        self._scales = registry.factors.new_empty(len(self._views), 2, registry.hosted, registry.rank)
        self._scales_of = dict(zip(self._views, self._scales))

    def begin(self) -> None:
        """All scales at once, so that one all-reduce over tp is enough."""
        for name, (of_rows, of_columns) in self._scales_of.items():
            hosted = self._views[name]
            torch.linalg.vector_norm(hosted.da, math.inf, dim=2, out=of_rows)
            torch.linalg.vector_norm(hosted.db, math.inf, dim=1, out=of_columns)
        if self.registry.mesh.size(2) > 1:
            dist.all_reduce(self._scales, dist.ReduceOp.MAX, self.registry.mesh.get_group("tp"))
        self._scales.div_(_LARGEST)
        # What is too small to divide by stays: it is zero in units of 1.
        self._scales.masked_fill_(self._scales < torch.finfo(torch.float32).tiny, 1.0)

    def take(self, names: Iterable[str]) -> list[HostedFactors]:
        return [self._rounded(self._views[name], self._scales_of[name]) for name in names]

    def end(self) -> None:
        """The residuals stay."""

    def _rounded(self, hosted: HostedFactors, scales: torch.Tensor) -> HostedFactors:
        da, db = _take_multiples(hosted.da, scales[0, :, :, None]), _take_multiples(hosted.db, scales[1, :, None, :])
        return hosted._replace(da=da, db=db, scales=scales)


def _take_multiples(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The nearest multiples of scale, as int8; values, fp32, keep the residuals. Their difference is exact: a value and
    its multiple are within a factor of two, or the multiple is zero."""
    multiples = (values / scale).round_().to(torch.int8)
    values.sub_(multiples * scale)
    return multiples


def _hosted_factors(entry: AdapterEntry) -> HostedFactors:
    tensors = (entry.a, entry.b, entry.layer.delta_A, entry.layer.delta_B)
    return HostedFactors(*(local_part(tensor).detach() for tensor in tensors))


# By the dtype on the way.
OUTGOING: dict[torch.dtype, type[Outgoing]] = {
    torch.float32: Outgoing,
    torch.bfloat16: Outgoing,
    torch.int8: Int8Outgoing,
}
