"""How quickly records become tokens, and how much memory that takes.

Writes --records short instructions (the quick start's, each made different by its number; or the records of --data,
repeated) and tokenizes them into an empty cache with every number of processes in --num-proc, then opens the cache
again. Every case runs in a process of its own, so that its peak of memory is its own: `writer MiB` is the process that
reads and writes, `process MiB` the largest of those that encode. CPU seconds are those of all processes together: on a
machine that does other things as well they say more than the clock.

    python -m benchmarks.bench_tokenize --records 200000 --num-proc 1 2 --tokenizer DIR
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from benchmarks.common import environment, pick_device, print_header, print_json, print_table
from titan_hd.config.command_line import ToolParser
from titan_hd.config.job_config import Data
from titan_hd.data import build
from titan_hd.data.text.tokenizer import load_tokenizer

QUICKSTART = Path(__file__).resolve().parents[1] / "assets" / "quickstart"


def write_records(source: Path, count: int, path: Path) -> None:
    with source.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    prompt = next(name for name in ("instruction", "query", "question", "prompt") if name in rows[0])
    with path.open("w", encoding="utf-8") as file:
        for number, row in zip(range(count), itertools.cycle(rows)):
            file.write(json.dumps({**row, prompt: f"{number}: {row[prompt]}"}) + "\n")


def run_case(folder: Path, tokenizer: str, num_proc: int, seq_len: int) -> None:
    """In a process of its own: tokenize (or open what is there) and print the figures."""
    build.SMALL = 0
    load = load_tokenizer(tokenizer)
    data = Data(train=str(folder / "records.jsonl"), num_proc=num_proc, cache_dir=str(folder / f"cache{num_proc}"))
    children = _PeakOfChildren()
    wall, cpu = time.perf_counter(), _cpu_seconds()
    records = build.DatasetBuilder(data, load.vocab_size, seq_len, lambda: load).training()
    result = {
        "seconds": time.perf_counter() - wall,
        "cpu_seconds": _cpu_seconds() - cpu,
        "writer_mib": _peak_mib("self"),
        "process_mib": children.mib,
        "records": records.rows[0].records,
        "tokens": records.rows[0].tokens,
        "bytes": sum(path.stat().st_size for path in (folder / f"cache{num_proc}").rglob("*")),
    }
    print(json.dumps(result))


def _peak_mib(process: str) -> float:
    """Most memory that a process has held; getrusage would count what it was before it ran its program."""
    try:
        status = Path("/proc", process, "status").read_text(encoding="utf-8")
    except OSError:  # it has ended
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0.0)


class _PeakOfChildren(threading.Thread):
    """Watches the peak of every process that this one starts."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.mib = 0.0
        self.start()

    def run(self) -> None:
        while True:
            for children in Path("/proc/self/task").glob("*/children"):
                with contextlib.suppress(OSError):
                    self.mib = max([self.mib, *map(_peak_mib, children.read_text(encoding="utf-8").split())])
            time.sleep(0.2)


def _cpu_seconds() -> float:
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in usage)


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("--records", type=int, nargs="+", default=[20000])
    parser.add_argument("--num-proc", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--tokenizer", default=str(QUICKSTART / "model"), help="a HF directory")
    parser.add_argument("--data", type=Path, default=QUICKSTART / "train.jsonl", help="JSONL of instructions")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--case", nargs=2, metavar=("FOLDER", "NUM_PROC"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        run_case(Path(args.case[0]), args.tokenizer, int(args.case[1]), args.seq_len)
        return
    env = environment(pick_device(), 1)
    print_header("Tokenizing into the cache, and opening it", env)
    rows, results = [], {}
    for count in args.records:
        with tempfile.TemporaryDirectory(prefix="titan_hd_bench_") as folder:
            write_records(args.data, count, Path(folder) / "records.jsonl")
            for num_proc, again in itertools.product(args.num_proc, (False, True)):
                command = [sys.executable, "-m", "benchmarks.bench_tokenize", "--tokenizer", args.tokenizer]
                command += ["--seq-len", str(args.seq_len), "--case", folder, str(num_proc)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                r = json.loads(done.stdout.splitlines()[-1])
                name = "cache hit" if again else f"{num_proc} process(es)"
                results[f"{count} x {num_proc}{' hit' if again else ''}"] = r
                rate, cpu_rate = r["records"] / r["seconds"], r["records"] / r["cpu_seconds"]
                memory = [r["writer_mib"], r["process_mib"] if num_proc > 1 and not again else None]
                rows.append(
                    [name, count, r["seconds"], round(rate), round(cpu_rate), *memory, r["bytes"] / r["tokens"]]
                )
    columns = ["", "records", "s", "records/s", "records/CPU s", "writer MiB", "process MiB", "bytes/token"]
    print_table(columns, rows)
    print_json("tokenize", env, results)


if __name__ == "__main__":
    main()
