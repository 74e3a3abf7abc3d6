"""Tensor parallelism: which module is split how, and what the layouts between them are.

Attention and MLP are split as in Megatron: query, key, value, gate and up by output features, o and down by input
features. What enters them is the same on every rank (Replicate), what leaves them is a sum over ranks (Partial). The
residual stream between them is

* with sequence parallelism Shard(1): all-gathered in front of each half of a block, reduce-scattered behind it.
  Communication volume is that of two all-reduces (except that recomputation gathers the MLP's input again); saved
  activations shrink by tp;
* without, Replicate: nothing in front, an all-reduce behind.

With loss parallelism, embedding and head are split by the vocabulary, and the logits stay split: `tp.loss` takes the
loss of them. Tied weights are one matrix, split once. Without it, every rank holds both whole and computes the logits
alike. Passes with a key/value cache (generation) have a Replicate stream and whole logits whatever is set.

Weights are DTensors over tp before FSDP2 shards them over the data-parallel workers. To everything else a tp-local
matrix is a matrix of its own: HD-PiSSA's factor on the side that is not split gets a term of its gradient on each rank,
which the registry sums once per step.

Why not `parallelize_module`? It makes DTensors of the activations. Ours stay plain tensors, as in torchtitan's newest
code: the exact mute is one autograd function over several layers and knows no DTensors, T need not be a multiple of tp,
and compiled blocks trace no DTensor dispatch. Its table of modules and styles we have as well.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch.distributed.device_mesh import DeviceMesh

from titan_hd.distributed.tp import styles
from titan_hd.distributed.tp.styles import Stream, Style
from titan_hd.models.decoder import Decoder

# Module of a block -> style. `stream` is Shard(1) or Replicate, as said above.
BLOCK_PLAN: dict[str, Style] = {
    "input_layernorm": styles.norm_of_stream,  # stream -> stream
    "self_attn": styles.gathered_input,  # stream -> Replicate
    "self_attn.q_proj": styles.column_wise,  # Replicate -> Shard(-1)
    "self_attn.k_proj": styles.column_wise,
    "self_attn.v_proj": styles.column_wise,
    "self_attn.q_norm": styles.norm_of_own_heads,  # each rank's heads
    "self_attn.k_norm": styles.norm_of_own_heads,
    "self_attn.o_proj": styles.row_wise,  # Shard(-1) -> stream
    "post_attention_layernorm": styles.norm_of_stream,  # stream -> stream
    "mlp": styles.gathered_input,  # stream -> Replicate
    "mlp.gate_proj": styles.column_wise,  # Replicate -> Shard(-1)
    "mlp.up_proj": styles.column_wise,
    "mlp.down_proj": styles.row_wise,  # Shard(-1) -> stream
}


def local_shape(path: str, shape: tuple[int, int], degree: int) -> tuple[int, int]:
    """(out, in) of the tp-local matrix of a linear layer; path: its place in the block, shape: of the whole W."""
    out, width = shape
    if degree == 1:
        return shape
    return (out // degree, width) if BLOCK_PLAN[path] is styles.column_wise else (out, width // degree)


def tensor_parallel_errors(shapes: dict[str, int], degree: int) -> list[str]:
    """Why a model's sizes (name -> number) cannot be split over `degree` ranks, one line each."""
    return [
        f"parallelism.tensor_parallel_degree: {degree} does not divide {name} = {size}"
        + ("; parallelism.loss_parallel = false keeps the vocabulary whole" if name == "vocab_size" else "")
        for name, size in shapes.items()
        if size % degree
    ]


def apply_tensor_parallel(
    model: Decoder, mesh: DeviceMesh, sequence_parallel: bool = True, loss_parallel: bool = True
) -> None:
    """Split a meta model over `mesh` (one dimension, "tp"), in place.

    With loss_parallel the model returns this rank's part of the logits, [B, T, vocabulary / tp], but for passes with a
    cache.
    """
    stream = Stream(mesh)
    model.forward = functools.partial(_forward, model.forward, stream, sequence_parallel)
    for block in model.model.layers:
        for path, style in BLOCK_PLAN.items():
            style(block.get_submodule(path), stream)
    styles.norm_of_stream(model.model.norm, stream)
    if loss_parallel:
        styles.split_embedding(model.model.embed_tokens, stream)
        styles.split_head(model, stream)
    else:
        styles.whole_embedding(model.model.embed_tokens, stream)
        styles.whole_head(model, stream)


def _forward(forward: Callable, stream: Stream, sequence_parallel: bool, input_ids: torch.Tensor, *args, **kwargs):
    """The model's forward pass, with the layout of the stream set for it."""
    stream.whole_logits = kwargs.get("cache") is not None
    stream.length = input_ids.shape[1] if sequence_parallel and not stream.whole_logits else None
    return forward(input_ids, *args, **kwargs)
