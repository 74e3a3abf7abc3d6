"""A model from a Hugging Face directory, or from a checkpoint of a run: whole in one process, or in shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from titan_hd.checkpoint.folder import STATE_FILE, read_train_state
from titan_hd.checkpoint.reader import CheckpointReader
from titan_hd.checkpoint.resume_check import same_model
from titan_hd.checkpoint.weights import CheckpointWeights
from titan_hd.console import Progress, tell
from titan_hd.distributed.parallel_dims import ParallelDims, local_part, owned_block
from titan_hd.distributed.parallelize import parallelize
from titan_hd.distributed.shards import load_weights, materialize
from titan_hd.errors import UserError
from titan_hd.models.hf_files import WeightFiles, open_model_weights, read_model_config
from titan_hd.models.model import Model
from titan_hd.models.model_config import ModelConfig
from titan_hd.models.registry import build_model, flavor_config
from titan_hd.models.roberta import with_labels


def load_pretrained(path: Path, assets: str, dtype: torch.dtype, device: torch.device) -> tuple[Model, Path]:
    """The model in eval mode, and the directory that has its tokenizer.

    Every tensor is read into its place: there is never a second copy of the model, and never one of another dtype.

    path: a HF directory, or a checkpoint's folder, `step-N`.
    assets: for a checkpoint, the HF directory with config.json and the tokenizer; empty: the one that the run had.

    Raises:
        UserError: one line for everything that is wrong with the files.
    """
    config, weights, directory = open_pretrained(path, assets)
    _check_that_it_writes(config, path)
    model = _empty_model(config, dtype)
    materialize(model, device)
    with _reading(model) as progress:
        for name, parameter in model.named_parameters():
            weights.read_into(name, parameter)
            progress.update(parameter.nbytes)
    return model, directory


def load_sharded(
    path: Path, assets: str, dtype: torch.dtype, device: torch.device
) -> tuple[Model, Path, dist.ProcessGroup]:
    """The same with every weight sharded over all processes, and the process group that has the shards. Collective.

    Of a HF directory each process reads its own rows. Of a checkpoint each reads one weight after the other as a whole,
    onto the host: adapters are merged into whole matrices.
    """
    config, weights, directory = open_pretrained(path, assets)
    _check_that_it_writes(config, path)
    dims = ParallelDims(1, dist.get_world_size(), device.type)
    model = _empty_model(config, dtype)
    parallelize(model, dims, set(), dtype, "none", compile_blocks=False)
    materialize(model, device)
    if isinstance(weights, WeightFiles):
        load_weights(model, dims, str(directory))
        return model, directory, dims.dp_mesh.get_group()
    with _reading(model) as progress:
        for name, parameter in model.named_parameters():
            whole = torch.empty(parameter.shape, dtype=dtype)
            weights.read_into(name, whole)
            block = owned_block(tuple(parameter.shape), None, dims.place(dims.rank), dims)
            local_part(parameter).copy_(whole[block.row : block.row + block.rows])
            progress.update(whole.nbytes)
    return model, directory, dims.dp_mesh.get_group()


def _check_that_it_writes(config: ModelConfig, path: Path) -> None:
    if not config.causal:
        raise UserError(f"{path}: {config.hf['model_type']} writes no text; validation.enable measures a classifier")


def _reading(model: Model) -> Progress:
    """A tool's, which has no log: it tells."""
    total = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return Progress("reading the weights", total, "B", said=tell)


def open_pretrained(path: Path, assets: str) -> tuple[ModelConfig, WeightFiles | CheckpointWeights, Path]:
    """What `load_pretrained` reads, without reading a weight: `read_into(name, tensor)` of the second reads one.

    Raises:
        UserError: as `load_pretrained`.
    """
    if (path / STATE_FILE).is_file():
        return _open_checkpoint(path, assets)
    if not (path / "config.json").is_file():
        steps = sorted(p.parent.name for p in path.glob(f"step-*/{STATE_FILE}"))
        hint = f"; it has {', '.join(steps)}: name one of them" if steps else ""
        if (path / "adapter_config.json").is_file():
            hint = "; it is an adapter without its model: name the run's checkpoint, or export with export.format hf"
        raise UserError(f"{path}: holds neither config.json (a HF directory) nor {STATE_FILE} (a checkpoint){hint}")
    if assets:
        raise UserError(f"--assets: {path} is a HF directory and has its own; only a checkpoint needs them")
    config = read_model_config(path)
    return config, open_model_weights(path, config), path


def _empty_model(config: ModelConfig, dtype: torch.dtype) -> Model:
    """A model without memory. It is given some when the files have been found to have the sizes that the configuration
    says: a wrong configuration may ask for any amount."""
    with torch.device("meta"):
        return build_model(config).to(dtype).requires_grad_(False).eval()


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def as_trained(config: ModelConfig, state: dict[str, Any]) -> ModelConfig:
    """The configuration of a model directory, with the classes that the run of a checkpoint gave its head."""
    labels = state.get("settings", {}).get("data", {}).get("labels")
    return with_labels(config, labels) if config.num_labels and labels else config


def _open_checkpoint(folder: Path, assets: str) -> tuple[ModelConfig, CheckpointWeights, Path]:
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
        config = read_model_config(directory)
    config = as_trained(config, state)
    if not same_model(identity.get("model"), repr(config)):
        raise UserError(f"--assets: {directory}: its config.json is not that of the checkpoint's model")
    return config, CheckpointWeights(CheckpointReader(folder), state, config, directory), Path(directory)
