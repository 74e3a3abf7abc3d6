"""Bat (DiSHA, arXiv 2409.15371; "bat" of PEFT's MiSS): blocks of the weight are transformed by small square matrices.

W is cut in b x b blocks W_ac (a: rows, c: columns; b = adapter.rank), and W_ac moves by W_ac D + D. In the column
form, PEFT's, a row block a has a D of its own, which all its column blocks share; in the row form a column block c has
one. There is no alpha.

    column   the dense dW is formed in each pass and not kept (recomputed.py)
    row      needs no dense dW: with z_c = D_c x_c it is y = W (x + z) + (sum_c z_c, for every row block)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_hd.adapters.adapter_linear import AdapterLinear, AdapterMethod
from titan_hd.adapters.bone import peft_miss
from titan_hd.adapters.dense_delta import recomputed_linear
from titan_hd.config.job_config import Adapter, JobConfig


def _effective(weight: Tensor, small: Sequence[Tensor], with_weight: bool) -> Tensor:
    """The column form; small: D [out/b, b, b]. A row block's [b, in] elements are viewed as [in, b], a row for each
    (row of W, column block)."""
    (d,) = small
    blocks, b, _ = d.shape
    dw = torch.bmm(weight.reshape(blocks, -1, b), d)
    dw.view(blocks, b, -1, b).add_(d[:, :, None, :])
    dw = dw.view_as(weight)
    return dw.add_(weight) if with_weight else dw


def _gradients(dw: Tensor, weight: Tensor, small: Sequence[Tensor]) -> list[Tensor]:
    (d,) = small
    blocks, b, _ = d.shape
    rows = dw.reshape(blocks, -1, b)
    return [torch.bmm(weight.reshape(blocks, -1, b).mT, rows) + rows.view(blocks, b, -1, b).sum(2)]


bat_linear = recomputed_linear("bat_linear", _effective, _gradients)


class BatLinear(AdapterLinear):
    """miss_block, PEFT's name of D: [out/b, b, b] (column form) or [in/b, b, b] (row form); zero at the start."""

    miss_block: nn.Parameter

    def __init__(self, linear: nn.Linear, block: int, form: str = "column", dropout: float = 0.0):
        cut = linear.out_features if form == "column" else linear.in_features
        super().__init__(linear, {"miss_block": (cut // block, block, block)}, dropout)
        self.form = form

    @classmethod
    def shape_error(cls, shape: tuple[int, int], block: int, **settings: Any) -> str | None:
        if shape[0] % block or shape[1] % block:
            return f"adapter.rank: method bat cuts weights in blocks of adapter.rank, {block} x {block}, without a rest"
        return None

    def initial(self, weight: Tensor | None, generator: torch.Generator) -> dict[str, Tensor]:
        return {"miss_block": torch.zeros(self.miss_block.shape)}

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "column":
            return bat_linear(x, self.dropped(x), self.weight, self.bias, [self.miss_block])
        z = torch.einsum("cij,...cj->...ci", self.miss_block, self._blocks(self.dropped(x)))
        shared = z.sum(-2)
        y = F.linear(x + z.flatten(-2), self.weight, self.bias)
        return y + shared.repeat(*[1] * (x.dim() - 1), self.out_features // shared.shape[-1])

    def _blocks(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.miss_block.shape[-1]))

    def merged(self, weight: Tensor, miss_block: Tensor) -> Tensor:
        if self.form == "column":
            return _effective(weight, [miss_block], True)
        b = miss_block.shape[-1]
        dw = torch.einsum("ocj,cjk->ock", self._blocks(weight), miss_block).unflatten(0, (-1, b))
        return weight + (dw + miss_block.transpose(0, 1)).reshape(weight.shape)

    def flops(self, tokens: float) -> float:
        """Column: the gradient of dW; and, spread over the tokens, dW in both passes and the gradient of D. Row: z and
        its gradients."""
        b = self.miss_block.shape[-1]
        if self.form == "row":
            return 6 * b * self.in_features
        return 2 * self.in_features * self.out_features * (1 + 3 * b / tokens)


class Bat(AdapterMethod):
    name, title, paper = "bat", "Bat", "arXiv 2409.15371"
    idea = "square blocks that multiply a frozen weight's own blocks are trained beside it"
    trains, size = "D [out/b, b, b], or [in/b, b, b]", "b out, or b in"
    keys = resume_keys = ("adapter.rank", "adapter.dropout", "adapter.bat_form")
    layer = BatLinear

    @classmethod
    def layer_settings(cls, config: JobConfig) -> dict[str, Any]:
        a = config.adapter
        return {"block": a.rank, "form": a.bat_form, "dropout": a.dropout}

    @classmethod
    def peft_error(cls, config: JobConfig) -> str | None:
        if config.adapter.bat_form == "column":
            return None
        return "export.format: peft has bat's column form alone, not adapter.bat_form row; use hf"

    @classmethod
    def peft_config(cls, adapter: Adapter) -> dict[str, Any]:
        return peft_miss(adapter, "bat")
