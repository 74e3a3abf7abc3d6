"""How rows are dealt to shards, by torch.chunk's rule, which is that of DTensor's Shard(0): equal chunks, of which the
last ones may be short or empty. Free of torch, so that a plan is."""

from __future__ import annotations


def chunk_rows(rows: int, shards: int) -> int:
    """Rows of the largest shard, to which the others are padded when they travel."""
    return -(-rows // shards)


def shard_rows(rows: int, shards: int, shard: int) -> tuple[int, int]:
    """Row range [start, stop) of a shard."""
    chunk = chunk_rows(rows, shards)
    return min(rows, shard * chunk), min(rows, (shard + 1) * chunk)
