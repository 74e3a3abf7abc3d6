"""Tokens per second of the loader alone, and of packing, against what a step consumes.

    python -m benchmarks.bench_loader

One worker's loader: a node has one per GPU, each of which feeds its own GPU alone. Tokens are real ones, not padding.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import environment, print_header, print_json, print_table
from titan_hd.config.command_line import ToolParser
from titan_hd.data.dataset import TokenizedDataset
from titan_hd.data.loader import GlobalBatches, TrainLoader
from titan_hd.data.order.packing import pack
from titan_hd.data.order.sample_order import OrderSettings, build_order
from titan_hd.data.tokens.cache import MappedArrays
from titan_hd.data.tokens.statistics import Statistics

REQUIRED = 100_000  # tokens per second of a whole node
BATCH, MICRO_BATCHES = 4, 4


def make_records(lengths: np.ndarray, folder: Path) -> dict[str, TokenizedDataset]:
    """The same random records, all labels trained, in memory and mapped from files as the token cache maps them."""
    count, ends = len(lengths), np.concatenate(([0], np.cumsum(lengths)))
    arrays = {
        "ids": np.random.default_rng(1).integers(0, 32000, ends[-1], dtype=np.int32),
        "ends": ends,
        "spans": np.stack((np.zeros(count), lengths), 1).astype(np.int32),
        "span_ends": np.arange(count + 1),
    }
    for name, array in arrays.items():
        array.tofile(folder / name)
    statistics = Statistics("data.train", "tokens")
    mapped = MappedArrays(folder, {name: array.nbytes for name, array in arrays.items()})
    return {"memory": TokenizedDataset(statistics, arrays), "file": TokenizedDataset(statistics, mapped)}


def measure(loader: TrainLoader, seconds: float) -> tuple[float, float, float]:
    """(seconds of the first step, tokens per second after the second, tokens per second of this process's processor
    time, which other programs on the machine disturb less)."""
    start = time.perf_counter()
    loader.step(0)
    first = time.perf_counter() - start
    loader.step(1)
    step, tokens, start, cpu = 2, 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - start < seconds:
        tokens += sum(batch.tokens for batch in loader.step(step))
        step += 1
    rates = tokens / (time.perf_counter() - start), tokens / (time.process_time() - cpu)
    loader.close()
    return first, *rates


def bench_packing(records: int, seq_len: int) -> list[object]:
    lengths = lognormal(records, 200, seq_len)
    start = time.perf_counter()
    packs = pack(lengths, seq_len)
    seconds = time.perf_counter() - start
    return [f"{records} records", seconds, len(packs), 100 * lengths.sum() / (len(packs) * seq_len)]


def lognormal(count: int, mean: int, seq_len: int) -> np.ndarray:
    """Lengths as unequal as those of answers to questions: a third of them above the mean, a tenth above twice it."""
    drawn = np.random.default_rng(0).lognormal(np.log(mean) - 0.25, 0.7, count)
    return np.clip(drawn.astype(np.int64), 2, seq_len)


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("--records", type=int, default=20000)
    parser.add_argument("--mean-length", type=int, default=200)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--num-workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pack", type=int, nargs="+", default=[10_000, 100_000, 1_000_000], help="records to pack")
    args = parser.parse_args()
    torch.set_num_threads(1)
    env = environment(torch.device("cpu"), 1)
    print_header("loader", env)
    lengths = lognormal(args.records, args.mean_length, args.seq_len)
    micro_batches = [range(m * BATCH, (m + 1) * BATCH) for m in range(MICRO_BATCHES)]
    rows: list[list[Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for source, records in make_records(lengths, Path(folder)).items():
            for packed in (False, True):
                order = build_order(
                    lambda: lengths, args.records, OrderSettings(True, 42, args.seq_len if packed else None)
                )
                batches = GlobalBatches(records, order, BATCH * MICRO_BATCHES, (), packed)
                for num_workers in args.num_workers:
                    first, rate, cpu = measure(TrainLoader(batches, micro_batches, num_workers), args.seconds)
                    kind = "packed" if packed else "unpacked"
                    rows.append([source, kind, num_workers, f"{rate:,.0f}", rate / REQUIRED, f"{cpu:,.0f}", first])
    columns = [
        "records in",
        "rows",
        "num_workers",
        "tokens/s",
        f"times {REQUIRED:,}",
        "per CPU second",
        "first step, s",
    ]
    print(f"records of {lengths.mean():.0f} tokens on average, micro-batches of {BATCH} rows\n")
    print_table(columns, rows)
    packing = [bench_packing(count, args.seq_len) for count in args.pack]
    print_table(["packing", "seconds", "packs", "% used"], packing)
    slowest = min(row[4] for row in rows)
    verdict = "never the bottleneck" if slowest >= 1 else "TOO SLOW"
    print(f"the slowest gives {slowest:.1f} times what a whole node consumes at {REQUIRED:,} tokens/s: {verdict}")
    print_json("loader", env, {"loader": [dict(zip(columns, row)) for row in rows], "packing": packing})


if __name__ == "__main__":
    main()
