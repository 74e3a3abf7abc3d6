"""Floating-point operations that training does per token; with a frozen base that is not 6N."""

from __future__ import annotations

from titan_hd.adapters.frozen_linear import FrozenLinear
from titan_hd.models.decoder import Decoder
from titan_hd.models.registry import DecoderConfig


def flops_per_token(config: DecoderConfig, length: float, trained_weights: int, adapters: float) -> float:
    """Model FLOPs per token of one training step, without recomputation.

    length: tokens that a sequence really has. The whole attention matrix is counted, as by PaLM and torchtitan, so that
    figures compare; causal kernels compute half of it.
    trained_weights: elements of the matrices for which dW is computed (0 with a frozen base).
    adapters: what the adapters do per token.

    Products with W: 2 per element forward, 2 for dx, 2 more for dW where it is computed. Attention: twice as much
    backward as forward.
    """
    per_layer = sum(out * width for out, width in config.linear_shapes().values())
    weights = config.num_hidden_layers * per_layer + config.vocab_size * config.hidden_size
    attention = 12 * config.num_attention_heads * config.head_dim * length * config.num_hidden_layers
    return 4 * weights + 2 * trained_weights + attention + adapters


def trained_work(model: Decoder, tokens: float) -> tuple[int, float]:
    """`trained_weights` and `adapters` of `flops_per_token` for a model that a method was applied to.

    tokens: of one worker's micro-batch.
    """
    looked_up = None if model.lm_head is None else model.model.embed_tokens.weight
    layers = [layer for layer in model.modules() if isinstance(layer, FrozenLinear)]
    beside = {looked_up, *(p for layer in layers for p in layer.parameters())}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad and p.dim() == 2 and p not in beside)
    return trained, sum(layer.flops(tokens) for layer in layers)
