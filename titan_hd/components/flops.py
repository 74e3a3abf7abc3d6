"""Floating-point operations that training really does per token; with a frozen base that is not 6N."""

from __future__ import annotations

from titan_hd.models.registry import DecoderConfig


def flops_per_token(config: DecoderConfig, length: float, trains_weights: bool, adapter_rank: int) -> float:
    """Model FLOPs per token of one training step, without recomputation.

    length: tokens that a sequence really has; causal attention sees half of them on average.
    Products with W: 2N forward, 2N for dx, 2N more for dW where weights are trained. Attention: twice as much backward
    as forward. Exact mute: four skinny products, 2 r (in + out) each pair, for grad(dA) and grad(dB).
    """
    shapes = config.linear_shapes().values()
    per_layer = sum(out * width for out, width in shapes)
    weights = config.num_hidden_layers * per_layer + config.vocab_size * config.hidden_size
    passes = 6 if trains_weights else 4
    attention = 3 * 2 * config.num_attention_heads * config.head_dim * length * config.num_hidden_layers
    adapters = 4 * adapter_rank * sum(out + width for out, width in shapes) * config.num_hidden_layers
    return passes * weights + attention + adapters
