"""GGUF files (llama.cpp's format) of Llama-type models to the configuration and weights of a Hugging Face directory.

Tensors are dequantised one at a time. llama.cpp interleaves the two halves of every head's rows in q and k of the
architecture `llama`, for its own form of RoPE; they are put back into the half-rotation order of Hugging Face.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from titan_hd.errors import UserError
from titan_hd.files import shown
from titan_hd.models.hf_files import check_space, plan_files, sync_files, write_headers, write_rows
from titan_hd.models.registry import parse_hf_config

_ARCHITECTURES = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "use_sliding_window": False},
}
_MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
# What Llama 3.1 and later were published with; the factor differs (8, or 32 for the small ones).
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3_CONTEXT = 8192  # before the scaling; where the file does not say
_ROPE_FACTORS = "rope_freqs.weight"
# The factors are stored in fp32, and computed by the converter in fp32 too.
_ROPE_TOLERANCE = 1e-4
_LARGEST = 2**31  # no size of a model; a larger one is a broken or a hostile file
# Kind of a metadata value -> the Python types that the gguf package gives for it, and its name.
_KINDS = {
    str: ((str,), "text"),
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((float, int), "a number"),
}


class _Reader(gguf.GGUFReader):
    """The package's own takes what lies behind the end for empty, and then counts to lengths like 2^60."""

    def _get(self, offset: int, dtype: Any, count: int = 1, *args, **kwargs) -> np.ndarray:
        values = super()._get(offset, dtype, count, *args, **kwargs)
        if len(values) < count:
            raise ValueError("it ends too early")
        return values


class GGUFModel:
    """One GGUF file: metadata, and tensors by name.

    name: what errors call the file, if not by its path.

    Raises:
        UserError: with one line if the file is no GGUF, incomplete, or of a model that is not supported.
    """

    def __init__(self, path: Path, name: str = ""):
        self.name = name or str(path)
        try:
            with np.errstate(over="raise"):  # offsets near 2^64
                reader = _Reader(path)
        except OSError as error:
            raise UserError(f"{self.name}: cannot be read: {error.strerror or error}") from None
        except (ValueError, LookupError, ArithmeticError, RecursionError) as error:  # of bytes that make no sense
            raise UserError(f"{self.name}: is no GGUF file, or an incomplete one: {shown(str(error))}") from None
        self._fields, self.tensors = reader.fields, {t.name: t for t in reader.tensors}
        self.architecture = self.get("general.architecture", str)
        if self.architecture not in _ARCHITECTURES:
            kind, known = shown(repr(self.architecture)), ", ".join(_ARCHITECTURES)
            raise UserError(f"{self.name}: architecture {kind} is not supported; supported are {known}")
        if self.get("split.count", int, 1) > 1:
            raise UserError(f"{self.name}: is one part of a split model; join them with llama.cpp's gguf-split first")
        self.config = self._config()
        parse_hf_config(self.config, self.name)  # refuses sizes that fit no model
        self._check_layers()
        self._layout = _layout(self.config)
        self._check_tensors()

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """A metadata value of the kind str, bool, int or float; UserError if it is of another."""
        types, kind_name = _KINDS[kind]
        if key not in self._fields:
            return default
        value = self._contents(key)
        if type(value) not in types:
            raise UserError(f"{self.name}: {key}: must be {kind_name}, not {shown(repr(value))}")
        return value

    def get_list(self, key: str, kind: type) -> list[Any]:
        """A metadata array of one kind; empty where it is missing."""
        types, kind_name = _KINDS[kind]
        value = self._contents(key) if key in self._fields else []
        if not isinstance(value, list) or any(type(item) not in types for item in value):
            raise UserError(f"{self.name}: {key}: must be an array, {kind_name} each")
        return value

    def _contents(self, key: str) -> Any:
        try:
            return self._fields[key].contents()
        except UnicodeDecodeError:
            raise UserError(f"{self.name}: {key}: is not valid UTF-8") from None

    def _number(self, key: str, kind: type = int, default: float | None = None, zero: bool = False) -> Any:
        """A number above 0 (or also 0) under the architecture's own prefix; one for all layers."""
        name = f"{self.architecture}.{key}"
        value = self.get(name, kind, default)
        if value is None:
            raise UserError(f"{self.name}: {name}: is missing")
        if not (0 < value < (_LARGEST if kind is int else math.inf) or (zero and value == 0)):
            raise UserError(f"{self.name}: {name}: must be {_KINDS[kind][1]} above 0, not {value}")
        return value

    def _config(self) -> dict[str, Any]:
        """The keys of config.json."""
        heads, hidden = self._number("attention.head_count"), self._number("embedding_length")
        head_dim = self._number("attention.key_length", default=max(1, hidden // heads))
        must_be = {"attention.value_length": head_dim, "rope.dimension_count": head_dim, "expert_count": 0}
        for key, value in must_be.items():
            if self._number(key, default=value, zero=True) != value:
                raise UserError(f"{self.name}: {self.architecture}.{key}: only {value} is supported for this model")
        if "token_embd.weight" not in self.tensors or len(self.tensors["token_embd.weight"].shape) != 2:
            raise UserError(f"{self.name}: token_embd.weight: is missing, or no matrix")
        window = self._number("attention.sliding_window", default=0, zero=True) if self.architecture == "llama" else 0
        config = {
            **(_MISTRAL if window else _ARCHITECTURES[self.architecture]),
            "hidden_act": "silu",
            "vocab_size": int(self.tensors["token_embd.weight"].shape[1]),
            "hidden_size": hidden,
            "intermediate_size": self._number("feed_forward_length"),
            "num_hidden_layers": self._number("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._number("attention.head_count_kv", default=heads),
            "head_dim": head_dim,
            "rms_norm_eps": _decimal(self._number("attention.layer_norm_rms_epsilon", float)),
            "max_position_embeddings": self._number("context_length"),
            "rope_theta": _decimal(self._number("rope.freq_base", float, 10000.0)),
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
            key = f"tokenizer.ggml.{'padding' if token == 'pad' else token}_token_id"
            config[f"{token}_token_id"] = self.get(key, int)
        return {key: value for key, value in config.items() if value is not None}

    def _rope_scaling(self, config: dict[str, Any]) -> dict[str, Any] | None:
        if _ROPE_FACTORS in self.tensors:
            return self._llama3_scaling(config)
        name = f"{self.architecture}.rope.scaling.type"
        kind = self.get(name, str, "none")
        # Files from before rope.scaling had the factor alone.
        factor = self._number("rope.scale_linear", float, 0.0, zero=True)
        factor = self._number("rope.scaling.factor", float, factor, zero=True)
        if kind == "none" and factor in (0.0, 1.0):
            return None
        if kind not in ("none", "linear") or factor == 0.0:
            kind = shown(repr(kind))
            raise UserError(f"{self.name}: {name}: {kind} is not supported; supported are none, linear, Llama 3's")
        return {"rope_type": "linear", "factor": _decimal(factor)}

    def _llama3_scaling(self, config: dict[str, Any]) -> dict[str, Any]:
        """The parameters of Llama 3's scaling from what llama.cpp keeps of it: a divisor for every frequency."""
        stored = self.read(_ROPE_FACTORS)
        context = self._number("rope.scaling.original_context_length", default=_LLAMA3_CONTEXT)
        if stored.shape == (config["head_dim"] // 2,) and np.isfinite(stored).all() and (stored > 0).all():
            scaling = {"rope_type": "llama3", "factor": float(stored.max()), **_LLAMA3_ROPE}
            scaling["original_max_position_embeddings"] = context
            expected = llama3_rope_factors(config["rope_theta"], config["head_dim"], scaling)
            if np.allclose(stored, expected, rtol=_ROPE_TOLERANCE):
                return scaling
        line = f"is not the RoPE scaling of Llama 3.1 and later for an original context of {context}"
        raise UserError(f"{self.name}: {_ROPE_FACTORS}: {line}")

    def read(self, name: str) -> np.ndarray:
        """A tensor of the file in fp32, [out, in] as in torch, with rows as llama.cpp orders them."""
        tensor = self.tensors[name]
        try:
            return np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        except NotImplementedError:
            kind = tensor.tensor_type.name
            raise UserError(f"{self.name}: {name}: the gguf package cannot dequantise {kind}") from None

    def _check_layers(self) -> None:
        """The layers that the tensors' names tell of must be as many; before anything is built for each."""
        indices = (re.match(r"blk\.([0-9]{1,9})\.", name) for name in self.tensors)
        found, count = max((int(i[1]) + 1 for i in indices if i), default=0), self.config["num_hidden_layers"]
        if found != count:
            raise UserError(f"{self.name}: {self.architecture}.block_count: is {count}, the file has {found} layers")

    def _check_tensors(self) -> None:
        errors = [f"{self.name}: {name}: is missing" for name in self._layout if name not in self.tensors]
        known = {*self._layout, _ROPE_FACTORS}
        errors += [f"{self.name}: {shown(name)}: is not supported" for name in self.tensors if name not in known]
        for name in [name for name in self._layout if name in self.tensors]:
            shape, expected = tuple(int(n) for n in reversed(self.tensors[name].shape)), self._layout[name][1]
            if shape != expected:
                errors.append(f"{self.name}: {name}: has shape {list(shape)}, must be {list(expected)}")
        if errors:
            others = f" (and {len(errors) - 1} more such lines)" if len(errors) > 1 else ""
            raise UserError(errors[0] + others)

    def write(self, folder: Path, dtype: torch.dtype, progress: Callable[[Iterable], Iterable] = iter) -> None:
        """Write config.json and safetensors in `dtype` into a folder; progress wraps the iteration over the tensors.

        Raises:
            UserError: the weights do not fit on the folder's disk; nothing of them is written then.
        """
        name = str(dtype).removeprefix("torch.")
        config = {**self.config, "torch_dtype": name, "dtype": name}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        shapes = {hf_name: torch.Size(shape) for hf_name, shape in self._layout.values()}
        slots, headers = plan_files(folder, shapes, dtype)
        check_space(folder, slots, shapes)
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
