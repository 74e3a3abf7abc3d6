"""The Llama-family decoder: plain modules in the layout and under the names of Hugging Face checkpoints.

Nothing here knows of parallelism, adapters or the configuration file. Shapes: B sequences, T positions, D hidden,
H query heads, G key/value heads, C channels per head.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from titan_hd.models.registry import DecoderConfig


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in fp32 whatever the input's dtype, as in Llama's reference code."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * h.to(x.dtype)


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
        self.register_buffer("inv_freq", rope_frequencies(config), persistent=False)

    def reset_buffers(self, device: torch.device) -> None:
        """Compute the frequencies anew: on the meta device, and after `to_empty`, they hold nothing."""
        self.inv_freq = rope_frequencies(self.config, device)

    @torch.no_grad()
    def forward(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        angles = positions[..., None].float() * self.inv_freq.float()  # [B, T, C/2]
        angles = torch.cat((angles, angles), dim=-1)[:, None]  # [B, 1, T, C]
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply the half-rotation RoPE to x [B, H, T, C]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.head_dim, self.heads, self.kv_heads = (
            config.head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
        )
        d, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(d, self.heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(d, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(d, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.head_dim, d, bias=bias)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            proj(x).view(batch, length, -1, self.head_dim).transpose(1, 2)  # [B, H or G, T, C]
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(
            rotate(q, cos, sin),
            rotate(k, cos, sin),
            v,
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=self.kv_heads != self.heads,
        )
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        d, ffn, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(d, ffn, bias=bias)
        self.up_proj = nn.Linear(d, ffn, bias=bias)
        self.down_proj = nn.Linear(ffn, d, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class DecoderStack(nn.Module):
    """The part that HF checkpoints keep under `model.`"""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)


class Decoder(nn.Module):
    """Causal language model. Tied models have no lm_head: they read the embedding, as their checkpoints store it."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.model = DecoderStack(config)
        self.lm_head = (
            None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )

    def reset_buffers(self, device: torch.device) -> None:
        """Recompute what is not loaded from a checkpoint; call it after the parameters are materialised."""
        self.model.rotary_emb.reset_buffers(device)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Logits [B, T, vocabulary] for token ids [B, T]; causal attention, positions 0..T-1 unless given [B, T]."""
        stack, length = self.model, input_ids.shape[1]
        if positions is None:
            positions = torch.arange(length, device=input_ids.device)[None]
        h = stack.embed_tokens(input_ids)
        cos, sin = stack.rotary_emb(positions, h.dtype)
        mask = self._sliding_mask(length, input_ids.device)
        for layer in stack.layers:
            h = layer(h, cos, sin, mask)
        h = stack.norm(h)
        return F.linear(h, stack.embed_tokens.weight) if self.lm_head is None else self.lm_head(h)

    def _sliding_mask(self, length: int, device: torch.device) -> torch.Tensor | None:
        """Boolean mask [T, T] where the window is shorter than the sequence; None where plain causal is the same."""
        window = self.config.sliding_window
        if window is None or length <= window:
            return None
        distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None]
        return (distance >= 0) & (distance < window)
