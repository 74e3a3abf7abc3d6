"""The model of a configuration, whatever its architecture: one class for each kind of configuration.

What the rest of the code asks of a model, beside its forward pass: `blocks`, `parts`, `head`, `trained_head`,
`looked_up`, `block_inputs` and `reset_buffers`; of a configuration: its sizes, `linear_shapes`, `linear_paths`,
`block_name`, `with_blocks` and the facts that stand behind its fields.
"""

from __future__ import annotations

import torch

from titan_hd.models.decoder import Decoder
from titan_hd.models.registry import ModelConfig
from titan_hd.models.roberta import Roberta, RobertaConfig

Model = Decoder | Roberta


def build_model(config: ModelConfig) -> Model:
    """A model with new values, on torch's default device."""
    return Roberta(config) if isinstance(config, RobertaConfig) else Decoder(config)


def parameter_shapes(config: ModelConfig) -> dict[str, torch.Size]:
    """Shape of every parameter of the model by HF's name, without memory for any."""
    with torch.device("meta"):
        model = build_model(config)
    return {name: parameter.shape for name, parameter in model.named_parameters()}
