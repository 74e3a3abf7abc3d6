"""Does a small encoder learn GLUE's tasks? Whole runs on MRPC, CoLA and RTE, against the share of the largest class.

    python -m benchmarks.learn_glue --glue assets/data/glue --out outputs/learn_glue                 # minutes, one core
    python -m benchmarks.learn_glue --glue assets/data/glue --out outputs/learn_glue --tasks mrpc --method hdpissa

The encoder (two blocks of 128 channels, a byte-level BPE of 2,000 pieces of the tasks' own texts) is trained in house,
from random weights, to tell what was done to a sentence of GLUE: a single one is as it was or has two words swapped;
the second of a pair has the first one's words, half of them, or none. The labels of the tasks are not used for it. Then
each task is trained by a method of adapters, with a new head, as the recipes of train_configs/paper do it. The last
validation counts, not the best one.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch
from safetensors.torch import load_file, save_file

from titan_hd.config.command_line import ToolParser
from titan_hd.data.sources import read_records
from titan_hd.in_process import train
from titan_hd.models.registry import build_model, parse_hf_config

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
SIZES = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
PIECES, LENGTH, BATCH = 2000, 64, 32
PARTS = {"train": "train", "validation": "dev"}
COMMON = {
    **{"data.format": "classification", "data.cache_dir": "", "validation.enable": True, "metrics.log_freq": 50},
    **{"training.seq_len": LENGTH, "training.local_batch_size": BATCH, "training.global_batch_size": BATCH},
    **{"training.mixed_precision_param": "float32", "training.master_dtype": "float32", "training.max_norm": 1.0},
    **{"lr_scheduler.warmup_ratio": 0.06, "lr_scheduler.decay_type": "linear", "export.dtype": "float32"},
}
DONE_TO_IT = ["as it was", "swapped", "same words", "half of them", "other words"]


class Task(NamedTuple):
    """labels: as in the recipes. texts: the fields of them."""

    folder: str
    labels: list[str]
    texts: tuple[str, ...]
    epochs: float


TASKS = {
    "mrpc": Task("MRPC", ["0", "1"], ("#1 String", "#2 String"), 3.0),
    "cola": Task("CoLA", ["0", "1"], ("sentence",), 2.0),
    "rte": Task("RTE", ["entailment", "not_entailment"], ("sentence1", "sentence2"), 4.0),
}


def sentences(glue: Path) -> Iterator[str]:
    """Of the three tasks' training records, and of SST-2's and STS-B's where they are there."""
    fields = {task.folder: task.texts for task in TASKS.values()}
    fields |= {"SST-2": ("sentence",), "STS-B": ("sentence1", "sentence2")}
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
        **{
            "architectures": ["RobertaForMaskedLM"],
            "model_type": "roberta",
            "vocab_size": bpe.get_vocab_size(),
            **SIZES,
        },
        **{"max_position_embeddings": LENGTH + 2, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
        **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        **{"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2},
    }
    (folder / "config.json").write_text(json.dumps(raw))
    model = build_model(parse_hf_config(raw, "config.json"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = model.initial(name)
            if value is None:
                std = 0.02 if "position" in name else SIZES["hidden_size"] ** -0.5
                parameter.normal_(0.0, std, generator=generator)
            else:
                parameter.fill_(value)
        for name, parameter in model.named_parameters():
            if name.endswith("self.key.weight"):  # a token sees its like in the other text from the first step on
                parameter.copy_(model.get_parameter(name.replace("self.key", "self.query")))
    weights = {n: w for n, w in model.state_dict().items() if not n.startswith("classifier.")}
    save_file(weights, folder / "model.safetensors")


def write_made_task(path: Path, texts: list[str], count: int, seed: int) -> None:
    """Sentences, and what was done to them."""
    draw = random.Random(seed)
    pool = [words for text in texts if 4 <= len(words := text.split()) <= 16]
    with path.open("w") as file:
        for _ in range(count):
            words, other, done = draw.choice(pool), draw.choice(pool), draw.choice(DONE_TO_IT)
            first, second = list(words), []
            if done == "swapped":
                a, b = draw.sample(range(len(first)), 2)
                first[a], first[b] = first[b], first[a]
            elif done != "as it was":
                kept = {"same words": len(words), "half of them": len(words) // 2, "other words": 0}[done]
                second = draw.sample(words, kept) + draw.sample(other, len(other))[: len(words) - kept]
                draw.shuffle(second)
            record = {"sentence1": " ".join(first), "sentence2": " ".join(second), "label": done}
            file.write(json.dumps(record) + "\n")


def make_encoder(folder: Path, args: argparse.Namespace) -> None:
    """Train it, and keep what is beneath the head of its own task."""
    texts, random_model = list(sentences(args.glue)), args.out / "random"
    write_encoder(random_model, texts, args.seed)
    write_made_task(args.out / "made.jsonl", texts, BATCH * args.steps, args.seed)
    write_made_task(args.out / "made_dev.jsonl", texts, 1000, args.seed + 1)
    data = {"data.train": str(args.out / "made.jsonl"), "data.validation": str(args.out / "made_dev.jsonl")}
    more = {"training.steps": args.steps, "validation.freq": max(1, args.steps // 4), "optimizer.lr": args.encoder_lr}
    values = {**COMMON, **data, **more, "data.labels": DONE_TO_IT, "training.seed": args.seed, "adapter.method": "full"}
    result = train(
        None,
        {
            **values,
            "job.dump_folder": str(args.out / "made"),
            "model.hf_assets_path": str(random_model),
            "export.enable": True,
        },
    )
    accuracy = result.metrics["validation_accuracy"]
    print(f"encoder: accuracy {accuracy:.3f} on its own task, of {len(DONE_TO_IT)} classes", flush=True)
    assert result.model is not None
    weights = load_file(result.model / "model.safetensors")
    shutil.copytree(random_model, folder)
    save_file({n: w for n, w in weights.items() if not n.startswith("classifier.")}, folder / "model.safetensors")


def learn(name: str, encoder: Path, args: argparse.Namespace) -> str:
    """Train a task; what came of it."""
    task = TASKS[name]
    files = {f"data.{key}": str(args.glue / task.folder / f"{part}.tsv") for key, part in PARTS.items()}
    result = train(
        None,
        {
            **{**COMMON, **files, "training.epochs": task.epochs, "validation.freq": 10**6, "data.labels": task.labels},
            **{"job.dump_folder": str(args.out / f"{name}_{args.method}"), "model.hf_assets_path": str(encoder)},
            **{"adapter.method": args.method, "adapter.rank": args.rank, "optimizer.lr": args.lr},
            "training.seed": args.seed,
        },
    )
    m = result.metrics
    return (
        f"{name}: accuracy {m['validation_accuracy']:.3f} (largest class {largest_class(task, args.glue):.3f}), "
        f"F1 {m['validation_f1']:.3f}, Matthews {m['validation_matthews']:.3f}, {result.steps} steps"
    )


def largest_class(task: Task, glue: Path) -> float:
    """Share of the development records that the most frequent class of the training records has."""
    counts = [
        [
            str(record.get("label", record.get("Quality")))
            for record in read_records(str(glue / task.folder / f), "--glue")
        ]
        for f in ("train.tsv", "dev.tsv")
    ]
    most = max(set(counts[0]), key=counts[0].count)
    return counts[1].count(most) / len(counts[1])


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("--glue", type=Path, required=True, help="GLUE's folders, each with train.tsv and dev.tsv")
    parser.add_argument("--out", type=Path, required=True, help="a new folder for the encoder and the runs")
    parser.add_argument("--tasks", default=",".join(TASKS), help="of " + ", ".join(TASKS))
    parser.add_argument("--method", default="bone", help="adapter.method of the tasks' runs")
    parser.add_argument("--rank", type=int, default=16, help="adapter.rank")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate of the tasks' runs")
    parser.add_argument("--steps", type=int, default=400, help="steps of the encoder's own training")
    parser.add_argument("--encoder-lr", type=float, default=1e-3, help="learning rate of the encoder's own training")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    encoder, started = args.out / "encoder", time.perf_counter()
    if not encoder.exists():
        make_encoder(encoder, args)
        print(f"{time.perf_counter() - started:.0f} s", flush=True)
    for name in args.tasks.split(","):
        print(learn(name, encoder, args), flush=True)
    print(f"{time.perf_counter() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
