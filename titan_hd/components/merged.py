"""Weights of a checkpoint whose adapters stand beside them, merged one layer at a time, in one process."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from titan_hd.adapters.adapter_linear import AdapterLinear, adapter_layers
from titan_hd.adapters.methods import build_method
from titan_hd.components.dcp_reader import CheckpointReader
from titan_hd.config import manager
from titan_hd.config.errors import UserError
from titan_hd.models.decoder import Decoder
from titan_hd.models.registry import DecoderConfig


class MergedWeights:
    """Reads weights by HF name, with the adapters of the run merged in.

    settings: the run's configuration as TOML, "" for a checkpoint of weights alone.

    Raises:
        UserError: the adapters' tensors are not those of the settings; a tensor cannot be read.
    """

    def __init__(self, folder: Path, reader: CheckpointReader, settings: str, decoder: DecoderConfig):
        self.folder, self.reader = folder, reader
        self.layers: dict[str, AdapterLinear] = {}
        if settings:
            config = manager.from_toml(settings, str(folder))
            with torch.device("meta"):
                model = Decoder(decoder)
                build_method(config).apply(model, config.adapter.target_modules)
            self.layers = {f"{name}.weight": layer for name, layer in adapter_layers(model).items()}
        layers = self.layers.values()
        shapes = {f"{layer.name}.{key}": getattr(layer, key).shape for layer in layers for key in layer.adapter_names}
        reader.weight_dtypes(shapes, "adapters.")

    def read_into(self, name: str, weight: torch.Tensor) -> None:
        """Fill `weight`: as stored, or merged in fp32 and rounded once."""
        layer = self.layers.get(name)
        if layer is None:
            self._load(f"model.{name}", weight)
            return
        whole = torch.empty(weight.shape, dtype=torch.float32)
        self._load(f"model.{name}", whole)
        tensors = {key: torch.empty(getattr(layer, key).shape) for key in layer.adapter_names}
        for key, tensor in tensors.items():
            self._load(f"adapters.{layer.name}.{key}", tensor)
        weight.copy_(layer.merged(whole, **tensors))

    def _load(self, key: str, values: torch.Tensor) -> None:
        try:
            dcp.load({key: values}, storage_reader=self.reader, no_dist=True)
        except CheckpointException as error:
            reason = next(iter(error.failures.values()))[0]
            raise UserError(f"{self.folder}: {key}: cannot be read: {reason}") from None
