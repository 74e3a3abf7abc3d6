"""Wraps a model from outside: (tensor parallelism ->) activation checkpointing -> compile -> FSDP2, in this order.

Wrapping replaces `block.forward`, never a module, so parameter names stay those of the HF checkpoint.
"""

from __future__ import annotations

import functools

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from titan_hd.distributed.parallel_dims import ParallelDims
from titan_hd.models.decoder import Decoder


def parallelize(
    model: Decoder,
    dims: ParallelDims,
    ignored_params: set[nn.Parameter],
    param_dtype: torch.dtype,
    checkpoint_mode: str,
    compile_blocks: bool,
) -> None:
    """Wrap a model on the meta device. Tensor parallelism comes before (`apply_tensor_parallel`): the adapters' tensors
    follow how it splits the weights."""
    if checkpoint_mode != "none":
        apply_activation_checkpointing(model, checkpoint_mode)
    if compile_blocks:
        apply_compile(model)
    apply_fsdp(model, dims, ignored_params, param_dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Activation checkpointing

_ATTENTION_OPS = {
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.higher_order.flex_attention,
}
_MATMUL_OPS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}


def _selective_contexts():
    """Keep attention's outputs and every second matrix product; recompute the rest."""
    products = {"forward": 0, "recompute": 0}

    def policy(ctx, op, *args, **kwargs):
        if op in _ATTENTION_OPS:
            return CheckpointPolicy.MUST_SAVE
        if op in _MATMUL_OPS:
            phase = "recompute" if ctx.is_recompute else "forward"
            products[phase] += 1
            if products[phase] % 2:
                return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def apply_activation_checkpointing(model: Decoder, mode: str) -> None:
    """Recompute each block in the backward pass, wholly ("full") or but for its costly results ("selective")."""
    extra = {"context_fn": _selective_contexts} if mode == "selective" else {}
    for block in model.model.layers:
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, **extra)


def apply_compile(model: Decoder) -> None:
    """Compile each block as one graph; FSDP2's hooks stay outside of it. Equal blocks share one compilation."""
    for block in model.model.layers:
        block.forward = torch.compile(block.forward, fullgraph=True)


# ---------------------------------------------------------------------------------------------------------------------
# FSDP2


def fsdp_groups(model: Decoder) -> list[tuple[list[nn.Module], bool]]:
    """What is gathered together, as data: modules of each FSDP2 group, and whether it is resharded after forward.

    The head is needed again at once in the backward pass, so it stays gathered. A tied embedding is the head too, and
    belongs to the root group, which stays gathered for the whole step.
    """
    groups: list[tuple[list[nn.Module], bool]] = [([block], True) for block in model.model.layers]
    if model.lm_head is not None:
        groups.extend([([model.model.embed_tokens], True), ([model.model.norm, model.lm_head], False)])
    return [*groups, ([model], False)]


def apply_fsdp(model: Decoder, dims: ParallelDims, ignored_params: set[nn.Parameter], param_dtype: torch.dtype) -> None:
    """Shard fp32 masters over the mesh; gather them in `param_dtype`. Gradients are summed, not averaged: the loss is
    already divided by the number of tokens of the whole step."""
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
    for modules, reshard in fsdp_groups(model):
        fully_shard(
            modules if len(modules) > 1 else modules[0],
            mesh=dims.fsdp_mesh,
            mp_policy=policy,
            reshard_after_forward=reshard,
            ignored_params=ignored_params,
        )
        first = modules[0]
        assert isinstance(first, FSDPModule)
        first.set_gradient_divide_factor(1.0)
        first.set_force_sum_reduction_for_comms(True)  # gloo knows no pre-multiplied sum
    if not model.model.embed_tokens.weight.requires_grad and model.lm_head is not None:
        # A frozen embedding has no backward pass, but FSDP2 would prefetch it during that of the first block.
        first = model.model.layers[0]
        assert isinstance(first, FSDPModule)
        first.set_modules_to_backward_prefetch([first])


def reshard(model: Decoder) -> None:
    """Back to shards after forward passes without a backward pass (validation).

    A backward pass does this by itself; without one, the groups that stay gathered would hand whole plain parameters to
    whoever looks at the model next: a checkpoint, the export.
    """
    for modules, _ in fsdp_groups(model):
        assert isinstance(modules[0], FSDPModule)
        modules[0].reshard()
