"""The fold's exchange alone, against the dense loops of `update/reference.py`.

workers  K     mesh            what it reaches
1        1, 4  1               no exchange, virtual adapters
2        2, 4  1 x 2           K = workers, K > workers
4        4, 8  1 x 4           uneven rows (37, 22), an empty shard (5 rows on 4: 2, 2, 1, 0)
4        2, 1  1 x 4           K < workers: shared adapters
4        4, 2  2 x 2           HSDP
"""

from unittest import mock

import pytest
import torch

from tests.kit.exchange import SHAPES, build, draw
from titan_hd.distributed.update.fold import Fold, FoldSettings
from titan_hd.distributed.update.plan import plan_update
from titan_hd.distributed.update.reference import reference_update
from titan_hd.distributed.update.topology import Topology

# One fp32 product of inner size 2 K r <= 16 against float64.
TOLERANCE = 1e-5


def fold_once(
    num_adapters: int, replicate: int, shard: int, aggregate: str, decay: float, exchange: str, piece_bytes: int | None
) -> dict:
    from titan_hd.distributed.update import dense

    with mock.patch.object(dense, "_PIECE_BYTES", {"cpu": piece_bytes} if piece_bytes else dense._PIECE_BYTES):
        return _fold_once(num_adapters, replicate, shard, aggregate, decay, exchange)


def _fold_once(num_adapters: int, replicate: int, shard: int, aggregate: str, decay: float, exchange: str) -> dict:
    registry, dims = build(num_adapters, replicate, shard)
    topology = Topology(num_adapters, 1, replicate, shard)
    plan = plan_update({n: e.shape for n, e in registry.entries.items()}, topology, exchange)
    fold = Fold(registry, dims, plan, FoldSettings(aggregate, decay))
    fold.prepare()
    first = registry.mesh.get_local_rank("adapter") * registry.hosted
    for name, entry in registry.entries.items():
        for key in ("delta_A", "delta_B"):
            local = getattr(entry.layer, key).detach().to_local()
            full = draw(name + key, (num_adapters, *local.shape[1:]))
            local.copy_(full[first : first + registry.hosted])
    fold(lr=0.5, step=0)
    result = {}
    for name, entry in registry.entries.items():
        assert not entry.layer.delta_A.to_local().any()
        assert not entry.layer.delta_B.to_local().any()
        result[name] = (entry.layer.weight.full_tensor(), entry.a.full_tensor(), entry.b.full_tensor())
    return result


@pytest.mark.parametrize(
    ("exchange", "aggregate", "piece_bytes"),
    # 400 bytes: dense in several pieces, some of one row, the last ones smaller
    [("factors", "mean", None), ("dense", "sum", None), ("dense", "mean", 400), ("auto", "mean", None)],
)
@pytest.mark.parametrize(
    ("world_size", "num_adapters", "replicate"),
    [(1, 1, 1), (1, 4, 1), (2, 2, 1), (2, 4, 1), (4, 4, 1), (4, 8, 1), (4, 2, 1), (4, 1, 1), (4, 4, 2), (4, 2, 2)],
)
def test_fold_equals_the_reference(world_size, num_adapters, replicate, exchange, aggregate, piece_bytes, workers):
    decay, shard = 0.1, world_size // replicate
    results = workers.run(
        world_size, fold_once, num_adapters, replicate, shard, aggregate, decay, exchange, piece_bytes
    )
    for name, (out, width) in SHAPES.items():
        start = draw(name, (out, width)).double()
        got, a, b = results[0][name]
        assert all(torch.equal(r[name][0], got) for r in results), "replicas and ranks see one W"
        da, db = draw(name + "delta_A", (num_adapters, 1, width)), draw(name + "delta_B", (num_adapters, out, 1))
        update = reference_update(a.double(), b.double(), da.double(), db.double(), aggregate)
        want = (1 - 0.5 * decay) * start + update
        assert ((got.double() - want).norm() / (want - start).norm()).item() < TOLERANCE
        # The factors are the SVD's of the start weight, whoever computed them.
        u, s, vh = torch.linalg.svd(start, full_matrices=False)
        best = (u[:, :num_adapters] * s[:num_adapters]) @ vh[:num_adapters]
        mine = torch.einsum("kor,kri->oi", b.double(), a.double())
        assert ((mine - best).norm() / best.norm()).item() < TOLERANCE
        gram = a.flatten(0, 1).double() @ a.flatten(0, 1).double().T
        assert (gram - torch.diag(gram.diag())).abs().max() < TOLERANCE * gram.max(), "slices are orthogonal"


def owners_of_svd(num_adapters: int) -> int:
    """How many SVDs this rank computes."""
    from titan_hd.distributed import factor_init as slices

    calls, original = 0, slices.cached_factors

    def counted(*args):
        nonlocal calls
        calls += 1
        return original(*args)

    slices.cached_factors = counted
    try:
        build(num_adapters, 1, 2)
    finally:
        slices.cached_factors = original
    return calls


def test_every_svd_is_computed_once(workers):
    assert workers.run(2, owners_of_svd, 2) == [2, 2]  # four weights, two workers
