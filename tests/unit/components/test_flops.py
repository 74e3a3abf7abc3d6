"""Operations per token: by hand, and against the published figures for an 8B model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from titan_hd.adapters.full import FullFineTuning
from titan_hd.adapters.hdpissa import HDPissa, HDPissaLinear
from titan_hd.adapters.lora import LoRA
from titan_hd.adapters.method import Method
from titan_hd.components.flops import flops_per_token, peak_flops, trained_work
from titan_hd.components.live_bytes import recomputed_flops
from titan_hd.config.job_config import ActivationCheckpoint
from titan_hd.models.decoder import Decoder
from titan_hd.models.registry import flavor_config

LLAMA = flavor_config("llama3", "8B")
# Weights that are multiplied with: all of them but the embedding, which is looked up.
N = 8030261248 - 128256 * 4096 - 65 * 4096
LENGTH = 8192
# 32 layers of 32 heads of 128 channels, scores and values, forward and twice backward.
ATTENTION = 3 * 4 * 32 * 32 * 128 * LENGTH
# The published figures have three digits.
FIGURES = 0.005


def test_a_frozen_base_costs_four_operations_per_weight():
    assert flops_per_token(LLAMA, LENGTH, 0, 0) == 4 * N + ATTENTION
    assert flops_per_token(LLAMA, 0, 0, 0) == 4 * N


def test_trained_weights_cost_six():
    assert flops_per_token(LLAMA, LENGTH, N, 0) == 6 * N + ATTENTION


WIDTH = 16 * 32 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))  # r (in + out), r = 16


def work(method: Method) -> tuple[int, float]:
    """Of the 8B model with micro-batches of one full sequence."""
    with torch.device("meta"):
        model = Decoder(LLAMA)
        method.apply(model, None)
        for layer in model.modules():
            if isinstance(layer, HDPissaLinear):  # as the adapter registry does, for one hosted adapter
                layer.delta_A = nn.Parameter(torch.empty(1, 16, layer.in_features))
                layer.delta_B = nn.Parameter(torch.empty(1, layer.out_features, 16))
    return trained_work(model, LENGTH)


def test_hdpissa_costs_four_skinny_products():
    """gy B, (gy B)^T x, x A^T, gy^T (x A^T): 2 r out or 2 r in each."""
    assert work(HDPissa(1, 16)) == (0, 4 * WIDTH)
    added = flops_per_token(LLAMA, LENGTH, 0, 4 * WIDTH) - flops_per_token(LLAMA, LENGTH, 0, 0)
    assert added == 4 * WIDTH
    assert added < 0.01 * 4 * N


def test_a_mute_scalar_costs_six_as_lora():
    assert work(HDPissa(1, 16, mute_scalar=1e-16)) == (0, 6 * WIDTH)


def test_all_adapters_learn_from_a_token_side_by_side():
    assert work(HDPissa(8, 16, samples="all")) == (0, 8 * 4 * WIDTH)
    assert work(HDPissa(8, 16)) == (0, 4 * WIDTH)


def test_a_local_model_costs_ten():
    """Forward, x [A ; dA]^T and the product with [dB | B + dB]; backward, both again for dx, and two of width r."""
    assert work(HDPissa(8, 16, local_steps=4)) == (0, 10 * WIDTH)


def test_cards_by_the_name_that_torch_gives():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA A10G") == 70e12
    assert peak_flops("NVIDIA GeForce RTX 4090") == 165.2e12
    assert peak_flops("another card") is None


def test_lora_costs_six():
    assert work(LoRA(rank=16, scale=1.0)) == (0, 6 * WIDTH)


def test_full_trains_what_is_multiplied_with():
    assert work(FullFineTuning()) == (N, 0)


@pytest.mark.parametrize(("trained", "figure"), [(0, 42.9e9), (N, 57.9e9)])
def test_published_figures_at_8192_tokens(trained: int, figure: float):
    assert flops_per_token(LLAMA, LENGTH, trained, 0) == pytest.approx(figure, rel=FIGURES)


def test_a_tied_head_is_multiplied_with_too():
    llama = flavor_config("llama3", "debugmodel")
    weights = sum(out * width for out, width in llama.linear_shapes().values()) * 2 + 256 * 64
    assert flops_per_token(llama, 0, weights, 0) == 6 * weights


def test_full_checkpointing_computes_blocks_again():
    """All of a block's forward pass, down_proj too: HD-PiSSA's function saves its operands when it is through."""
    llama, tokens = flavor_config("llama3", "debugmodel"), (2, 64)
    method = HDPissa(1, 4)
    forward = 2 * sum(out * width for out, width in llama.linear_shapes().values())
    attention = 4 * llama.num_attention_heads * llama.head_dim * tokens[1]

    def again_in(mode: str) -> float:
        return recomputed_flops(llama, method, None, tokens, ActivationCheckpoint(mode=mode))

    again = again_in("full")
    assert again == llama.num_hidden_layers * (forward + attention)
    assert again_in("none") == 0
    assert again_in("selective") == 0, "no product but those that activation_checkpoint.keep leaves out"
