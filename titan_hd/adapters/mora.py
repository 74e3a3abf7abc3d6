"""MoRA (arXiv 2405.12130): one square matrix M [q, q] between two fixed maps, as many parameters as LoRA of rank r.

q = floor(sqrt((in + out) r) + 1/2); M is zero at the start, and there is no alpha. The input, continued circularly, is
cut in blocks of q, and

    type 1 ("sharing", for large ranks)    h = sum of the blocks; y += M h, repeated up to the size of the output
    type 6 ("rotation", for small ranks)   block j is rotated as RoPE rotates position j (base 10000; q is made even)
                                           and multiplied by M; the results, one after the other, are cut or repeated
                                           to the size of the output
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_hd.adapters.adapter_linear import AdapterLinear, AdapterMethod
from titan_hd.config.job_config import JobConfig

_ROPE_BASE = 10000.0


def square_size(in_features: int, out_features: int, rank: int, mora_type: int) -> int:
    """q, the size of M; at least 2 for type 6."""
    q = math.floor(math.sqrt((in_features + out_features) * rank) + 0.5)
    return q if mora_type == 1 else max(2, q // 2 * 2)


def _circular(x: Tensor, size: int) -> Tensor:
    """x [..., n] cut or repeated to [..., size]."""
    whole, rest = divmod(size, x.shape[-1])
    return torch.cat([x] * whole + [x[..., :rest]], -1) if size != x.shape[-1] else x


def _rotate(blocks: Tensor) -> Tensor:
    """Blocks [..., n, q], each rotated by its number."""
    count, q = blocks.shape[-2:]
    device = blocks.device
    frequency = _ROPE_BASE ** (-torch.arange(0, q, 2, dtype=torch.float32, device=device) / q)
    angle = torch.arange(count, dtype=torch.float32, device=device)[:, None] * frequency
    cos, sin = angle.cos().to(blocks.dtype), angle.sin().to(blocks.dtype)
    first, second = blocks.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class MoraLinear(AdapterLinear):
    """mora_M [q, q], zero at the start."""

    mora_M: nn.Parameter

    def __init__(self, linear: nn.Linear, rank: int, mora_type: int = 6, dropout: float = 0.0):
        q = square_size(linear.in_features, linear.out_features, rank, mora_type)
        super().__init__(linear, {"mora_M": (q, q)}, dropout)
        self.mora_type = mora_type

    def initial(self, weight: Tensor | None, generator: torch.Generator) -> dict[str, Tensor]:
        return {"mora_M": torch.zeros(self.mora_M.shape)}

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + self._delta(self.dropped(x), self.mora_M)

    def _delta(self, x: Tensor, m: Tensor) -> Tensor:
        """The change of the output [..., out] for an input x [..., in]."""
        q = m.shape[0]
        blocks = _circular(x, -(-self.in_features // q) * q).unflatten(-1, (-1, q))
        h = blocks.sum(-2) if self.mora_type == 1 else _rotate(blocks)
        y = F.linear(h, m)
        return _circular(y if self.mora_type == 1 else y.flatten(-2), self.out_features)

    def merged(self, weight: Tensor, mora_M: Tensor) -> Tensor:
        identity = torch.eye(self.in_features, dtype=mora_M.dtype, device=mora_M.device)
        return weight + self._delta(identity, mora_M).T

    def flops(self, tokens: float) -> float:
        """The product with M, of the sum of the blocks or of every block, and its gradients."""
        q = self.mora_M.shape[0]
        return 6 * q * q * (1 if self.mora_type == 1 else -(-self.in_features // q))


class Mora(AdapterMethod):
    name, title, paper = "mora", "MoRA", "arXiv 2405.12130"
    idea = "a square matrix, with as many parameters as LoRA's two, is trained beside each frozen weight"
    trains, size = "M [q, q], q = floor(sqrt((in + out) r) + 1/2)", "about r (in + out)"
    keys = resume_keys = ("adapter.rank", "adapter.dropout", "adapter.mora_type")
    layer = MoraLinear
    no_peft = "the library does not have it"

    @classmethod
    def layer_settings(cls, config: JobConfig) -> dict[str, Any]:
        a = config.adapter
        return {"rank": a.rank, "mora_type": a.mora_type, "dropout": a.dropout}
