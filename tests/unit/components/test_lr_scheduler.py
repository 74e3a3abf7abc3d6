"""The learning rate as a function of the step."""

from __future__ import annotations

import math

import pytest

from titan_hd.components.lr_scheduler import lr_factor, warmup_length
from titan_hd.config.job_config import LRScheduler

DECAYS = ["cosine", "linear", "constant"]


def factors(total: int, **keys) -> list[float]:
    return [lr_factor(LRScheduler(**keys), step, total) for step in range(total)]


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("warmup", [0, 1, 5, 20, 50])
def test_always_above_zero_and_never_above_the_peak(decay: str, warmup: int):
    """The first step already learns, and so does the last."""
    for total in (1, 2, 20):
        assert all(0 < f <= 1 for f in factors(total, decay_type=decay, warmup_steps=warmup))


@pytest.mark.parametrize("decay", DECAYS)
def test_warm_up_is_linear_and_ends_at_the_peak(decay: str):
    found = factors(20, decay_type=decay, warmup_steps=4)
    assert found[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert max(found) == found[4] == 1.0


@pytest.mark.parametrize("decay", DECAYS)
def test_without_warm_up_the_first_step_is_the_peak(decay: str):
    assert factors(10, decay_type=decay)[0] == 1.0


def test_linear_decay():
    found = factors(8, decay_type="linear", warmup_steps=3)
    assert found[3:] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert lr_factor(LRScheduler(decay_type="linear", warmup_steps=3), 8, 8) == pytest.approx(0.0)


def test_cosine_decay():
    found = factors(10)
    assert found == pytest.approx([0.5 * (1 + math.cos(math.pi * s / 10)) for s in range(10)])
    assert found[5] == pytest.approx(0.5)
    assert lr_factor(LRScheduler(), 10, 10) == pytest.approx(0.0)


def test_constant():
    assert factors(10, decay_type="constant", warmup_steps=2, min_lr_factor=0.1)[2:] == [1.0] * 8


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_it_ends_at_the_minimum(decay: str):
    keys = {"decay_type": decay, "warmup_steps": 2, "min_lr_factor": 0.1}
    found = factors(200, **keys)
    assert found[2] == 1.0
    assert found[2:] == sorted(found[2:], reverse=True)
    assert lr_factor(LRScheduler(**keys), 200, 200) == pytest.approx(0.1)
    assert 0.1 < found[-1] < 0.11


@pytest.mark.parametrize(
    ("ratio", "total", "steps"), [(0.03, 100, 3), (0.03, 101, 4), (0.0, 100, 0), (1.0, 10, 10), (0.5, 1, 1)]
)
def test_warm_up_as_a_share(ratio: float, total: int, steps: int):
    config = LRScheduler(warmup_ratio=ratio)
    assert warmup_length(config, total) == steps
    assert factors(total, warmup_ratio=ratio) == factors(total, warmup_steps=steps)


def test_no_warm_up_by_default():
    assert warmup_length(LRScheduler(), 100) == 0
