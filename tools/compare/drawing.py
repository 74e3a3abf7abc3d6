"""How the figures of a comparison look: one colour, line style and marker for each arm, and the legend outside."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from compare.outcome import Arm, Outcome
from compare.statistics import Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Transform

# Eight colours that readers with a colour deficiency tell apart (after Okabe and Ito; the yellow is darkened). The next
# eight arms have them again with dashed lines; no two of sixteen have the same marker.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#56b4e9", "#b8860b", "#7a5cc7")
_LINES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h", "d", "8", "H", "$\\odot$")
_PANEL = (5.6, 4.4)  # width and height of one panel, inches
_WIDE = 4.0  # an axis whose greatest value is this many times the least is a logarithmic one


@dataclass(frozen=True)
class Series:
    """Points of one arm that can be pointed at, and a text of each.

    place: matplotlib's transform of x and y; None: the data's, and what the axes cut off cannot be pointed at.
    """

    arm: int
    axes: Axes
    x: Sequence[float]
    y: Sequence[float]
    texts: Sequence[str]
    place: Transform | None = None


@dataclass
class Picture:
    """A figure with its file's name (without its ending), its heading and what it shows."""

    name: str
    title: str
    caption: str
    figure: Figure
    series: list[Series] = field(default_factory=list)


@dataclass(frozen=True)
class Style:
    colour: str
    line: str
    marker: str

    def curve(self) -> dict[str, Any]:
        return {"color": self.colour, "linestyle": self.line, "linewidth": 1.4}

    def points(self, size: float) -> dict[str, Any]:
        return {"linestyle": "none", "color": self.colour, "marker": self.marker, "markersize": size}


def style_of(index: int) -> Style:
    """Of the arm that is the index-th in grid.csv."""
    turn, place = divmod(index, len(_COLOURS))
    return Style(_COLOURS[place], _LINES[turn % len(_LINES)], _MARKERS[index % len(_MARKERS)])


def mark_of(index: int) -> str:
    """The `gid` by which the page finds what is drawn of an arm."""
    return f"arm{index}"


def new_picture(
    outcome: Outcome,
    name: str,
    title: str,
    caption: str,
    panels: int = 1,
    legend: Iterable[Arm] | None = None,
    height: float = _PANEL[1],
) -> tuple[Picture, list[Axes]]:
    """A figure with empty panels side by side.

    legend: the arms in it; None: those that have a best point. height: inches; more if the legend needs it.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    names = list(outcome.arms)
    ran = (arm for arm in outcome.arms.values() if arm.best is not None)
    shown = [arm.name for arm in (ran if legend is None else legend)]
    width = panels * _PANEL[0] + (0.9 + 0.085 * max(map(len, shown)) if shown else 0.0)
    figure = Figure(figsize=(width, max(height, 0.6 + 0.21 * len(shown))), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    axes = [figure.add_subplot(1, panels, place + 1) for place in range(panels)]
    for one in axes:
        one.grid(alpha=0.25)
    handles = []
    for arm in shown:
        style, mark = style_of(names.index(arm)), mark_of(names.index(arm))
        handles.append(Line2D([], [], **style.curve(), marker=style.marker, markersize=6, label=arm, gid=mark))
    if handles:
        figure.legend(handles=handles, loc="outside right upper", fontsize="small", frameon=False, handlelength=3)
    return Picture(name, title, caption, figure), axes


def is_wide(values: Iterable[float]) -> bool:
    """Whether values are better seen on a logarithmic axis."""
    values = list(values)
    return bool(values) and min(values) > 0 and max(values) > _WIDE * min(values)


def is_wide_metric(outcome: Outcome, values: Iterable[float]) -> bool:
    """The same of the ranking metric: losses are read by their ratios, shares of right answers are not."""
    return outcome.better == "min" and is_wide(values)


def set_log(axes: Axes, side: Literal["x", "y"]) -> None:
    """Make an axis logarithmic, with numbers that are read at once: 0.3, not 3 x 10^-1."""
    from matplotlib.ticker import LogFormatter

    class Plain(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""  # which ticks get a label is matplotlib's choice

    axes.set(**{f"{side}scale": "log"})
    axis = axes.xaxis if side == "x" else axes.yaxis
    axis.set_major_formatter(Plain())
    axis.set_minor_formatter(Plain())


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
