"""How the figures of a comparison look: an empty one with its arms' legend, points with bars."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from charts.drawing import PANEL, Picture, Series, empty_picture, is_wide, mark_of, set_log, style_of

from compare.outcome import Arm, Outcome
from compare.statistics import Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def new_picture(
    outcome: Outcome,
    name: str,
    title: str,
    caption: str,
    panels: int = 1,
    legend: Iterable[Arm] | None = None,
    height: float = PANEL[1],
) -> tuple[Picture, list[Axes]]:
    """A figure with empty panels side by side.

    legend: the arms in it; None: those that have a best point. height: inches; more if the legend needs it.
    """
    names = list(outcome.arms)
    ran = (arm for arm in outcome.arms.values() if arm.best is not None)
    places = [(names.index(arm.name), arm.name) for arm in (ran if legend is None else legend)]
    looks = [(index, label, style_of(index)) for index, label in places]
    return empty_picture(name, title, caption, looks, panels, height=height)


def is_wide_metric(outcome: Outcome, values: Iterable[float]) -> bool:
    """The same of the ranking metric: losses are read by their ratios, shares of right answers are not."""
    return outcome.better == "min" and is_wide(values)


def cross(
    picture: Picture, axes: Axes, index: int, x: tuple[float, float | None], y: tuple[float, float | None], text: str
) -> None:
    """A point of an arm with bars; x, y: (value, half the length of the bar or None)."""
    style = style_of(index)
    axes.errorbar([x[0]], [y[0]], xerr=x[1], yerr=y[1], **style.points(7), capsize=2, gid=mark_of(index))
    picture.series.append(Series(index, axes, [x[0]], [y[0]], [text]))


def scatter(picture: Picture, axes: Axes, outcome: Outcome, column: str, label: str) -> None:
    """The ranking metric at each arm's best point against the median of a column there."""
    means = []
    for index, arm in enumerate(outcome.arms.values()):
        value, x = arm.at_best(outcome.rank_by), arm.median_at_best(column)
        if value is not None and x is not None:
            text = f"{arm.name}\n{label} {x:,.4g}\n{metric_text(outcome.rank_by, value)}"
            cross(picture, axes, index, (x, None), (value.mean, value.sd), text)
            means.append(value.mean)
    if is_wide_metric(outcome, means):
        set_log(axes, "y")
    axes.set(xlabel=label, ylabel=outcome.rank_by)


def metric_text(metric: str, summary: Summary) -> str:
    spread = "" if summary.sd is None or math.isnan(summary.sd) else f" (sd {summary.sd:.2g}, {summary.n} seeds)"
    return f"{metric} {summary.mean:.4g}{spread}"
