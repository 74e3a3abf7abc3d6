"""How long a run of a comparison takes: as those that have been made, else by its arithmetic."""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import Any

import torch

from titan_hd.adapters.frozen_linear import FoldingLinear
from titan_hd.adapters.methods import build_method
from titan_hd.components.flops import flops_per_token, peak_flops, trained_work
from titan_hd.models.registry import build_model
from titan_hd.preflight import RunPlan

_START_SECONDS = 15.0  # of the processes, and the export
_UTILISATION = 0.4  # of a GPU's peak
_CPU_FLOPS = 5e10  # of a core in fp32


class Durations:
    """workers: processes of each run."""

    def __init__(self, workers: int):
        self.workers = workers
        self._measured: dict[str, list[float]] = defaultdict(list)

    def add(self, arm: str, row: dict[str, Any]) -> None:
        """A run that has ended."""
        if "seconds" in row:
            self._measured[arm].append(row["seconds"])

    def of(self, arm: str, plan: RunPlan) -> tuple[float | None, str]:
        """Seconds of a run, None where that is not known before one was made, and how they are known."""
        if self._measured[arm]:
            return _START_SECONDS + statistics.median(self._measured[arm]), "as the runs that were made"
        training = plan.config.training
        if training.steps is None:
            return None, "as long as its epochs take"
        with torch.device("meta"):
            model = build_model(plan.decoder)
        build_method(plan.config, plan.num_adapters).apply(model, plan.config.adapter.target_modules)
        layers = [layer for layer in model.modules() if isinstance(layer, FoldingLinear)]
        if layers:  # whose deltas are made later
            rank = plan.config.adapter.rank
            work = (0, sum(4.0 * rank * (layer.in_features + layer.out_features) for layer in layers))
        else:
            work = trained_work(model, training.local_batch_size * training.seq_len)
        flops = flops_per_token(plan.decoder, training.seq_len, *work)
        operations = flops * training.steps * plan.global_batch_size * training.seq_len
        return _START_SECONDS + operations / (self.workers * _rate()), "at most, by its operations"


def _rate() -> float:
    """Operations per second of a worker."""
    if torch.cuda.is_available():
        return _UTILISATION * (peak_flops(torch.cuda.get_device_name()) or 1e14)
    return _CPU_FLOPS
