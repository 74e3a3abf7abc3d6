"""What "auto" means for the dtypes of a run and for its checkpoints' base. Decided once, before anything is built."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from titan_hd.adapters.adapter_linear import AdapterMethod
from titan_hd.adapters.methods import build_method
from titan_hd.config.job_config import JobConfig

_HALVES: dict[Any, Any] = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
# Names of the instructions in torch.cpu.get_capabilities() and /proc/cpuinfo (the last one is Arm's).
_BFLOAT16_INSTRUCTIONS = {"amx_bf16", "avx512_bf16", "bf16"}


def has_bfloat16(device_type: str) -> bool:
    """Whether products in bfloat16 are fast: on a CPU without instructions for it they are many times slower, and GPUs
    before compute capability 8.0 have no units for it. GPUs that are not here are taken to have them."""
    if device_type != "cpu":
        return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # since torch 2.12
    if capabilities:
        return any(capabilities.get(name) for name in _BFLOAT16_INSTRUCTIONS)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return any(not _BFLOAT16_INSTRUCTIONS.isdisjoint(line.split()) for line in file)
    except OSError:
        return False


def resolve_dtypes(
    config: JobConfig, device_type: str, files: torch.dtype | None, saved: dict[str, Any] | None
) -> JobConfig:
    """The configuration with every "auto" of its dtypes and of checkpoint.base replaced.

    files: the dtype that all weights of model.hf_assets_path have; None if they differ or are not there. saved: the
    state of the checkpoint that the run goes on from.
    """
    compute, master, base = config.training.mixed_precision_param, config.training.master_dtype, config.checkpoint.base
    if compute == "auto":
        compute = "bfloat16" if has_bfloat16(device_type) else "float32"
    training = dataclasses.replace(config.training, mixed_precision_param=compute)
    method = build_method(dataclasses.replace(config, training=training))
    frozen = isinstance(method, AdapterMethod)
    if master == "auto":
        # Rounding the base that pissa and OLoRA make would not change the training, which rounds what it gathers, but
        # their adapter for peft: docs/memory.md.
        exact = frozen and not method.changes_base and compute == "bfloat16"
        # fp16 has three bits of mantissa more than bf16: a base of such files is held in it, and rounded when gathered.
        master = _HALVES.get(files, "float32") if exact else "float32"
        master = saved["identity"].get("training.master_dtype", master) if saved else master
    if base == "auto":
        base = "delta" if frozen and config.model.hf_assets_path and not config.model.flavor else "full"
        base = saved.get("base", base) if saved else base
    training = dataclasses.replace(training, master_dtype=master)
    return dataclasses.replace(config, training=training, checkpoint=dataclasses.replace(config.checkpoint, base=base))


def untouched_dtype(given: JobConfig, resolved: JobConfig, files: torch.dtype | None) -> torch.dtype:
    """Of the shards of weights that are as their files have them, and stay so (`adapter_linear.untouched_parameters`):
    the files' 16-bit dtype where nothing is lost by that, unless training.master_dtype says otherwise."""
    lossless = given.training.master_dtype == "auto" and resolved.training.mixed_precision_param == "bfloat16"
    master = resolved.training.master_dtype
    return getattr(torch, _HALVES.get(files, master) if lossless else master)


def dtype_warnings(config: JobConfig, device_type: str) -> list[str]:
    """Of a configuration as the user gave it."""
    if config.training.mixed_precision_param != "bfloat16" or has_bfloat16(device_type):
        return []
    lacks = "CPU has no instructions" if device_type == "cpu" else "GPU has no units"
    return [f"training.mixed_precision_param: this {lacks} for bfloat16; float32 (or auto) is better"]
