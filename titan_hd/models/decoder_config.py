"""The decoder's architectures as data: which keys of a config.json are read, and the DecoderConfig that they give.

A key that changes the computation in a way that the decoder does not have is refused by name; a key of unknown meaning
is ignored, and named in the log.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from titan_hd.errors import UserError
from titan_hd.models.config_values import flag_of, number_of, refuse_unsupported, size_of
from titan_hd.models.model_config import ModelConfig


@dataclass(frozen=True)
class Architecture:
    """How the variants of the decoder follow from the keys of a config.json.

    model_type: stands for it where a config.json does not name its architecture.
    families: names that `model.name` may have for it.
    qkv_bias, o_bias, mlp_bias: True or False, or the key that says so (False where it is missing).
    windows: "none", "all" (Mistral: `sliding_window` holds for every layer), or "some" (Qwen: `use_sliding_window`,
        from layer `max_window_layers` on, or by `layer_types`).
    """

    model_type: str
    families: tuple[str, ...]
    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: bool = False
    windows: str = "none"


_WINDOW_KEYS = {
    "none": (),
    "all": ("sliding_window",),
    "some": ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
}
ARCHITECTURES = {
    "LlamaForCausalLM": Architecture(
        "llama", ("llama2", "llama3", "smollm2"), "attention_bias", "attention_bias", "mlp_bias"
    ),
    "MistralForCausalLM": Architecture("mistral", ("mistral",), windows="all"),
    "Qwen2ForCausalLM": Architecture("qwen2", ("qwen2",), qkv_bias=True, windows="some"),
    "Qwen3ForCausalLM": Architecture(
        "qwen3", ("qwen3",), "attention_bias", "attention_bias", qk_norm=True, windows="some"
    ),
}

_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
_ROPE_REASONS = {
    "dynamic": "its frequencies depend on the length of each sequence, so that training and generation would differ",
    "yarn": "it also scales the attention",
    "longrope": "it also scales the attention",
}
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_READ = {
    *_SIZES,
    *("architectures", "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings"),
    *("tie_word_embeddings", "rope_theta", "rope_scaling", "rope_parameters"),
}
# Keys that change what a model computes, with the values that mean "not used".
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),  # two names of one function
    "quantization_config": (None, {}),
    "partial_rotary_factor": (None, 1.0),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "logit_scale": (None, 1.0),
    "logits_scaling": (None, 1.0),
    "embedding_multiplier": (None, 1.0),
    "residual_multiplier": (None, 1.0),
    "attention_multiplier": (None,),
    "clip_qkv": (None,),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
}
# Keys that say nothing about the computation.
_HARMLESS = {
    *("model_type", "transformers_version", "torch_dtype", "dtype", "_name_or_path", "initializer_range", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "pretraining_tp", "return_dict", "id2label"),
    *("label2id", "problem_type", "output_attentions", "output_hidden_states", "chunk_size_feed_forward"),
    *("is_decoder", "is_llama_config", "rope_interleaved", "transformers.js_config", "attn_implementation"),
    *("_attn_implementation_autoset", "use_mrope"),
}
_LARGEST_WEIGHT = 2**40  # elements
_MOST_LAYERS = 1_000  # each is a module; no published model has 200


@dataclass(frozen=True)
class DecoderConfig(ModelConfig):
    """Sizes and variants of a Llama-family decoder, in HF's names.

    layer_windows: for each layer how many positions a token sees, itself included; None: all.
    ignored: keys of the config.json that have an unknown meaning, or one for training alone; the decoder ignores them.
    hf: the whole config.json, for the export; with the architecture, which vLLM needs, and the model type, which
        transformers needs, if they are not there.
    """

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
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    layer_windows: tuple[int | None, ...]
    ignored: tuple[str, ...] = field(repr=False, compare=False)
    hf: dict[str, Any] = field(repr=False, compare=False)

    tensor_parallel: ClassVar[bool] = True
    blocks_name: ClassVar[str] = "model.layers"

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

    def linear_paths(self) -> dict[str, str]:
        """Kind -> path in the block."""
        attention = ("q_proj", "k_proj", "v_proj", "o_proj")
        return {kind: f"{'self_attn' if kind in attention else 'mlp'}.{kind}" for kind in self.linear_shapes()}

    def mixing_flops(self, length: float) -> float:
        """Of attention: scores and values."""
        return 4 * self.num_attention_heads * self.head_dim * length * self.num_hidden_layers

    def with_blocks(self, count: int) -> DecoderConfig:
        """The same model with its first blocks alone."""
        return replace(self, num_hidden_layers=count, layer_windows=self.layer_windows[:count])


def parse_decoder(raw: dict[str, Any], where: str) -> DecoderConfig:
    """Turn the keys of a config.json into a DecoderConfig; refuse by name what the decoder would compute wrongly.

    raw: with one architecture and the model type, which vLLM and transformers go by.
    where: the file, or what stands for it, in front of every error.
    """
    name = raw["architectures"][0]
    architecture = ARCHITECTURES[name]
    refuse_unsupported(raw, _UNSUPPORTED, where)
    sizes = {key: size_of(raw, key, where) for key in _SIZES}
    if sizes["num_hidden_layers"] > _MOST_LAYERS:
        raise UserError(f"{where}: num_hidden_layers: must be at most {_MOST_LAYERS}")
    hidden, heads, layers = (sizes[key] for key in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    # Where the key is missing transformers assumes one head each for Llama, and other numbers for the others.
    llama = name == "LlamaForCausalLM"
    kv_heads = size_of(raw, "num_key_value_heads", where, heads if llama else None)
    if heads % kv_heads:
        raise UserError(f"{where}: num_key_value_heads: must divide num_attention_heads ({heads})")
    head_dim = size_of(raw, "head_dim", where, 128 if architecture.qk_norm else max(1, hidden // heads))
    if head_dim % 2:
        raise UserError(f"{where}: head_dim: must be even for rotary embeddings, not {head_dim}")
    if max(sizes["vocab_size"], sizes["intermediate_size"], heads * head_dim) * hidden > _LARGEST_WEIGHT:
        raise UserError(f"{where}: hidden_size: a weight of more than {_LARGEST_WEIGHT} elements is no model's")
    rope = _rope_parameters(raw, where)
    biases = (architecture.qkv_bias, architecture.o_bias, architecture.mlp_bias)
    qkv_bias, o_bias, mlp_bias = (flag_of(raw, said, where) if isinstance(said, str) else said for said in biases)
    return DecoderConfig(
        **sizes,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=number_of(raw, "rms_norm_eps", where, 1e-6),
        rope_theta=rope.pop("rope_theta"),
        rope_scaling=rope if rope["rope_type"] != "default" else None,
        max_position_embeddings=size_of(raw, "max_position_embeddings", where, 2048),
        tie_word_embeddings=flag_of(raw, "tie_word_embeddings", where),
        qkv_bias=qkv_bias,
        o_bias=o_bias,
        mlp_bias=mlp_bias,
        qk_norm=architecture.qk_norm,
        layer_windows=_layer_windows(raw, architecture.windows, layers, where),
        ignored=_ignored(raw, architecture),
        hf=raw,
    )


def _layer_windows(raw: dict[str, Any], rule: str, layers: int, where: str) -> tuple[int | None, ...]:
    """Sliding windows as transformers derives them, its defaults for missing keys included."""
    window: int | None = None
    # A key that is there and null says "no window"; only a missing one has transformers' default.
    if rule == "all" or (rule == "some" and flag_of(raw, "use_sliding_window", where)):
        given = {"sliding_window": raw.get("sliding_window", 4096)}
        window = None if given["sliding_window"] is None else size_of(given, "sliding_window", where)
    if rule != "some":
        return (window,) * layers
    types = raw.get("layer_types")
    if types is None:
        first = raw.get("max_window_layers", 28)
        if isinstance(first, bool) or not isinstance(first, int) or first < 0:
            raise UserError(f"{where}: max_window_layers: must be a whole number, not {first!r}")
        types = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    known = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) != layers or any(t not in known for t in types):
        raise UserError(f"{where}: layer_types: must name {' or '.join(known)} for each of the {layers} layers")
    return tuple(window if t == "sliding_attention" else None for t in types)


def _ignored(raw: dict[str, Any], architecture: Architecture) -> tuple[str, ...]:
    read = _READ | _HARMLESS | _UNSUPPORTED.keys() | set(_WINDOW_KEYS[architecture.windows])
    read |= {key for key in (architecture.qkv_bias, architecture.mlp_bias) if isinstance(key, str)}
    return tuple(sorted(key for key, value in raw.items() if value and key not in read))


def _rope_parameters(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """RoPE settings from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    new, old = raw.get("rope_parameters") or {}, raw.get("rope_scaling") or {}
    for given in (new, old):
        if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
            raise UserError(f"{where}: rope_parameters: must be one table of numbers for all layers")
    # Libraries differ in which of two contradicting keys they take.
    if new and old and {**old, **new} != {**new, **old}:
        raise UserError(f"{where}: rope_parameters and rope_scaling contradict each other; keep one of them")
    rope = {**old, **new}
    kinds = {key: rope.pop(key) for key in ("type", "rope_type") if rope.get(key)}
    if len(set(map(str, kinds.values()))) > 1:
        raise UserError(f"{where}: rope_scaling: type and rope_type contradict each other; keep one of them")
    kind = next(iter(kinds.values()), "default")
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        reason = f" ({_ROPE_REASONS[kind]})" if str(kind) in _ROPE_REASONS else ""
        raise UserError(
            f"{where}: rope_scaling: type {kind!r} is not supported{reason}; supported are {', '.join(_ROPE_KEYS)}"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{where}: partial_rotary_factor: is not supported")
    for key in _ROPE_KEYS[kind]:
        number_of(rope, key, f"{where}: rope_scaling")
    theta = number_of({"rope_theta": rope.get("rope_theta") or raw.get("rope_theta")}, "rope_theta", where, 10000.0)
    return {**rope, "rope_type": kind, "rope_theta": theta}
