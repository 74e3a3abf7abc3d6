"""GGUF files (llama.cpp's format) of Llama-type models to the configuration and weights of a Hugging Face directory.

Tensors are dequantised one at a time. llama.cpp interleaves the two halves of every head's rows in q and k of the
architecture `llama`, for its own form of RoPE; they are put back into the half-rotation order of Hugging Face.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from titan_hd.config.errors import UserError
from titan_hd.models.hf_weights import plan_files, sync_files, write_headers, write_rows

_ARCHITECTURES = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "use_sliding_window": False},
}
_MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
# What Llama 3.1 and later were published with; the factor differs (8, or 32 for the small ones).
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_ROPE_FACTORS = "rope_freqs.weight"
# The factors are stored in fp32, and computed by the converter in fp32 too.
_ROPE_TOLERANCE = 1e-4


class GGUFModel:
    """One GGUF file: metadata, and tensors by name.

    Raises:
        UserError: with one line if the file is no GGUF, incomplete, or of a model that is not supported.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            reader = gguf.GGUFReader(path)
            self._fields, self.tensors = reader.fields, {t.name: t for t in reader.tensors}
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
        except (ValueError, IndexError, KeyError, OverflowError) as error:  # numpy, of bytes that are not there
            raise UserError(f"{path}: is no GGUF file, or an incomplete one: {error}") from None
        self.architecture = self.get("general.architecture")
        if self.architecture not in _ARCHITECTURES:
            known = ", ".join(_ARCHITECTURES)
            raise UserError(f"{path}: architecture {self.architecture!r} is not supported; supported are {known}")
        if (self.get("split.count") or 1) > 1:
            raise UserError(f"{path}: is one part of a split model; join them with llama.cpp's gguf-split first")
        self.config = self._config()
        self._layout = _layout(self.config)
        self._check_tensors()

    def get(self, key: str, default: Any = None) -> Any:
        """A metadata value as a Python object."""
        return self._fields[key].contents() if key in self._fields else default

    def _setting(self, key: str, default: Any = None) -> Any:
        """A number under the architecture's own prefix; refused where it is missing or differs from layer to layer."""
        name = f"{self.architecture}.{key}"
        value = self.get(name, default)
        if value is None or isinstance(value, (list, str)):
            raise UserError(f"{self.path}: {name}: is missing or not one number for all layers")
        return value

    def _config(self) -> dict[str, Any]:
        """The keys of config.json."""
        heads, hidden = self._setting("attention.head_count"), self._setting("embedding_length")
        head_dim = self._setting("attention.key_length", hidden // heads)
        must_be = {"attention.value_length": head_dim, "rope.dimension_count": head_dim, "expert_count": 0}
        for key, value in must_be.items():
            if self._setting(key, value) != value:
                raise UserError(f"{self.path}: {self.architecture}.{key}: only {value} is supported for this model")
        if "token_embd.weight" not in self.tensors:
            raise UserError(f"{self.path}: token_embd.weight: is missing")
        window = self._setting("attention.sliding_window", 0) if self.architecture == "llama" else 0
        config = {
            **(_MISTRAL if window else _ARCHITECTURES[self.architecture]),
            "hidden_act": "silu",
            "vocab_size": int(self.tensors["token_embd.weight"].shape[1]),
            "hidden_size": hidden,
            "intermediate_size": self._setting("feed_forward_length"),
            "num_hidden_layers": self._setting("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._setting("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "rms_norm_eps": _decimal(self._setting("attention.layer_norm_rms_epsilon")),
            "max_position_embeddings": self._setting("context_length"),
            "rope_theta": _decimal(self._setting("rope.freq_base", 10000.0)),
            "tie_word_embeddings": "output.weight" not in self.tensors,
        }
        if window:
            config["sliding_window"] = window
        if config["model_type"] == "llama":
            config["attention_bias"] = "blk.0.attn_q.bias" in self.tensors
            config["mlp_bias"] = "blk.0.ffn_up.bias" in self.tensors
        if scaling := self._rope_scaling(config):
            config["rope_scaling"] = scaling
        for token in ("bos", "eos", "pad"):
            config[f"{token}_token_id"] = self.get(f"tokenizer.ggml.{'padding' if token == 'pad' else token}_token_id")
        return {key: value for key, value in config.items() if value is not None}

    def _rope_scaling(self, config: dict[str, Any]) -> dict[str, Any] | None:
        if _ROPE_FACTORS in self.tensors:
            return self._llama3_scaling(config)
        name = f"{self.architecture}.rope.scaling.type"
        kind = self.get(name, "none")
        # Files from before rope.scaling had the factor alone.
        factor = self._setting("rope.scaling.factor", self._setting("rope.scale_linear", 0.0))
        if kind == "none" and factor in (0.0, 1.0):
            return None
        if kind not in ("none", "linear") or factor <= 0.0:
            raise UserError(f"{self.path}: {name}: {kind!r} is not supported; supported are none, linear, Llama 3's")
        return {"rope_type": "linear", "factor": _decimal(factor)}

    def _llama3_scaling(self, config: dict[str, Any]) -> dict[str, Any]:
        """The parameters of Llama 3's scaling from what llama.cpp keeps of it: a divisor for every frequency."""
        stored = self.read(_ROPE_FACTORS)
        scaling = {"rope_type": "llama3", "factor": float(stored.max()), **_LLAMA3_ROPE}
        expected = llama3_rope_factors(config["rope_theta"], config["head_dim"], scaling)
        if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=_ROPE_TOLERANCE):
            raise UserError(f"{self.path}: {_ROPE_FACTORS}: is not the RoPE scaling of Llama 3.1 and later")
        return scaling

    def read(self, name: str) -> np.ndarray:
        """A tensor of the file in fp32, [out, in] as in torch, with rows as llama.cpp orders them."""
        tensor = self.tensors[name]
        try:
            return np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        except NotImplementedError:
            kind = tensor.tensor_type.name
            raise UserError(f"{self.path}: {name}: the gguf package cannot dequantise {kind}") from None

    def _check_tensors(self) -> None:
        errors = [f"{self.path}: {name}: is missing" for name in self._layout if name not in self.tensors]
        known = {*self._layout, _ROPE_FACTORS}
        errors += [f"{self.path}: {name}: is not supported" for name in self.tensors if name not in known]
        for name in self._layout.keys() & self.tensors.keys():
            shape, expected = tuple(int(n) for n in reversed(self.tensors[name].shape)), self._layout[name][1]
            if shape != expected:
                errors.append(f"{self.path}: {name}: has shape {list(shape)}, must be {list(expected)}")
        if errors:
            others = f" (and {len(errors) - 1} more such lines)" if len(errors) > 1 else ""
            raise UserError(errors[0] + others)

    def write(self, folder: Path, dtype: torch.dtype, progress: Callable[[Iterable], Iterable] = iter) -> None:
        """Write config.json and safetensors in `dtype` into a folder; progress wraps the iteration over the tensors."""
        name = str(dtype).removeprefix("torch.")
        config = {**self.config, "torch_dtype": name, "dtype": name}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        shapes = {hf_name: torch.Size(shape) for hf_name, shape in self._layout.values()}
        slots, headers = plan_files(folder, shapes, dtype)
        write_headers(slots, headers)
        for name in progress(self._layout):
            values = self.read(name)
            if self.architecture == "llama" and name.split(".")[-2] in ("attn_q", "attn_k"):
                values = unpermute(values, values.shape[0] // self.config["head_dim"])
            write_rows(slots[self._layout[name][0]], 0, torch.from_numpy(values))
        sync_files(headers)


def unpermute(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads * C, ...] from llama.cpp's order (rows that are rotated together side by side) to halves of C / 2."""
    pairs = values.reshape(heads, -1, 2, *values.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)


def llama3_rope_factors(theta: float, head_dim: int, scaling: dict[str, Any]) -> np.ndarray:
    """What Llama 3's scaling divides each inverse frequency by, [C/2]."""
    inv_freq = theta ** -(np.arange(0, head_dim, 2) / head_dim)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * inv_freq / (2 * math.pi)  # within the old context
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1 / ((1 - smooth) / scaling["factor"] + smooth)


def _layout(config: dict[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name in the GGUF -> Hugging Face's name and the shape in torch's order."""
    d, ffn, c, vocab = config["hidden_size"], config["intermediate_size"], config["head_dim"], config["vocab_size"]
    q, kv = config["num_attention_heads"] * c, config["num_key_value_heads"] * c
    linears = {
        "attn_q": ("self_attn.q_proj", q, d),
        "attn_k": ("self_attn.k_proj", kv, d),
        "attn_v": ("self_attn.v_proj", kv, d),
        "attn_output": ("self_attn.o_proj", d, q),
        "ffn_gate": ("mlp.gate_proj", ffn, d),
        "ffn_up": ("mlp.up_proj", ffn, d),
        "ffn_down": ("mlp.down_proj", d, ffn),
    }
    norms = {"attn_norm": ("input_layernorm", d), "ffn_norm": ("post_attention_layernorm", d)}
    if config["model_type"] == "qwen3":
        norms |= {"attn_q_norm": ("self_attn.q_norm", c), "attn_k_norm": ("self_attn.k_norm", c)}
    biased = []
    if config["model_type"] == "qwen2" or config.get("attention_bias"):
        biased += ["attn_q", "attn_k", "attn_v"]
    if config.get("attention_bias"):
        biased += ["attn_output"]
    if config.get("mlp_bias"):
        biased += ["ffn_gate", "ffn_up", "ffn_down"]
    layout = {"token_embd.weight": ("model.embed_tokens.weight", (vocab, d))}
    for i in range(config["num_hidden_layers"]):
        ours, theirs = f"model.layers.{i}.", f"blk.{i}."
        layout |= {f"{theirs}{k}.weight": (f"{ours}{name}.weight", (n, m)) for k, (name, n, m) in linears.items()}
        layout |= {f"{theirs}{k}.bias": (f"{ours}{linears[k][0]}.bias", (linears[k][1],)) for k in biased}
        layout |= {f"{theirs}{k}.weight": (f"{ours}{name}.weight", (n,)) for k, (name, n) in norms.items()}
    layout["output_norm.weight"] = ("model.norm.weight", (d,))
    if not config["tie_word_embeddings"]:
        layout["output.weight"] = ("lm_head.weight", (vocab, d))
    return layout


def _decimal(value: float) -> float:
    """The shortest decimal that is this fp32 number: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
