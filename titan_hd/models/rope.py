"""Rotary position embeddings: Llama's half rotation, with linear and Llama-3 scaling of the frequencies."""

from __future__ import annotations

import math

import torch
from torch import nn

from titan_hd.models.decoder_config import DecoderConfig


def rope_frequencies(config: DecoderConfig, device: torch.device | None = None) -> torch.Tensor:
    """Inverse frequencies [C/2] in fp32, with linear or Llama-3 scaling applied."""
    dim = config.head_dim
    exponent = torch.arange(0, dim, 2, dtype=torch.int64, device=device).float() / dim
    inv_freq = 1.0 / config.rope_theta**exponent
    scaling = config.rope_scaling
    if scaling is None:
        return inv_freq
    if scaling["rope_type"] == "linear":
        return inv_freq / scaling["factor"]
    # Llama 3.1: long wavelengths are divided by `factor`, short ones kept, those between are interpolated.
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    old_context = scaling["original_max_position_embeddings"]
    wavelength = 2 * math.pi / inv_freq
    smooth = (old_context / wavelength - low) / (high - low)
    smooth = smooth.clamp(0.0, 1.0)
    return (1 - smooth) * inv_freq / factor + smooth * inv_freq


class RotaryEmbedding(nn.Module):
    """cos and sin of the half-rotation RoPE for given positions, computed in fp32."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.register_buffer("inv_freq", torch.empty(config.head_dim // 2), persistent=False)
        if not self.inv_freq.is_meta:  # where computing would import torch's compiler
            self.reset_buffers(self.inv_freq.device)

    def reset_buffers(self, device: torch.device) -> None:
        """Compute the frequencies anew: on the meta device, and after `to_empty`, they hold nothing."""
        self.inv_freq = rope_frequencies(self.config, device)

    @torch.no_grad()
    def forward(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        angles = positions[..., None].float() * self.inv_freq.float()  # [B, T, C/2]
        angles = torch.cat((angles, angles), dim=-1)[:, None]  # [B, 1, T, C]
        return angles.cos().to(dtype), angles.sin().to(dtype)


class _Rotate(torch.autograd.Function):
    """apply(x, cos, sin); the gradient turns back by the same angles. cos and sin are alike in both halves."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1)

    @staticmethod
    def backward(ctx, *gys):
        cos, sin = ctx.saved_tensors
        return _turned(gys[0], cos, sin, -1), None, None


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sense: int) -> torch.Tensor:
    """(x1 cos - x2 sin, x2 cos + x1 sin) of the halves x1, x2 of the channels; sense -1: with -sin."""
    y = x * cos
    (first, second), (sin1, sin2) = x.chunk(2, -1), sin.chunk(2, -1)
    y1, y2 = y.chunk(2, -1)
    y1.addcmul_(second, sin1, value=-sense)
    y2.addcmul_(first, sin2, value=sense)
    return y


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply the half-rotation RoPE to x [B, H, T, C]."""
    return _Rotate.apply(x, cos, sin)
