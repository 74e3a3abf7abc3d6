"""Bat's layer against its formula in loops over blocks, both forms."""

from __future__ import annotations

import pytest
import torch

from tests.kit.layers import check_compiled, check_dropout, check_layer, check_start, make
from titan_hd.adapters.bat import BatLinear


def bat(x, weight, miss_block, form):
    """y [out] of one x [in]: W_ac + W_ac D + D, block by block."""
    b = miss_block.shape[-1]
    y = []
    for a in range(len(weight) // b):
        part = torch.zeros(b, dtype=x.dtype)
        for c in range(len(x) // b):
            block = weight[a * b : (a + 1) * b, c * b : (c + 1) * b]
            d = miss_block[a if form == "column" else c]
            part = part + (block + block @ d + d) @ x[c * b : (c + 1) * b]
        y += part
    return y


@pytest.mark.parametrize("form", ["column", "row"])
@pytest.mark.parametrize(("out", "inner", "block"), [(12, 8, 4), (6, 15, 3), (4, 4, 4), (5, 3, 1)])
def test_layer_is_the_formula(out: int, inner: int, block: int, form: str):
    for bias, shape in ((True, (2, 3)), (False, (4,)), (True, (1, 2, 3))):
        layer = make(BatLinear, out, inner, bias=bias, block=block, form=form)
        check_layer(layer, lambda x, w, miss_block: bat(x, w, miss_block, form), shape)


@pytest.mark.parametrize("form", ["column", "row"])
def test_start_dropout_and_compile(form: str):
    check_start(make(BatLinear, 12, 8, block=4, form=form), zero=["miss_block"])
    check_dropout(make(BatLinear, 12, 8, block=4, form=form, dropout=0.4))
    check_compiled(make(BatLinear, 12, 8, block=4, form=form))


def test_weights_that_do_not_divide():
    assert BatLinear.shape_error((12, 8), block=4, form="row") is None
    for shape in ((12, 9), (9, 12)):
        assert "adapter.rank: method bat cuts weights in blocks" in BatLinear.shape_error(shape, block=4)
