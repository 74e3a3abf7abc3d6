"""Which runs a comparison makes: every arm as many as every other.

1. All values of every arm's grid, with the first seed.
2. While an arm's best value lies on an edge of what was tried, it gets the next value beyond it; every other arm gets a
   value between its best and the better of its neighbours instead. `widen` times at most.
3. The best value of every arm and its two neighbours (or the best alone), with the other seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from compare.arms import Arm

Point = tuple[tuple[str, str], ...]  # keys and their values, in the order of the grid


class Run(NamedTuple):
    """One training: an arm at a point of its grid with a seed."""

    arm: str
    point: Point
    seed: int

    @property
    def name(self) -> str:
        """For folders and lines: arm/optimizer.lr=0.001,seed=42."""
        return f"{self.arm}/{','.join([*(f'{key}={value}' for key, value in self.point), f'seed={self.seed}'])}"


class Round(NamedTuple):
    """Runs that do not depend on one another, and why there are."""

    reason: str
    runs: list[Run]


# The metric of a run, so that less is better; infinity for one that failed. Asked only of runs that were made.
Score = Callable[[Run], float]
# Whether a run beyond the grid can be made at all: a key may end where the next value would be.
Allowed = Callable[[Run], bool]


@dataclass
class Tuning:
    """What was tried of one arm with the first seed.

    The values of an axis that can be widened stand in order.
    """

    arm: Arm
    points: list[Point]

    @classmethod
    def of(cls, arm: Arm) -> Tuning:
        points: list[Point] = [()]
        for key, axis in arm.axes.items():
            points = [(*point, (key, value)) for point in points for value in axis.values]
        return cls(arm, points)

    def line(self, through: Point, key: str) -> list[Point]:
        """The points that differ from this one in no other key, in order of its value."""
        rest = _without(through, key)
        found = [point for point in self.points if _without(point, key) == rest]
        return sorted(found, key=lambda point: float(dict(point)[key]))

    def best(self, score: Callable[[Point], float]) -> Point:
        """The point with the least score; of equal ones, such as those that all failed, the one of the least values."""
        return min(self.points, key=lambda point: (score(point), *(float(dict(point)[key]) for key in self.tuned())))

    def tuned(self) -> list[str]:
        return [key for key, axis in self.arm.axes.items() if axis.ratio is not None]

    def edge(self, best: Point) -> tuple[str, bool] | None:
        """The key in which the best point is the first or last that was tried, and whether it is the last."""
        for key in self.tuned():
            line = self.line(best, key)
            if best == line[-1]:
                return key, True
            if best == line[0]:
                return key, False
        return None

    def outwards(self, best: Point, allowed: Callable[[Point], bool]) -> Point | None:
        """The next point beyond the edge on which the best one lies."""
        edge = self.edge(best)
        if edge is None:
            return None
        key, upwards = edge
        value = self.arm.axes[key].beyond(dict(best)[key], upwards)
        point = None if value is None else _at(best, key, value)
        return point if point is not None and allowed(point) else None

    def inwards(self, best: Point, score: Callable[[Point], float], allowed: Callable[[Point], bool]) -> Point | None:
        """A point between the best one and the better of its neighbours."""
        for key in self.tuned():
            line = self.line(best, key)
            place = line.index(best)
            near = [line[i] for i in (place - 1, place + 1) if 0 <= i < len(line)]
            for other in sorted(near, key=score):
                value = self.arm.axes[key].between(dict(best)[key], dict(other)[key])
                point = None if value is None else _at(best, key, value)
                if point is not None and point not in self.points and allowed(point):
                    return point
        return None

    def around(self, best: Point, score: Callable[[Point], float]) -> list[Point]:
        """The best point and two neighbours in each key that is tuned: one on each side where both were trained to
        the end, else the two nearest on one side, so that the arms stay alike in number. None where all failed."""
        if score(best) == float("inf"):
            return []
        found = [best]
        for key in self.tuned():
            line = [point for point in self.line(best, key) if score(point) < float("inf")]
            place = line.index(best)
            near = sorted(range(len(line)), key=lambda i: (abs(i - place), -i))[1:]
            sides = [i for i in near if abs(i - place) == 1]
            found += [line[i] for i in (sides if len(sides) == 2 else near[:2])]
        return list(dict.fromkeys(found))


def _at(point: Point, key: str, value: str) -> Point:
    return tuple((k, value if k == key else v) for k, v in point)


def _without(point: Point, key: str) -> Point:
    return tuple((k, v) for k, v in point if k != key)


def rounds(
    arms: Sequence[Arm],
    seeds: Sequence[int],
    score: Score,
    widen: int,
    equal: bool = True,
    allowed: Allowed = lambda run: True,
    neighbours: bool = True,
) -> Iterator[Round]:
    """The rounds one after another; the runs of a round must have been made before the next is asked for.

    neighbours: those of the best values get the other seeds, too. equal: all arms get as many runs as the one that
    needs the most; else only those whose best lies on an edge more.
    """
    tunings = [Tuning.of(arm) for arm in arms]

    def first(tuning: Tuning) -> Callable[[Point], float]:
        return lambda point: score(Run(tuning.arm.name, point, seeds[0]))

    def can(tuning: Tuning) -> Callable[[Point], bool]:
        return lambda point: allowed(Run(tuning.arm.name, point, seeds[0]))

    yield Round("the grid", [Run(t.arm.name, point, seeds[0]) for t in tunings for point in t.points])
    for _ in range(widen):
        bests = [t.best(first(t)) for t in tunings]
        beyond = [t.outwards(best, can(t)) for t, best in zip(tunings, bests)]
        if not any(beyond):
            break
        chosen = [
            point or (t.inwards(best, first(t), can(t)) if equal else None)
            for t, best, point in zip(tunings, bests, beyond)
        ]
        for tuning, point in zip(tunings, chosen):
            tuning.points += [point] if point else []
        said = ", ".join(f"{t.arm.name} ({_text(best)})" for t, best, point in zip(tunings, bests, beyond) if point)
        runs = [Run(t.arm.name, point, seeds[0]) for t, point in zip(tunings, chosen) if point]
        yield Round(f"wider, for the best lies on the edge of what was tried: {said}", runs)
    near = [t.around(t.best(first(t)), first(t))[: None if neighbours else 1] for t in tunings]
    again = [Run(t.arm.name, point, seed) for t, points in zip(tunings, near) for point in points for seed in seeds[1:]]
    if again:
        yield Round(f"the best of every arm{' and its neighbours' * neighbours} with the other seeds", again)


def best_point(runs: Sequence[Run], score: Score) -> Point:
    """Of one arm's runs that were completed, at least one: the point with the best mean over its seeds, among those
    with the most seeds. As `compare.outcome` chooses it for the report."""
    scores: dict[Point, list[float]] = {}
    for run in runs:
        scores.setdefault(run.point, []).append(score(run))
    most = max(map(len, scores.values()))
    return min((p for p, found in scores.items() if len(found) == most), key=lambda p: sum(scores[p]) / most)


def edges(arms: Sequence[Arm], tried: Sequence[Run], best: dict[str, Point]) -> dict[str, str]:
    """By arm: that its best point lies on the edge of all that was tried, in words; nothing for the others."""
    said = {}
    for arm in arms:
        tuning = Tuning(arm, list(dict.fromkeys(run.point for run in tried if run.arm == arm.name)))
        edge = tuning.edge(best[arm.name]) if arm.name in best else None
        if edge is not None:
            key, upwards = edge
            most = "largest" if upwards else "smallest"
            said[arm.name] = f"the best {key}, {dict(best[arm.name])[key]}, is the {most} that was tried"
    return said


def _text(point: Point) -> str:
    return ", ".join(f"{key} {value}" for key, value in point)
