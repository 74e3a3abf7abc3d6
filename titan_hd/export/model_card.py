"""The README.md of an exported model: where it comes from, how it was trained, what came out; no local paths."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from titan_hd import __version__
from titan_hd.adapters.method import Method
from titan_hd.adapters.methods import method_named
from titan_hd.components.records import read_records

_SECTIONS = ("training", "optimizer", "lr_scheduler", "adapter", "hdpissa", "parallelism")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_LICENSE_LINE = re.compile(r"(license|license_name|license_link):[ ]*[\"']?([\w.:/+-]+)[\"']?[ ]*")
_LONGEST_README = 2**20


def model_card(
    hf_config: dict[str, Any],
    assets: str,
    settings: dict[str, dict[str, Any]],
    metrics: dict[str, Any],
) -> str:
    """Markdown with the front matter that the hub reads.

    assets: the directory of the base model, empty for random weights.
    settings: the run's configuration by section and key; metrics: its last values.
    """
    base = base_name(hf_config, assets)
    model, chosen = settings.get("model", {}), settings.get("adapter", {}).get("method", "")
    method = method_named(chosen) if chosen else None
    datasets = [_source(data) for data in _sources(settings.get("data", {}).get("train", ""))]
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-classification" if _classifies(hf_config) else "text-generation",
        **({"base_model": base} if _HUB_NAME.fullmatch(base) else {}),  # the hub would look for it
        **_license(assets),
        **({"datasets": hub} if (hub := [name for name in datasets if _HUB_NAME.fullmatch(name)]) else {}),
        "tags": ["titan_hd", *([method.name] if method else [])],
    }
    origin = base or f"{model.get('name', '')} {model.get('flavor', '')} with random weights".strip()
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", ""]
    lines += [f"# {base.rpartition('/')[2]}, fine-tuned" if base else "# A model trained from random weights", ""]
    lines += [f"Trained with titan_hd {__version__} from {origin}.", ""]
    if method:
        lines += [f"Method: {_described(method)}.", ""]
    if any(datasets):
        lines += [f"Training data: {', '.join(datasets)}.", ""]
    rows = [
        (f"{section}.{key}", _cell(value))
        for section in _SECTIONS
        if section != "hdpissa" or (method and method.folds)
        for key, value in settings.get(section, {}).items()
        if value is not None and not (isinstance(value, str) and (os.sep in value or not value))
    ]
    lines += _table("Settings", rows) + _table("Final metrics", [(k, _cell(v)) for k, v in metrics.items()])
    return "\n".join(lines)


def _classifies(hf_config: dict[str, Any]) -> bool:
    return str(hf_config.get("architectures", "")).endswith("ForSequenceClassification']")


def _described(method: type[Method]) -> str:
    paper = method.paper
    if paper.startswith("arXiv "):
        paper = f"[{paper}](https://arxiv.org/abs/{paper.removeprefix('arXiv ')})"
    cited = f"{method.title} ({paper})" if paper else method.title
    # A clause of its own follows a colon, a participle a comma.
    return f"{cited}{': ' if method.folds else ', '}{method.how}" if method.how else cited


def base_name(hf_config: dict[str, Any], assets: str) -> str:
    """Name of the base model on the hub as far as it is known, else that of its folder; empty for random weights."""
    if not assets:
        return ""
    path = Path(os.path.abspath(assets))
    for part in path.parts:  # the hub's cache: models--org--name/snapshots/<commit>
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/")
    said = hf_config.get("_name_or_path")
    return said if isinstance(said, str) and _HUB_NAME.fullmatch(said) else path.name


def final_metrics(path: Path) -> dict[str, Any]:
    """The last value of every key of a metrics.jsonl."""
    values: dict[str, Any] = {}
    for record in read_records(path):
        values.update(record)
    return values


def _sources(train: Any) -> list[str]:
    """data.train is a path, or a list of tables with a path."""
    return (
        [source["path"] if isinstance(source, dict) else source for source in train]
        if isinstance(train, list)
        else [train]
    )


def _source(data: str) -> str:
    """A data set's name on the hub, or the name of its file or folder."""
    on_hub = _HUB_NAME.fullmatch(data) and not Path(data).exists() and not data.endswith((".json", ".jsonl"))
    return data if on_hub else Path(data).name


def _license(assets: str) -> dict[str, str]:
    """What the base model's own card says of its license."""
    path = Path(assets) / "README.md"
    if not assets or not path.is_file():
        return {}
    with open(path, encoding="utf-8", errors="replace") as file:
        front = re.match(r"---\r?\n(.*?)\r?\n---", file.read(_LONGEST_README), re.DOTALL)
    lines = front[1].splitlines() if front else []
    return {match[1]: match[2] for line in lines if (match := _LICENSE_LINE.fullmatch(line.rstrip()))}


def _cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else json.dumps(value) if isinstance(value, list) else str(value)
    return " ".join(text.split()).replace("|", "\\|")


def _table(title: str, rows: list[tuple[str, str]]) -> list[str]:
    if not rows:
        return []
    return [f"## {title}", "", "| key | value |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows), ""]
