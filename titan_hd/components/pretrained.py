"""A whole model in one process: from a Hugging Face directory, or from a checkpoint of a run."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from titan_hd.components.checkpoint import STATE_FILE
from titan_hd.components.dcp_reader import CheckpointReader
from titan_hd.components.merged import MergedWeights
from titan_hd.config.errors import UserError
from titan_hd.distributed.weights import materialize
from titan_hd.models.decoder import Decoder
from titan_hd.models.hf_weights import WeightFiles
from titan_hd.models.registry import DecoderConfig, flavor_config, read_hf_config

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def load_pretrained(path: Path, assets: str, dtype: torch.dtype, device: torch.device) -> tuple[Decoder, Path]:
    """The model in eval mode, and the directory that has its tokenizer.

    Every tensor is read into its place: there is never a second copy of the model, and never one of another dtype.

    path: a HF directory, or a checkpoint's folder, `step-N`.
    assets: for a checkpoint, the HF directory with config.json and the tokenizer; empty: the one that the run had.

    Raises:
        UserError: one line for everything that is wrong with the files.
    """
    if (path / STATE_FILE).is_file():
        return _load_checkpoint(path, assets, dtype, device)
    if not (path / "config.json").is_file():
        steps = sorted(p.parent.name for p in path.glob(f"step-*/{STATE_FILE}"))
        hint = f"; it has {', '.join(steps)}: name one of them" if steps else ""
        raise UserError(f"{path}: holds neither config.json (a HF directory) nor {STATE_FILE} (a checkpoint){hint}")
    if assets:
        raise UserError(f"--assets: {path} is a HF directory and has its own; only a checkpoint needs them")
    model = _meta_model(read_hf_config(path), dtype)
    files = WeightFiles(path, {name: p.shape for name, p in model.named_parameters()}, model.lm_head is None)
    materialize(model, device)
    for name, parameter in model.named_parameters():
        files.read_into(name, parameter)
    return model, path


def _meta_model(config: DecoderConfig, dtype: torch.dtype) -> Decoder:
    """Without memory: that comes when the files have been found to have the sizes that the configuration says."""
    with torch.device("meta"):
        return Decoder(config).to(dtype).requires_grad_(False).eval()


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def _load_checkpoint(folder: Path, assets: str, dtype: torch.dtype, device: torch.device) -> tuple[Decoder, Path]:
    settings, run, identity = _read_state(folder / STATE_FILE)
    directory = assets or run.get("hf_assets_path", "")
    if not directory:
        raise UserError(f"--assets: {folder} is of a run without model.hf_assets_path; name the directory")
    if not Path(directory).is_dir():
        key = "--assets" if assets else "--assets: missing, and model.hf_assets_path of the run"
        raise UserError(f"{key}: no such directory: {directory}")
    if run.get("flavor"):
        config = flavor_config(run["name"], run["flavor"])
    else:
        config = read_hf_config(directory)
    if identity.get("model") != repr(config):
        raise UserError(f"--assets: {directory}: its config.json is not that of the checkpoint's model")
    model, reader = _meta_model(config, dtype), CheckpointReader(folder)
    weights = MergedWeights(folder, reader, settings, config)
    reader.weight_dtypes({name: p.shape for name, p in model.named_parameters()})
    materialize(model, device)
    with warnings.catch_warnings():  # that this is one process
        warnings.simplefilter("ignore")
        for name, parameter in model.named_parameters():
            weights.read_into(name, parameter)
    return model, Path(directory)


def _read_state(path: Path) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The run's configuration as TOML, its [model], and what identifies the run."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        return state["config"], tomllib.loads(state["config"])["model"], state["identity"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: is not the state of a titan_hd run: {type(error).__name__}: {error}") from None
