"""How the figures of the tools look, and what of them the page (page.py) can point at.

One colour, line style and marker for each thing that is compared, and the legend outside.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Transform

# Eight colours that readers with a colour deficiency tell apart (after Okabe and Ito; the yellow is darkened). The next
# eight arms have them again with dashed lines; no two of sixteen have the same marker.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#56b4e9", "#b8860b", "#7a5cc7")
_LINES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h", "d", "8", "H", "$\\odot$")
PANEL = (5.6, 4.4)  # width and height of one panel, inches
_HOVER_POINTS = 200  # of a curve, at most; what is drawn has all
_WIDE = 4.0  # an axis whose greatest value is this many times the least is a logarithmic one


@dataclass(frozen=True)
class Series:
    """Points of one arm that can be pointed at, and a text of each. An arm is what has one look in all figures: of a
    comparison a method, of several runs a run.

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


def matplotlib_is_there() -> bool:
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def style_of(index: int) -> Style:
    """Of the index-th arm."""
    turn, place = divmod(index, len(_COLOURS))
    return Style(_COLOURS[place], _LINES[turn % len(_LINES)], _MARKERS[index % len(_MARKERS)])


def mark_of(index: int) -> str:
    """The `gid` by which the page finds what is drawn of an arm."""
    return f"arm{index}"


def empty_picture(
    name: str,
    title: str,
    caption: str,
    legend: Sequence[tuple[int, str, Style]] = (),
    panels: int = 1,
    columns: int | None = None,
    height: float = PANEL[1],
) -> tuple[Picture, list[Axes]]:
    """A figure with empty panels.

    legend: place, name and look of the arms in it. columns: panels side by side; None: all. height: of a row of panels,
    inches; the figure is higher if the legend needs it.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    columns = columns or panels
    rows = -(-panels // columns)
    width = columns * PANEL[0] + (0.9 + 0.085 * max(len(label) for _, label, _ in legend) if legend else 0.0)
    figure = Figure(figsize=(width, max(rows * height, 0.6 + 0.21 * len(legend))), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    axes = [figure.add_subplot(rows, columns, place + 1) for place in range(panels)]
    for one in axes:
        one.grid(alpha=0.25)
    handles = [
        Line2D([], [], **style.curve(), marker=style.marker, markersize=6, label=label, gid=mark_of(index))
        for index, label, style in legend
    ]
    if handles:
        figure.legend(handles=handles, loc="outside right upper", fontsize="small", frameon=False, handlelength=3)
    return Picture(name, title, caption, figure), axes


def save(pictures: Iterable[Picture], folder: Path) -> None:
    """A PNG file of each in a folder that is there; the same figure gives the same bytes. Raises OSError."""
    for picture in pictures:
        picture.figure.savefig(folder / f"{picture.name}.png", dpi=150, metadata={"Software": None})


def curve_series(arm: int, axes: Axes, x: Sequence[float], y: Sequence[float], texts: Sequence[str]) -> Series:
    """Of a curve as many points as a pointer can tell apart."""
    stride = max(1, math.ceil(len(x) / _HOVER_POINTS))
    return Series(arm, axes, x[::stride], y[::stride], texts[::stride])


def is_wide(values: Iterable[float]) -> bool:
    """Whether values are better seen on a logarithmic axis."""
    values = list(values)
    return bool(values) and min(values) > 0 and max(values) > _WIDE * min(values)


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


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and the window - 1 before it, of fewer at the beginning; window below 2: as they are."""
    sums = [0.0, *itertools.accumulate(values)]
    starts = [max(0, end - max(1, window)) for end in range(1, len(sums))]
    return [(sums[end] - sums[start]) / (end - start) for end, start in enumerate(starts, 1)]


def trend(values: Sequence[float]) -> list[float]:
    """What a loss is drawn as: its running mean over a fiftieth of the curve."""
    return running_mean(values, len(values) // 50)
