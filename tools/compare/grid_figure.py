"""The figure that settles whether a method was given its learning rate: the metric against a key of the grid."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from charts.drawing import Picture, Series, mark_of, set_log, style_of

from compare.drawing import is_wide_metric, new_picture
from compare.outcome import FAILURES, Arm, Outcome, Point, show_value

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIGNS = {"diverged": "x", "out_of_memory": "$M$", "failed": "$?$"}
_SIGN_TEXTS = {"diverged": "x diverged", "out_of_memory": "M out of memory", "failed": "? failed"}
_ROW = 0.036  # of the height of the axes: the distance between the rows of failures above the edge
_TRIANGLES = {True: 6, False: 7}  # matplotlib's markers whose tips touch an upper and a lower edge
_MOST_TICKS = 12


@dataclass(frozen=True)
class _Plot:
    """What is drawn: `outcome` along the key grid[place]."""

    outcome: Outcome
    place: int

    @property
    def key(self) -> str:
        return self.outcome.grid[self.place]

    def points(self, arm: Arm) -> list[Point]:
        """Those that have a value of the key: of an arm whose key it is not, none."""
        return [point for point in arm.points if point[self.place] != ""]

    @cached_property
    def arms(self) -> dict[int, Arm]:
        """Place in grid.csv -> arm, of those that the key is of."""
        return {index: arm for index, arm in enumerate(self.outcome.arms.values()) if self.points(arm)}

    @cached_property
    def failures(self) -> dict[int, dict[Point, dict[str, int]]]:
        """Place of the arm -> point -> status -> number of runs that ended so; without what has none."""
        found = {
            index: {point: ends for point in self.points(arm) if (ends := arm.failures(point))}
            for index, arm in self.arms.items()
        }
        return {index: points for index, points in found.items() if points}

    @cached_property
    def values(self) -> list[float | str]:
        """All values of the key, in the order of grid.csv."""
        return list(dict.fromkeys(point[self.place] for arm in self.arms.values() for point in self.points(arm)))

    @cached_property
    def words(self) -> bool:
        return any(isinstance(value, str) for value in self.values)

    def place_of(self, value: float | str) -> float:
        """Of a number its own place on the axis; where some values are none, all lie one after the other."""
        return float(self.values.index(value)) if self.words else float(value)

    def x(self, point: Point) -> float:
        return self.place_of(point[self.place])

    @cached_property
    def numbers(self) -> list[float]:
        """The metric of every complete run."""
        arms, metric = self.arms.values(), self.outcome.rank_by
        return [run.numbers[metric] for arm in arms for point in self.points(arm) for run in arm.complete(point)]

    @cached_property
    def window(self) -> tuple[float, float] | None:
        """The range of the metric in which the bests lie, with some room; None where nearly all values lie there."""
        scale, back = (math.log, math.exp) if is_wide_metric(self.outcome, self.numbers) else (float, float)
        metric = self.outcome.rank_by
        bests = [scale(y) for arm in self.arms.values() for y in arm.by_seed(arm.best, metric).values()]
        if not bests:
            return None
        low, high = min(bests), max(bests)
        room = 0.25 * (high - low) or 0.1 * abs(high) or 0.1
        low, high = low - room, high + room
        spread = scale(max(self.numbers)) - scale(min(self.numbers))
        return (back(low), back(high)) if spread > 1.6 * (high - low) else None


def grid_picture(outcome: Outcome, place: int) -> Picture:
    """The ranking metric against the place-th key of the grid."""
    plot = _Plot(outcome, place)
    picture, panels = new_picture(
        outcome,
        f"grid-{''.join(c if c.isalnum() or c in '._-' else '-' for c in plot.key)}",
        f"{outcome.rank_by} against {plot.key}",
        _caption(plot),
        2 if plot.window else 1,
        plot.arms.values(),
        4.6 + 0.16 * len(plot.failures),
    )
    for axes, shown in zip(panels, (plot.numbers, plot.window)):
        axes.set(xlabel=plot.key, ylabel=outcome.rank_by)
        _set_x_axis(plot, axes)
        if is_wide_metric(outcome, shown or ()):
            set_log(axes, "y")
        for index, arm in plot.arms.items():
            _draw_arm(plot, picture, axes, index, arm)
    if plot.window:
        panels[1].set_ylim(*plot.window)
        _mark_beyond(plot, panels[1], plot.window)
    _mark_failures(plot, picture, panels)
    return picture


def _caption(plot: _Plot) -> str:
    other = ", at the best value of the other keys" if len(plot.outcome.grid) > 1 else ""
    text = f"Every point is a run, the line their mean over seeds{other}. Filled: the points with the most seeds, from "
    text += "which the best (ringed) is chosen; open: fewer seeds."
    if plot.failures:
        text += " Above the edge: runs that came to nothing."
    if plot.window:
        text += " Right: the same near the best values; a triangle at the edge stands for what lies beyond it."
    return text


def _set_x_axis(plot: _Plot, axes: Axes) -> None:
    """Ticks at the values themselves, as many as have room."""
    scale: Callable[[float], float] = float
    places = {plot.place_of(value): show_value(value) for value in plot.values}
    low, high = min(places), max(places)
    if not plot.words and low > 0 and high > 3 * low:
        set_log(axes, "x")
        scale = math.log
    apart = 0.0 if plot.words else (scale(high) - scale(low)) / _MOST_TICKS
    ticks: list[float] = []
    for place in sorted(places):
        if not ticks or scale(place) - scale(ticks[-1]) >= apart:
            ticks.append(place)
    axes.set_xticks(ticks, [places[tick] for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.tick_params(axis="x", labelrotation=45 if sum(len(places[tick]) for tick in ticks) > 40 else 0)


def _draw_arm(plot: _Plot, picture: Picture, axes: Axes, index: int, arm: Arm) -> None:
    style, mark, metric = style_of(index), mark_of(index), plot.outcome.rank_by
    better = min if plot.outcome.better == "min" else max
    means: dict[float, float] = {}
    for point in plot.points(arm):
        at = arm.at(point, metric)
        if at is not None:
            means[plot.x(point)] = better(means.get(plot.x(point), at.mean), at.mean)
    xs = sorted(means)
    axes.plot(xs, [means[x] for x in xs], **style.curve(), gid=mark)
    for point in plot.points(arm):
        values, place = arm.by_seed(point, metric), _point_text(plot.outcome, point)
        face = style.colour if point in arm.repeated else "white"
        ys = list(values.values())
        axes.plot([plot.x(point)] * len(ys), ys, **style.points(5), markerfacecolor=face, gid=mark)
        texts = [f"{arm.name}\n{place}\nseed {seed}: {metric} {y:.4g}" for seed, y in values.items()]
        picture.series.append(Series(index, axes, [plot.x(point)] * len(ys), ys, texts))
        if point == arm.best:
            mean = statistics.fmean(ys)
            ring = {"markersize": 13, "markeredgewidth": 1.2, "markerfacecolor": "none"}
            axes.plot([plot.x(point)], [mean], "o", color=style.colour, **ring, gid=mark)
            text = f"{arm.name}: its best point\n{place}\nmean of {len(ys)}: {metric} {mean:.4g}"
            picture.series.append(Series(index, axes, [plot.x(point)], [mean], [text]))


def _mark_beyond(plot: _Plot, axes: Axes, window: tuple[float, float]) -> None:
    for index, arm in plot.arms.items():
        for point in plot.points(arm):
            for y in arm.by_seed(point, plot.outcome.rank_by).values():
                if not window[0] <= y <= window[1]:
                    above = y > window[1]
                    look = {"marker": _TRIANGLES[above], "color": style_of(index).colour, "gid": mark_of(index)}
                    axes.plot([plot.x(point)], [window[1] if above else window[0]], **look)


def _mark_failures(plot: _Plot, picture: Picture, panels: Sequence[Axes]) -> None:
    """Above the upper edge: a row for each arm that has failures, so that no arm hides another. The arm's own marker
    and beside it the sign of how the run ended."""
    from matplotlib.transforms import ScaledTranslation

    beside = ScaledTranslation(8 / 72, 0, picture.figure.dpi_scale_trans)
    for (row, (index, points)), axes in itertools.product(enumerate(plot.failures.items()), panels):
        edge, y = axes.get_xaxis_transform(), 1 + _ROW * (row + 0.8)
        style, common = style_of(index), {"clip_on": False, "gid": mark_of(index)}
        for point, ends in points.items():
            x = plot.x(point)
            axes.plot([x], [y], **style.points(4), markerfacecolor="white", transform=edge, **common)
            moved = edge
            for end in ends:
                moved = moved + beside
                look = {"marker": _SIGNS[end], "markersize": 5, "markeredgewidth": 0.8, "color": style.colour}
                axes.plot([x], [y], **look, transform=moved, **common)
            said = ", ".join(f"{count} {end.replace('_', ' ')}" for end, count in ends.items())
            text = f"{plot.arms[index].name}\n{_point_text(plot.outcome, point)}\n{said}"
            picture.series.append(Series(index, axes, [x], [y], [text], edge))
    seen = {end for points in plot.failures.values() for ends in points.values() for end in ends}
    if seen:
        text = ", ".join(_SIGN_TEXTS[end] for end in FAILURES if end in seen)
        panels[0].set_title(text, fontsize="small", loc="left", y=1 + _ROW * (len(plot.failures) + 0.6), pad=0)


def _point_text(outcome: Outcome, point: Point) -> str:
    return ", ".join(f"{key} {show_value(value)}" for key, value in zip(outcome.grid, point) if value != "")
