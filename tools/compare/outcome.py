"""What the runs of a comparison came to: grid.csv, losses.csv and comparison.json, and the best grid point of each arm.

An arm is a method with its settings, a point one choice of the grid's keys for it, a run one seed at a point. A point's
value is the mean of the ranking metric over the seeds that completed there, and an arm's best point is the one with the
best value among the points that have the most such seeds. A point that was run fewer times is not chosen, however good
it looks: of many single runs the best is one that was lucky. A point where a seed diverged has one seed less, too.
"""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from compare.statistics import Summary, paired_difference, summarise
from titan_hd.errors import UserError
from titan_hd.files import read_json_object, shown

# How a run can end that has no metrics, in the order in which tables and figures name it.
FAILURES = ("diverged", "out_of_memory", "failed")
BEFORE = "before:"  # a metric's value before the first step has this in front of its name

Point = tuple[Any, ...]  # the values of the grid's keys: numbers, or text where a value is none ("": not the arm's key)


@dataclass(frozen=True)
class Run:
    """One line of grid.csv. numbers: every column that is a number and not empty."""

    arm: str
    point: Point
    seed: int
    status: str
    numbers: dict[str, float]


@dataclass
class Curve:
    """The lines of losses.csv of one run, in the order of steps; a step without one of the losses has NaN for it."""

    steps: list[int]
    seconds: list[float]
    losses: dict[str, list[float]]


@dataclass(frozen=True)
class Arm:
    """All runs of one arm.

    points: point -> its runs, in the order of grid.csv. rank_by: the metric that chooses; better: "min" or "max".
    """

    name: str
    points: dict[Point, list[Run]]
    rank_by: str
    better: str

    def complete(self, point: Point | None) -> list[Run]:
        return [run for run in self.points.get(point, []) if run.status == "complete"] if point is not None else []

    def by_seed(self, point: Point | None, column: str) -> dict[int, float]:
        """Seed -> value of a column, of the complete runs that have one."""
        return {run.seed: run.numbers[column] for run in self.complete(point) if column in run.numbers}

    @cached_property
    def best(self) -> Point | None:
        """As this file's beginning says; of equal points the first. None where no run completed."""
        return self._choose({point: self.by_seed(point, self.rank_by) for point in self.repeated})

    @cached_property
    def repeated(self) -> list[Point]:
        """The points with the most complete seeds, from which the best is chosen."""
        seeds = {point: len(self.complete(point)) for point in self.points}
        most = max(seeds.values(), default=0)
        return [point for point, n in seeds.items() if n == most > 0]

    def at(self, point: Point | None, column: str) -> Summary | None:
        """A column over the seeds that completed at a point; None where none has it."""
        values = self.by_seed(point, column)
        return summarise(values.values()) if values else None

    def at_best(self, column: str) -> Summary | None:
        return self.at(self.best, column)

    def median_at_best(self, column: str) -> float | None:
        values = self.by_seed(self.best, column)
        return statistics.median(values.values()) if values else None

    def chosen_by_others(self) -> float | None:
        """The mean over the seeds of: the value at the point that the *other* seeds would have chosen. What a seed was
        lucky with cannot choose it here: where this is much worse than the mean at the best point, the choice picked
        luck. None with one seed, or where the points share none."""
        values = {point: self.by_seed(point, self.rank_by) for point in self.repeated}
        common = [seed for seed in self.by_seed(self.best, self.rank_by) if all(seed in of for of in values.values())]
        if len(common) < 2:
            return None
        found = []
        for seed in common:
            others = {point: {other: of[other] for other in common if other != seed} for point, of in values.items()}
            chosen = self._choose(others)
            assert chosen is not None, "a best point is one of the repeated"
            found.append(values[chosen][seed])
        return statistics.fmean(found)

    def failures(self, point: Point | None = None) -> dict[str, int]:
        """Status -> number of runs that ended so, of one point or of all; those that did not happen are left out."""
        runs = self.points[point] if point is not None else [run for runs in self.points.values() for run in runs]
        counts = {status: sum(run.status == status for run in runs) for status in FAILURES}
        return {status: count for status, count in counts.items() if count}

    @property
    def runs(self) -> int:
        return sum(map(len, self.points.values()))

    def _choose(self, values: dict[Point, dict[int, float]]) -> Point | None:
        sign = 1 if self.better == "min" else -1
        return min(values, key=lambda point: sign * statistics.fmean(values[point].values()), default=None)


@dataclass(frozen=True)
class Outcome:
    """A comparison's folder as it was read.

    grid: the grid's keys; none where every arm has one point. arms: by name, in the order of grid.csv. metrics: names
    of what validation measured after the last step, the ranking metric first. edges: arm -> what is to be said where
    its best value lies on the edge of what was tried. curves: (arm, seed) -> losses at the arm's best point.
    """

    title: str
    grid: list[str]
    rank_by: str
    better: str
    baseline: str
    edges: dict[str, str]
    arms: dict[str, Arm]
    metrics: list[str]
    curves: dict[tuple[str, int], Curve]

    @property
    def ranked(self) -> list[Arm]:
        """The arms that have a complete run, the best first, then the others."""
        sign = 1 if self.better == "min" else -1

        def place(arm: Arm) -> tuple[bool, float]:
            value = arm.at_best(self.rank_by)
            return value is None, sign * value.mean if value else 0.0

        return sorted(self.arms.values(), key=place)

    @property
    def further(self) -> list[str]:
        """The metrics of further validation sets that were measured before training, too: what may be forgotten."""
        return [
            metric
            for metric in self.metrics
            if "/" in metric and any(BEFORE + metric in run.numbers for arm in self.arms.values() for run in _runs(arm))
        ]

    def difference(self, arm: Arm) -> Summary | None:
        """Of the arm's best point to the baseline's, paired by seed."""
        baseline = self.arms.get(self.baseline)
        if baseline is None or baseline is arm:
            return None
        return paired_difference(arm.by_seed(arm.best, self.rank_by), baseline.by_seed(baseline.best, self.rank_by))

    def forgetting(self, arm: Arm, metric: str) -> Summary | None:
        """After less before, of each seed at the arm's best point."""
        after, before = arm.by_seed(arm.best, metric), arm.by_seed(arm.best, BEFORE + metric)
        return paired_difference(after, before)


def show_value(value: float | str) -> str:
    """A value of a key; "-" where an arm has none, because the key is one of other arms."""
    return (value or "-") if isinstance(value, str) else f"{value:.4g}"


def _runs(arm: Arm) -> Iterator[Run]:
    for runs in arm.points.values():
        yield from runs


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_outcome(folder: Path) -> Outcome:
    """Read a comparison's folder.

    Raises:
        UserError: a file is missing, or a line of it is not what it must be.
    """
    said = read_json_object(folder / "comparison.json")
    grid, rank_by, better = said.get("grid"), said.get("rank_by"), said.get("better") or "min"
    if not isinstance(grid, list) or not rank_by:
        raise UserError(f"{folder / 'comparison.json'}: must have grid, a list of keys, and rank_by, a metric")
    if better not in ("min", "max"):
        raise UserError(f"{folder / 'comparison.json'}: better: must be min or max, not {shown(str(better))}")
    arms, metrics = _read_grid(folder / "grid.csv", grid, rank_by, better)
    baseline = said.get("baseline") or ""
    if baseline and baseline not in arms:
        raise UserError(f"baseline: no arm is named {shown(baseline)}; there are {', '.join(arms)}")
    curves = _read_losses(folder / "losses.csv", grid, arms)
    edges = {arm: text for arm, text in (said.get("edges") or {}).items() if text}
    return Outcome(said.get("title") or "", grid, rank_by, better, baseline, edges, arms, metrics, curves)


def _read_grid(path: Path, grid: list[str], rank_by: str, better: str) -> tuple[dict[str, Arm], list[str]]:
    """The arms, and the names of the metrics."""
    arms: dict[str, Arm] = {}
    seen: set[tuple[str, Point, int]] = set()
    metrics = {rank_by: None}
    for place, row in _rows(path, ["arm", *grid, "seed", "status", rank_by]):
        metrics |= {column: None for column in row if column.startswith("validation_")}
        run = _run(place, row, grid, rank_by)
        if (run.arm, run.point, run.seed) in seen:
            raise UserError(f"{place}: this arm, point and seed have a line already")
        seen.add((run.arm, run.point, run.seed))
        arm = arms.setdefault(run.arm, Arm(run.arm, {}, rank_by, better))
        arm.points.setdefault(run.point, []).append(run)
    if not arms:
        raise UserError(f"{path}: has no runs")
    return arms, list(metrics)


def _run(place: str, row: dict[str, str], grid: list[str], rank_by: str) -> Run:
    status = row["status"]
    if status != "complete" and status not in FAILURES:
        raise UserError(f"{place}: status: must be complete, {', '.join(FAILURES)}, not {shown(status)!r}")
    numbers = {column: _number(text) for column, text in row.items() if column not in ("arm", "seed", "status", *grid)}
    numbers = {column: number for column, number in numbers.items() if isinstance(number, float)}
    if status == "complete":
        if rank_by not in numbers:
            raise UserError(f"{place}: a complete run without a number for {rank_by}, which the arms are ranked by")
        if not math.isfinite(numbers[rank_by]):
            status = "diverged"
    return Run(row["arm"], _point(row, grid), _seed(place, row), status, numbers)


def _read_losses(path: Path, grid: list[str], arms: dict[str, Arm]) -> dict[tuple[str, int], Curve]:
    """The curves of the complete runs at each arm's best point; none where there is no such file."""
    if not path.exists():
        return {}
    wanted = {(arm.name, arm.best, run.seed) for arm in arms.values() for run in arm.complete(arm.best)}
    curves: dict[tuple[str, int], Curve] = {}
    for place, row in _rows(path, ["arm", *grid, "seed", "step", "seconds", "loss", "validation_loss"]):
        seed = _seed(place, row)
        if (row["arm"], _point(row, grid), seed) not in wanted:
            continue
        curve = curves.setdefault((row["arm"], seed), Curve([], [], {"loss": [], "validation_loss": []}))
        numbers = {column: _number(row[column] or "nan") for column in ("step", "seconds", *curve.losses)}
        for column, number in numbers.items():
            if not isinstance(number, float):
                raise UserError(f"{place}: {column}: must be a number, not {shown(row[column])!r}")
        curve.steps.append(int(row["step"]))
        curve.seconds.append(float(numbers["seconds"]))
        for column, losses in curve.losses.items():
            losses.append(float(numbers[column]))
    return curves


def _rows(path: Path, columns: list[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """(file:line, column -> text) of every line; UserError if a column is missing, or a line has too few or many."""
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [column for column in columns if column not in (reader.fieldnames or ())]
        if missing:
            raise UserError(f"{path}: has no column {', '.join(missing)}")
        for row in reader:
            place = f"{path}:{reader.line_num}"
            if None in row or None in row.values():
                raise UserError(f"{place}: must have {len(reader.fieldnames or ())} columns")
            yield place, row


def _point(row: dict[str, str], grid: list[str]) -> Point:
    return tuple(_number(row[key]) for key in grid)


def _seed(place: str, row: dict[str, str]) -> int:
    try:
        return int(row["seed"])
    except ValueError:
        raise UserError(f"{place}: seed: must be a whole number, not {shown(row['seed'])!r}") from None


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
