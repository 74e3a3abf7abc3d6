"""HiRA's layer against its formula in loops."""

from __future__ import annotations

import pytest
import torch

from tests.kit.layers import check_compiled, check_dropout, check_layer, check_start, make
from titan_hd.adapters.hira import HiraLinear


def hira(x, weight, hira_A, hira_B):
    """y [out] of one x [in]: W_oi (1 + sum_k B_ok A_ki)."""
    out, inner = weight.shape
    return [sum(x[i] * weight[o, i] * (1 + hira_B[o] @ hira_A[:, i]) for i in range(inner)) for o in range(out)]


@pytest.mark.parametrize(("out", "inner", "rank"), [(12, 10, 3), (7, 5, 1), (5, 7, 6)])
def test_layer_is_the_formula(out: int, inner: int, rank: int):
    for bias, shape in ((True, (2, 3)), (False, (4,)), (True, (1, 2, 3))):
        check_layer(make(HiraLinear, out, inner, bias=bias, rank=rank), hira, shape)


def test_start_dropout_and_compile():
    check_start(make(HiraLinear, 12, 10, rank=3), zero=["hira_B"])
    check_dropout(make(HiraLinear, 12, 10, rank=3, dropout=0.4))
    check_compiled(make(HiraLinear, 12, 10, rank=3))


def test_initial_a_is_kaiming_uniform():
    """Within 1 / sqrt(in), as nn.Linear's, and spread over all of it."""
    layer = make(HiraLinear, 12, 400, rank=8)
    a = layer.initial(None, torch.Generator().manual_seed(0))["hira_A"]
    assert 0.99 / 20 < a.abs().max() <= 1 / 20
    assert abs(a.std().item() - 1 / 20 / 3**0.5) < 1e-3
