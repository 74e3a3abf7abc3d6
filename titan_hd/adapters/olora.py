"""OLoRA (arXiv 2406.01775): LoRA that starts from the QR decomposition of W, over a frozen remainder.

W = Q R; B = Q[:, :r], A = R[:r], and the base weight becomes W - s B A.
"""

from __future__ import annotations

import torch
from torch import nn

from titan_hd.adapters.lora import LoRALinear, over_remainder


class OLoRALinear(LoRALinear):
    """dtype: as in `PiSSALinear`."""

    reads_weight = changes_weight = True

    def __init__(
        self, linear: nn.Linear, rank: int, scale: float, dropout: float = 0.0, dtype: torch.dtype = torch.float32
    ):
        super().__init__(linear, rank, scale, dropout)
        self.dtype = dtype

    def initial(self, weight: torch.Tensor | None, generator: torch.Generator) -> dict[str, torch.Tensor]:
        # The leading columns of Q depend on those of W alone, and R = Q^T W: no whole decomposition is needed.
        q = torch.linalg.qr(weight[:, : self.rank].double())[0].float()
        return over_remainder(weight, q.T @ weight, q, self.scale, self.dtype)
