"""What it costs to bring the adapters' gradients to their holders. No torch in here.

`distributed.adapter_samples` says how: where every adapter learns from all samples, a reduce-scatter of the gradients
of all directions over the holders; where workers share an adapter, an all-reduce of its gradient over them.
"""

from __future__ import annotations

from collections.abc import Sequence

from titan_hd.distributed.update.route import Collective, Shape
from titan_hd.distributed.update.topology import Topology


def gradient_traffic(shapes: Sequence[Shape], t: Topology) -> list[Collective]:
    """The collectives of one step, bucket by bucket put together. shapes: of all adapted weights."""
    hosted = 4 * t.hosted * t.rank * sum(map(sum, shapes))
    collectives = [Collective("all_reduce", 2 * (t.sharing - 1) * hosted // t.sharing, t.sharing, 1)]
    if t.samples == "all":
        collectives.append(Collective("reduce_scatter", (t.holders - 1) * hosted, t.holders, t.sharing))
    return collectives


def bound_elements(shapes: Sequence[Shape], t: Topology) -> int:
    """Elements of the factors A, B that a micro-batch is computed with, and of their gradients: a worker's of one
    adapter, or of all."""
    return (t.directions if t.samples == "all" else t.rank) * sum(map(sum, shapes))
