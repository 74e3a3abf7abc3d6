"""PiSSA (arXiv 2404.02948): LoRA that starts from the principal part of W, over a frozen remainder.

W = U S V^T; A = S_r^1/2 V_r^T / sqrt(s), B = U_r S_r^1/2 / sqrt(s), and the base weight becomes W - s B A: the first
forward pass is the base model's, and the largest singular directions are what is trained. After training the weight
differs from W by a matrix of rank 2r.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from titan_hd.adapters.lora import LoRA, LoRALinear, over_remainder
from titan_hd.adapters.svd import SvdSettings
from titan_hd.adapters.svd_cache import cached_factors
from titan_hd.config.job_config import JobConfig


class PiSSALinear(LoRALinear):
    """dtype: that in which A and B are gathered; see `over_remainder`."""

    reads_weight = changes_weight = True

    def __init__(
        self,
        linear: nn.Linear,
        rank: int,
        scale: float,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
        svd: SvdSettings | None = None,
        svd_cache: str = "",
    ):
        super().__init__(linear, rank, scale, dropout)
        self.dtype, self.svd, self.svd_cache = dtype, svd or SvdSettings(), svd_cache

    def initial(self, weight: torch.Tensor | None, generator: torch.Generator) -> dict[str, torch.Tensor]:
        assert weight is not None  # reads_weight
        a, b, self.report = cached_factors(weight, self.rank, self.svd, self.name, self.svd_cache)
        root = self.scale**0.5
        return over_remainder(weight, a / root, b / root, self.scale, self.dtype)


class PiSSA(LoRA):
    name, title, paper = "pissa", "PiSSA", "arXiv 2404.02948"
    idea = "a product B A of rank r that begins as a weight's principal part is trained beside the frozen rest"
    trains, base = "A, B", "W without its principal part, frozen"
    resume_keys = ("adapter.rank", "adapter.alpha", "adapter.dropout", "adapter.rslora")
    keys = (*resume_keys, "adapter.loraplus_lr_ratio", "adapter.svd", "adapter.svd_niter", "adapter.svd_cache")
    layer = PiSSALinear

    def __init__(self, layer: type[LoRALinear] | None = None, **settings: Any):
        super().__init__(layer, **settings)
        self.directions = settings["rank"]

    @classmethod
    def layer_settings(cls, config: JobConfig) -> dict[str, Any]:
        a = config.adapter
        svd = {"svd": SvdSettings(a.svd, a.svd_niter), "svd_cache": a.svd_cache}
        return {**super().layer_settings(config), **svd}
