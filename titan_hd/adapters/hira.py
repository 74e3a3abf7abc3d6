"""HiRA (ICLR 2025): a low-rank matrix scales every element of the frozen weight, y = x (W o (1 + B A))^T.

The change W o B A has a high rank where W has. There is no alpha: the scale is that of W itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from titan_hd.adapters.adapter_linear import AdapterLinear, AdapterMethod
from titan_hd.adapters.dense_delta import recomputed_linear
from titan_hd.adapters.lora import kaiming_uniform
from titan_hd.config.job_config import Adapter, JobConfig


def _effective(weight: Tensor, small: Sequence[Tensor], with_weight: bool) -> Tensor:
    a, b = small
    product = b @ a
    return torch.addcmul(weight, weight, product) if with_weight else product.mul_(weight)


def _gradients(dw: Tensor, weight: Tensor, small: Sequence[Tensor]) -> list[Tensor]:
    a, b = small
    product = dw.mul_(weight)  # of B A
    return [b.T @ product, product @ a.T]


hira_linear = recomputed_linear("hira_linear", _effective, _gradients)


class HiraLinear(AdapterLinear):
    """hira_A [r, in], kaiming-uniform; hira_B [out, r], zero."""

    hira_A: nn.Parameter
    hira_B: nn.Parameter

    def __init__(self, linear: nn.Linear, rank: int, dropout: float = 0.0):
        super().__init__(linear, {"hira_A": (rank, linear.in_features), "hira_B": (linear.out_features, rank)}, dropout)
        self.rank = rank

    @classmethod
    def shape_error(cls, shape: tuple[int, int], rank: int, **settings: Any) -> str | None:
        if rank > min(shape):
            return f"adapter.rank: {rank} is more than the smaller side of a weight, {min(shape)}"
        return None

    def initial(self, weight: Tensor | None, generator: torch.Generator) -> dict[str, Tensor]:
        a = kaiming_uniform(self.rank, self.in_features, generator)
        return {"hira_A": a, "hira_B": torch.zeros(self.hira_B.shape)}

    def forward(self, x: Tensor) -> Tensor:
        return hira_linear(x, self.dropped(x), self.weight, self.bias, [self.hira_A, self.hira_B])

    def merged(self, weight: Tensor, hira_A: Tensor, hira_B: Tensor) -> Tensor:
        return _effective(weight, (hira_A, hira_B), True)

    def flops(self, tokens: float) -> float:
        """The gradient of dW; and, spread over the tokens, B A in both passes and the gradients of A and B."""
        return 2 * self.in_features * self.out_features * (1 + 4 * self.rank / tokens)


class Hira(AdapterMethod):
    name, title, paper = "hira", "HiRA", "ICLR 2025"
    idea = "a frozen W becomes W + W * B A, element by element, and B A of rank r is trained"
    trains, size = "A, B", "r (in + out)"
    keys = resume_keys = ("adapter.rank", "adapter.dropout")
    scales_weight = True
    layer = HiraLinear

    @classmethod
    def layer_settings(cls, config: JobConfig) -> dict[str, Any]:
        return {"rank": config.adapter.rank, "dropout": config.adapter.dropout}

    @classmethod
    def peft_config(cls, adapter: Adapter) -> dict[str, Any]:
        return {"peft_type": "HIRA", "r": adapter.rank, "hira_dropout": adapter.dropout}
