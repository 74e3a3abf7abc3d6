"""What a block keeps and needs, found by running it on tensors without memory.

A formula would have to know what autograd saves of every layer of every method; running one block under FakeTensorMode
costs a fraction of a second and knows. Shapes, dtypes and the moment at which each tensor dies are those of a real run.
"""

from __future__ import annotations

import math
import weakref
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from titan_hd.adapters.frozen_linear import FoldingLinear
from titan_hd.adapters.method import FoldingMethod, Method
from titan_hd.config.job_config import ActivationCheckpoint
from titan_hd.distributed.parallelize import apply_activation_checkpointing
from titan_hd.models.head import Targets, logits_or_loss
from titan_hd.models.model import Model
from titan_hd.models.model_config import ModelConfig
from titan_hd.models.norm import RMSNorm
from titan_hd.models.registry import build_model

# Operators that make a tensor as large as their input for themselves.
_WORKSPACE = {torch.ops.aten.logsumexp.default}


def _attention_flops(q: torch.Size, k: torch.Size, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Scores and values, of shapes [B, H, T, C] and [B, G, S, C]."""
    return 4 * math.prod(q) * k[2]


# Attention's operator on a CPU, which torch's counter does not know.
_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


class LiveBytes(TorchDispatchMode):
    """While it is entered: `live` is the bytes of all storages that operators have made since and that are still there,
    `peak` the most that there were at a time. `peak` may be set back to `live`."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    @property
    def live(self) -> int:
        """Asked of the storages each time: one may be emptied, and filled again, without an operator."""
        storages = [ref() for ref in [*self._storages.values()]]  # one may go in the middle of it
        return sum(storage.nbytes() for storage in storages if storage is not None)

    def __torch_dispatch__(self, func, types, args: tuple[Any, ...] = (), kwargs=None):
        before = {id(t.untyped_storage()) for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor) and id(tensor.untyped_storage()) not in before:
                self._add(tensor.untyped_storage())
        workspace = args[0].nbytes if func in _WORKSPACE else 0
        self.peak = max(self.peak, self.live + workspace)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key not in self._storages:
            self._storages[key] = weakref.ref(storage, lambda _: self._storages.pop(key))


class BlockMemory(NamedTuple):
    """Bytes of activations of one block and micro-batch.

    kept: from the forward to the backward pass. forward, backward: the most beside what is kept while one block's pass
    runs; backward includes the gradients of the block's own parameters, in the dtype of the compute.
    """

    kept: int
    forward: int
    backward: int


class HeadMemory(NamedTuple):
    """Bytes of the final norm, the head and the loss. peak: the most in the forward pass; backward: in the backward
    pass, with the gradient of the hidden states."""

    peak: int
    backward: int


def head_memory(config: ModelConfig, tokens: tuple[int, int], dtype: torch.dtype, trained: bool) -> HeadMemory:
    """Of a micro-batch of tokens (B, T) that all have a label. trained: the head gets a gradient. A classification head
    sees one token of each sequence: what counts is the gradient of the hidden states."""
    if config.num_labels:
        return HeadMemory(0, tokens[0] * tokens[1] * config.hidden_size * dtype.itemsize)
    with FakeTensorMode(), torch.device("cpu"):
        norm = RMSNorm(config.hidden_size, eps=1e-6)
        weight = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype, requires_grad=trained)
        norm.weight = nn.Parameter(torch.empty(config.hidden_size, dtype=dtype), requires_grad=trained)
        count = tokens[0] * tokens[1]
        targets = Targets(torch.arange(count), torch.zeros(count, dtype=torch.long))
        with LiveBytes() as bytes_:
            h = torch.empty(*tokens, config.hidden_size, dtype=dtype).requires_grad_()
            loss = logits_or_loss(norm(h), weight, targets)
            peak, bytes_.peak = bytes_.peak, bytes_.live
            loss.backward()
            return HeadMemory(peak, bytes_.peak)


def block_memory(
    config: ModelConfig,
    method: Method,
    targets: list[str] | None,
    tokens: tuple[int, int],
    dtype: torch.dtype,
    checkpointing: ActivationCheckpoint,
    dropout: bool = False,
) -> BlockMemory:
    """Of an inner block of a model that a method was applied to. tokens: (B, T) of a micro-batch; dtype: of compute;
    dropout: whether the adapters have it.

    Two blocks are run: what the second adds is what every further one adds.
    """
    two = config.with_blocks(2).changed(vocab_size=1)
    with FakeTensorMode(), torch.device("cpu"):
        model = build_model(two)
        method.apply(model, targets)
        _as_gathered(model, dtype)
        _bind(model, method, dtype)
        if checkpointing.mode != "none":
            apply_activation_checkpointing(model, checkpointing.mode, checkpointing.keep, dropout)
        positions = torch.zeros(tokens, dtype=torch.long)
        beside = model.block_inputs(positions, dtype)
        with LiveBytes() as bytes_:
            h = torch.empty(*tokens, config.hidden_size, dtype=dtype).requires_grad_()
            first, second = model.blocks()
            h = first(h, *beside)
            after_one = bytes_.peak = bytes_.live
            h = second(h, *beside)
            kept, forward = bytes_.live - after_one, bytes_.peak - bytes_.live
            gy = torch.empty_like(h)
            bytes_.peak = before = bytes_.live
            h.backward(gy)
            return BlockMemory(kept, forward, bytes_.peak - before)


def recomputed_flops(
    config: ModelConfig,
    method: Method,
    targets: list[str] | None,
    tokens: tuple[int, int],
    checkpointing: ActivationCheckpoint,
) -> float:
    """Operations per token that all blocks together do a second time. Arguments as of `block_memory`."""

    def counted(checkpointing: ActivationCheckpoint) -> int:
        with FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter:
            block_memory(config, method, targets, tokens, torch.bfloat16, checkpointing)
        return counter.get_total_flops()

    nothing = ActivationCheckpoint(mode="none")
    again = 0 if checkpointing.mode == "none" else counted(checkpointing) - counted(nothing)
    return again / 2 * config.num_hidden_layers / (tokens[0] * tokens[1])


def _as_gathered(model: Model, dtype: torch.dtype) -> None:
    """Every parameter in the dtype of the compute, as FSDP2 hands it to a forward pass."""
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            module.register_parameter(name, nn.Parameter(torch.empty(p.shape, dtype=dtype), p.requires_grad))


def _bind(model: Model, method: Method, dtype: torch.dtype) -> None:
    """Adapters for the layers whose registry is not there, with the gradients that it keeps."""
    for layer in model.modules():
        if isinstance(layer, FoldingLinear):
            assert isinstance(method, FoldingMethod)
            fixed, rank = torch.float32 if method.mute_scalar else dtype, method.together * method.rank
            a, b = torch.empty(rank, layer.in_features, dtype=fixed), torch.empty(layer.out_features, rank, dtype=fixed)
            da, db = torch.empty(rank, layer.in_features), torch.empty(layer.out_features, rank)
            for leaf in (da, db):
                leaf.requires_grad_().grad = torch.empty_like(leaf)
            layer.bind(a, b, da, db)
