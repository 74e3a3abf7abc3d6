"""Reads the weights of a checkpoint by HF name, in one process, with a run's adapters merged in."""

from __future__ import annotations

import logging
from typing import Any

import torch

from titan_hd.adapters.adapter_linear import AdapterLinear, adapter_layers
from titan_hd.adapters.methods import build_method
from titan_hd.checkpoint.folder import check_files
from titan_hd.checkpoint.reader import CheckpointReader
from titan_hd.checkpoint.resume_check import weights_fingerprint
from titan_hd.config import manager
from titan_hd.errors import UserError
from titan_hd.models.hf_files import open_model_weights
from titan_hd.models.model_config import ModelConfig
from titan_hd.models.registry import build_model, parameter_shapes

logger = logging.getLogger("titan_hd")


class CheckpointWeights:
    """Reads one weight after the other: from the checkpoint; from the base model, if the checkpoint holds only the
    weights that training changed; and with its adapter merged in fp32, if it has one.

    state: what `read_train_state` gave, empty for a checkpoint of weights alone. directory: has the base model.

    Attributes:
        shapes: of all weights of the model.
        dtypes: of the weights that are stored.
        merged: names of the weights that have an adapter.

    Raises:
        UserError: tensors are missing or misshapen, the directory holds another base model, or a file of the run's
            checkpoint is not as it was written; a line for each.
    """

    def __init__(self, reader: CheckpointReader, state: dict[str, Any], decoder: ModelConfig, directory: str):
        self._reader = reader
        self.shapes = parameter_shapes(decoder)
        self._layers: dict[str, AdapterLinear] = {}
        if state:
            config = manager.from_toml(state["config"], str(reader.folder))
            with torch.device("meta"):
                model = build_model(decoder)
                build_method(config).apply(model, config.adapter.target_modules)
            self._layers = {f"{name}.weight": layer for name, layer in adapter_layers(model).items()}
        self.merged = self._layers.keys()
        self._base = self._of_the_base(state, directory)
        self._files = open_model_weights(directory, decoder) if self._base else None
        self.dtypes = reader.tensor_dtypes({name: s for name, s in self.shapes.items() if name not in self._base})
        layers = self._layers.values()
        beside = {f"{layer.name}.{key}": getattr(layer, key).shape for layer in layers for key in layer.adapter_names}
        reader.tensor_dtypes(beside, "adapters.")
        if state:  # what no run of ours wrote has no checksums
            check_files(reader.folder)
        if reader.holds("unfolded.rates"):
            line = "%s: saved between two folds of hdpissa.local_steps: its weights are those of the last one"
            logger.warning(line, reader.folder)

    def _of_the_base(self, state: dict[str, Any], directory: str) -> set[str]:
        if state.get("base") != "delta":
            return set()
        if weights_fingerprint(directory) != state["identity"].get("weights"):
            folder = self._reader.folder
            raise UserError(f"--assets: {directory}: its weights are not those that the checkpoint {folder} builds on")
        return {name for name in self.shapes if not self._reader.holds(f"model.{name}")}

    def dtype(self, name: str) -> torch.dtype:
        """What a weight was last rounded to: its storage's dtype, or float32 where an adapter is merged in."""
        if name in self.merged:
            return torch.float32
        if self._files is not None and name in self._base:
            return self._files.dtype(name)
        return self._reader.tensor_dtype(f"model.{name}")

    def read_into(self, name: str, weight: torch.Tensor) -> None:
        """Fill `weight`, rounded once to its dtype."""
        layer = self._layers.get(name)
        if layer is None:
            self._read(name, weight)
            return
        whole = torch.empty(weight.shape, dtype=torch.float32)
        self._read(name, whole)
        tensors = {key: torch.empty(getattr(layer, key).shape) for key in layer.adapter_names}
        for key, tensor in tensors.items():
            self._reader.fill({f"adapters.{layer.name}.{key}": tensor})
        weight.copy_(layer.merged(whole, **tensors))

    def _read(self, name: str, weight: torch.Tensor) -> None:
        if self._files is not None and name in self._base:
            self._files.read_into(name, weight)
        else:
            self._reader.fill({f"model.{name}": weight})
