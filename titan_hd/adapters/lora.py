"""LoRA (arXiv 2106.09685): y = x W^T + s (x A^T) B^T with A [r, in], B [out, r] trained and W frozen.

s = alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv 2312.03732). LoRA+ (arXiv 2402.12354) gives B a learning rate of its
own. A is drawn from kaiming_uniform(a = sqrt 5), B is zero, so that the first forward pass is the base model's.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from titan_hd.adapters.adapter_linear import AdapterLinear


def lora_scale(rank: int, alpha: float | None, rslora: bool) -> float:
    """alpha / r, or alpha / sqrt(r) for rsLoRA; alpha is r unless given."""
    return (rank if alpha is None else alpha) / (math.sqrt(rank) if rslora else rank)


class LoRALinear(AdapterLinear):
    """The tensors have PEFT's names and orientation."""

    tp_splits: ClassVar = {0: {"lora_B": 0}, 1: {"lora_A": 1}}

    def __init__(
        self,
        linear: nn.Linear,
        rank: int,
        scale: float,
        dropout: float = 0.0,
        more: dict[str, tuple[int, ...]] | None = None,
    ):
        """more: name -> shape of what a method trains beside A and B."""
        shapes = {"lora_A": (rank, linear.in_features), "lora_B": (linear.out_features, rank)}
        super().__init__(linear, {**shapes, **(more or {})}, dropout)
        self.rank, self.scale = rank, scale

    @classmethod
    def shape_error(cls, shape: tuple[int, int], rank: int, **settings: Any) -> str | None:
        if rank > min(shape):
            return f"adapter.rank: {rank} is more than the smaller side of a weight, {min(shape)}"
        return None

    def initial(self, weight: torch.Tensor | None, generator: torch.Generator) -> dict[str, torch.Tensor]:
        bound = 1.0 / math.sqrt(self.in_features)  # what kaiming_uniform with a = sqrt 5 comes to
        a = torch.empty(self.rank, self.in_features).uniform_(-bound, bound, generator=generator)
        return {"lora_A": a, "lora_B": torch.zeros(self.out_features, self.rank)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.parameters_for_compute()
        low_rank = F.linear(self.dropped(x), self.tensor("lora_A"))
        return add_low_rank(F.linear(x, weight, bias), low_rank, self.tensor("lora_B"), self.scale)

    def merged(self, weight: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor) -> torch.Tensor:
        return torch.addmm(weight, lora_B, lora_A, alpha=self.scale)

    def flops(self, tokens: float) -> float:
        """Two skinny products forward, four backward (for x, A, B and the low-rank activation)."""
        return 6 * self.rank * (self.in_features + self.out_features)


def over_remainder(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """First values, as `initial` returns them, of adapters that start as a part of W: A and B rounded to dtype, and
    the base weight without them, W - s B A."""
    a, b = a.to(dtype).float(), b.to(dtype).float()
    return {"lora_A": a, "lora_B": b, "weight": torch.addmm(weight, b, a, alpha=-scale)}


def add_low_rank(y: torch.Tensor, low_rank: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """y [..., out] + scale * low_rank [..., r] b^T without a product [..., out] of its own."""
    return torch.addmm(y.flatten(0, -2), low_rank.flatten(0, -2), b.T, alpha=scale).view_as(y)
