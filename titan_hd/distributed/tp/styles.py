"""The ways in which tensor parallelism changes one module of the decoder: what `tensor_parallel`'s tables name.

A style is a function (module, stream) -> None. It makes the weights that it splits DTensors over tp, and replaces
methods of this one module (`_replace`): `forward`, or of an adapter's layer those that are there for it. Layouts in
docstrings are those of activations, in the words of `functions.py`; "stream" is the residual stream's layout.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from titan_hd.adapters.adapter_linear import AdapterLinear
from titan_hd.adapters.frozen_linear import FrozenLinear
from titan_hd.distributed.parallel_dims import local_part
from titan_hd.distributed.tp.functions import (
    copy_to_tp,
    gather_alike,
    gather_dim,
    gather_sequence,
    own_piece,
    reduce_from_tp,
    scatter_sequence,
)
from titan_hd.distributed.tp.loss import split_cross_entropy_sum_
from titan_hd.models.decoder import Decoder
from titan_hd.models.head import logits_or_loss
from titan_hd.models.norm import RMSNorm


class Stream:
    """The layout of the residual stream in the current forward pass. The model's forward sets it, its parts read it.

    length: T where the layout is Shard(1); None where it is Replicate.
    whole_logits: gather the logits of a split head.
    """

    def __init__(self, mesh: DeviceMesh):
        self.mesh, self.group = mesh, mesh.get_group()
        self.length: int | None = None
        self.whole_logits = False

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """stream -> Replicate, in front of layers whose ranks compute terms of dx."""
        return copy_to_tp(x, self.group) if self.length is None else gather_sequence(x, self.length, self.group)

    def leave(self, x: torch.Tensor) -> torch.Tensor:
        """Partial -> stream."""
        return reduce_from_tp(x, self.group) if self.length is None else scatter_sequence(x, self.group)

    def replicated(self, parameter: torch.Tensor) -> torch.Tensor:
        """A parameter that is not split and works on the stream: of Shard(1), each rank has a term of its gradient."""
        return parameter if self.length is None else copy_to_tp(parameter, self.group)


Style = Callable[[Any, Stream], None]


def _distribute(module: nn.Module, name: str, stream: Stream, dim: int) -> None:
    """Split a parameter over tp."""
    old = getattr(module, name)
    new = distribute_tensor(old.data, stream.mesh, [Shard(dim)])
    setattr(module, name, nn.Parameter(new, requires_grad=old.requires_grad))


def _replace(module: nn.Module, **methods: Callable) -> None:
    """Put functions in the place of methods of this one module. Its parameters keep their names."""
    for name, function in methods.items():
        setattr(module, name, function)


# ---------------------------------------------------------------------------------------------------------------------
# Modules of a block


def gathered_input(module: nn.Module, stream: Stream) -> None:
    """stream -> Replicate, once for all the column-wise layers inside."""
    forward = module.forward
    _replace(module, forward=lambda x, *args: forward(stream.enter(x), *args))


def norm_of_stream(norm: RMSNorm, stream: Stream) -> None:
    """stream -> stream; the weight is not split."""
    _replace(norm, forward=lambda x: norm.normalize(x, stream.replicated(norm.weight)))


def norm_of_own_heads(norm: nn.Module, stream: Stream) -> None:
    """Works on this rank's heads. The weight, common to all heads, is not split; its gradient comes in terms."""
    if isinstance(norm, RMSNorm):  # decoders without such norms have an Identity here
        _replace(norm, forward=lambda x: norm.normalize(x, copy_to_tp(norm.weight, stream.group)))


def column_wise(layer: nn.Linear, stream: Stream) -> None:
    """Replicate -> Shard(-1): each rank computes its own output features; the bias is split with them."""
    if layer.bias is not None:
        _distribute(layer, "bias", stream, 0)
    _replace(layer, forward=_split_linear(layer, stream, 0))


def row_wise(layer: nn.Linear, stream: Stream) -> None:
    """Shard(-1) -> stream: products of each rank's input features are summed; the bias is added once, behind."""
    partial_sums = _split_linear(layer, stream, 1)

    def forward(x):
        y = stream.leave(partial_sums(x))
        return y if layer.bias is None else y + stream.replicated(layer.bias)

    _replace(layer, forward=forward)


def _split_linear(layer: nn.Linear, stream: Stream, dim: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Split W in `dim`; returns the layer's computation with this rank's part of it."""
    _distribute(layer, "weight", stream, dim)

    def local_parameters() -> tuple[torch.Tensor, torch.Tensor | None]:
        return local_part(layer.weight), local_part(layer.bias) if dim == 0 and layer.bias is not None else None

    if not isinstance(layer, FrozenLinear):
        return lambda x: F.linear(x, *local_parameters())
    _replace(layer, parameters_for_compute=local_parameters)
    if dim == 1:
        _replace(layer, dropped=functools.partial(_dropped_columns, layer, stream.group))
    if isinstance(layer, AdapterLinear):
        _split_adapter(layer, stream, dim)
    return layer.forward


def _split_adapter(layer: AdapterLinear, stream: Stream, dim: int) -> None:
    """Split the adapter's tensors that go with dimension `dim` of W; of the others every rank has a term of the
    gradient."""
    assert layer.tp_splits is not None  # Method.tensor_parallel
    split = layer.tp_splits[dim]
    for name, tensor_dim in split.items():
        _distribute(layer, name, stream, tensor_dim)

    def tensor(name: str) -> torch.Tensor:
        value = getattr(layer, name)
        return value.to_local() if name in split else copy_to_tp(value, stream.group)

    _replace(layer, tensor=tensor)
    if dim == 1:
        _replace(layer, sum_over_tp=functools.partial(funcol.all_reduce, reduceOp="sum", group=stream.group))


def _dropped_columns(layer: FrozenLinear, group: dist.ProcessGroup, x: torch.Tensor) -> torch.Tensor:
    """Dropout of this rank's columns of the input. Every rank draws the mask of the whole input, which is the one that
    is drawn without tensor parallelism: generators are seeded by the samples, so they are alike on tp ranks."""
    if not (layer.dropout and layer.training):
        return x
    size = dist.get_world_size(group)
    whole = F.dropout(x.new_ones(*x.shape[:-1], size * x.shape[-1]), layer.dropout)
    kept = whole.chunk(size, dim=-1)[dist.get_rank(group)] != 0
    return torch.where(kept, x / (1 - layer.dropout), 0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Embedding and head. A tied model has no lm_head, its `tied_head` reads the embedding: a head's style gets the model.


def split_embedding(embedding: nn.Embedding, stream: Stream) -> None:
    """Token ids -> stream, split by the vocabulary: a rank looks up the tokens that it has, and the sum over ranks is
    the embedding."""
    _distribute(embedding, "weight", stream, 0)

    def forward(input_ids):
        weight = local_part(embedding.weight)
        local = input_ids - dist.get_rank(stream.group) * len(weight)
        others = (local < 0) | (local >= len(weight))
        return stream.leave(F.embedding(local.masked_fill(others, 0), weight).masked_fill(others[..., None], 0.0))

    _replace(embedding, forward=forward)


def whole_embedding(embedding: nn.Embedding, stream: Stream) -> None:
    """Token ids -> stream: a rank looks up its own positions."""

    def forward(input_ids):
        own = input_ids if stream.length is None else own_piece(input_ids, stream.group)
        return F.embedding(own, stream.replicated(embedding.weight))

    _replace(embedding, forward=forward)


def split_head(model: Decoder, stream: Stream) -> None:
    """stream -> the loss; without targets logits split by the vocabulary, or whole ones where the pass asks for them. A
    tied head was split with the embedding."""
    head = model.model.embed_tokens if model.lm_head is None else model.lm_head
    if model.lm_head is not None:
        _distribute(head, "weight", stream, 0)

    cross_entropy_sum = functools.partial(split_cross_entropy_sum_, group=stream.group)

    def forward(x, targets=None):
        out = logits_or_loss(stream.enter(x), local_part(head.weight), targets, cross_entropy_sum)
        return gather_dim(out, 2, stream.group) if stream.whole_logits and targets is None else out

    _set_head(model, forward)


def whole_head(model: Decoder, stream: Stream) -> None:
    """stream -> Replicate, in front of the head, which every rank computes alike."""
    whole = model.tied_head if model.lm_head is None else model.lm_head.forward

    def forward(x, targets=None):
        return whole(x if stream.length is None else gather_alike(x, stream.length, stream.group), targets)

    _set_head(model, forward)


def _set_head(model: Decoder, forward: Callable[..., torch.Tensor]) -> None:
    if model.lm_head is None:
        _replace(model, tied_head=forward)
    else:
        _replace(model.lm_head, forward=forward)
