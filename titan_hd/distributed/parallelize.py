"""Wraps a model from outside: (tensor parallelism ->) activation checkpointing -> compile -> FSDP2, in this order.

Wrapping replaces `block.forward`, never a module, so parameter names stay those of the HF checkpoint.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from titan_hd.config.seeding import stable_seed
from titan_hd.distributed.parallel_dims import Block, ParallelDims, owned_block
from titan_hd.models.decoder import Decoder, RMSNorm
from titan_hd.models.hf_weights import WeightFiles, plan_files, write_headers, write_rows


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
    groups = [([block], True) for block in model.model.layers]
    if model.lm_head is not None:
        groups += [([model.model.embed_tokens], True), ([model.model.norm, model.lm_head], False)]
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
        modules[0].set_gradient_divide_factor(1.0)
        modules[0].set_force_sum_reduction_for_comms(True)  # gloo knows no pre-multiplied sum


def reshard(model: Decoder) -> None:
    """Back to shards after forward passes without a backward pass (validation).

    A backward pass does this by itself; without one, the groups that stay gathered would hand whole plain parameters to
    whoever looks at the model next: a checkpoint, the export.
    """
    for modules, _ in fsdp_groups(model):
        modules[0].reshard()


# ---------------------------------------------------------------------------------------------------------------------
# Weights into and out of the shards


def materialize(model: Decoder, device: torch.device) -> None:
    """Give a parallelised meta model real memory on `device`: shards only, values not set."""
    model.to_empty(device=device)
    model.reset_buffers(device)


def base_parameters(model: nn.Module) -> Iterator[tuple[str, DTensor]]:
    """The model's own parameters under their HF names, without the adapters' ones."""
    for name, parameter in model.named_parameters():
        if not name.endswith((".delta_A", ".delta_B")):
            yield name, parameter


def _block(parameter: DTensor, dims: ParallelDims) -> Block:
    """The rectangle of a parameter that this rank holds."""
    return owned_block(tuple(parameter.shape), _tp_split(parameter), dims.place(dims.rank), dims)


def _tp_split(parameter: DTensor) -> int | None:
    """The dimension in which tensor parallelism splits a parameter: that of the last placement of a two-dimensional
    sharding (FSDP2 puts the data-parallel dimensions first)."""
    names = parameter.device_mesh.mesh_dim_names
    return parameter.placements[-1].dim if "tp" in names and parameter.placements[-1].is_shard() else None


@torch.no_grad()
def load_weights(model: Decoder, dims: ParallelDims, directory: str) -> None:
    """Fill the shards from a HF directory; every rank reads only what it holds, one tensor at a time.

    Does not communicate. ValueError lists everything that is wrong with the files, before anything is loaded.
    """
    parameters = dict(base_parameters(model))
    expected = {name: p.shape for name, p in parameters.items()}
    files = WeightFiles(directory, expected, tied_head=model.lm_head is None)
    for name, parameter in parameters.items():
        block = _block(parameter, dims)
        if block.rows:
            columns = None if parameter.dim() == 1 else (block.column, block.column + block.columns)
            values = files.read_rows(name, block.row, block.row + block.rows, columns)
            parameter.to_local().copy_(values)


_INIT_ROWS = 1024


@torch.no_grad()
def init_weights(model: Decoder, dims: ParallelDims, seed: int, std: float = 0.02) -> None:
    """Random weights: norms 1, biases 0, the rest normal. Drawn on the host in blocks of rows, each with a generator
    keyed by (seed, name, block), so that the model is the same on any number of workers and any device."""
    norms = {f"{n}.weight" for n, module in model.named_modules() if isinstance(module, RMSNorm)}
    for name, parameter in base_parameters(model):
        local = parameter.to_local()
        if parameter.dim() == 1:
            local.fill_(1.0 if name in norms else 0.0)
            continue
        mine = _block(parameter, dims)
        for number in range(mine.row // _INIT_ROWS, -(-(mine.row + mine.rows) // _INIT_ROWS)):
            lo, hi = number * _INIT_ROWS, min(parameter.shape[0], (number + 1) * _INIT_ROWS)
            generator = torch.Generator().manual_seed(stable_seed("init", seed, name, number))
            drawn = torch.empty(hi - lo, parameter.shape[1]).normal_(0.0, std, generator=generator)
            first, last = max(lo, mine.row), min(hi, mine.row + mine.rows)
            if first < last:
                part = drawn[first - lo : last - lo, mine.column : mine.column + mine.columns]
                local[first - mine.row : last - mine.row].copy_(part)


@torch.no_grad()
def write_weights(
    model: Decoder, dims: ParallelDims, directory: Path, dtype: torch.dtype, barrier: Callable[[], None]
) -> None:
    """Write safetensors files; every rank writes what it holds in place, no rank gathers a tensor.

    The directory must exist on a file system that all ranks share. Every rank calls this; on return all have written.
    """
    parameters = dict(base_parameters(model))
    slots, headers = plan_files(directory, {name: p.shape for name, p in parameters.items()}, dtype)
    if dims.rank == 0:
        write_headers(slots, headers)
    barrier()
    for name, parameter in parameters.items():
        # Replicas, and tp ranks of a parameter that is not split, hold the same.
        writes = dims.dp_rank < dims.dp_shard and (_tp_split(parameter) is not None or dims.tp_rank == 0)
        local = parameter.to_local()
        if writes and local.numel():
            block = _block(parameter, dims)
            write_rows(slots[name], block.row, local.to("cpu", dtype), block.column)
    barrier()
