"""Buffers in which values wait on their way from files to a device.

On the host a buffer is all there is, and a conversion to another dtype copies out of it. For a GPU every buffer is a
pair, of pinned memory and of as much on the device. So a copy runs beside the reading of the next piece, no more bytes
travel than the file has, and the device converts them.
"""

from __future__ import annotations

import torch

PIECE_BYTES = 16 * 2**20  # of a buffer; more only where one row has more


class Slot:
    """One buffer, or pair: `on_host` to be written to, `sent` to the device, or received `on_device`; when what uses
    the values has been launched, `release`."""

    def __init__(self, device: torch.device):
        self._device, self._size = device, 0
        self._host = self._there = torch.empty(0, dtype=torch.uint8)
        self._used: torch.cuda.Event | None = None  # the device is done with what the slot had

    def begin(self, nbytes: int) -> None:
        """Wait until the slot is free, for so many bytes."""
        if self._used is not None:
            self._used.synchronize()
        self._size = nbytes

    def on_host(self) -> torch.Tensor:
        """Flat, uint8; to be written to."""
        if len(self._host) < self._size:
            self._host = torch.empty(self._size, dtype=torch.uint8, pin_memory=self._device.type == "cuda")
        return self._host[: self._size]

    def on_device(self) -> torch.Tensor:
        """Flat, uint8; to be received into. On a CPU that of `on_host`."""
        if self._device.type == "cpu":
            return self.on_host()
        if len(self._there) < self._size:
            self._there = torch.empty(self._size, dtype=torch.uint8, device=self._device)
        return self._there[: self._size]

    def sent(self) -> torch.Tensor:
        """`on_device`, with what was written on the host, if anything was: after a fault nothing is read any more, and
        all ranks go on to the end. The copy may still be under way, in the device's current stream."""
        there = self.on_device()
        if self._device.type != "cpu":
            there.copy_(self.on_host(), non_blocking=True)
        return there

    def release(self) -> None:
        """The device's current stream has got all that uses the values."""
        if self._device.type == "cuda":
            self._used = torch.cuda.Event()
            self._used.record(torch.cuda.current_stream(self._device))  # of this GPU, whichever is the current one


class Staging:
    """Slots in turn. slots: how many; None: one on a CPU, where nothing runs beside the reading, else two."""

    def __init__(self, device: torch.device | None = None, slots: int | None = None):
        self.device = device or torch.device("cpu")
        self.slots = [Slot(self.device) for _ in range(slots or (1 if self.device.type == "cpu" else 2))]
        self._taken = 0

    def next(self, nbytes: int) -> Slot:
        """A slot for so many bytes, free when this returns."""
        slot = self.slots[self._taken % len(self.slots)]
        self._taken += 1
        slot.begin(nbytes)
        return slot
