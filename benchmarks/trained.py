"""A trainer as a run has it, of a model with random weights on made-up records, for benchmarks of whole steps."""

from __future__ import annotations

import datetime
import json
import os
import random
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from titan_hd.config import manager
from titan_hd.config.job_config import JobConfig
from titan_hd.console import init_logging
from titan_hd.models.registry import flavor_config
from titan_hd.preflight import plan_run
from titan_hd.train import Trainer


def init_workers() -> torch.device:
    """The process group of torchrun's workers, or of this process alone; returns this worker's device."""
    rank, workers = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    backend, timeout = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", datetime.timedelta(minutes=10)
    if workers > 1:
        dist.init_process_group(backend, timeout=timeout)
    else:
        store = dist.HashStore()
        dist.init_process_group(backend, store=store, rank=rank, world_size=workers, timeout=timeout)
    init_logging(rank=1)  # its warnings alone
    return device


def write_records(path: Path, vocab_size: int, count: int, length: int, labelled: float) -> None:
    """Records of `length` random tokens, of which the last part `labelled` is trained."""
    generator, masked = random.Random(0), round(length * (1 - labelled))
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            ids = [generator.randrange(vocab_size) for _ in range(length)]
            file.write(json.dumps({"input_ids": ids, "labels": [-100] * masked + ids[masked:]}) + "\n")


def build_trainer(
    flavor: str, tokens: int, rows: int, micro_batches: int, labelled: float, steps: int, argv: list[str]
) -> Trainer:
    """A trainer for `steps` steps, each of so many micro-batches per worker, of `rows` records of `tokens` tokens.

    flavor: "family/size" of models.flavors. argv: further options of a run.
    """
    name, size = flavor.split("/")
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    workers = dist.get_world_size()
    vocab_size = flavor_config(name, size).vocab_size
    write_records(folder / "records.jsonl", vocab_size, 2 * workers * micro_batches * rows, tokens, labelled)
    values = {
        "model.name": name,
        "model.flavor": size,
        "data.train": folder / "records.jsonl",
        "data.format": "tokens",
        "job.dump_folder": folder / "run",
        "training.steps": steps,
        "training.seq_len": tokens,
        "training.local_batch_size": rows,
        "training.global_batch_size": workers * micro_batches * rows,
        "lr_scheduler.decay_type": "constant",
        "metrics.progress_bar": "false",
    }
    config: JobConfig = manager.load([f"--{key}={value}" for key, value in values.items()] + argv)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return Trainer(config, plan_run(config, workers), device)
