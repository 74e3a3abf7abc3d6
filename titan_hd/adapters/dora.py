"""DoRA (arXiv 2402.09353): LoRA on the direction of each row of W, and a trained magnitude m [out] for its length.

    y = (m / ||W + s B A||) * x (W + s B A)^T + bias,    m = ||W|| at the start, norms over rows and without gradient

What is kept is delta = m - ||W||, zero at the start, in place of m: ||W|| is needed in every forward pass anyway, the
gradients are the same, and delta loses nothing where m, gathered in bf16, would round each row by 0.4%. For the same
reason y + (m / ||W + s B A|| - 1) y is computed. Weight decay pulls delta to zero, so m to ||W||.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from titan_hd.adapters.lora import LoRA, LoRALinear, add_low_rank
from titan_hd.config.job_config import Adapter


class DoRALinear(LoRALinear):
    """Trains lora_A [r, in], lora_B [out, r] and lora_magnitude_delta [out]; PEFT's lora_magnitude_vector is
    `magnitude` of it. With dropout the low-rank term alone sees the dropped input."""

    tp_splits: ClassVar = {0: {"lora_B": 0, "lora_magnitude_delta": 0}, 1: {"lora_A": 1}}

    def __init__(self, linear: nn.Linear, rank: int, scale: float, dropout: float = 0.0):
        super().__init__(linear, rank, scale, dropout, {"lora_magnitude_delta": (linear.out_features,)})

    def initial(self, weight: torch.Tensor | None, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return {**super().initial(weight, generator), "lora_magnitude_delta": torch.zeros(self.out_features)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self.parameters_for_compute()
        a, b = self.tensor("lora_A"), self.tensor("lora_B")
        y = add_low_rank(F.linear(x, weight), F.linear(self.dropped(x), a), b, self.scale)
        base, adapted = self.sum_over_tp(squared_row_norms(weight, a, b, self.scale)).sqrt()
        excess = (base + self.tensor("lora_magnitude_delta").float() - adapted) / _divisor(adapted)
        y = y + y * excess.to(y.dtype)
        return y if bias is None else y + bias

    def merged(
        self, weight: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, lora_magnitude_delta: torch.Tensor
    ) -> torch.Tensor:
        base, adapted = squared_row_norms(weight, lora_A, lora_B, self.scale).sqrt()
        ratio = (base + lora_magnitude_delta) / _divisor(adapted)
        return super().merged(weight, lora_A=lora_A, lora_B=lora_B) * ratio[:, None]

    @staticmethod
    def magnitude(weight: torch.Tensor, lora_magnitude_delta: torch.Tensor) -> torch.Tensor:
        """m [out] in fp32, from W [out, in]."""
        return torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32) + lora_magnitude_delta

    def flops(self, tokens: float) -> float:
        """LoRA's, and per forward pass the norms: W's squares and W A^T."""
        return super().flops(tokens) + 2 * (1 + self.rank) * self.in_features * self.out_features / tokens


class DoRA(LoRA):
    name, title, paper = "dora", "DoRA", "arXiv 2402.09353"
    idea = "LoRA for the directions of a frozen weight's rows, and their lengths are trained by themselves"
    trains, size = "A, B, delta [out]", "r (in + out) + out"
    resume_keys = ("adapter.rank", "adapter.alpha", "adapter.dropout", "adapter.rslora")
    keys = (*resume_keys, "adapter.loraplus_lr_ratio")
    layer = DoRALinear

    @classmethod
    def peft_config(cls, adapter: Adapter) -> dict[str, Any]:
        return {**super().peft_config(adapter), "use_dora": True}


def _divisor(norms: torch.Tensor) -> torch.Tensor:
    """Norms of rows; 1 for those of length 0, which have no direction: of a W that has rows of zeros, as the blocks
    that LLaMA Pro adds. Their output is 0 at the start, B moves them as LoRA's would, and from then on m scales them.
    """
    return torch.where(norms > 0, norms, 1.0)


@torch.no_grad()
def squared_row_norms(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """[2, out] in fp32: squared row norms of W [out, in] and of W + s B A, without a product [out, in]:

    ||w + s b A||^2 = ||w||^2 + 2 s (w A^T) . b + s^2 (b A A^T) . b    for a row w of W and b of B.
    """
    base = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
    cross, a, b = (weight @ a.T).float(), a.float(), b.float()
    adapted = base + (2 * scale * cross + scale**2 * (b @ (a @ a.T))).mul(b).sum(1)
    return torch.stack((base, adapted.clamp(min=0)))
