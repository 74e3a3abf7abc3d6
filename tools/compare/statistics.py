"""Means over seeds with Student's 95% interval, and differences paired by seed."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

LEVEL = 0.95


@dataclass(frozen=True)
class Summary:
    """n numbers: their mean, the sample's standard deviation (n - 1 below the line), and half the width of the mean's
    95% interval. sd and half are None for one number; half also where scipy is missing."""

    n: int
    mean: float
    sd: float | None
    half: float | None

    @property
    def interval(self) -> tuple[float, float] | None:
        return None if self.half is None else (self.mean - self.half, self.mean + self.half)


def summarise(values: Iterable[float]) -> Summary:
    """mean +- t * sd / sqrt(n), with the quantile t of Student's distribution of n - 1 degrees of freedom.

    values: at least one.
    """
    values = list(values)
    n, mean = len(values), statistics.fmean(values)
    if n == 1:
        return Summary(1, mean, None, None)
    sd, quantile = statistics.stdev(values), student_quantile(n - 1)
    return Summary(n, mean, sd, None if quantile is None else quantile * sd / math.sqrt(n))


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Summary | None:
    """Ours less theirs, seed by seed, over the seeds that both have; the interval is that of the paired t-test. None
    where there is no such seed.

    ours, theirs: seed -> value. Runs of one seed have the same records in the same order, and what that adds to both
    of them cancels.
    """
    common = [seed for seed in ours if seed in theirs]
    return summarise(ours[seed] - theirs[seed] for seed in common) if common else None


@functools.cache
def student_quantile(degrees: int) -> float | None:
    """What a t-distributed number stays below in absolute value with 95% probability; None without scipy."""
    if not scipy_is_there():
        return None
    from scipy import stats

    return float(stats.t.ppf((1 + LEVEL) / 2, degrees))


@functools.cache
def scipy_is_there() -> bool:
    try:
        import scipy.stats  # noqa: F401
    except ImportError:
        return False
    return True
