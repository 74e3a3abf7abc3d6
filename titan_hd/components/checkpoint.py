"""Checkpoints through torch.distributed.checkpoint: written beside, renamed when complete, loaded on any mesh.

A checkpoint is a folder `step-N` with DCP's files (weights, fixed factors and optimizer moments as DTensors) and
`train_state.json` (step, wandb run, resolved configuration). The data cursor and the learning rate are functions of the
step; dA and dB are zero between steps; random numbers are functions of (seed, step, sample): none of them needs saving.

DCP's `.metadata` is a pickle: `dcp_reader` reads it without running what it says.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from titan_hd.components.dcp_reader import CheckpointReader
from titan_hd.config.errors import UserError
from titan_hd.distributed.adapter_registry import AdapterRegistry
from titan_hd.distributed.weights import adapter_parameters, base_parameters

logger = logging.getLogger("titan_hd")
STATE_FILE = "train_state.json"  # what a run's checkpoint has beside DCP's files


def model_state(model: nn.Module, registry: AdapterRegistry | None) -> dict[str, torch.Tensor]:
    """Weights by HF name, the tensors of adapters beside them and, for HD-PiSSA, the fixed factors, as DTensors."""
    state: dict[str, torch.Tensor] = {f"model.{name}": p.detach() for name, p in base_parameters(model)}
    state |= {f"adapters.{name}": p.detach() for name, p in adapter_parameters(model)}
    for name, entry in registry.entries.items() if registry else ():
        state[f"factors.{name}.A"], state[f"factors.{name}.B"] = entry.a, entry.b
    return state


def optimizer_state(optimizer: torch.optim.Optimizer, names: dict[nn.Parameter, str]) -> dict[str, Any]:
    """The optimizer's per-parameter state, keyed by parameter name and state key."""
    return {
        f"optimizer.{names[parameter]}.{key}": value
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }


def allocate_optimizer_state(
    optimizer: torch.optim.Optimizer, names: dict[nn.Parameter, str], metadata: Metadata
) -> None:
    """Make the state tensors that a checkpoint has, without values: optimizers create theirs in the first step."""
    parameters = {name: parameter for parameter, name in names.items()}
    for key, stored in metadata.state_dict_metadata.items():
        match = re.fullmatch(r"optimizer\.(.+)\.([^.]+)", key)
        if not match or match[1] not in parameters or not isinstance(stored, TensorStorageMetadata):
            continue
        parameter = parameters[match[1]]
        if stored.size == parameter.shape:
            value = torch.zeros_like(parameter, dtype=stored.properties.dtype)
        else:
            value = torch.zeros(stored.size, dtype=stored.properties.dtype)
        optimizer.state[parameter][match[2]] = value


def check_resumable(saved: dict[str, Any] | None, current: dict[str, Any]) -> None:
    """ValueError if a checkpoint is of a run that differs in what cannot change (one line for each key)."""
    if saved is None:
        return
    lines = [
        f"{key}: the checkpoint has {saved.get(key)!r}, this run {value!r}; set it back, or checkpoint.load_step = 0"
        for key, value in current.items()
        if saved.get(key) != value
    ]
    if lines:
        raise UserError("\n".join(lines))


class Checkpointer:
    """Saves to and loads from `folder`. Collective: every rank calls every method but `latest`."""

    def __init__(self, folder: Path, keep_latest_k: int):
        self.folder, self.keep_latest_k = folder, keep_latest_k

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        found = [re.fullmatch(r"step-(\d+)", p.parent.name) for p in self.folder.glob(f"step-*/{STATE_FILE}")]
        return sorted(int(m[1]) for m in found if m)

    def choose(self, load_step: int) -> int | None:
        """The step to resume from: the latest for -1, None for 0 or where there is none.

        Raises:
            ValueError: a step is asked for that is not there.
        """
        steps = self.steps()
        if load_step == 0 or (load_step == -1 and not steps):
            return None
        if load_step == -1:
            return steps[-1]
        if load_step not in steps:
            have = ", ".join(map(str, steps)) or "none"
            raise UserError(f"checkpoint.load_step: {self.folder} has no complete checkpoint {load_step} (has {have})")
        return load_step

    def save(self, step: int, tensors: dict[str, Any], train_state: dict[str, Any]) -> None:
        """Write `step-N`; it becomes visible under this name only when everything is there."""
        final, partial = self.folder / f"step-{step}", self.folder / f"step-{step}.partial"
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        dcp.save(tensors, checkpoint_id=str(partial))
        if dist.get_rank() == 0:
            with open(partial / STATE_FILE, "w", encoding="utf-8") as file:
                json.dump(train_state, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            logger.info("saved checkpoint %s", final)
            self._set_aside(step)
            self._purge()
        dist.barrier()

    def train_state(self, step: int) -> dict[str, Any]:
        return json.loads((self.folder / f"step-{step}" / STATE_FILE).read_text())

    def metadata(self, step: int) -> Metadata:
        return CheckpointReader(self.folder / f"step-{step}").read_metadata()

    def load(self, step: int, tensors: dict[str, Any]) -> None:
        """Fill `tensors` in place from `step-N`, whatever mesh wrote it."""
        dcp.load(tensors, storage_reader=CheckpointReader(self.folder / f"step-{step}"))
        logger.info("resumed from %s", self.folder / f"step-{step}")

    def _set_aside(self, step: int) -> None:
        """Rename later checkpoints: this run went back behind them, so they are another run's and not the latest."""
        for later in [s for s in self.steps() if s > step]:
            aside = self.folder / f"abandoned-{later}"
            shutil.rmtree(aside, ignore_errors=True)
            (self.folder / f"step-{later}").rename(aside)
            logger.warning("%s is of a run that was left behind; kept as %s", f"step-{later}", aside)

    def _purge(self) -> None:
        if self.keep_latest_k:
            for step in self.steps()[: -self.keep_latest_k]:
                shutil.rmtree(self.folder / f"step-{step}", ignore_errors=True)
