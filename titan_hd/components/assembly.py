"""From a plan to a model that is ready for memory: the method on it, its update around it, and FSDP2's wrappers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from titan_hd.adapters.adapter_linear import untouched_parameters
from titan_hd.adapters.method import Method
from titan_hd.components.update import Update, build_update
from titan_hd.config.job_config import JobConfig
from titan_hd.distributed.parallel_dims import ParallelDims
from titan_hd.distributed.parallelize import parallelize
from titan_hd.distributed.tp.tensor_parallel import apply_tensor_parallel
from titan_hd.models.decoder import Decoder
from titan_hd.models.model import Model
from titan_hd.models.model_config import ModelConfig
from titan_hd.models.registry import build_model


class Assembled(NamedTuple):
    """trained_layers: their names. ignored: parameters that FSDP2 neither gathers nor reduces. param_dtype: that of the
    gathered weights."""

    model: Model
    update: Update
    trained_layers: list[str]
    ignored: set[nn.Parameter]
    param_dtype: torch.dtype


def assemble(
    config: JobConfig, decoder: ModelConfig, method: Method, dims: ParallelDims, untouched: torch.dtype
) -> Assembled:
    """meta init -> method -> tensor parallelism -> update -> the other wrappers. Nothing has memory or values yet, and
    nothing is communicated: also one process, of a mesh that is there in name alone, can do it.

    config: with its dtypes resolved. untouched: dtype of the shards of what the method leaves as the files have it.
    """
    c = config
    with torch.device("meta"):
        model = build_model(decoder).to(getattr(torch, c.training.master_dtype))
    trained_layers = method.apply(model, c.adapter.target_modules)
    for parameter in untouched_parameters(model):
        parameter.data = parameter.data.to(untouched)
    if dims.tp > 1:
        p, mesh = c.parallelism, dims.world["tp"]
        assert isinstance(model, Decoder), "the family that can be split"
        apply_tensor_parallel(model, mesh, p.sequence_parallel, p.loss_parallel)
    update = build_update(model, method, dims, c)
    ignored, param_dtype = update.ignored_parameters(), getattr(torch, c.training.mixed_precision_param)
    parallelize(
        model,
        dims,
        ignored_params=ignored,
        param_dtype=param_dtype,
        checkpoint_mode=c.activation_checkpoint.mode,
        compile_blocks=c.compile.enable,
        checkpoint_keep=c.activation_checkpoint.keep,
        dropout=c.adapter.dropout > 0 or decoder.draws,
        offload=c.training.enable_cpu_offload,
    )
    return Assembled(model, update, trained_layers, ignored, param_dtype)
