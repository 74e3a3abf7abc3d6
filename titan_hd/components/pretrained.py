"""A whole model in one process: from a Hugging Face directory, or from a checkpoint of a run."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from titan_hd.components.checkpoint_folder import STATE_FILE, read_train_state
from titan_hd.components.dcp_reader import CheckpointReader
from titan_hd.components.identity import weights_fingerprint
from titan_hd.config.errors import UserError
from titan_hd.distributed.weights import materialize
from titan_hd.models.decoder import Decoder
from titan_hd.models.hf_weights import WeightFiles
from titan_hd.models.registry import DecoderConfig, flavor_config, read_hf_config


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
    state = read_train_state(folder)
    settings, identity = state["settings"].get("model", {}), state["identity"]
    directory = assets or settings.get("hf_assets_path", "")
    if not directory:
        raise UserError(f"--assets: {folder} is of a run without model.hf_assets_path; name the directory")
    if not Path(directory).is_dir():
        key = "--assets" if assets else "--assets: missing, and model.hf_assets_path of the run"
        raise UserError(f"{key}: no such directory: {directory}")
    if settings.get("flavor"):
        config = flavor_config(settings["name"], settings["flavor"])
    else:
        config = read_hf_config(directory)
    if identity.get("model") != repr(config):
        raise UserError(f"--assets: {directory}: its config.json is not that of the checkpoint's model")
    model, reader = _meta_model(config, dtype), CheckpointReader(folder)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    frozen = base_weights(state, reader, shapes, directory)
    stored = {name: shape for name, shape in shapes.items() if name not in frozen}
    reader.weight_dtypes(stored)
    files = WeightFiles(directory, shapes, model.lm_head is None) if frozen else None
    materialize(model, device)
    tensors = {f"model.{name}": p for name, p in model.named_parameters() if name in stored}
    for name in frozen:
        files.read_into(name, model.get_parameter(name))
    try:
        with warnings.catch_warnings():  # that this is one process
            warnings.simplefilter("ignore")
            dcp.load(tensors, storage_reader=reader, no_dist=True)
    except CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        raise UserError(f"{folder}: cannot be read: {reason}") from None
    return model, Path(directory)


def base_weights(
    state: dict[str, Any], reader: CheckpointReader, shapes: dict[str, torch.Size], directory: str
) -> set[str]:
    """The weights that a checkpoint leaves to the base model in `directory`: none, unless checkpoint.base was "delta".

    Raises:
        UserError: the directory holds another base model.
    """
    if state.get("base") != "delta":
        return set()
    if weights_fingerprint(directory) != state["identity"].get("weights"):
        raise UserError(
            f"--assets: {directory}: its weights are not those that the checkpoint {reader.folder} builds on"
        )
    return {name for name in shapes if not reader.holds(f"model.{name}")}
