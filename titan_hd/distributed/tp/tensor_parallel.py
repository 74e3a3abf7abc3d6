"""Tensor parallelism: query, key, value, gate and up split by columns, o and down by rows (Megatron), and around them
the sequence and the vocabulary.

Weights are DTensors on the tp dimension before FSDP2 shards them over the data-parallel workers; activations stay plain
tensors. A layer computes with its tp-local matrix, which is a matrix of its own to everything else: HD-PiSSA's gradient
of the factor that is not split comes out as a part on each tp rank and is summed once per step by the registry.

What enters attention and MLP is whole on every rank, what leaves them is a sum of the ranks' parts (`tp_functions` has
the words). Between them, the residual stream is

* with sequence parallelism in pieces: gathered in front of each half of a block, reduce-scattered behind it. Norms
  work on a piece, so their weights' gradients come in parts. As many bytes travel as without (but for the recomputed
  MLP's input), and what a block keeps between its halves, or recomputes from, is 1 / tp of it;
* without, whole on every rank: nothing in front, an all-reduce behind.

With loss parallelism, embedding and head are split by the vocabulary: a rank looks up the tokens that it has, the sum
over ranks is the embedding; the head's logits stay split, and `loss_parallel` takes the loss of them. Tied weights are
one matrix, split once. Without it both are whole and computed alike on every rank.

Passes with a key/value cache (generation) have a whole residual stream and whole logits whatever is set.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from titan_hd.adapters.adapter_linear import AdapterLinear
from titan_hd.adapters.frozen_linear import FrozenLinear
from titan_hd.distributed.tp.functions import (
    copy_to_tp,
    gather_alike,
    gather_dim,
    gather_sequence,
    own_piece,
    reduce_from_tp,
    scatter_sequence,
)
from titan_hd.models.decoder import Decoder, RMSNorm

COLUMN_WISE = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROW_WISE = ("o_proj", "down_proj")


@dataclass
class _Pass:
    """How the current forward pass goes; set by the model's forward, read by its parts.

    length: T where the residual stream is in pieces, else None. whole_logits: gather the head's logits.
    """

    group: dist.ProcessGroup
    length: int | None = None
    whole_logits: bool = False

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """The residual stream, or a norm of it, whole, in front of layers that give every rank a part of dx."""
        return copy_to_tp(x, self.group) if self.length is None else gather_sequence(x, self.length, self.group)

    def leave(self, x: torch.Tensor) -> torch.Tensor:
        """Parts of a sum, back to the residual stream."""
        return reduce_from_tp(x, self.group) if self.length is None else scatter_sequence(x, self.group)

    def of_piece(self, parameter: torch.Tensor) -> torch.Tensor:
        """A whole parameter that works on pieces: its gradient comes in parts."""
        return parameter if self.length is None else copy_to_tp(parameter, self.group)


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
    state = _Pass(mesh.get_group())
    model.forward = functools.partial(_forward, model.forward, state, sequence_parallel)
    for block in model.model.layers:
        for part in (block.self_attn, block.mlp):
            part.forward = _entered(part.forward, state)
            for name, layer in part.named_children():
                if name in COLUMN_WISE:
                    _split(layer, mesh, 0, state)
                elif name in ROW_WISE:
                    _split(layer, mesh, 1, state)
                elif isinstance(layer, RMSNorm):  # of the rank's own heads: its gradient comes in parts
                    layer.forward = functools.partial(_norm_of_own_heads, layer, state.group)
        for norm in (block.input_layernorm, block.post_attention_layernorm):
            norm.forward = functools.partial(_norm_of_stream, norm, state)
    model.model.norm.forward = functools.partial(_norm_of_stream, model.model.norm, state)
    _split_vocabulary(model, mesh, state) if loss_parallel else _keep_vocabulary(model, state)


def _forward(forward: Callable, state: _Pass, sequence_parallel: bool, input_ids: torch.Tensor, *args, **kwargs):
    state.whole_logits = kwargs.get("cache") is not None
    state.length = input_ids.shape[1] if sequence_parallel and not state.whole_logits else None
    return forward(input_ids, *args, **kwargs)


def _entered(forward: Callable, state: _Pass) -> Callable:
    def wrapped(x, *args):
        return forward(state.enter(x), *args)

    return wrapped


def _norm_of_own_heads(norm: RMSNorm, group: dist.ProcessGroup, x: torch.Tensor) -> torch.Tensor:
    return norm.normalize(x, copy_to_tp(norm.weight, group))


def _norm_of_stream(norm: RMSNorm, state: _Pass, x: torch.Tensor) -> torch.Tensor:
    return norm.normalize(x, state.of_piece(norm.weight))


# ---------------------------------------------------------------------------------------------------------------------
# Embedding and head


def _split_vocabulary(model: Decoder, mesh: DeviceMesh, state: _Pass) -> None:
    embedding = model.model.embed_tokens
    _distribute_weight(embedding, mesh, 0)
    embedding.forward = functools.partial(_embed_own_tokens, embedding, state)
    if model.lm_head is None:
        model.tied_head = functools.partial(_own_logits, embedding, state)
    else:
        _distribute_weight(model.lm_head, mesh, 0)
        model.lm_head.forward = functools.partial(_own_logits, model.lm_head, state)


def _embed_own_tokens(embedding: nn.Embedding, state: _Pass, input_ids: torch.Tensor) -> torch.Tensor:
    weight = embedding.weight.to_local()
    local = input_ids - dist.get_rank(state.group) * len(weight)
    others = (local < 0) | (local >= len(weight))
    return state.leave(F.embedding(local.masked_fill(others, 0), weight).masked_fill(others[..., None], 0.0))


def _own_logits(head: nn.Module, state: _Pass, x: torch.Tensor) -> torch.Tensor:
    logits = F.linear(state.enter(x), head.weight.to_local())
    return gather_dim(logits, 2, state.group) if state.whole_logits else logits


def _keep_vocabulary(model: Decoder, state: _Pass) -> None:
    """Embed the own piece, and gather in front of the head, which every rank computes alike."""
    embedding = model.model.embed_tokens
    embedding.forward = functools.partial(_embed_own_piece, embedding, state)
    if model.lm_head is None:
        model.tied_head = functools.partial(_whole_input, model.tied_head, state)
    else:
        model.lm_head.forward = functools.partial(_whole_input, model.lm_head.forward, state)


def _embed_own_piece(embedding: nn.Embedding, state: _Pass, input_ids: torch.Tensor) -> torch.Tensor:
    mine = input_ids if state.length is None else own_piece(input_ids, state.group)
    return F.embedding(mine, state.of_piece(embedding.weight))


def _whole_input(head: Callable, state: _Pass, x: torch.Tensor) -> torch.Tensor:
    return head(x if state.length is None else gather_alike(x, state.length, state.group))


# ---------------------------------------------------------------------------------------------------------------------
# Linear layers of the blocks


def _distribute_weight(layer: nn.Module, mesh: DeviceMesh, dim: int) -> None:
    weight = distribute_tensor(layer.weight.data, mesh, [Shard(dim)])
    layer.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)


def _split(layer: nn.Linear, mesh: DeviceMesh, dim: int, state: _Pass) -> None:
    """Make the weight a DTensor split in `dim`; the bias follows the output, or is added once behind the sum."""
    _distribute_weight(layer, mesh, dim)
    if layer.bias is not None and dim == 0:
        bias = distribute_tensor(layer.bias.data, mesh, [Shard(0)])
        layer.bias = nn.Parameter(bias, requires_grad=layer.bias.requires_grad)

    split_bias = layer.bias if dim == 0 else None
    parts = functools.partial(_local_parts, layer, split_bias is not None)
    if isinstance(layer, AdapterLinear):
        _split_adapter(layer, mesh, dim)
    if isinstance(layer, FrozenLinear):
        if dim == 1:
            layer.dropped = functools.partial(_dropped_columns, layer, state.group)
        layer.parameters_for_compute = parts
        compute = layer.forward
    else:

        def compute(x):
            return F.linear(x, *parts())

    def row_wise(x):
        y = state.leave(compute(x))
        return y if layer.bias is None else y + state.of_piece(layer.bias)

    layer.forward = compute if dim == 0 else row_wise


def _dropped_columns(layer: FrozenLinear, group: dist.ProcessGroup, x: torch.Tensor) -> torch.Tensor:
    """Dropout of this rank's columns of the input. Every rank draws the mask of the whole input, which is the one that
    is drawn without tensor parallelism: generators are seeded by the samples, so they are alike on tp ranks."""
    if not (layer.dropout and layer.training):
        return x
    size = dist.get_world_size(group)
    whole = F.dropout(x.new_ones(*x.shape[:-1], size * x.shape[-1]), layer.dropout)
    kept = whole.chunk(size, dim=-1)[dist.get_rank(group)] != 0
    return torch.where(kept, x / (1 - layer.dropout), 0.0)


def _split_adapter(layer: AdapterLinear, mesh: DeviceMesh, dim: int) -> None:
    """Split the tensors that go with dimension `dim` of W; of the others every rank has a part of the gradient."""
    group = mesh.get_group()
    for name, tensor_dim in layer.tp_splits[dim].items():
        tensor = distribute_tensor(getattr(layer, name).data, mesh, [Shard(tensor_dim)])
        setattr(layer, name, nn.Parameter(tensor))
    layer.tensor = functools.partial(_adapter_part, layer, frozenset(layer.tp_splits[dim]), group)
    if dim == 1:
        layer.sum_over_tp = functools.partial(funcol.all_reduce, reduceOp="sum", group=group)


def _adapter_part(layer: AdapterLinear, split: frozenset[str], group, name: str) -> torch.Tensor:
    tensor = getattr(layer, name)
    return tensor.to_local() if name in split else copy_to_tp(tensor, group)


def _local_parts(layer: nn.Linear, with_bias: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    return layer.weight.to_local(), layer.bias.to_local() if with_bias else None
