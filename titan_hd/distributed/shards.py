"""Weights from files into the shards, and back: every block is read and written once, no tensor is gathered."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from titan_hd.adapters.adapter_linear import adapter_layers
from titan_hd.console import Progress
from titan_hd.distributed.adapter_init import merged_weights
from titan_hd.distributed.collectives import TRAFFIC, on_rank_zero, raise_on_all
from titan_hd.distributed.parallel_dims import Block, ParallelDims, local_part, owned_block
from titan_hd.distributed.regroup import tp_split
from titan_hd.distributed.weight_reading import Part, read_parts
from titan_hd.files import disk_faults
from titan_hd.models.hf_files import check_space, plan_files, sync_files, weight_files, write_headers, write_rows
from titan_hd.models.model import Model
from titan_hd.seeding import stable_seed

logger = logging.getLogger("titan_hd")

_INIT_ROWS = 1024


def materialize(model: Model, device: torch.device, shards_on: torch.device | None = None) -> None:
    """Give a parallelised meta model real memory: shards only, values not set. shards_on: where they lie, if not on the
    device that computes."""
    model.to_empty(device=shards_on or device)
    model.reset_buffers(device)


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The model's own parameters under their HF names, without those of adapters."""
    beside = {name for name, _ in adapter_parameters(model)}
    for name, parameter in model.named_parameters():
        if not name.endswith((".delta_A", ".delta_B")) and name not in beside:
            yield name, parameter


def adapter_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The tensors of `AdapterLinear` layers, named <layer>.<tensor>."""
    for name, layer in adapter_layers(model).items():
        for key in layer.adapter_names:
            yield f"{name}.{key}", getattr(layer, key)


def _block(parameter: nn.Parameter, dims: ParallelDims) -> Block:
    """The rectangle of a parameter that this rank holds."""
    return owned_block(tuple(parameter.shape), tp_split(parameter), dims.place(dims.rank), dims)


class LoadedWeights(NamedTuple):
    """bytes_read: by this rank. bytes_received: by this rank, of what others have read. zeros: names of the weights in
    which there is nothing but zeros, on every rank. missing: of those that the files lack, and may: a new head's."""

    bytes_read: int
    bytes_received: int
    zeros: list[str]
    missing: list[str]


@torch.no_grad()
def load_weights(model: Model, dims: ParallelDims, directory: str) -> LoadedWeights:
    """Fill the shards from a HF directory. Rank 0 reads the index and the headers; of the ranks that hold a block one
    reads its byte ranges, and the others receive them (`weight_reading`). Collective.

    Raises:
        UserError: one line for everything that is wrong with the files, on every rank, before any rank loads anything;
            or for a weight that holds a NaN.
    """
    started, received = time.perf_counter(), TRAFFIC.received
    parameters = dict(base_parameters(model))
    expected, config = {name: p.shape for name, p in parameters.items()}, model.config
    files = on_rank_zero("checking the weights", lambda: weight_files(directory, expected, config))
    parameters = {name: p for name, p in parameters.items() if name not in files.missing}
    parts = {name: local_part(p).numel() / p.numel() for name, p in parameters.items()}
    total = round(sum(files.nbytes(name) * part for name, part in parts.items()))
    progress = Progress("reading the weights", total, "B", shown=dims.rank == 0)
    held = [Part(n, _block(p, dims), tp_split(p), local_part(p)) for n, p in parameters.items()]
    with raise_on_all("reading the weights"), progress:  # it raises when nobody waits for it any more
        read_parts(files, held, dims, held[0].target.device, lambda: progress.update(files.bytes_read - progress.done))
    files.close()
    received = TRAFFIC.received - received
    read = torch.tensor([files.bytes_read, *(name in files.nonzero for name in parameters)])
    dist.all_reduce(read)
    read, nonzero = read[0], read[1:].tolist()
    seconds, size = time.perf_counter() - started, sum(map(files.nbytes, parameters))
    logger.info(
        "read %.3f GiB of %.3f GiB in %.1f s (%.2f GB/s), all workers together",
        read.item() / 2**30,
        size / 2**30,
        seconds,
        read.item() / 1e9 / seconds,
    )
    zeros = [name for name, count in zip(parameters, nonzero) if not count]
    return LoadedWeights(files.bytes_read, received, zeros, sorted(files.missing))


@torch.no_grad()
def init_weights(
    model: Model, dims: ParallelDims, seed: int, std: float = 0.02, names: Collection[str] | None = None
) -> None:
    """Random weights, all of them or those of `names`: normal where the model has no first value (`Model.initial`).
    Drawn on the host in blocks of rows, each with a generator keyed by (seed, name, block), so that the model is the
    same on any number of workers and any device."""
    parameters = {name: p for name, p in base_parameters(model) if names is None or name in names}
    with Progress("drawing random weights", len(parameters), "tensors", shown=dims.rank == 0) as progress:
        for name, parameter in parameters.items():
            value = model.initial(name)
            if value is None:
                _draw(name, parameter, dims, seed, std)
            elif isinstance(value, torch.Tensor):
                mine = _block(parameter, dims)
                local_part(parameter).copy_(value[mine.row : mine.row + mine.rows])
            else:
                local_part(parameter).fill_(value)
            progress.update()


def _draw(name: str, parameter: nn.Parameter, dims: ParallelDims, seed: int, std: float) -> None:
    """Random values of a matrix, or of several, into this rank's part."""
    local, mine = local_part(parameter), _block(parameter, dims)
    for number in range(mine.row // _INIT_ROWS, math.ceil((mine.row + mine.rows) / _INIT_ROWS)):
        lo, hi = number * _INIT_ROWS, min(parameter.shape[0], (number + 1) * _INIT_ROWS)
        generator = torch.Generator().manual_seed(stable_seed("init", seed, name, number))
        drawn = torch.empty(hi - lo, *parameter.shape[1:]).normal_(0.0, std, generator=generator)
        first, last = max(lo, mine.row), min(hi, mine.row + mine.rows)
        if first < last:
            part = drawn[first - lo : last - lo, mine.column : mine.column + mine.columns]
            local[first - mine.row : last - mine.row].copy_(part)


@torch.no_grad()
def write_weights(model: Model, dims: ParallelDims, directory: Path, dtype: torch.dtype, max_file_bytes: float) -> None:
    """Write safetensors files of bounded size; every rank writes what it holds in place. Collective.

    Adapters are merged in fp32 on the way; the model stays as it is.

    The directory must exist on a file system that all ranks share. On return everything is on the disk.

    Raises:
        UserError: the disk is full or fails, on any rank.
    """
    parameters = dict(base_parameters(model))
    shapes = {name: p.shape for name, p in parameters.items()}
    slots, headers = plan_files(directory, shapes, dtype, max_file_bytes)
    with raise_on_all("writing the headers"), disk_faults(directory):
        if dims.rank == 0:
            check_space(directory, slots, shapes)
            write_headers(slots, headers)
    adapted = {f"{name}.weight" for name in adapter_layers(model)}
    own = [(name, local_part(p)) for name, p in parameters.items() if name not in adapted]
    written = set()
    with Progress("exporting the weights", len(parameters), "tensors", shown=dims.rank == 0) as progress:
        for wave in itertools.chain([own], merged_weights(model, dims)):
            with raise_on_all("writing the weights"), disk_faults(directory):
                for name, local in wave:
                    parameter = parameters[name]
                    if dims.first_copy(dims.rank, tp_split(parameter)) and local.numel():
                        block = _block(parameter, dims)
                        write_rows(slots[name], block.row, local, block.column)
                        written.add(slots[name].file)
                    progress.update()
    with raise_on_all("writing the weights"), disk_faults(directory):
        sync_files(sorted(written))
