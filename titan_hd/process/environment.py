"""What a run ran on: one JSON object per start in dump_folder/environment.jsonl."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import platform
import socket
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from titan_hd.components.source_code import commit
from titan_hd.config.job_config import JobConfig

logger = logging.getLogger("titan_hd")

_PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "torchdata", "transformers")
_PREFIXES = ("SLURM_", "NCCL_", "GLOO_", "TORCH", "PYTORCH_", "CUDA_", "OMP_", "PET_", "MASTER_", "NGPU")
_SECRETS = ("TOKEN", "SECRET", "PASSWORD", "JWT", "KEY")


def record_environment(folder: Path, world_size: int, config: JobConfig) -> None:
    """Append versions, command, configuration, commit, device and the variables of the scheduler and of torch. One
    process does this; a disk that does not take it gives a warning.

    Variables are chosen by their prefixes, so that no other program's secrets are written down.
    """
    cuda = torch.cuda.is_available()
    record = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "config": dataclasses.asdict(config),
        "world_size": world_size,
        "host": socket.gethostname(),
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
        "cuda": torch.version.cuda if cuda else None,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
        "commit": commit(),
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(_PREFIXES) and not any(word in name for word in _SECRETS)
        },
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "environment.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        logger.warning("environment.jsonl: cannot be written (%s); the run goes on without it", error.strerror)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
