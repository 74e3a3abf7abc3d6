"""Wraps a model from outside: (tensor parallelism ->) activation checkpointing -> compile -> FSDP2, in this order.

Wrapping replaces `block.forward`, never a module, so parameter names stay those of the HF checkpoint.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from titan_hd.distributed.parallel_dims import ParallelDims
from titan_hd.models.model import Model

KEEPABLE = ("qkv", "gate_up")  # values of activation_checkpoint.keep
_GRAPHS = 64  # of one block's code at most: lengths, times kinds of masks, times the first block and the others


def parallelize(
    model: Model,
    dims: ParallelDims,
    ignored_params: set[nn.Parameter],
    param_dtype: torch.dtype,
    checkpoint_mode: str,
    compile_blocks: bool,
    checkpoint_keep: Sequence[str] = KEEPABLE,
    dropout: bool = False,
    offload: bool = False,
) -> None:
    """Wrap a model on the meta device. Tensor parallelism comes before (`apply_tensor_parallel`): the adapters' tensors
    follow how it splits the weights. checkpoint_keep, dropout: see `apply_activation_checkpointing`; offload: see
    `apply_fsdp`."""
    if checkpoint_mode != "none":
        apply_activation_checkpointing(model, checkpoint_mode, checkpoint_keep, dropout)
    if compile_blocks:
        apply_compile(model)
    apply_fsdp(model, dims, ignored_params, param_dtype, offload)


# ---------------------------------------------------------------------------------------------------------------------
# Activation checkpointing


def apply_activation_checkpointing(
    model: Model, mode: str, keep: Sequence[str] = KEEPABLE, draws: bool = False
) -> None:
    """Recompute each block in the backward pass, wholly ("full"), or but for its costly results ("selective").

    selective keeps the residual stream, attention's result and, if `keep` names them, q, k, v ("qkv") and the outputs
    of gate_proj and up_proj ("gate_up"). It recomputes the norms, the MLP's product, and what `keep` does not name. No
    matrix product runs twice but those; nobody needs the outputs of o_proj and down_proj again.

    draws: adapters have dropout, whose masks must be drawn again.
    """
    for block in model.blocks():
        if mode == "full":
            flags = {"use_reentrant": False, "preserve_rng_state": draws, "determinism_check": "none"}
            block.forward = functools.partial(checkpoint, block.forward, **flags)
            continue
        block.recompute(keep, draws)


def apply_compile(model: Model) -> None:
    """Compile each block as one graph per shape; FSDP2's hooks stay outside of it. Equal blocks share one compilation.

    Shapes are static: rows come in a handful of lengths (`data.loader.length_buckets`). Passes without gradients are
    not compiled: validation and generation have shapes of their own, too many and too rare to compile for.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _GRAPHS)
    for block in model.blocks():
        compiled = torch.compile(block.forward, fullgraph=True, dynamic=False)
        block.forward = functools.partial(_compiled_in_training, compiled, block.forward)


def _compiled_in_training(compiled: Callable, eager: Callable, *args: Any) -> torch.Tensor:
    return compiled(*args) if torch.is_grad_enabled() else eager(*args)


# ---------------------------------------------------------------------------------------------------------------------
# FSDP2


def fsdp_groups(model: Model) -> list[tuple[list[nn.Module], bool]]:
    """What is gathered together, as data: modules of each FSDP2 group, and whether it is resharded after forward.

    The head is needed again at once in the backward pass, so it stays gathered. A tied embedding is the head too, and
    belongs to the root group, which stays gathered for the whole step.
    """
    groups: list[tuple[list[nn.Module], bool]] = [([block], True) for block in model.blocks()]
    if model.output_head() is not None:
        groups.extend([([model.embedding()], True), (_behind(model), False)])
    return [*groups, ([model], False)]


def _behind(model: Model) -> list[nn.Module]:
    """What is behind the blocks."""
    return [module for module in (model.final_norm(), model.output_head()) if module is not None]


def apply_fsdp(
    model: Model,
    dims: ParallelDims,
    ignored_params: set[nn.Parameter],
    param_dtype: torch.dtype,
    offload: bool = False,
) -> None:
    """Shard fp32 masters over the mesh; gather them in `param_dtype`. Gradients are summed, not averaged: the loss is
    already divided by the number of tokens of the whole step. offload: the shards lie on the host."""
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
    on_host = CPUOffloadPolicy(pin_memory=dims.device_type == "cuda") if offload else OffloadPolicy()
    for modules, reshard in fsdp_groups(model):
        fully_shard(
            modules if len(modules) > 1 else modules[0],
            mesh=dims.fsdp_mesh,
            mp_policy=policy,
            reshard_after_forward=reshard,
            ignored_params=ignored_params,
            offload_policy=on_host,
        )
        first = modules[0]
        assert isinstance(first, FSDPModule)
        if dims.dp_size > 1:  # one worker has nothing to divide, but FSDP2 would make a copy for it
            first.set_gradient_divide_factor(1.0)
        first.set_force_sum_reduction_for_comms(True)  # gloo knows no pre-multiplied sum
    if dims.dp_shard > 1:
        prefetch_forward(model)
    if model.output_head() is not None and not any(p.requires_grad for p in model.embedding().parameters()):
        # A frozen embedding has no backward pass, but FSDP2 would prefetch it during that of the first block.
        first = next(model.blocks())
        assert isinstance(first, FSDPModule)
        first.set_modules_to_backward_prefetch([first])


def prefetch_forward(model: Model) -> None:
    """Ask for the next block's weights before a block computes. FSDP2 by itself asks when the host comes to the next
    block, which is in time only while the host runs ahead of the device."""
    chain: list[nn.Module] = [*model.blocks()]
    if model.output_head() is not None:
        chain = [model.embedding(), *chain, _behind(model)[0]]  # the first of a group stands for it
    for module, following in itertools.pairwise(chain):
        assert isinstance(module, FSDPModule)
        assert isinstance(following, FSDPModule)
        module.set_modules_to_forward_prefetch([following])


def reshard(model: Model) -> None:
    """Back to shards after forward passes without a backward pass (validation).

    A backward pass does this by itself; without one, the groups that stay gathered would hand whole plain parameters to
    whoever looks at the model next: a checkpoint, the export.
    """
    for modules, _ in fsdp_groups(model):
        assert isinstance(modules[0], FSDPModule)
        modules[0].reshard()
