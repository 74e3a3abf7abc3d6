"""Bone (DiSHA, arXiv 2409.15371; the default of PEFT's "MiSS"): one block for all column blocks of a weight.

The input is cut in blocks of b = adapter.rank (the last one filled up with zeros) and y = x W^T + (sum of blocks) D.
So every column block of W moves by the same D^T. There is no alpha.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_hd.adapters.adapter_linear import AdapterLinear, AdapterMethod
from titan_hd.config.job_config import Adapter, JobConfig


class BoneLinear(AdapterLinear):
    """miss_block [b, out], PEFT's name of D; zero at the start."""

    miss_block: nn.Parameter

    def __init__(self, linear: nn.Linear, block: int, dropout: float = 0.0):
        super().__init__(linear, {"miss_block": (block, linear.out_features)}, dropout)

    @classmethod
    def shape_error(cls, shape: tuple[int, int], block: int, **settings: Any) -> str | None:
        if block > shape[1]:
            return f"adapter.rank: method bone cuts the input in blocks of adapter.rank = {block}, more than it has"
        return None

    def initial(self, weight: Tensor | None, generator: torch.Generator) -> dict[str, Tensor]:
        return {"miss_block": torch.zeros(self.miss_block.shape)}

    def forward(self, x: Tensor) -> Tensor:
        block = self.miss_block.shape[0]
        padded = F.pad(self.dropped(x), (0, -self.in_features % block))
        summed = padded.unflatten(-1, (-1, block)).sum(-2)
        return F.linear(x, self.weight, self.bias) + summed @ self.miss_block

    def merged(self, weight: Tensor, miss_block: Tensor) -> Tensor:
        copies = -(-self.in_features // miss_block.shape[0])
        return weight + miss_block.T.repeat(1, copies)[:, : self.in_features]

    def flops(self, tokens: float) -> float:
        """The product with D, and its gradients."""
        return 6 * self.miss_block.numel()


class Bone(AdapterMethod):
    name, title, paper, aliases = "bone", "Bone", "arXiv 2409.15371", ("miss",)
    idea = "one block that all column blocks of a frozen weight share is trained beside it"
    trains, size = "D [b, out], b = `adapter.rank`", "b out"
    keys = resume_keys = ("adapter.rank", "adapter.dropout")
    layer = BoneLinear

    @classmethod
    def layer_settings(cls, config: JobConfig) -> dict[str, Any]:
        return {"block": config.adapter.rank, "dropout": config.adapter.dropout}

    @classmethod
    def peft_config(cls, adapter: Adapter) -> dict[str, Any]:
        return peft_miss(adapter, True)


def peft_miss(adapter: Adapter, variant: bool | str) -> dict[str, Any]:
    """peft's configuration of MiSS, of which Bone and Bat are variants."""
    dropout = {"miss_dropout": adapter.dropout, "bias": "none", "init_weights": variant}
    return {"peft_type": "MISS", "r": adapter.rank, **dropout}
