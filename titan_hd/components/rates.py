"""How fast a run is: tokens, operations and their share of what the card could do, between two lines of the log."""

from __future__ import annotations

from typing import NamedTuple

import torch

from titan_hd.adapters.methods import build_method
from titan_hd.components.flops import flops_per_token, peak_flops, trained_work
from titan_hd.components.live_bytes import recomputed_flops
from titan_hd.config.job_config import JobConfig
from titan_hd.models.model import Model


class StepResult(NamedTuple):
    """What one step came to: the loss of a trained token before the step, the gradients' norm before clipping, the
    learning rate; over all workers the positions of all rows, the tokens in them (without padding), and the sum of the
    records' squared lengths.
    """

    loss: float
    grad_norm: float
    lr: float
    positions: int
    tokens: int
    squares: int


class TokenCounts(NamedTuple):
    """Of one step over all workers: trained tokens of each share of the global batch, positions of all rows, all tokens
    but padding; squares: the sum of the records' squared lengths."""

    trained: list[int]
    positions: int
    tokens: int
    squares: int


class Rates:
    """Of the steps since the last call of `take`.

    workers: the world's size. passes: micro-batches of all workers in a step, tensor-parallel groups counted once.
    """

    def __init__(self, model: Model, config: JobConfig, device: torch.device, workers: int, passes: int):
        self.model, self.workers, self.passes = model, workers, passes
        card = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.peak_flops = peak_flops(card)
        self.recomputed_flops = 0.0
        if self.peak_flops:
            shape, targets = (config.training.local_batch_size, config.training.seq_len), config.adapter.target_modules
            checkpointing = config.activation_checkpoint
            self.recomputed_flops = recomputed_flops(model.config, build_method(config), targets, shape, checkpointing)
        self._steps: list[tuple[StepResult, float]] = []

    def add(self, result: StepResult, seconds: float) -> None:
        """A step, and how long it took."""
        self._steps.append((result, seconds))

    def forget(self) -> None:
        """Leave out what has been added: warm-up and compilation."""
        self._steps.clear()

    def take(self) -> dict[str, float]:
        """The rates by the names of docs/metrics.md."""
        steps, seconds = len(self._steps), sum(seconds for _, seconds in self._steps)
        tokens = sum(result.tokens for result, _ in self._steps)
        squares = sum(result.squares for result, _ in self._steps)
        positions = sum(result.positions for result, _ in self._steps)
        self._steps.clear()
        work = trained_work(self.model, tokens / (steps * self.passes))
        flops = flops_per_token(self.model.config, squares / tokens, *work)
        per_worker = tokens / seconds / self.workers
        rates = {"tokens_per_second": tokens / seconds, "tflops_per_worker": per_worker * flops / 1e12}
        if self.peak_flops:
            rates["mfu"] = per_worker * flops / self.peak_flops
            rates["hfu"] = per_worker * (flops + self.recomputed_flops) / self.peak_flops
        return {**rates, "padding_share": 1 - tokens / positions, "step_seconds": seconds / steps}
