"""What a run ran on: one JSON object per start in dump_folder/environment.jsonl."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "torchdata", "transformers")
_PREFIXES = ("SLURM_", "NCCL_", "GLOO_", "TORCH", "PYTORCH_", "CUDA_", "OMP_", "PET_", "MASTER_", "NGPU")
_SECRETS = ("TOKEN", "SECRET", "PASSWORD", "JWT", "KEY")


def record_environment(folder: Path, world_size: int) -> None:
    """Append versions, command, commit, device and the variables of the scheduler and of torch. One process does this.

    Variables are chosen by their prefixes, so that no other program's secrets are written down.
    """
    cuda = torch.cuda.is_available()
    record = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "world_size": world_size,
        "host": socket.gethostname(),
        "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "packages": {name: found for name in _PACKAGES if (found := _version(name))},
        "cuda": torch.version.cuda if cuda else None,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
        "commit": _commit(),
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(_PREFIXES) and not any(word in name for word in _SECRETS)
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "environment.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the source, "+changes" where it differs from that; None without git."""
    root = Path(__file__).parent.parent.parent
    said = []
    for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]):
        try:
            command = ["git", "-C", str(root), *arguments]
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        said.append(done.stdout.strip())
    return said[0] + ("+changes" if said[1] else "")
