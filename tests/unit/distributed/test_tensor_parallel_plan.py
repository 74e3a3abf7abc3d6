"""The table of tensor parallelism against the modules of a decoder."""

import torch
from torch import nn

from tests.kit.runs import LINEAR_LAYERS
from titan_hd.distributed.tp.tensor_parallel import BLOCK_PLAN, local_shape
from titan_hd.models.decoder import Decoder
from titan_hd.models.registry import flavor_config


def test_every_module_with_weights_has_a_style():
    config = flavor_config("qwen3", "0.6B")
    with torch.device("meta"):
        block = Decoder(config).model.layers[0]
    weights = {name for name, module in block.named_modules() if list(module.parameters(recurse=False))}
    assert weights == BLOCK_PLAN.keys() - {"self_attn", "mlp"}
    linears = {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    assert set(config.linear_paths().values()) == linears
    assert list(config.linear_paths()) == LINEAR_LAYERS


def test_shapes_of_a_rank():
    assert local_shape("mlp.up_proj", (12, 8), 4) == (3, 8)
    assert local_shape("self_attn.o_proj", (12, 8), 4) == (12, 2)
