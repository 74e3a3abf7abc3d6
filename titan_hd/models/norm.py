"""The root-mean-square norm, computed in fp32, of which nothing in fp32 but a number a row is kept."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class _Normalize(torch.autograd.Function):
    """apply(x [..., D], weight [D], eps) -> weight * x / sqrt(mean(x^2) + eps), in the dtype of x.

    With r the inverse root: dx = r (g - x r^2 mean(g x)), g = gy * weight; dweight = sum of gy x r. Autograd would keep
    the squares and make a tensor like x in fp32 for each of a dozen operations.
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = x.to(_wide(x.dtype))
        inverse = torch.linalg.vecdot(wide, wide)[..., None].div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).to(x.dtype) * weight

    @staticmethod
    def backward(ctx, *gys):
        (gy,), (x, weight, inverse) = gys, ctx.saved_tensors
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            wide = _wide(x.dtype)
            g = (gy * weight).to(wide)
            along = torch.linalg.vecdot(g, x.to(wide))[..., None] * (inverse.pow(3) / x.shape[-1])
            dx = g.mul_(inverse).addcmul_(x, along, value=-1).to(x.dtype)
        if ctx.needs_input_grad[1]:
            dweight = (gy * (x * inverse).to(x.dtype)).reshape(-1, x.shape[-1]).sum(0)
        return dx, dweight, None


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in fp32 whatever the input's dtype, as in Llama's reference code."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.normalize(x, self.weight)

    def normalize(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if x.is_cuda:  # one kernel each way
            return F.rms_norm(x, weight.shape, weight, self.eps)
        return _Normalize.apply(x, weight, self.eps)
