"""Does a small encoder learn GLUE's tasks from random weights? Whole runs, against the share of the largest class.

    python -m benchmarks.learn_glue --glue assets/data/glue --out outputs/learn_glue      # SST-2, two minutes of a core
    python -m benchmarks.learn_glue --glue assets/data/glue --out outputs/learn_glue --tasks mrpc,cola,rte

The encoder has two blocks of 128 channels and a byte-level BPE of 4,000 pieces of the tasks' own texts. All of it is
trained, with a new head. The last validation counts, not the best one.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch
from safetensors.torch import save_file

from titan_hd.config.command_line import ToolParser
from titan_hd.data.sources import read_records
from titan_hd.in_process import train
from titan_hd.models.registry import build_model, parse_hf_config

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
SIZES = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
PIECES, LENGTH, BATCH = 4000, 160, 32
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
    """labels: as in the recipes. texts: the fields of them."""

    folder: str
    labels: list[str]
    texts: tuple[str, ...]
    epochs: float
    lr: float


TASKS = {
    "sst2": Task("SST-2", ["0", "1"], ("sentence",), 0.5, 1e-3),
    "mrpc": Task("MRPC", ["0", "1"], ("#1 String", "#2 String"), 4.0, 5e-4),
    "cola": Task("CoLA", ["0", "1"], ("sentence",), 3.0, 1e-3),
    "rte": Task("RTE", ["entailment", "not_entailment"], ("sentence1", "sentence2"), 2.0, 5e-4),
}


def sentences(glue: Path) -> Iterator[str]:
    """Of the training records of all tasks that are there, and of STS-B's."""
    fields = {task.folder: task.texts for task in TASKS.values()} | {"STS-B": ("sentence1", "sentence2")}
    for folder, texts in fields.items():
        if (path := glue / folder / "train.tsv").exists():
            for record in read_records(str(path), "--glue"):
                yield from (record[text] for text in texts)


def write_encoder(folder: Path, texts: list[str], seed: int) -> None:
    """A Hugging Face directory with random weights and a tokenizer."""
    folder.mkdir(parents=True)
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, PIECES, special_tokens=SPECIAL, show_progress=False)
    bpe.save_model(str(folder))
    raw = {
        "architectures": ["RobertaForMaskedLM"],
        "model_type": "roberta",
        "vocab_size": bpe.get_vocab_size(),
        **SIZES,
        "max_position_embeddings": LENGTH + 2,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(raw))
    model = build_model(parse_hf_config(raw, "config.json"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = model.initial(name)
            if value is None:
                std = 0.05 if "position" in name else SIZES["hidden_size"] ** -0.5
                parameter.normal_(0.0, std, generator=generator)
            else:
                parameter.fill_(value)
        for name, parameter in model.named_parameters():
            if name.endswith("self.key.weight"):  # a token looks at its like; else little is learned
                parameter.copy_(model.get_parameter(name.replace("self.key", "self.query")))
    weights = {n: w for n, w in model.state_dict().items() if not n.startswith("classifier.")}
    save_file(weights, folder / "model.safetensors")


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
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name in args.tasks.split(","):
        if name not in TASKS:
            parser.error(f"--tasks: {name}: must be of {', '.join(TASKS)}")
    encoder, started = args.out / "encoder", time.perf_counter()
    if not encoder.exists():
        write_encoder(encoder, list(sentences(args.glue)), args.seed)
    for name in args.tasks.split(","):
        print(learn(name, encoder, args), flush=True)
    print(f"{time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
