"""GGUF files as llama.cpp's converter writes them: names by the gguf package's own table, q and k of the architecture
llama with their rows in pairs, RoPE scaling as divisors of the frequencies."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

# Heads of 8 channels on a hidden size of 64 with 4 of them: head_dim is not hidden / heads. Sizes are multiples of 32,
# the block of Q8_0.
SIZES = {
    "vocab_size": 288,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 257,
    "eos_token_id": 256,
    "pad_token_id": 256,
    "tie_word_embeddings": False,
    "initializer_range": 0.3,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# name -> architecture of the GGUF, class of transformers, what differs from SIZES
MODELS = {
    "llama": ("llama", "Llama", {}),
    "llama tied": ("llama", "Llama", {"tie_word_embeddings": True}),
    "llama with biases": ("llama", "Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama 3.1": ("llama", "Llama", {"head_dim": 64, "rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE}),
    "llama 3.1 of 64": (
        "llama",
        "Llama",
        {"head_dim": 64, "rope_scaling": {**LLAMA3_ROPE, "original_max_position_embeddings": 64}},
    ),
    "llama linear": ("llama", "Llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "mistral": ("llama", "Mistral", {"sliding_window": 6}),
    "qwen2": ("qwen2", "Qwen2", {"head_dim": 16}),
    "qwen3": ("qwen3", "Qwen3", {}),
}


def make_model(name: str):
    """A random model with weights large enough for attention to matter, and norms and biases that are not 1 and 0."""
    _, family, changes = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **changes})
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order: row j of a head's first half, row j of its second half, j + 1 ..."""
    return np.concatenate([np.stack(np.split(head, 2), axis=1).reshape(head.shape) for head in np.split(rows, heads)])


def rope_divisors(config: dict, scaling: dict) -> np.ndarray:
    """As llama.cpp's converter writes them, one frequency after the other."""
    divisors = []
    for exponent in range(0, config["head_dim"], 2):
        wavelength = 2 * np.pi * config["rope_theta"] ** (exponent / config["head_dim"])
        turns = scaling["original_max_position_embeddings"] / wavelength
        if turns > scaling["high_freq_factor"]:
            divisors.append(1.0)
        elif turns < scaling["low_freq_factor"]:
            divisors.append(scaling["factor"])
        else:
            span = scaling["high_freq_factor"] - scaling["low_freq_factor"]
            smooth = (turns - scaling["low_freq_factor"]) / span
            divisors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(divisors, dtype=np.float32)


def write_metadata(writer, model, arch: str, changes: dict) -> None:
    c = model.config
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    if arch != "qwen2":
        writer.add_key_length(c.head_dim)
        writer.add_value_length(c.head_dim)
        writer.add_rope_dimension_count(c.head_dim)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(changes.get("rope_theta", 10000.0))
    if changes.get("rope_scaling", {}).get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(changes["rope_scaling"]["factor"])
    context = changes.get("rope_scaling", LLAMA3_ROPE).get("original_max_position_embeddings", 8192)
    if context != 8192:  # files of Llama 3.1 itself do not say it
        writer.add_rope_scaling_orig_ctx_len(context)
    if "sliding_window" in changes:
        writer.add_sliding_window(changes["sliding_window"])


def write_byte_tokenizer(writer, pre: str = "gpt-2") -> None:
    """One token for each byte, EOS, BOS, one user-defined token, and rows that only pad the embedding."""
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    kinds = [1] * 256 + [3, 3, 4, 1] + [5] * 28
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*alphabet, "<eos>", "<bos>", "<tool>", "Ġa", *(f"[PAD{i}]" for i in range(260, 288))])
    writer.add_token_types(kinds)
    writer.add_token_merges(["Ġ a"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(256)
    writer.add_pad_token_id(256)
    writer.add_add_bos_token(True)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")


def write_gguf(path: Path, name: str, quantisation: str = "F32", **options):
    """A GGUF file of a random model; returns the model, with the weights that the file holds."""
    arch, _, changes = MODELS[name]
    model = make_model(name)
    c, kind = model.config, gguf.GGMLQuantizationType[quantisation]
    writer = gguf.GGUFWriter(path, options.get("arch", arch))
    write_metadata(writer, model, arch, changes)
    write_byte_tokenizer(writer, options.get("pre", "gpt-2"))
    for key, (value, value_type) in options.get("metadata", {}).items():
        writer.kv_data[0].pop(key, None)
        writer.add_key_value(key, value, *value_type)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, arch.upper()), c.num_hidden_layers)
    if changes.get("rope_scaling", {}).get("rope_type") == "llama3":
        config = {"head_dim": c.head_dim, "rope_theta": changes.get("rope_theta", 10000.0)}
        divisors = rope_divisors(config, {**changes["rope_scaling"], **options.get("rope", {})})
        writer.add_tensor("rope_freqs.weight", divisors)
    for extra, size in options.get("extra", {}).items():
        writer.add_tensor(extra, np.ones(size, np.float32))
    for hf_name, parameter in model.named_parameters():
        values, their_name = parameter.detach().numpy(), names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        if their_name == options.get("left_out"):
            continue
        if arch == "llama" and ("q_proj" in hf_name or "k_proj" in hf_name):
            heads = c.num_attention_heads if "q_proj" in hf_name else c.num_key_value_heads
            values = interleave(values, heads)
        if values.ndim == 1:
            writer.add_tensor(their_name, values)
            continue
        writer.add_tensor(their_name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        # Rows are quantised one by one, so that their order does not matter.
        kept = gguf.quants.dequantize(gguf.quants.quantize(parameter.detach().numpy(), kind), kind)
        parameter.data = torch.from_numpy(np.array(kept))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def write_vocabulary(path: Path, tokens: list[str], types: list[int], **tokenizer) -> None:
    """A llama of one layer and four channels with this vocabulary; tokenizer: GGUFWriter.add_NAME(value)."""
    writer = gguf.GGUFWriter(path, "llama")
    numbers = {"context_length": 64, "embedding_length": 4, "block_count": 1, "feed_forward_length": 4}
    for name, value in {**numbers, "head_count": 1, "layer_norm_rms_eps": 1e-5}.items():
        getattr(writer, f"add_{name}")(value)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for name, value in tokenizer.items():
        getattr(writer, f"add_{name}")(value)
    linears = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    for name in linears:
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros((4, 4), np.float32))
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.zeros(4, np.float32))
    writer.add_tensor("token_embd.weight", np.zeros((len(tokens), 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_byte_level(path: Path, folder: Path, pre: str, **tokenizer) -> None:
    """What llama.cpp's converter keeps of a byte-level tokenizer.json; missing ids become rows of padding."""
    published = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    kinds = {i: (token, 1) for token, i in published["model"]["vocab"].items()}
    kinds |= {t["id"]: (t["content"], 3 if t["special"] else 4) for t in published["added_tokens"]}
    rows = [kinds.get(i, (f"[PAD{i}]", 5)) for i in range(max(kinds) + 17)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in published["model"]["merges"]]
    tokens, types = zip(*rows)
    write_vocabulary(
        path,
        list(tokens),
        list(types),
        tokenizer_model="gpt2",
        tokenizer_pre=pre,
        token_merges=merges,
        eos_token_id=rows.index(tokenizer.pop("eos")),
        **tokenizer,
    )
