"""Configurations of every family and feature of the decoder, and decoders with random weights."""

from __future__ import annotations

import torch

from titan_hd.models.decoder import Decoder
from titan_hd.models.decoder_config import DecoderConfig
from titan_hd.models.registry import parse_hf_config

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SIZES}
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None, **SIZES}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **SIZES, "num_key_value_heads": 2}
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "head_dim": 12,
    **SIZES,
    "num_key_value_heads": 2,
}
WINDOWED = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
# Wavelengths of head_dim 8 are 6.3, 63, 628 and 6283 positions: kept, interpolated, divided, divided.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 100,
}

# name -> (config.json, the same without the feature)
VARIANTS: dict[str, tuple[dict, dict | None]] = {
    "plain": (LLAMA, None),
    "grouped-query": ({**LLAMA, "num_key_value_heads": 2}, None),
    "one-kv-head": ({**LLAMA, "num_key_value_heads": 1}, None),
    "tied": ({**LLAMA, "tie_word_embeddings": True}, None),
    "head-dim": ({**LLAMA, "head_dim": 12, "num_key_value_heads": 2}, None),
    "biases": ({**LLAMA, "attention_bias": True, "mlp_bias": True}, None),
    "theta": ({**LLAMA, "rope_theta": 100.0}, LLAMA),
    "eps": ({**LLAMA, "rms_norm_eps": 0.5}, LLAMA),
    "llama3-rope": ({**LLAMA, "rope_scaling": LLAMA3_ROPE}, LLAMA),
    "linear-rope": ({**LLAMA, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}, LLAMA),
    "mistral": ({**MISTRAL, "num_key_value_heads": 2}, None),
    "mistral-window": ({**MISTRAL, "sliding_window": 5}, MISTRAL),
    "mistral-window-of-the-length": ({**MISTRAL, "sliding_window": 24}, None),
    "mistral-window-one-less": ({**MISTRAL, "sliding_window": 23}, MISTRAL),
    "mistral-rope": ({**MISTRAL, "rope_theta": 1e6, "head_dim": 12}, None),
    "qwen2": (QWEN2, None),
    "qwen2-tied": ({**QWEN2, "tie_word_embeddings": True}, None),
    "qwen2-window": ({**QWEN2, **WINDOWED}, QWEN2),
    "qwen3": (QWEN3, None),
    "qwen3-tied-biases": ({**QWEN3, "tie_word_embeddings": True, "attention_bias": True}, None),
    "qwen3-layer-types": ({**QWEN3, **WINDOWED, "layer_types": ["sliding_attention", "full_attention"]}, QWEN3),
    "qwen3-llama3-rope": ({**QWEN3, "rope_scaling": LLAMA3_ROPE}, QWEN3),
}
LENGTH = 24


def config_of(raw: dict) -> DecoderConfig:
    return parse_hf_config(raw, "config.json")


def random_decoder(raw: dict, seed: int = 0) -> Decoder:
    """Weights large enough that attention is far from uniform, norms and biases away from 1 and 0."""
    model = Decoder(config_of(raw))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, 0.2, generator=generator)
    return model.eval()
