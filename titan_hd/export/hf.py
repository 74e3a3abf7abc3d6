"""Writes the model as a Hugging Face directory that transformers, vLLM and lm-eval open.

The directory is written beside its place and renamed when everything is on the disk: what was there before stays until
then, and a crash leaves it alone.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from titan_hd.config.job_config import JobConfig
from titan_hd.data.build import NO_ANSWERS, Answering
from titan_hd.data.text.tokenizer import TOKENIZER_FILES
from titan_hd.distributed.collectives import raise_on_all
from titan_hd.distributed.parallel_dims import ParallelDims
from titan_hd.distributed.shards import write_weights
from titan_hd.errors import UserError
from titan_hd.export.model_card import final_metrics, model_card
from titan_hd.files import disk_faults, read_json_object
from titan_hd.models.model import Model

logger = logging.getLogger("titan_hd")

# Copied from the base model where it has them, beside the files that our own tokenizers read.
_ASSET_FILES = (
    *TOKENIZER_FILES,
    "generation_config.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    "original/tokenizer.model",
)
# Files that mark a folder as the result of an export, which the next export may replace.
_MARKS = ("config.json", "adapter_config.json")
_GENERATION_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


def export_hf(model: Model, dims: ParallelDims, config: JobConfig, answering: Answering = NO_ANSWERS) -> None:
    """Write the model to export.folder. Collective; each rank writes the rows that it owns, rounded once from the
    masters to export.dtype.

    answering: of the training records.

    Raises:
        UserError: the folder holds something else, or the disk fails; on every rank.
    """
    folder, assets = export_folder(config), config.model.hf_assets_path
    partial, dtype = beside(folder), getattr(torch, config.export.dtype)
    with raise_on_all("looking at the export folder"):
        check_folder(folder, assets)
    with raise_on_all("starting the export"), disk_faults(partial):
        if dist.get_rank() == 0:
            dump = Path(config.job.dump_folder)
            base = "" if config.model.flavor else assets
            card = model_card(model.config.hf, base, dataclasses.asdict(config), final_metrics(dump / "metrics.jsonl"))
            start_folder(partial)
            write_assets(partial, model.config.hf, dtype, assets, card, answering)
    write_weights(model, dims, partial, dtype, config.export.max_shard_size_gb * 1e9)
    with raise_on_all("finishing the export"), disk_faults(folder):
        if dist.get_rank() == 0:
            publish(partial, folder)
            logger.info("exported the model to %s", folder)


def export_folder(config: JobConfig) -> Path:
    return Path(config.job.dump_folder) / config.export.folder


def beside(folder: Path) -> Path:
    """Where a folder is written until it is complete."""
    return folder.with_name(folder.name + ".partial")


def check_folder(folder: Path, assets: str) -> None:
    """UserError if an export to `folder` would delete anything but an earlier export: the base model, or a folder (also
    the two beside it that an export uses) with other content."""
    if assets and folder.resolve() == Path(assets).resolve():
        raise UserError(f"export.folder: {folder} is model.hf_assets_path; name another folder")
    for path in (folder, beside(folder), _old(folder)):
        if not os.path.lexists(path):
            continue
        if not path.is_dir() or (any(path.iterdir()) and not any((path / name).exists() for name in _MARKS)):
            raise UserError(f"export.folder: {path} is there and holds no model; name another folder")


def check_place(folder: Path, others: dict[str, Path]) -> None:
    """UserError if an export to `folder`, which replaces it (and the two beside it) as a whole, would take away what
    the run reads or writes elsewhere. others: paths by the key, or the file, that stands for them."""
    replaced = [path.resolve() for path in (folder, beside(folder), _old(folder))]
    errors = []
    for key, path in others.items():
        for place in replaced:
            if path.resolve() == place:
                name = "" if place == replaced[0] else f" with {place.name}, which the export uses"
                errors.append(f"export.folder: is {key}{name}; name another folder")
            elif path.resolve().is_relative_to(place):
                errors.append(
                    f"export.folder: {folder} is replaced as a whole, and {key} lies in it; name another folder"
                )
    if errors:
        raise UserError("\n".join(errors))


def start_folder(partial: Path) -> None:
    """Make an empty folder; the remains of an export that was cut off are removed."""
    _remove(partial)
    partial.mkdir(parents=True)


def write_assets(
    partial: Path,
    hf_config: dict[str, Any],
    dtype: torch.dtype,
    assets: str,
    card: str,
    answering: Answering = NO_ANSWERS,
) -> None:
    """Write everything but the weights: config.json first (it marks the folder, see `check_folder`), tokenizer files,
    chat template and generation config (`write_answering`), and model card."""
    config = {key: value for key, value in hf_config.items() if key != "_name_or_path"}  # may be a path of a machine
    # transformers 5 reads `dtype`, older versions and vLLM `torch_dtype`.
    config["torch_dtype"] = config["dtype"] = str(dtype).removeprefix("torch.")
    _write_json(partial / "config.json", config)
    check_assets(assets)
    for name in _assets(assets):
        (partial / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(Path(assets) / name, partial / name)
    generates = not str(config.get("problem_type", "")).endswith(("classification", "regression"))
    generation = {key: config[key] for key in _GENERATION_KEYS if generates and config.get(key) is not None}
    if generation and not (partial / "generation_config.json").exists():
        _write_json(partial / "generation_config.json", {"_from_model_config": True, **generation})
    write_answering(partial, partial, hf_config, answering)
    # Names of data files may be bytes that are no UTF-8.
    (partial / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")


def write_answering(folder: Path, base: Path, hf_config: dict[str, Any], answering: Answering) -> bool:
    """Put into `folder` what the model directory `base` lacks of what the training records take for granted: the chat
    template, and the tokens that end an answer, at which transformers and vLLM would not stop otherwise.

    Returns:
        whether there was anything.
    """
    said: dict[str, Any] = {key: hf_config[key] for key in _GENERATION_KEYS if hf_config.get(key) is not None}
    if answering.stop_ids and (base / "generation_config.json").is_file():
        said = read_json_object(base / "generation_config.json")
    ends = said.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    added = [token for token in answering.stop_ids if token not in ends]
    if added:
        said.pop("_from_model_config", None)
        said["eos_token_id"] = ends + added if ends or added[1:] else added[0]
        _write_json(folder / "generation_config.json", said)
        logger.info("generation_config.json: eos_token_id also names %s, which ended the answers in training", added)
    if answering.chat_template is not None:
        (folder / "chat_template.jinja").write_text(answering.chat_template, encoding="utf-8")
    return bool(added) or answering.chat_template is not None


def _assets(assets: str) -> list[str]:
    """The files of the model directory that an export copies; none of a run without one."""
    return [name for name in dict.fromkeys(_ASSET_FILES) if assets and (Path(assets) / name).is_file()]


def check_assets(assets: str) -> None:
    """UserError, with a line for each, if files of the model directory that an export copies are links out of it: the
    export would copy, and its user publish, any file of this machine that the directory's author names. The hub's cache
    links from snapshots/COMMIT to blobs. Or if a file cannot be read."""
    errors, root = [], Path(assets).resolve()
    allowed = root.parent.parent if root.parent.name == "snapshots" else root
    for name in _assets(assets):
        path = Path(assets) / name
        if not path.resolve().is_relative_to(allowed):
            errors.append(
                f"{path}: is a link out of the directory, which an export does not copy; replace it by the file "
                f"(cp --remove-destination {path.resolve()} {path})"
            )
        elif not os.access(path, os.R_OK):
            errors.append(f"{path}: cannot be read, and an export copies it")
    if errors:
        raise UserError("\n".join(errors))


def publish(partial: Path, folder: Path) -> None:
    """Put the complete folder into its place. What was there is moved aside first and removed last."""
    if os.path.lexists(folder):
        _remove(_old(folder))
        folder.rename(_old(folder))
    partial.rename(folder)
    _remove(_old(folder))


def _old(folder: Path) -> Path:
    return folder.with_name(folder.name + ".old")


def _remove(path: Path) -> None:
    """The mark goes last: what is left by a removal that was cut off is still seen to be an export's."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        for inside in path.iterdir():
            if inside.is_dir() and not inside.is_symlink():
                shutil.rmtree(inside)
            elif inside.name not in _MARKS:
                inside.unlink()
        shutil.rmtree(path)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
