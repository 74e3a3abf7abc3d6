"""The learning rate as a pure function of the step: nothing to save, nothing to restore wrongly."""

from __future__ import annotations

import math

from titan_hd.config.job_config import LRScheduler


def warmup_length(config: LRScheduler, total_steps: int) -> int:
    """Steps of the linear warm-up."""
    if config.warmup_ratio is not None:
        return math.ceil(config.warmup_ratio * total_steps)
    return config.warmup_steps or 0


def lr_factor(config: LRScheduler, step: int, total_steps: int) -> float:
    """Share of the peak learning rate at a step (0-based).

    The warm-up of w steps gives 1/(w+1), 2/(w+1), ...: the first step is never wasted on a rate of zero. The decay
    reaches min_lr_factor where step = total_steps, one step after the last.
    """
    warmup = warmup_length(config, total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total_steps - warmup)
    if config.decay_type == "constant":
        shape = 1.0
    elif config.decay_type == "linear":
        shape = 1.0 - progress
    else:
        shape = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.min_lr_factor + (1.0 - config.min_lr_factor) * shape
