"""What the benchmarks share: the header, interleaved timing, live bytes, the table and the JSON line."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import re
import statistics
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Seconds = dict[str, list[float]]


@dataclass
class Timing:
    """Seconds of every sample: on the clock, and of processor time over all threads of this process, which other
    programs on the machine disturb far less. With a GPU the latter is the host's part only."""

    wall: Seconds
    cpu: Seconds


def pick_device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def environment(device: torch.device, threads: int) -> dict[str, object]:
    """Versions and the machine; `threads` is per process. The load says how much others used the cores just before."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": gpu or f"CPU, {platform.machine()}, {os.cpu_count()} cores",
        "threads": threads,
        "load_1min": round(os.getloadavg()[0], 1),
    }


def print_header(title: str, env: dict[str, object]) -> None:
    print(f"# {title}\n# " + ", ".join(f"{key} {value}" for key, value in env.items()), flush=True)


def interleave(
    variants: Mapping[str, Callable[[], object]],
    device: torch.device,
    repetitions: int,
    warmup: int = 1,
    before: Callable[[], object] = lambda: None,
    calls: int = 1,
) -> Timing:
    """Times of every variant, per call. A repetition runs all variants once, each time beginning with another one, so
    that what else the machine does meets all alike; `before` runs outside the clock, before each sample of `calls`."""
    names = list(variants)
    timing = Timing({name: [] for name in names}, {name: [] for name in names})
    for repetition in range(-warmup, repetitions):
        shift = repetition % len(names)
        for name in names[shift:] + names[:shift]:
            before()
            synchronize(device)
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(calls):
                variants[name]()
            synchronize(device)
            if repetition >= 0:
                timing.wall[name].append((time.perf_counter() - wall) / calls)
                timing.cpu[name].append((time.process_time() - cpu) / calls)
    return timing


def medians(seconds: Seconds) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


def median_ratio(seconds: Seconds, name: str, base: str) -> float:
    """Median over the repetitions of (variant / base in the same repetition): steadier than a ratio of medians."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[base]))


class LiveBytes(TorchDispatchMode):
    """The most bytes that live at a time in storages which operations inside the context allocate."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak, self._known = 0, 0, set()

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        before = {t.untyped_storage()._cdata for t in _tensors((arguments, kwargs))}
        result = function(*arguments, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._known and key not in before:
                self._known.add(key)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._gone, key, storage.nbytes())
        return result

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _tensors(tree: object) -> list[torch.Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


def peak_extra_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Most memory that one call holds beyond what was held before it. Slow on CPU: never inside a timing."""
    if device.type == "cpu":
        with LiveBytes() as memory:
            function()
        return memory.peak
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    function()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def held_bytes(device: torch.device) -> int | None:
    """Memory that this process holds now: of the GPU, or its resident set (Linux; None elsewhere)."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status_bytes("VmRSS")


def peak_bytes(device: torch.device) -> int | None:
    """The most that `held_bytes` has been since `reset_peak`."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status_bytes("VmHWM")


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif (clear := Path("/proc/self/clear_refs")).exists():
        clear.write_text("5")  # see proc(5)


def trim_heap() -> None:
    """Give freed memory of the host back to the system, where the C library can."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _status_bytes(field: str) -> int | None:
    status = Path("/proc/self/status")
    found = re.search(rf"{field}:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else None


def print_table(columns: list[str], rows: Sequence[Sequence[object]]) -> None:
    """A Markdown table; the first column is text, the others are right-aligned."""
    assert all(len(row) == len(columns) for row in rows)
    cells = [columns] + [[_cell(value) for value in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    rule = ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]]
    for row in [cells[0], rule, *cells[1:]]:
        print("| " + " | ".join(_pad(row, widths)) + " |")
    print(flush=True)


def _pad(row: list[str], widths: list[int]) -> list[str]:
    return [row[0].ljust(widths[0])] + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def print_json(name: str, env: dict[str, object], results: object) -> None:
    """The last line of a benchmark's output."""
    print(json.dumps({"benchmark": name, "environment": env, "results": results}))
