"""Means, intervals and paired differences against scipy's own, and against numbers worked out by hand."""

from __future__ import annotations

import random

import pytest
from compare import statistics
from compare.statistics import paired_difference, summarise

# Ten seeds of two made-up arms whose seeds have much in common.
_DRAW = random.Random(5)
_SEEDS = {seed: _DRAW.gauss(0.05, 0.02) for seed in range(10)}
OURS = {seed: value + _DRAW.gauss(-0.004, 0.003) for seed, value in _SEEDS.items()}
THEIRS = {seed: value + _DRAW.gauss(0, 0.003) for seed, value in _SEEDS.items()}


def test_by_hand():
    """1, 2, 3: sd 1, and Student's quantile of two degrees of freedom is 4.302653 (any table of it)."""
    pytest.importorskip("scipy")
    found = summarise([1.0, 2.0, 3.0])
    assert (found.n, found.mean, found.sd) == (3, 2.0, 1.0)
    assert found.interval == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), abs=1e-6)
    # Differences -1, 0, 1, 4 of four seeds: mean 1, squares 4 + 1 + 0 + 9 = 14, sd (14 / 3)^0.5; quantile 3.182446.
    found = paired_difference({1: 4.0, 2: 5.0, 3: 7.0, 4: 9.0}, {1: 5.0, 2: 5.0, 3: 6.0, 4: 5.0})
    assert found is not None
    assert (found.n, found.mean, found.sd) == (4, 1.0, pytest.approx((14 / 3) ** 0.5))
    assert found.half == pytest.approx(3.182446 * (14 / 3) ** 0.5 / 2, abs=1e-5)


@pytest.mark.parametrize("n", [2, 3, 10])
def test_the_interval_of_a_mean_is_scipys(n: int):
    stats = pytest.importorskip("scipy.stats")
    values = list(OURS.values())[:n]
    expected = stats.t.interval(0.95, n - 1, loc=sum(values) / n, scale=stats.sem(values))
    assert summarise(values).interval == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("n", [2, 3, 10])
def test_a_paired_difference_is_scipys(n: int):
    stats = pytest.importorskip("scipy.stats")
    seeds = list(OURS)[:n]
    test = stats.ttest_rel([OURS[seed] for seed in seeds], [THEIRS[seed] for seed in seeds])
    found = paired_difference({seed: OURS[seed] for seed in reversed(seeds)}, THEIRS)  # in whatever order
    assert found is not None
    assert found.n == n
    assert found.interval == pytest.approx(tuple(test.confidence_interval(0.95)), rel=1e-9)


def test_only_seeds_of_both_are_paired():
    found = paired_difference({1: 5.0, 2: 7.0, 9: 100.0}, {2: 4.0, 1: 3.0, 8: -100.0})
    assert found is not None
    assert (found.n, found.mean) == (2, 2.5)
    assert paired_difference({1: 5.0}, {2: 5.0}) is None


def test_one_seed_has_no_interval():
    for found in (summarise([3.0]), paired_difference({1: 5.0}, {1: 2.0})):
        assert found is not None
        assert (found.n, found.mean, found.sd, found.interval) == (1, 3.0, None, None)


def test_without_scipy_there_is_a_deviation_but_no_interval(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(statistics, "student_quantile", lambda degrees: None)
    found = summarise([1.0, 3.0])
    assert (found.mean, found.sd, found.interval) == (2.0, pytest.approx(2**0.5), None)
