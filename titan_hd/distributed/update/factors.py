"""The factors route: low-rank factors travel, each worker multiplies out only the rows of W that it owns.

With n = min(K, W) holders that exchange with each other, k = K / n adapters on each, and at most `chunk` =
ceil(out / dp_shard) rows of W per worker, a worker receives (n - 1) k r (in + chunk) elements per step, and the same
again of the fixed factors A and B unless they are cached. Where elements travel as int8, the scales of (n - 1) k r rows
of dA and as many columns of dB come on top. `factors_exchange.py` has the steps.
"""

from __future__ import annotations

from collections.abc import Sequence

from titan_hd.distributed.update.route import Collective, Exchange, Memory, Route, Shape
from titan_hd.distributed.update.topology import Topology


class FactorsRoute(Route):
    name = "factors"
    fills_bucket = False

    def traffic(self, shapes: Sequence[Shape], t: Topology, cached: bool) -> list[Collective]:
        element = t.wire_bytes if cached else t.wire_bytes + 4  # the fixed factors travel in fp32
        others = (t.holders - 1) * t.hosted * t.rank * element
        a, b = sum(width for _, width in shapes), sum(t.chunk(out) for out, _ in shapes)
        collectives = [
            Collective("all_gather", others * a, t.holders, t.sharing),
            Collective("all_to_all", others * b, t.holders, t.sharing),
        ]
        if t.scale_bytes:
            rows = (t.holders - 1) * t.hosted * t.rank * 2 * len(shapes)
            collectives.append(Collective("all_gather", rows * t.scale_bytes, t.holders, t.sharing))
        return collectives

    def flops(self, shape: Shape, t: Topology) -> int:
        out, width = shape
        return 2 * t.chunk(out) * width * 2 * t.num_adapters * t.rank

    def cache_bytes(self, shape: Shape, t: Topology) -> int:
        out, width = shape
        return 4 * t.num_adapters * t.rank * (width + t.chunk(out))

    def memory(self, shapes: Sequence[Shape], t: Topology, cached: bool, device_type: str = "cuda") -> Memory:
        """Held: what is sent and received, of int8 with what was rounded and all scales. Computing: the same unpacked
        to fp32, and left and right of one weight's product, or what rounds it, or packs its rows for the holders."""
        m, hosted = t.num_adapters * t.rank, t.hosted * t.rank
        converts = t.wire_bytes != 4
        copies = 1 if cached else 2
        held = unpacked = largest = 0
        for out, width in shapes:
            chunk = t.chunk(out)
            received = m * (width + chunk)
            sent = hosted * width + m * chunk
            held += (sent + received) * (t.wire_bytes + 4 * (copies - 1))
            if t.scale_bytes:
                held += hosted * (width + out) + 3 * 2 * m * t.scale_bytes
                largest = max(largest, 5 * hosted * max(width, out))
            unpacked += copies * received * 4 * (1 + converts)
            product = 4 * m * (2 * width + 3 * chunk)
            packing = copies * 3 * hosted * chunk * t.dp_shard * 4
            largest = max(largest, product, packing)
        return Memory(held, unpacked + largest)

    def exchange(self, mesh, dims, coefficient, wire) -> Exchange:
        from titan_hd.distributed.update.factors_exchange import FactorsExchange  # needs torch, a plan does not

        return FactorsExchange(mesh, dims, coefficient, wire)
