"""Intervals against figures from elsewhere, and against a bootstrap in plain loops."""

from __future__ import annotations

import random

import pytest

from titan_hd.evaluation.statistics import compare, wilson


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    # Newcombe (1998), table I, method 3, for 81 of 263; none and all of n give z^2 / (n + z^2).
    [(0, 10, 0.0, 0.27754), (10, 10, 0.72246, 1.0), (81, 263, 0.25527, 0.36622), (0, 0, 0.0, 1.0)],
)
def test_wilson(right: int, n: int, low: float, high: float):
    assert wilson(right, n) == pytest.approx((low, high), abs=1e-4)


def test_a_paired_bootstrap_in_plain_loops_gives_the_same_interval():
    ours = [True] * 30 + [False] * 40 + [True] * 20 + [False] * 10
    theirs = [True] * 30 + [False] * 40 + [False] * 20 + [True] * 10
    found = compare(ours, theirs)
    assert (found.n, found.gained, found.lost, found.difference) == (100, 20, 10, pytest.approx(0.1))
    draw = random.Random(1)
    pairs = list(zip(ours, theirs))
    means = sorted(sum(a - b for a, b in draw.choices(pairs, k=100)) / 100 for _ in range(2000))
    assert found.low == pytest.approx(means[50], abs=0.011)  # a hundredth is one problem
    assert found.high == pytest.approx(means[1949], abs=0.011)
    assert found == compare(ours, theirs)


def test_equal_answers_differ_by_nothing():
    found = compare([True, False, True], [True, False, True])
    assert (found.difference, found.low, found.high, found.gained, found.lost) == (0, 0, 0, 0, 0)
