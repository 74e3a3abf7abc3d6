"""How often FSDP2 gathers W, and sums gradients: for every micro-batch, or once for all of a step.

W changes once a step, and FSDP2 gathers it twice for every micro-batch: in the forward pass and in the backward pass.
That is the price of holding no more than two blocks of the gathered copy. Where the device has room for the whole copy,
it may stay from the first forward pass of a step to the last backward pass: 1 x W at the collectives instead of 2 M x,
and on one worker one cast of the masters instead of 2 M. The last backward pass frees it block by block, so that fold,
optimizer, checkpoints and export meet shards, and the next step gathers what they have made of W.

Gradients are summed over the micro-batches first and over the workers then, where that costs little: where W is not in
shards (one worker, or replicas alone), for there a shard of the gradient is all of it; and where what is trained is
small beside W, as adapters are, so that each worker can hold its whole gradient. Else after every micro-batch.
"""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from titan_hd.distributed.parallel_dims import ParallelDims
from titan_hd.models.model import Model

logger = logging.getLogger("titan_hd")

GIB = 2**30
CPU_SHARE = 4  # a host's memory has other users (data, page cache): a copy may take a quarter of what is available
SMALL = 0.1  # of all elements: what is trained is small
CUDA_MARGIN = 0.08  # of the device's memory, for fragmentation and the buffers of collectives


class WeightGathers:
    """The policy of one run. `before_micro_batch` comes before each forward pass of a training step, `after_step` when
    the step's update is done.

    setting: parallelism.fsdp_reshard_after_forward. "default" keeps the copy if there is more than one micro-batch to
        keep it for, and memory for it beside what the first step took, which still gathers for every micro-batch.
    sums_once: see `sums_gradients_once`. copy_bytes: of the gathered W, see `gathered_bytes`. seq_len: the longest row
        that a later step may bring. device: where the copy would lie.
    """

    def __init__(
        self,
        model: Model,
        setting: str,
        micro_batches: int,
        sums_once: bool,
        copy_bytes: int,
        seq_len: int,
        device: torch.device,
    ):
        self.model, self.micro_batches, self.copy_bytes, self.seq_len = model, micro_batches, copy_bytes, seq_len
        self.device = device
        self.undecided = setting == "default" and micro_batches > 1
        self.kept = False
        self.sums_once = sums_once
        self.allocated = 0  # bytes on the GPU before the first step
        if setting == "never":
            self._keep()

    def before_micro_batch(self, micro_batch: int) -> None:
        """micro_batch: 0-based, within the step."""
        last = micro_batch == self.micro_batches - 1
        if self.sums_once and (last or micro_batch == 0):
            assert isinstance(self.model, FSDPModule)
            self.model.set_requires_gradient_sync(last)
        if self.kept and (last or micro_batch == 0):
            assert isinstance(self.model, FSDPModule)
            self.model.set_reshard_after_backward(last)
        elif self.undecided and micro_batch == 0 and self.device.type == "cuda":
            self.allocated = torch.cuda.memory_allocated(self.device)

    def after_step(self, longest: int) -> None:
        """Decide, after the first step; collective then. longest: tokens of the step's longest row, with padding."""
        if not self.undecided:
            return
        self.undecided = False
        left = self._memory_left(longest)
        keep = torch.tensor(self.copy_bytes <= left, dtype=torch.int32, device=self.device)
        dist.all_reduce(keep, dist.ReduceOp.MIN)  # all or none: they gather together
        copy = f"{self.copy_bytes / GIB:.2f} GiB gathered, {max(0, left) / GIB:.2f} GiB left for it on this worker"
        if keep.item():
            logger.info("W is gathered once a step and kept over its %d micro-batches: %s", self.micro_batches, copy)
            self._keep()
        else:
            logger.info("W is gathered for every micro-batch, forward and backward: %s, or less on another", copy)

    def _keep(self) -> None:
        assert isinstance(self.model, FSDPModule)
        self.kept = True
        self.model.set_reshard_after_forward(False)

    def _memory_left(self, longest: int) -> int:
        """Bytes that a copy may take. On a GPU: what the first step's activations leave, had its rows had seq_len
        tokens. On CPUs: a quarter of the available memory, shared by the workers of the node."""
        device = self.device
        if device.type != "cuda":
            return available_memory() // (CPU_SHARE * int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        free, total = torch.cuda.mem_get_info(device)
        activations = (torch.cuda.max_memory_allocated(device) - self.allocated) * self.seq_len / longest
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + unused - activations - CUDA_MARGIN * total)


def sums_gradients_once(trained: int, weights: int, dp_shard: int, micro_batches: int) -> bool:
    """Whether gradients are summed over the workers after a step's last micro-batch alone.

    trained: whole elements of what FSDP2 reduces gradients of; weights: of all that it gathers. dp_shard: shards of W.
    """
    return trained > 0 and micro_batches > 1 and (dp_shard == 1 or trained <= SMALL * weights)


def gathered_bytes(model: Model, dims: ParallelDims, ignored: set[nn.Parameter], dtype: torch.dtype) -> int:
    """Bytes of all that FSDP2 gathers, held whole in `dtype` (under tensor parallelism: whole tp-local matrices)."""
    shards = [p.to_local() for p in model.parameters() if isinstance(p, DTensor) and p not in ignored]
    return sum(shard.numel() for shard in shards) * dims.dp_shard * dtype.itemsize


def available_memory() -> int:
    """Bytes of the host's memory that are free or can be freed; 0 where the system does not say."""
    path = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+) kB", path.read_text()) if path.exists() else None
    return int(found[1]) * 1024 if found else 0
