"""Architectures and sizes as data: what `config.json` may say, and the published sizes for random weights."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from titan_hd.config.errors import UserError

_LLAMA31_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
_MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu"}
_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}

# family -> flavor -> the keys of the published config.json
FLAVORS: dict[str, dict[str, dict[str, Any]]] = {
    "llama2": {
        "7B": {
            **_LLAMA,
            **_8B,
            "vocab_size": 32000,
            "intermediate_size": 11008,
            "num_key_value_heads": 32,
            "max_position_embeddings": 4096,
            "rope_theta": 10000.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    },
    "llama3": {
        "debugmodel": {
            **_LLAMA,
            "vocab_size": 256,
            "hidden_size": 64,
            "intermediate_size": 160,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 512,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        "8B": {
            **_LLAMA,
            **_8B,
            "vocab_size": 128256,
            "max_position_embeddings": 131072,
            "rope_theta": 500000.0,
            "rope_scaling": _LLAMA31_ROPE,
            "bos_token_id": 128000,
            "eos_token_id": 128001,
        },
    },
    "mistral": {
        "7B": {
            **_MISTRAL,
            **_8B,
            "vocab_size": 32000,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
            "rope_theta": 10000.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    },
}

_ROPE_KEYS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_ARCHITECTURES = {"LlamaForCausalLM": ("llama2", "llama3"), "MistralForCausalLM": ("mistral",)}


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a Llama-family decoder, in HF's names. `hf` keeps the whole config.json for the export."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    sliding_window: int | None
    hf: dict[str, Any] = field(repr=False, compare=False)

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Last part of the HF name -> (out, in) of each linear layer of a block."""
        d, heads, kv = self.hidden_size, self.num_attention_heads * self.head_dim, self.num_key_value_heads
        kv, ffn = kv * self.head_dim, self.intermediate_size
        return {
            "q_proj": (heads, d),
            "k_proj": (kv, d),
            "v_proj": (kv, d),
            "o_proj": (d, heads),
            "gate_proj": (ffn, d),
            "up_proj": (ffn, d),
            "down_proj": (d, ffn),
        }


def flavor_config(name: str, flavor: str) -> DecoderConfig:
    """Published sizes of a family's flavor. ValueError if either is unknown."""
    if name not in FLAVORS:
        raise UserError(f"model.name: must be one of {', '.join(FLAVORS)}, not {name!r}")
    if flavor not in FLAVORS[name]:
        raise UserError(f"model.flavor: must be one of {', '.join(FLAVORS[name])} for {name}, not {flavor!r}")
    return parse_hf_config(FLAVORS[name][flavor], f"{name} {flavor}")


def read_hf_config(directory: str | Path, name: str = "") -> DecoderConfig:
    """Read `config.json` of a HF directory; `name`, if given, must be the family that it belongs to.

    Raises:
        ValueError: missing or unreadable file, or an architecture or feature that is not supported, by name.
    """
    path = Path(directory) / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"model.hf_assets_path: cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: must be a JSON object")
    config = parse_hf_config(raw, str(path))
    families = _ARCHITECTURES[raw["architectures"][0]]
    if name and name not in families:
        raise UserError(f"model.name: {path} is of the family {' or '.join(families)}, not {name!r}")
    return config


def parse_hf_config(raw: dict[str, Any], where: str) -> DecoderConfig:
    """Turn the keys of a config.json into a DecoderConfig; refuse by name what the decoder would compute wrongly."""
    architectures = raw.get("architectures") or []
    if len(architectures) != 1 or architectures[0] not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise UserError(f"{where}: architectures: {architectures} is not supported; supported are {known}")
    if raw.get("hidden_act", "silu") != "silu":
        raise UserError(f"{where}: hidden_act: {raw['hidden_act']!r} is not supported; only silu")
    if raw.get("quantization_config"):
        raise UserError(f"{where}: quantization_config: quantized weights are not supported")
    rope = _rope_parameters(raw, where)
    try:
        heads, hidden = int(raw["num_attention_heads"]), int(raw["hidden_size"])
        config = DecoderConfig(
            vocab_size=int(raw["vocab_size"]),
            hidden_size=hidden,
            intermediate_size=int(raw["intermediate_size"]),
            num_hidden_layers=int(raw["num_hidden_layers"]),
            num_attention_heads=heads,
            num_key_value_heads=int(raw.get("num_key_value_heads") or heads),
            head_dim=int(raw.get("head_dim") or hidden // heads),
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            rope_theta=float(rope.pop("rope_theta", 10000.0)),
            rope_scaling=rope if rope.get("rope_type", "default") != "default" else None,
            max_position_embeddings=int(raw.get("max_position_embeddings", 2048)),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            attention_bias=bool(raw.get("attention_bias", False)),
            mlp_bias=bool(raw.get("mlp_bias", False)),
            sliding_window=raw.get("sliding_window") if raw.get("model_type") == "mistral" else None,
            hf=dict(raw),
        )
    except KeyError as error:
        raise UserError(f"{where}: {error.args[0]}: is missing") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: a size is no number: {error}") from None
    if config.num_attention_heads % config.num_key_value_heads:
        raise UserError(f"{where}: num_key_value_heads: must divide num_attention_heads ({heads})")
    return config


def _rope_parameters(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """RoPE settings from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type") or "default"
    rope.setdefault("rope_theta", raw.get("rope_theta") or 10000.0)
    if rope["rope_type"] not in ("default", "linear", "llama3"):
        raise UserError(
            f"{where}: rope_scaling: type {rope['rope_type']!r} is not supported; supported are default, linear, llama3"
        )
    missing = [key for key in _ROPE_KEYS.get(rope["rope_type"], ()) if not isinstance(rope.get(key), (int, float))]
    if missing:
        raise UserError(f"{where}: rope_scaling: {missing[0]}: is missing or no number")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{where}: partial_rotary_factor: is not supported")
    return rope
