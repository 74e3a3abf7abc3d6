"""Operations per token: by hand, and against the published figures for an 8B model."""

from __future__ import annotations

import pytest

from titan_hd.components.flops import flops_per_token
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


def test_adapters_cost_four_skinny_products():
    """gy B, (gy B)^T x, x A^T, gy^T (x A^T): 2 r out or 2 r in each."""
    width = 16 * 32 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    added = flops_per_token(LLAMA, LENGTH, 0, width) - flops_per_token(LLAMA, LENGTH, 0, 0)
    assert added == 4 * width
    assert added < 0.01 * 4 * N


@pytest.mark.parametrize(("trained", "figure"), [(0, 42.9e9), (N, 57.9e9)])
def test_published_figures_at_8192_tokens(trained: int, figure: float):
    assert flops_per_token(LLAMA, LENGTH, trained, 0) == pytest.approx(figure, rel=FIGURES)


def test_a_tied_head_is_multiplied_with_too():
    llama = flavor_config("llama3", "debugmodel")
    weights = sum(out * width for out, width in llama.linear_shapes().values()) * 2 + 256 * 64
    assert flops_per_token(llama, 0, weights, 0) == 6 * weights
