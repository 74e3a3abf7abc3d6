"""Does a small encoder learn GLUE's tasks? Whole runs, against the share of the largest class.

    python -m benchmarks.learn_glue --glue assets/data/glue --out outputs/learn_glue    # SST-2 from random weights
    python -m benchmarks.learn_glue --glue assets/data/glue --out outputs/small_tasks --steps 2500 --tasks mrpc,rte,cola

All of the encoder (benchmarks/small_encoder.py: three blocks of 128 channels) is trained, with a new head. The last
validation counts, not the best one.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.small_encoder import LENGTH, write_encoder
from titan_hd.config.command_line import ToolParser
from titan_hd.data.sources import read_records
from titan_hd.in_process import train

BATCH = 32
PARTS = {"train": "train", "validation": "dev"}
COMMON = {
    "data.format": "classification",
    "data.cache_dir": "",
    "validation.enable": True,
    "validation.freq": 10**6,  # before the first step and after the last one
    "metrics.log_freq": 50,
    "training.seq_len": LENGTH,
    "training.local_batch_size": BATCH,
    "training.global_batch_size": BATCH,
    "training.mixed_precision_param": "float32",
    "training.master_dtype": "float32",
    "training.max_norm": 1.0,
    "lr_scheduler.warmup_ratio": 0.06,
    "lr_scheduler.decay_type": "linear",
}


class Task(NamedTuple):
    """labels: as in the recipes."""

    folder: str
    labels: list[str]
    epochs: float
    lr: float


TASKS = {
    "sst2": Task("SST-2", ["0", "1"], 0.5, 1e-3),
    "mrpc": Task("MRPC", ["0", "1"], 4.0, 5e-4),
    "cola": Task("CoLA", ["0", "1"], 6.0, 5e-4),
    "rte": Task("RTE", ["entailment", "not_entailment"], 2.0, 3e-4),
}


def learn(name: str, encoder: Path, args: argparse.Namespace) -> str:
    """Train a task; what came of it."""
    task = TASKS[name]
    values = {
        **COMMON,
        **{f"data.{key}": str(args.glue / task.folder / f"{part}.tsv") for key, part in PARTS.items()},
        "data.labels": task.labels,
        "job.dump_folder": str(args.out / f"{name}_{args.method}"),
        "model.hf_assets_path": str(encoder),
        "adapter.method": args.method,
        "adapter.rank": args.rank,
        "optimizer.lr": args.lr or task.lr,
        "training.epochs": args.epochs or task.epochs,
        "training.seed": args.seed,
    }
    result = train(None, values)
    m = result.metrics
    return (
        f"{name}: accuracy {m['validation_accuracy']:.3f} (largest class {largest_class(task, args.glue):.3f}), "
        f"F1 {m['validation_f1']:.3f}, Matthews {m['validation_matthews']:.3f}, {result.steps} steps"
    )


def largest_class(task: Task, glue: Path) -> float:
    """Share of the development records that the most frequent class of the training records has."""
    files = [read_records(str(glue / task.folder / f), "--glue") for f in ("train.tsv", "dev.tsv")]
    counts = [[str(record.get("label", record.get("Quality"))) for record in records] for records in files]
    most = max(set(counts[0]), key=counts[0].count)
    return counts[1].count(most) / len(counts[1])


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("--glue", type=Path, required=True, help="GLUE's folders, each with train.tsv and dev.tsv")
    parser.add_argument("--out", type=Path, required=True, help="a folder for the encoder and the runs")
    parser.add_argument("--tasks", default="sst2", help="of " + ", ".join(TASKS))
    parser.add_argument("--method", default="full", help="adapter.method of the tasks' runs")
    parser.add_argument("--rank", type=int, default=16, help="adapter.rank")
    parser.add_argument("--lr", type=float, help="learning rate of the tasks' runs; default: the task's own")
    parser.add_argument("--epochs", type=float, help="of the tasks' runs; default: the task's own")
    parser.add_argument("--steps", type=int, default=0, help="of the encoder's own training; default: none")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name in args.tasks.split(","):
        if name not in TASKS:
            parser.error(f"--tasks: {name}: must be of {', '.join(TASKS)}")
    encoder, started = args.out / "encoder", time.perf_counter()
    if not encoder.exists():
        write_encoder(encoder, args.glue, args.steps, args.seed)
    for name in args.tasks.split(","):
        print(learn(name, encoder, args), flush=True)
    print(f"{time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
