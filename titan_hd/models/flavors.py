"""Published model sizes, in the keys of their own config.json. For models with random weights (`model.flavor`)."""

from __future__ import annotations

from typing import Any

_LLAMA31_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
_LLAMA32_ROPE = {**_LLAMA31_ROPE, "factor": 32.0}


def _family(architecture: str, **shared: Any):
    """A function that makes a config.json from what all sizes of a family share and what one of them has."""
    model_type = architecture.removesuffix("ForCausalLM").lower()
    head = {"architectures": [architecture], "model_type": model_type, "hidden_act": "silu"}

    def make(
        hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, tied: bool = False, **more: Any
    ) -> dict[str, Any]:
        sizes = {
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "tie_word_embeddings": tied,
        }
        return {**head, **shared, **sizes, **more}

    return make


_llama = {"rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2}
_llama2 = _family("LlamaForCausalLM", **_llama, vocab_size=32000, max_position_embeddings=4096, rope_theta=10000.0)
_debug = _family("LlamaForCausalLM", **_llama, vocab_size=256, max_position_embeddings=512, rope_theta=10000.0)
_llama3 = _family(
    "LlamaForCausalLM",
    vocab_size=128256,
    max_position_embeddings=131072,
    rope_theta=500000.0,
    rope_scaling=_LLAMA31_ROPE,
    rms_norm_eps=1e-5,
    bos_token_id=128000,
    eos_token_id=128001,
)
_smollm2 = _family(
    "LlamaForCausalLM",
    vocab_size=49152,
    max_position_embeddings=8192,
    rope_theta=100000.0,
    rms_norm_eps=1e-5,
    bos_token_id=0,
    eos_token_id=0,
)
_mistral = _family(
    "MistralForCausalLM",
    vocab_size=32000,
    max_position_embeddings=32768,
    sliding_window=4096,
    rope_theta=10000.0,
    rms_norm_eps=1e-5,
    bos_token_id=1,
    eos_token_id=2,
)
_qwen2 = _family(
    "Qwen2ForCausalLM",
    vocab_size=151936,
    max_position_embeddings=32768,
    rope_theta=1000000.0,
    rms_norm_eps=1e-6,
    use_sliding_window=False,
    bos_token_id=151643,
    eos_token_id=151643,
)
_qwen3 = _family(
    "Qwen3ForCausalLM",
    vocab_size=151936,
    max_position_embeddings=32768,
    rope_theta=1000000.0,
    rms_norm_eps=1e-6,
    head_dim=128,
    use_sliding_window=False,
    attention_bias=False,
    bos_token_id=151643,
    eos_token_id=151643,
)


def _roberta(hidden: int, intermediate: int, layers: int, heads: int) -> dict[str, Any]:
    """With a new classification head."""
    return {
        "architectures": ["RobertaForSequenceClassification"],
        "model_type": "roberta",
        "vocab_size": 50265,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
        "hidden_act": "gelu",
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
    }


def _rwkv6(hidden: int, layers: int, **more: Any) -> dict[str, Any]:
    return {
        "architectures": ["Rwkv6ForCausalLM"],
        "model_type": "rwkv6",
        "vocab_size": 65536,
        "hidden_size": hidden,
        "attention_hidden_size": hidden,
        "num_hidden_layers": layers,
        "head_size": 64,
        "head_size_divisor": 8,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        **more,
    }


# family -> flavor -> config.json
FLAVORS: dict[str, dict[str, dict[str, Any]]] = {
    "llama2": {
        "7B": _llama2(4096, 11008, 32, 32, 32),
        "13B": _llama2(5120, 13824, 40, 40, 40),
        "70B": _llama2(8192, 28672, 80, 64, 8),
    },
    "llama3": {
        "debugmodel": _debug(64, 160, 2, 4, 2),
        "1B": _llama3(2048, 8192, 16, 32, 8, tied=True, head_dim=64, rope_scaling=_LLAMA32_ROPE),
        "3B": _llama3(3072, 8192, 28, 24, 8, tied=True, head_dim=128, rope_scaling=_LLAMA32_ROPE),
        "8B": _llama3(4096, 14336, 32, 32, 8),
        "70B": _llama3(8192, 28672, 80, 64, 8),
    },
    "mistral": {"7B": _mistral(4096, 14336, 32, 32, 8)},
    "qwen2": {
        "0.5B": _qwen2(896, 4864, 24, 14, 2, tied=True),
        "1.5B": _qwen2(1536, 8960, 28, 12, 2, tied=True),
        "7B": _qwen2(3584, 18944, 28, 28, 4, vocab_size=152064),
    },
    "qwen3": {
        "0.6B": _qwen3(1024, 3072, 28, 16, 8, tied=True),
        "4B": _qwen3(2560, 9728, 36, 32, 8, tied=True),
        "8B": _qwen3(4096, 12288, 36, 32, 8),
    },
    "roberta": {"base": _roberta(768, 3072, 12, 12), "large": _roberta(1024, 4096, 24, 16)},
    "rwkv6": {"1.6B": _rwkv6(2048, 24), "3B": _rwkv6(2560, 32), "7B": _rwkv6(4096, 32)},
    "smollm2": {
        "135M": _smollm2(576, 1536, 30, 9, 3, tied=True),
        "360M": _smollm2(960, 2560, 32, 15, 5, tied=True),
        "1.7B": _smollm2(2048, 8192, 24, 32, 32, tied=True, rope_theta=130000.0),
    },
}
