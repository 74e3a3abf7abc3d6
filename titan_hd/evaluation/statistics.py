"""How sure a share of right answers is, and a difference between two of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

_Z = 1.959963984540054  # the normal distribution has 95% within so many standard deviations
_RESAMPLES = 10_000
_SEED = 20_250_524


def wilson(right: float, n: int) -> tuple[float, float]:
    """The 95% interval of a share, right / n, by Wilson's score; (0, 1) where there is no sample.

    Of n problems with shares each, `right` is their sum: the interval is then no narrower than it has to be, since
    shares with this mean vary at most as yes and no do.
    """
    if n == 0:
        return 0.0, 1.0
    share, z2 = right / n, _Z**2 / n
    middle = share + z2 / 2
    half = _Z * math.sqrt(share * (1 - share) / n + z2 / (4 * n))
    return max(0.0, (middle - half) / (1 + z2)), min(1.0, (middle + half) / (1 + z2))


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95% interval of a mean of independent numbers, by the normal distribution; of one number that number."""
    mean = sum(values) / len(values)
    half = _Z * float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return mean - half, mean + half


@dataclass(frozen=True)
class Comparison:
    """Two systems on the same n problems.

    difference: share of right answers of the first less that of the second; low, high: its 95% interval.
    gained: problems that the first alone answers rightly (of several samples: more of them); lost: the other way round.
    """

    n: int
    difference: float
    low: float
    high: float
    gained: int
    lost: int


def compare(ours: Sequence[float], theirs: Sequence[float]) -> Comparison:
    """Paired bootstrap: problems are drawn anew, 10,000 times, always with both answers; percentiles of the difference.

    ours, theirs: whether each problem was answered rightly, or the share of its samples that were.

    A problem adds 1, 0 or -1 to the difference (of several samples: one of a few fractions), so that a drawing of
    problems is one of the numbers of each kind. The generator has a fixed seed: the same answers give the same
    interval.
    """
    assert len(ours) == len(theirs) > 0, "pairs"
    n = len(ours)
    differences = [Fraction(a).limit_denominator() - Fraction(b).limit_denominator() for a, b in zip(ours, theirs)]
    kinds = sorted({*differences, Fraction(0), Fraction(1), Fraction(-1)}, key=lambda kind: (kind == 0, -kind))
    counts = [differences.count(kind) for kind in kinds]
    draws = np.random.default_rng(_SEED).multinomial(n, [count / n for count in counts], _RESAMPLES)
    low, high = np.percentile(draws @ np.array(kinds, dtype=float) / n, [2.5, 97.5])
    gained, lost = sum(kind > 0 for kind in differences), sum(kind < 0 for kind in differences)
    return Comparison(n, float(sum(differences) / n), float(low), float(high), gained, lost)
