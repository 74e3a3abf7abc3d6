"""The figures of a comparison, drawn by matplotlib from what was read of its files.

A figure also says where its points lie and what is to be read there, for the page (page.py) to show under the pointer.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from charts.drawing import PANEL, Picture, curve_series, is_wide, mark_of, set_log, style_of, trend

from compare.drawing import cross, is_wide_metric, metric_text, new_picture, scatter
from compare.grid_figure import grid_picture
from compare.outcome import Curve, Outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def pictures_of(outcome: Outcome) -> list[Picture]:
    """Every figure for which there are numbers. matplotlib must be there."""
    drawn = [grid_picture(outcome, place) for place in range(len(outcome.grid))]
    others = (_differences, _losses, _time, _moments, _forgetting)
    return drawn + [picture for draw in others if (picture := draw(outcome)) is not None]


def _differences(outcome: Outcome) -> Picture | None:
    """Every arm's difference to the baseline with its interval."""
    found = [(arm, outcome.difference(arm)) for arm in outcome.ranked]
    rows = [(arm, difference) for arm, difference in found if difference is not None]
    if not rows:
        return None
    side = "Left" if outcome.better == "min" else "Right"
    picture, (axes,) = new_picture(
        outcome,
        "differences",
        f"{outcome.rank_by}: each arm's best less that of {outcome.baseline}",
        f"Paired by seed; bars: 95% intervals. {side} of the line is better than {outcome.baseline}.",
        legend=[],
        height=1.2 + 0.3 * len(rows),
    )
    axes.axvline(0, color="grey", linewidth=1)
    names = list(outcome.arms)
    for y, (arm, difference) in enumerate(rows):
        interval = difference.interval
        said = "no interval" if interval is None else f"95%: {interval[0]:+.3g} to {interval[1]:+.3g}"
        text = f"{arm.name}\n{difference.mean:+.3g} ({difference.n} pairs)\n{said}"
        cross(picture, axes, names.index(arm.name), (difference.mean, difference.half), (float(y), None), text)
    axes.set_yticks(range(len(rows)), [arm.name for arm, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)  # the best above
    axes.set_xlabel("difference")
    # Names of arms can be as long as the axes.
    picture.figure.set_figwidth(PANEL[0] + 0.085 * max(len(arm.name) for arm, _ in rows))
    return picture


def _moments(outcome: Outcome) -> Picture | None:
    held = [arm.median_at_best("moments_per_worker") for arm in outcome.arms.values()]
    if not any(held):
        return None
    picture, (axes,) = new_picture(
        outcome,
        "moments",
        f"{outcome.rank_by} against the optimizer's moments",
        "At each arm's best point; bars: the standard deviation over the seeds. Moments: elements that a worker holds.",
    )
    scatter(picture, axes, outcome, "moments_per_worker", "moments per worker")
    if is_wide(number for number in held if number is not None):
        set_log(axes, "x")
    return picture


def _forgetting(outcome: Outcome) -> Picture | None:
    if not outcome.further:
        return None
    picture, panels = new_picture(
        outcome,
        "forgetting",
        f"Forgetting against {outcome.rank_by}",
        "At each arm's best point: the metric of a further validation set after training less that before; bars: the "
        "standard deviation over the seeds.",
        len(outcome.further),
    )
    for axes, metric in zip(panels, outcome.further):
        axes.axhline(0, color="grey", linewidth=1)
        means = []
        for index, arm in enumerate(outcome.arms.values()):
            value, lost = arm.at_best(outcome.rank_by), outcome.forgetting(arm, metric)
            if value is not None and lost is not None:
                text = f"{arm.name}\n{metric_text(outcome.rank_by, value)}\n{metric} {lost.mean:+.3g}"
                cross(picture, axes, index, (value.mean, value.sd), (lost.mean, lost.sd), text)
                means.append(value.mean)
        if is_wide_metric(outcome, means):
            set_log(axes, "x")
        axes.set(xlabel=outcome.rank_by, ylabel=f"{metric}: after - before")
    return picture


# ---------------------------------------------------------------------------------------------------------------------
# Curves


@dataclass(frozen=True)
class MeanCurve:
    """Of one arm: steps, seconds and losses, means over the seeds that have a step."""

    steps: list[int]
    seconds: list[float]
    losses: list[float]


def mean_curve(curves: Iterable[Curve], column: str) -> MeanCurve:
    """column: "loss", whose mean over a fiftieth of the steps is taken, too, or "validation_loss"."""
    places: dict[int, list[tuple[float, float]]] = {}
    for curve in curves:
        for step, seconds, loss in zip(curve.steps, curve.seconds, curve.losses[column]):
            if not math.isnan(loss):
                places.setdefault(step, []).append((seconds, loss))
    steps = sorted(places)
    seconds, losses = ([statistics.fmean(pair[i] for pair in places[step]) for step in steps] for i in (0, 1))
    return MeanCurve(steps, seconds, trend(losses) if column == "loss" else losses)


def _losses(outcome: Outcome) -> Picture | None:
    """Training and validation loss against the step."""
    columns = [column for column in ("loss", "validation_loss") if _mean_curves(outcome, column)]
    if not columns:
        return None
    picture, panels = new_picture(
        outcome,
        "losses",
        "Losses at each arm's best point",
        "Mean over the seeds; the training loss as a running mean over a fiftieth of the steps.",
        len(columns),
    )
    for axes, column in zip(panels, columns):
        _draw_curves(picture, axes, outcome, column, "step", lambda curve: curve.steps)
    return picture


def _time(outcome: Outcome) -> Picture | None:
    """The validation loss, or where there is none the training loss, against seconds; and the whole runs."""
    column = next((column for column in ("validation_loss", "loss") if _mean_curves(outcome, column)), None)
    if column is None:
        return None
    picture, (curves, runs) = new_picture(
        outcome,
        "time",
        "Loss against time" if column in outcome.rank_by else f"Loss and {outcome.rank_by} against time",
        "At each arm's best point, mean over the seeds. Left: in training; right: the whole runs, bars: the standard "
        "deviation. Times compare as far as nothing else ran on the machine.",
        2,
    )
    _draw_curves(picture, curves, outcome, column, "seconds since the first step", lambda curve: curve.seconds)
    scatter(picture, runs, outcome, "seconds", "seconds of the whole run")
    return picture


def _mean_curves(outcome: Outcome, column: str) -> dict[int, MeanCurve]:
    """Place of the arm -> its curve; arms that have none are left out."""
    found = {}
    for index, arm in enumerate(outcome.arms.values()):
        keys = [(arm.name, run.seed) for run in arm.complete(arm.best)]
        curve = mean_curve((outcome.curves[key] for key in keys if key in outcome.curves), column)
        if curve.steps:
            found[index] = curve
    return found


def _draw_curves(
    picture: Picture,
    axes: Axes,
    outcome: Outcome,
    column: str,
    label: str,
    along: Callable[[MeanCurve], Sequence[float]],
) -> None:
    curves, names = _mean_curves(outcome, column), list(outcome.arms)
    for index, curve in curves.items():
        style, xs = style_of(index), along(curve)
        # Where markers stand: a place of its own for each arm, so that few lie on each other.
        every = max(1, len(xs) // 6)
        marks = {"marker": style.marker, "markersize": 4, "markevery": (index * every // len(names), every)}
        axes.plot(xs, curve.losses, **style.curve(), **marks, gid=mark_of(index))
        texts = [
            f"{names[index]}\nstep {step}, {seconds:.4g} s\n{column} {loss:.4g}"
            for step, seconds, loss in zip(curve.steps, curve.seconds, curve.losses)
        ]
        picture.series.append(curve_series(index, axes, xs, curve.losses, texts))
    if is_wide(loss for curve in curves.values() for loss in curve.losses):
        set_log(axes, "y")
    axes.set(xlabel=label, ylabel="training loss" if column == "loss" else "validation loss")
