"""What is known of a large model before anything of it is in memory."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from titan_hd.models.decoder import Decoder
from titan_hd.models.hf_files import WeightFiles, plan_files, write_headers
from titan_hd.models.registry import flavor_config


def test_a_large_model_is_planned_and_checked_without_memory(tmp_path: Path):
    """Llama-3.1-8B on meta: layout, headers (over sparse files of their full size) and the check of all of it."""
    config = flavor_config("llama3", "8B")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = peak_kib()
    with torch.device("meta"):
        shapes = {name: w.shape for name, w in Decoder(config).named_parameters()}
    slots, headers = plan_files(tmp_path, shapes, torch.bfloat16)
    write_headers(slots, headers)
    for path in headers:
        os.truncate(path, max(s.offset + shapes[n].numel() * 2 for n, s in slots.items() if s.file == path))
    files = WeightFiles(tmp_path, shapes, tied_head=False)
    assert sum(map(files.nbytes, shapes)) == 16_060_522_496
    assert len(headers) == 4
    grown = (peak_kib() - before) / 1024
    print(f"peak memory grew by {grown:.1f} MiB")
    assert grown < 200


def peak_kib() -> int:
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
