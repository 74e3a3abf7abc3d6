"""Bone's layer against its formula in loops; blocks that do not divide the input."""

from __future__ import annotations

import pytest

from tests.kit.layers import check_compiled, check_dropout, check_layer, check_start, make
from titan_hd.adapters.bone import BoneLinear


def bone(x, weight, miss_block):
    """y [out] of one x [in]: element i of x meets row i mod b of D."""
    b = len(miss_block)
    return [w @ x + sum(x[i] * miss_block[i % b, o] for i in range(len(x))) for o, w in enumerate(weight)]


@pytest.mark.parametrize(("out", "inner", "block"), [(12, 10, 5), (12, 10, 4), (6, 22, 1), (5, 7, 7)])
def test_layer_is_the_formula(out: int, inner: int, block: int):
    check_layer(make(BoneLinear, out, inner, block=block), bone)
    check_layer(make(BoneLinear, out, inner, block=block, bias=False), bone, shape=(4,))


def test_start_dropout_and_compile():
    check_start(make(BoneLinear, 12, 10, block=4), zero=["miss_block"])
    check_dropout(make(BoneLinear, 12, 10, block=4, dropout=0.4))
    check_compiled(make(BoneLinear, 12, 10, block=4))
