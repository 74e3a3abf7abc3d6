"""Floating-point operations that training does per token; with a frozen base that is not 6N."""

from __future__ import annotations

from titan_hd.models.registry import DecoderConfig


def flops_per_token(config: DecoderConfig, length: float, trained_weights: int, adapter_width: int) -> float:
    """Model FLOPs per token of one training step, without recomputation.

    length: tokens that a sequence really has. The whole attention matrix is counted, as by PaLM and torchtitan, so that
    figures compare; causal kernels compute half of it.
    trained_weights: elements of the matrices for which dW is computed (0 with a frozen base).
    adapter_width: sum over the adapted layers of r (in + out).

    Products with W: 2 per element forward, 2 for dx, 2 more for dW where it is computed. Attention: twice as much
    backward as forward. Exact mute: four skinny products, 4 r (in + out), for grad(dA) and grad(dB).
    """
    per_layer = sum(out * width for out, width in config.linear_shapes().values())
    weights = config.num_hidden_layers * per_layer + config.vocab_size * config.hidden_size
    attention = 12 * config.num_attention_heads * config.head_dim * length * config.num_hidden_layers
    return 4 * weights + 2 * trained_weights + attention + 4 * adapter_width
