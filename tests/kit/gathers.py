"""Counts what FSDP2 gathers."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Gathers(TorchDispatchMode):
    """Bytes received in each all-gather into one tensor, while `counting`."""

    def __init__(self):
        super().__init__()
        self.received: list[int] = []
        self.counting = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.counting and func is torch.ops.c10d._allgather_base_.default:
            self.received.append(args[0].nbytes - args[1].nbytes)
        return func(*args, **(kwargs or {}))
