"""RWKV-6 for tests: tiny configurations, and the recurrence as it is defined."""

from __future__ import annotations

import struct
from pathlib import Path

import torch

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
