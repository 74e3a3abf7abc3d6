"""A tiny RoBERTa as a directory, pairs of texts for it, and whole runs on them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.kit import runs
from titan_hd.models.registry import parse_hf_config
from titan_hd.models.roberta import ARCHITECTURE, Roberta, RobertaConfig

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
# Odd shapes, as of `runs.ODD`; blocks of Bone and Bat do not divide them but for a size of 1.
TINY = {
    "architectures": ["RobertaForMaskedLM"],
    "model_type": "roberta",
    "vocab_size": 33,
    "hidden_size": 22,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 34,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
}


def random_roberta(raw: dict, seed: int = 0) -> Roberta:
    """Weights large enough that attention is far from uniform, norms and biases away from 1 and 0."""
    config = parse_hf_config(raw, "config.json")
    assert isinstance(config, RobertaConfig)
    model = Roberta(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if name.endswith("LayerNorm.weight") else 0.0, 0.2, generator=generator)
    return model.eval()


def write_classifier(folder: Path, **changes) -> dict[str, torch.Tensor]:
    """A HF directory of an encoder, with a tokenizer of letters; returns its weights. It has a classification head if
    its architecture is that of a classifier."""
    raw = {**TINY, **changes}
    folder.mkdir(parents=True, exist_ok=True)
    weights = random_roberta(raw).state_dict()
    if raw["architectures"] != [ARCHITECTURE]:
        weights = {name: w for name, w in weights.items() if not name.startswith("classifier.")}
    save_file(weights | {"lm_head.bias": torch.zeros(raw["vocab_size"])}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(raw))
    vocabulary = {piece: i for i, piece in enumerate([*SPECIAL, "\u0120", *LETTERS, "the"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return weights


def write_head(folder: Path, *names: str) -> dict[str, torch.Tensor]:
    """As `write_classifier`, with a trained head for classes of these names; without any, for two that have none."""
    named = {"id2label": {str(i): name for i, name in enumerate(names)}} if names else {}
    return write_classifier(folder, architectures=[ARCHITECTURE], **named)


def write_pairs(path: Path, count: int = 24, seed: int = 0) -> None:
    """A .tsv as GLUE's, whose label is whether the texts begin alike."""
    generator = torch.Generator().manual_seed(seed)
    lines = ["index\tsentence1\tsentence2\tlabel\n"]
    for i in range(count):
        first, second = (
            "".join(LETTERS[j] for j in torch.randint(0, 4, (int(n),), generator=generator))
            for n in torch.randint(2, 9, (2,), generator=generator)
        )
        lines.append(f"{i}\t{first}\t{second}\t{'same' if first[0] == second[0] else 'other'}\n")
    path.write_text("".join(lines))


def options(model: Path, records: Path, dump: Path, **overrides) -> list[str]:
    """Command-line options of a tiny fp32 run, as `runs.options`."""
    values = {"data__format": "auto", "data__labels": "other,same", "training__seq_len": 24, "data__cache_dir": ""}
    return runs.options(model, records, dump, **(values | overrides))
