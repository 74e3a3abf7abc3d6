"""The dense route: every worker forms its adapters' update and reduce-scatters it onto the shards.

With at most `chunk` = ceil(out / dp_shard) rows of W per worker, a worker receives (dp_shard - 1) chunk in elements of
the reduce-scatter, and of the all-reduce over the replicas 2 (dp_replicate - 1) / dp_replicate chunk in: cheaper than
factors only where K*r comes near min(out, in). Sums travel in fp32 where dA and dB were rounded to int8.
`dense_exchange.py` has the steps.
"""

from __future__ import annotations

from collections.abc import Sequence

from titan_hd.distributed.update.route import Collective, Exchange, Memory, Route, Shape
from titan_hd.distributed.update.topology import Topology

# What travels at a time, in bytes of fp32: enough to fill the links of GPUs, little enough for the caches of CPUs.
_PIECE_BYTES = {"cuda": 2**26, "cpu": 2**22}


def piece_rows(chunk: int, width: int, shards: int, device_type: str) -> int:
    """Rows of each chunk [chunk, width] that travel together."""
    return min(chunk, max(1, _PIECE_BYTES.get(device_type, 2**26) // (4 * shards * width)))


class DenseRoute(Route):
    name = "dense"
    fills_bucket = True

    def traffic(self, shapes: Sequence[Shape], t: Topology, cached: bool) -> list[Collective]:
        collectives = []
        for out, width in shapes:
            rows = t.chunk(out) * width * t.sum_bytes
            across = 2 * (t.dp_replicate - 1) * rows // t.dp_replicate
            collectives.append(Collective("reduce_scatter", (t.dp_shard - 1) * rows, t.dp_shard, 1))
            collectives.append(Collective("all_reduce", across, t.dp_replicate, t.dp_shard))
        return collectives

    def flops(self, shape: Shape, t: Topology) -> int:
        out, width = shape
        return 2 * out * width * 2 * t.hosted * t.rank

    def memory(self, shapes: Sequence[Shape], t: Topology, cached: bool, device_type: str = "cuda") -> Memory:
        """Held: left and right of the product, the worker's rows of the update, and the piece that travels: what is
        sent, over gloo as much that is received, and the sum; of int8 what was rounded. Computing: stacking left, and
        one piece in fp32; of int8 dA and dB in fp32."""
        ((out, width),) = shapes
        chunk, hosted = t.chunk(out), t.hosted * t.rank
        step = piece_rows(chunk, width, t.dp_shard, device_type)
        piece = step * t.dp_shard * width
        held = 8 * hosted * (chunk * t.dp_shard + width) + 4 * chunk * width
        held += (2 * piece + step * width) * t.sum_bytes
        converted = 4 * piece if t.sum_bytes != 4 else 0
        if t.scale_bytes:
            held += hosted * (width + out)
            converted += 5 * hosted * (width + out)
        return Memory(held, 4 * hosted * (5 * out + 2 * step * t.dp_shard) + converted)

    def exchange(self, mesh, dims, coefficient, wire) -> Exchange:
        import torch  # a plan does not need it

        from titan_hd.distributed.update.dense_exchange import DenseExchange

        sums = wire if wire.is_floating_point else torch.float32
        return DenseExchange(mesh, dims, coefficient, sums, piece_rows)
