"""RWKV-6 for tests: a tiny model, its recurrence and its equations as they are defined."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import torch
from safetensors.torch import save_file

from titan_hd.models.registry import parameter_shapes, parse_hf_config

# Heads of 4 channels, an odd number of channels in the channel mix, a vocabulary that two workers cannot halve.
TINY = {
    "architectures": ["Rwkv6ForCausalLM"],
    "model_type": "rwkv6",
    "vocab_size": 51,
    "hidden_size": 24,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "head_size": 4,
    "head_size_divisor": 8,
    "time_mix_extra_dim": 3,
    "time_decay_extra_dim": 5,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": False,
}


def recurrence(r, k, v, decay, bonus, ends=None, state=None):
    """y [B, T, H, V] and the last state, in plain loops; arguments as of `models.wkv6`."""
    batch, length, heads, _ = r.shape
    state = r.new_zeros(batch, heads, k.shape[3], v.shape[3]) if state is None else state
    w, outputs = torch.exp(-torch.exp(decay)), []
    for t in range(length):
        kv = k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append((r[:, t, :, :, None] * (state + bonus[None, :, :, None] * kv)).sum(2))
        state = w[:, t, :, :, None] * state + kv
        if ends is not None:
            state = torch.where(ends[:, t, None, None, None], 0.0, state)
    return torch.stack(outputs, 1), state


def read_rwkv_cpp(path: Path) -> dict[str, torch.Tensor]:
    """The weights of a file of rwkv.cpp (fp32, version 6), in the names and shapes of the .pth it was made from."""
    data, tensors, at = path.read_bytes(), {}, 24
    while at < len(data):
        dimensions, name_length, dtype = struct.unpack_from("=3i", data, at)
        shape = struct.unpack_from(f"={dimensions}i", data, at + 12)[::-1]
        at += 12 + 4 * dimensions
        name = data[at : at + name_length].decode()
        assert dtype == 0
        values = torch.frombuffer(
            bytearray(data), dtype=torch.float32, count=torch.Size(shape).numel(), offset=at + name_length
        )
        at += name_length + values.nbytes
        tensors[name] = _as_in_pth(name, values.view(shape))
    return tensors


def _as_in_pth(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if name.endswith("time_maa_w2"):
        return tensor.transpose(1, 2).contiguous()
    if name.endswith(("time_maa_w1", "time_decay_w1", "time_decay_w2")):
        return tensor.T.contiguous()
    if name.endswith("time_faaaa"):
        return tensor.squeeze(-1).clone()
    if "time_" in name:
        return tensor.reshape(1, 1, -1).clone()
    return tensor.clone()


def write_model(folder: Path, **changes) -> tuple[dict, dict[str, torch.Tensor]]:
    """A HF directory with random fp32 weights, of which every one matters; returns its config and weights."""
    config = {**TINY, **changes}
    shapes = parameter_shapes(parse_hf_config(config, "tests"))
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in shapes.items():
        norm = "ln" in name and name.endswith("weight")
        scale = shape[-1] ** -0.5 if len(shape) == 2 else 0.3
        weights[name] = scale * torch.randn(shape, generator=generator) + norm
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return config, weights


def forward(weights: dict[str, torch.Tensor], config: dict, ids: torch.Tensor) -> torch.Tensor:
    """Logits [T, vocabulary] of one sequence of token ids [T], from the equations, token by token."""
    eps, heads = config["layer_norm_epsilon"], config["hidden_size"] // config["head_size"]

    def norm(x, name, groups=1, eps=eps):
        x = x.view(groups, -1)
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + eps).sqrt()
        return x.flatten() * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    width, size = config["hidden_size"], config["head_size"]
    zero, logits = ids.new_zeros(width, dtype=torch.float64), []
    before = {(i, part): zero for i in range(config["num_hidden_layers"]) for part in ("attention", "feed_forward")}
    states = [zero.new_zeros(heads, size, size) for _ in range(config["num_hidden_layers"])]
    for token in ids.tolist():
        h = norm(weights["rwkv.embeddings.weight"][token], "rwkv.blocks.0.pre_ln")
        for i in range(config["num_hidden_layers"]):
            block = f"rwkv.blocks.{i}."
            w = {name.removeprefix(f"{block}attention."): t for name, t in weights.items() if name.startswith(block)}
            x, previous = norm(h, f"{block}ln1"), before[i, "attention"]
            step, before[i, "attention"] = previous - x, x
            ranks = torch.tanh((x + step * w["time_maa_x"].flatten()) @ w["time_maa_w1"]).view(5, -1)
            xw, xk, xv, xr, xg = (
                x + step * (w[f"time_maa_{name}"].flatten() + ranks[n] @ w["time_maa_w2"][n])
                for n, name in enumerate("wkvrg")
            )
            r, k, v = w["receptance.weight"] @ xr, w["key.weight"] @ xk, w["value.weight"] @ xv
            g = w["gate.weight"] @ xg
            decay = w["time_decay"].flatten() + torch.tanh(xw @ w["time_decay_w1"]) @ w["time_decay_w2"]
            r, k, v, decay = (t.view(heads, size) for t in (r, k, v, torch.exp(-torch.exp(decay))))
            kv = k[:, :, None] * v[:, None]
            y = torch.einsum("hk,hkv->hv", r, states[i] + w["time_faaaa"][:, :, None] * kv)
            states[i] = decay[:, :, None] * states[i] + kv
            y = norm(y, f"{block}attention.ln_x", heads, 1e-5 * config["head_size_divisor"] ** 2)
            h = h + w["output.weight"] @ (y * g * torch.sigmoid(g))
            w = {name.removeprefix(f"{block}feed_forward."): t for name, t in weights.items() if name.startswith(block)}
            x, previous = norm(h, f"{block}ln2"), before[i, "feed_forward"]
            step, before[i, "feed_forward"] = previous - x, x
            k, r = (x + step * w[f"time_maa_{name}"].flatten() for name in "kr")
            grown = torch.relu(w["key.weight"] @ k) ** 2
            h = h + torch.sigmoid(w["receptance.weight"] @ r) * (w["value.weight"] @ grown)
        logits.append(weights["head.weight"] @ norm(h, "rwkv.ln_out"))
    return torch.stack(logits)
