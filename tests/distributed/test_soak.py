"""Thousands of optimizer steps and folds: host memory stays flat (fused AdamW on DTensors once leaked in each step)."""

import gc

import pytest
import torch

from tests.kit.exchange import prepared

# The allocator may keep a page or an arena more; a leak of one DTensorSpec per parameter and step (about 1 kB) would be
# 8 MB per 1,000 steps here.
GROWTH_BYTES = 2 * 2**20


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def soak(steps: int) -> int:
    """Growth of the resident set over the second half of `steps` steps."""
    registry, fold = prepared(4, 1, 1)
    optimizer = torch.optim.AdamW([registry.deltas], lr=1e-3, foreach=True)
    before = 0
    for step in range(steps):
        if step == steps // 2:
            gc.collect()
            before = resident()
        registry.zero_grad()
        registry.gradients.add_(1e-3)
        optimizer.step()
        fold(lr=1e-3, step=step)
    gc.collect()
    return resident() - before


def test_memory_is_flat_over_a_thousand_folds(workers):
    assert workers.run(1, soak, 1000)[0] < GROWTH_BYTES


@pytest.mark.slow
def test_memory_is_flat_over_ten_thousand_folds(workers):
    assert workers.run(1, soak, 10_000)[0] < GROWTH_BYTES
