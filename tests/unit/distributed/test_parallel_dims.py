"""How K adapters, W workers and the samples of a global batch are dealt to each other. Needs no process group."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from titan_hd.distributed.mesh_picture import mesh_picture
from titan_hd.distributed.parallel_dims import AdapterPlacement, placement_error, resolve_shard_degree
from titan_hd.distributed.row_shards import shard_rows

PROPERTY = settings(max_examples=200, deadline=None, derandomize=True)


@st.composite
def runs(draw) -> tuple[int, int, int, int]:
    """(K, W, local batch, global batch) that fit: K and W divide each other, every share is whole micro-batches."""
    small, factor = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    k, w = draw(st.permutations([small, small * factor]))
    local, micro_batches = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    return k, w, local, local * micro_batches * max(k, w)


def placements(k: int, w: int, local: int, batch: int) -> list[AdapterPlacement]:
    return [AdapterPlacement(k, w, rank, batch, local) for rank in range(w)]


class TestAdapterPlacement:
    @PROPERTY
    @given(runs())
    def test_every_sample_is_computed_exactly_once(self, run: tuple[int, int, int, int]):
        _, _, local, batch = run
        dealt = [s for p in placements(*run) for m in range(p.micro_batches) for s in p.samples(m)]
        assert sorted(dealt) == list(range(batch))
        assert all(len(p.samples(m)) == local for p in placements(*run) for m in range(p.micro_batches))
        assert len({p.micro_batches for p in placements(*run)}) == 1  # or collectives would not meet

    @PROPERTY
    @given(runs())
    def test_sample_j_belongs_to_adapter_j_k_over_b_whoever_computes_it(self, run: tuple[int, int, int, int]):
        """So a micro-batch never straddles two adapters, and the owner does not depend on the number of workers."""
        k, _, _, batch = run
        for p in placements(*run):
            for m in range(p.micro_batches):
                assert {j * k // batch for j in p.samples(m)} == {p.first_adapter + p.slot(m)}

    @PROPERTY
    @given(runs())
    def test_workers_host_what_the_mesh_says(self, run: tuple[int, int, int, int]):
        """Shard(0) over min(K, W) holders in the workers' order, a group of W / holders workers for each."""
        k, w, _, _ = run
        holders = min(k, w)
        for p in placements(*run):
            holder = p.rank // (w // holders)
            assert p.hosted == k // holders
            assert p.first_adapter == holder * p.hosted
            assert all(0 <= p.slot(m) < p.hosted for m in range(p.micro_batches))

    @PROPERTY
    @given(runs())
    def test_every_adapter_gets_equal_numbers_of_samples(self, run: tuple[int, int, int, int]):
        k, _, _, batch = run
        counts = [0] * k
        for p in placements(*run):
            for m in range(p.micro_batches):
                counts[p.first_adapter + p.slot(m)] += len(p.samples(m))
        assert counts == [batch // k] * k

    @pytest.mark.parametrize("workers", [1, 2, 4, 8])
    def test_eight_adapters_on_any_number_of_workers(self, workers: int):
        """The same samples meet in the same adapters: the trajectory does not depend on the workers."""
        owners = {}
        for p in placements(8, workers, 2, 32):
            for m in range(p.micro_batches):
                owners |= dict.fromkeys(p.samples(m), p.first_adapter + p.slot(m))
        assert owners == {j: j // 4 for j in range(32)}

    @pytest.mark.parametrize(
        ("run", "says"),
        [
            ((3, 2, 1, 6), "hdpissa.num_adapters: 3 adapters cannot be dealt to 2 data-parallel workers"),
            ((2, 3, 1, 6), "hdpissa.num_adapters: 2 adapters cannot be dealt to 3 data-parallel workers"),
            (
                (4, 2, 2, 12),
                r"training.global_batch_size: 12 must be a multiple of 8 \(local_batch_size 2 x 4 adapters\)",
            ),
            (
                (2, 4, 2, 12),
                r"training.global_batch_size: 12 must be a multiple of 8 \(local_batch_size 2 x 4 workers\)",
            ),
            ((1, 1, 4, 2), r"training.global_batch_size: 2 must be a multiple of 4"),
        ],
    )
    def test_what_cannot_be_dealt_is_refused(self, run: tuple[int, int, int, int], says: str):
        k, w, local, batch = run
        with pytest.raises(ValueError, match=says):
            AdapterPlacement(k, w, 0, batch, local)

    @PROPERTY
    @given(runs())
    def test_what_fits_is_not_refused(self, run: tuple[int, int, int, int]):
        k, w, local, batch = run
        assert placement_error(k, w, batch, local) is None


class TestShards:
    @PROPERTY
    @given(rows=st.integers(0, 60), shards=st.integers(1, 12))
    def test_the_same_rows_as_torch_chunk(self, rows: int, shards: int):
        """DTensor's Shard(0) chunks as torch.chunk does, with empty shards for what is left."""
        chunks = torch.arange(rows).chunk(shards) if rows else ()
        expected = [chunk.tolist() for chunk in chunks] + [[]] * (shards - len(chunks))
        assert [list(range(*shard_rows(rows, shards, shard))) for shard in range(shards)] == expected

    @pytest.mark.parametrize(
        ("replicate", "shard", "world", "result"),
        [(1, -1, 8, 8), (2, -1, 8, 4), (8, -1, 8, 1), (2, 4, 8, 4), (1, 1, 1, 1)],
    )
    def test_degrees(self, replicate: int, shard: int, world: int, result: int):
        assert resolve_shard_degree(replicate, shard, 1, world) == result

    def test_tensor_parallelism_takes_its_share(self):
        assert resolve_shard_degree(2, -1, 2, 8) == 2
        with pytest.raises(ValueError, match="replicate 1 x shard 2 x tensor 3"):
            resolve_shard_degree(1, -1, 3, 8)

    @pytest.mark.parametrize(("replicate", "shard", "world"), [(1, 4, 8), (3, -1, 8), (16, -1, 8), (2, 8, 8)])
    def test_degrees_that_do_not_multiply(self, replicate: int, shard: int, world: int):
        with pytest.raises(ValueError, match=r"parallelism.data_parallel_shard_degree: .* number of workers, 8"):
            resolve_shard_degree(replicate, shard, 1, world)


class TestMeshPicture:
    def test_hsdp_with_tensor_parallelism_and_shared_adapters(self):
        assert mesh_picture(2, 2, 2, 2).splitlines() == [
            "mesh 2 x 2 x 2 (replicate x shard x tensor); ranks:",
            "                          tp 0  tp 1",
            "  replica 0    shard 0         0     1   adapter 0, shared by 2 workers",
            "  replica 0    shard 1         2     3   adapter 0, shared by 2 workers",
            "  replica 1    shard 0         4     5   adapter 1, shared by 2 workers",
            "  replica 1    shard 1         6     7   adapter 1, shared by 2 workers",
        ]

    def test_virtual_adapters_one_each_and_none(self):
        assert mesh_picture(1, 2, 1, 8).splitlines()[1:] == [
            "  replica 0    shard 0         0   adapters 0 to 3",
            "  replica 0    shard 1         1   adapters 4 to 7",
        ]
        assert mesh_picture(1, 2, 1, 2).endswith("   adapter 1")
        assert mesh_picture(1, 2, 1, None).endswith("shard 1         1")

    def test_large_worlds_are_abbreviated(self):
        lines = mesh_picture(8, 32, 16, 8).splitlines()
        assert len(lines) == 2 + 16
        assert lines[-2] == "  ..."
        ranks = "  4080  4081  4082  4083  4084  4085   ...  4095"
        assert lines[-1] == f"  replica 7    shard 31   {ranks}   adapter 7, shared by 32 workers"

    @PROPERTY
    @given(runs())
    def test_it_says_what_the_placement_says(self, run: tuple[int, int, int, int]):
        k, w, *_ = run
        for placement, line in zip(placements(*run), mesh_picture(1, w, 1, k).splitlines()[1:15]):
            last = placement.first_adapter + placement.hosted - 1
            said = f"adapters {placement.first_adapter} to {last}" if placement.hosted > 1 else f"adapter {last}"
            assert said in line
