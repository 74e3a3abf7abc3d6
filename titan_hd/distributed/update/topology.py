"""The sizes that a plan depends on: adapters and workers, without a process group and without torch."""

from __future__ import annotations

from dataclasses import dataclass

from titan_hd.distributed.row_shards import chunk_rows

WIRE_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}  # of an element of dA or dB, by hdpissa.exchange_dtype


@dataclass(frozen=True)
class Topology:
    """K adapters of rank r on dp_replicate x dp_shard workers; wire_bytes is the size of an element that travels;
    samples: of the global batch, that an adapter learns from: its "own" share or "all"; local_steps: from one fold to
    the next."""

    num_adapters: int
    rank: int
    dp_replicate: int
    dp_shard: int
    wire_bytes: int = 4
    samples: str = "own"
    local_steps: int = 1

    @property
    def directions(self) -> int:
        """Of all adapters together."""
        return self.num_adapters * self.rank

    @property
    def workers(self) -> int:
        return self.dp_replicate * self.dp_shard

    @property
    def scale_bytes(self) -> int:
        """What travels beside each row of dA and column of dB: the scale of int8."""
        return 4 if self.wire_bytes == 1 else 0

    @property
    def sum_bytes(self) -> int:
        """Size of an element of a partial sum that travels: int8 is for dA and dB alone."""
        return 4 if self.wire_bytes == 1 else self.wire_bytes

    @property
    def holders(self) -> int:
        """Workers that exchange with each other; where K < W, W / K such sets run side by side."""
        return min(self.num_adapters, self.workers)

    @property
    def sharing(self) -> int:
        """Neighbouring workers that share an adapter: 1 unless K < W."""
        return self.workers // self.holders

    @property
    def hosted(self) -> int:
        """Adapters on each holder."""
        return self.num_adapters // self.holders

    def chunk(self, out_features: int) -> int:
        """Rows of the largest shard of a weight."""
        return chunk_rows(out_features, self.dp_shard)
