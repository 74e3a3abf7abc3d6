"""MoRA's layer against its formula in loops, both types, shapes that divide by nothing."""

from __future__ import annotations

import math

import pytest
import torch

from tests.kit.layers import check_compiled, check_dropout, check_layer, check_start, make
from titan_hd.adapters.mora import MoraLinear, square_size

# (out, in, rank): in and out above and below q, multiples of q or not; the last three have q at least in.
SHAPES = [(12, 10, 1), (17, 11, 2), (3, 20, 1), (8, 8, 1), (11, 5, 3), (20, 3, 1)]


def mora(x, weight, mora_M, mora_type):
    """y [out] of one x [in], element by element."""
    out, inner, q = len(weight), len(x), len(mora_M)
    blocks = math.ceil(inner / q)
    cut = [[x[(j * q + k) % inner] for k in range(q)] for j in range(blocks)]  # circular padding
    if mora_type == 1:
        h = [[sum(block[k] for block in cut) for k in range(q)]]
    else:
        h = []
        for j, block in enumerate(cut):
            turned = [None] * q
            for k in range(q // 2):
                angle = j * 10000 ** (-2 * k / q)
                turned[k] = block[k] * math.cos(angle) - block[k + q // 2] * math.sin(angle)
                turned[k + q // 2] = block[k + q // 2] * math.cos(angle) + block[k] * math.sin(angle)
            h.append(turned)
    flat = [sum(mora_M[i, k] * row[k] for k in range(q)) for row in h for i in range(q)]
    return [weight[o] @ x + flat[o % len(flat)] for o in range(out)]


@pytest.mark.parametrize("mora_type", [1, 6])
@pytest.mark.parametrize(("out", "inner", "rank"), SHAPES)
def test_layer_is_the_formula(out: int, inner: int, rank: int, mora_type: int):
    layer = make(MoraLinear, out, inner, rank=rank, mora_type=mora_type)
    check_layer(layer, lambda x, w, mora_M: mora(x, w, mora_M, mora_type))


def test_size_of_the_square_matrix():
    """As many elements as LoRA's, to the nearest q; Llama-2-7B's layers at r = 8."""
    assert square_size(4096, 4096, 8, 1) == 256
    assert square_size(4096, 11008, 8, 1) == 348
    assert square_size(10, 12, 1, 1) == 5
    assert square_size(10, 12, 1, 6) == 4
    assert square_size(1, 1, 1, 6) == 2


@pytest.mark.parametrize("mora_type", [1, 6])
def test_start_dropout_and_compile(mora_type: int):
    check_start(make(MoraLinear, 12, 10, rank=2, mora_type=mora_type), zero=["mora_M"])
    check_dropout(make(MoraLinear, 12, 10, rank=2, mora_type=mora_type, dropout=0.4))
    check_compiled(make(MoraLinear, 12, 10, rank=2, mora_type=mora_type))


def test_rotation_in_bf16_uses_exact_angles():
    """Angles of late blocks are beyond bf16's precision; cosines are rounded last."""
    layer = make(MoraLinear, 8, 8 * 300, rank=1, mora_type=6)
    x = torch.randn(3, 2400, generator=torch.Generator().manual_seed(0))
    exact, rounded = layer(x), layer.to(torch.bfloat16)(x.to(torch.bfloat16))
    assert (exact - rounded).norm() / exact.norm() < 2e-2  # bf16's 8 bits, some roundings
