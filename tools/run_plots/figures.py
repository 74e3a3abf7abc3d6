"""The figures of runs: every metric against the step, in groups.

Metrics whose names have a common part before a "/" are a family and share a figure: of one run in one panel, a curve
for each member; of several runs a panel for each member, a curve for each run, so that the runs lie on each other.
"""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from charts.drawing import (
    Picture,
    Style,
    curve_series,
    empty_picture,
    is_wide,
    mark_of,
    set_log,
    style_of,
    trend,
)

from run_plots.records import Curve, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = 2  # panels side by side
_MOST_PANELS = 12  # of a family of several runs; one with more members is shown by its range
_MOST_POINTS = 1000  # of a drawn curve; longer ones are drawn as means of equal stretches
_FEW_POINTS = 30  # of a curve, which are drawn as points, too
_SMOOTHED = 100  # records from which on the training loss has a running mean


Axis = Literal["log", "linear", "zero"]


@dataclass(frozen=True)
class Line:
    """One curve of a panel. said: what it is, for the legend and under the pointer."""

    arm: int
    said: str
    style: Style
    curve: Curve


@dataclass(frozen=True)
class Panel:
    """title: what it is of, where the figure's heading does not say so. axis: "log" is for what is read by its ratios,
    where it spans some; "zero" begins there.

    bands: of several runs, those of a family with too many members, in place of lines.
    """

    label: str
    axis: Axis
    lines: list[Line]
    bands: list[tuple[Line, Curve, Curve]]
    title: str = ""


# Figure -> heading, what it shows, and its metrics: name -> (label of its axis, kind of axis).
_KNOWN: dict[str, tuple[str, str, dict[str, tuple[str, Axis]]]] = {
    "loss": (
        "Training loss",
        "Of a step's global batch, before the step.",
        {"loss": ("loss, nats per token", "log")},
    ),
    "rate": (
        "Learning rate and gradient norm",
        "The norm over all trained parameters and logical adapters, before clipping.",
        {"lr": ("learning rate", "linear"), "grad_norm": ("gradient norm", "log")},
    ),
    "speed": (
        "Speed",
        "Of the steps since the last record; validation, checkpoints and the first step of a process are left out.",
        {
            "tokens_per_second": ("tokens per second", "zero"),
            "step_seconds": ("seconds per step", "zero"),
            "mfu": ("MFU", "zero"),
            "hfu": ("HFU", "zero"),
        },
    ),
    "phases": (
        "Where the time of a step goes",
        "Shares of the time of rank 0.",
        {
            "data_share": ("data", "zero"),
            "forward_backward_share": ("forward and backward passes", "zero"),
            "optimizer_share": ("optimizer", "zero"),
            "exchange_share": ("exchange and fold", "zero"),
        },
    ),
    "memory": (
        "Peak memory",
        "What CUDA's allocator has reserved at most; on a CPU the largest resident set of the process.",
        {"peak_memory_gib": ("peak memory, GiB", "zero")},
    ),
}
_VALIDATION = "validation_"
_VALIDATION_LABELS: dict[str, tuple[str, Axis]] = {
    "validation_loss": ("validation loss, nats per token", "log"),
    "validation_exact_match": ("share of right answers", "zero"),
}
# Family -> heading, label and kind of the axis, and what it shows; others are shown by their names.
_FAMILIES: dict[str, tuple[str, str, Axis, str]] = {
    "update_size": ("Size of a step's update", "update / W", "log", "Norms, by kind of layer."),
    "weight_change": ("Change of W since the base model", "dW / W", "log", "Norms, by kind of layer."),
    "effective_rank": ("Effective rank of dW", "directions", "log", "The mean over the layers of a kind."),
    "energy_core": (
        "dW within the initial directions, on both sides",
        "share of dW's squared norm",
        "zero",
        "What takes the K*r initial right directions to the K*r initial left ones.",
    ),
    "energy_inside": (
        "dW within the initial directions, on one side at least",
        "share of dW's squared norm",
        "zero",
        "What is left to 1 is outside of the K*r initial directions.",
    ),
    "slice_grad_norm": (
        "Gradient norm of each logical adapter",
        "gradient norm",
        "log",
        "Over all layers, before clipping: does every slice learn?",
    ),
}
# Metrics that the table of the last values shows, and no figure: they hardly change, or say again what others say.
_IN_THE_TABLE = ("tflops_per_worker", "padding_share", "gather_gb", "exchange_gb", "refresh_seconds", "measure_seconds")


def pictures_of(runs: Sequence[Run], labels: Sequence[str]) -> list[Picture]:
    """Every figure for which there are finite numbers. matplotlib must be there.

    labels: of the runs, for the legends.
    """
    draw = _Figures(runs, labels)
    return [picture for picture in draw.all() if picture.series]


class _Figures:
    def __init__(self, runs: Sequence[Run], labels: Sequence[str]):
        self.runs, self.labels = runs, labels
        self.metrics = list(dict.fromkeys(name for run in runs for name in run.curves))
        steps = [step for run in runs for curve in run.curves.values() for step in curve.steps]
        self.span = min(steps), max(steps)
        self.taken = {*_KNOWN, "validation", "others", "said"}  # names of figures, and what the page has beside them
        self.members: dict[str, int] = {}  # of one run: what a curve is of -> its place among all of these

    def all(self) -> Iterator[Picture]:
        yield from self._known("loss")
        yield from self._validation()
        yield from self._known("rate")
        families = self._families()
        for base, names in families.items():
            yield self._family(base, names)
        for name in ("speed", "phases", "memory"):
            yield from self._known(name)
        yield from self._others()

    def _known(self, name: str) -> Iterator[Picture]:
        title, caption, metrics = _KNOWN[name]
        if name == "phases" and len(self.runs) == 1:
            (run,) = self.runs
            there = {label: run.curves[metric] for metric, (label, _) in metrics.items() if metric in run.curves}
            lines = [
                Line(self._arm(label), label, style_of(i), curve) for i, (label, curve) in enumerate(there.items())
            ]
            if lines:
                yield self._draw(name, title, caption, [Panel("share of a step", "zero", lines, [])])
            return
        panels = [
            Panel(label, axis, self._of_runs(metric), [])
            for metric, (label, axis) in metrics.items()
            if metric in self.metrics
        ]
        if panels:
            yield self._draw(name, title, caption, panels)

    def _validation(self) -> Iterator[Picture]:
        names = [name for name in self.metrics if name.startswith(_VALIDATION)]
        bases = list(dict.fromkeys(name.partition("/")[0] for name in names))
        panels = []
        for base in bases:
            label, axis = _VALIDATION_LABELS.get(base, (base.replace("_", " "), "log"))
            panels += self._panels(base, [name for name in names if name.partition("/")[0] == base], label, axis)
        if panels:
            text = "Of data.validation: before the first step, every validation.freq steps and at the end."
            yield self._draw("validation", "Validation", text, panels)

    def _others(self) -> Iterator[Picture]:
        """What a hook of the user's logs, say."""
        known = {metric for _, _, metrics in _KNOWN.values() for metric in metrics} | {*_IN_THE_TABLE}
        others = [n for n in self.metrics if n not in known and "/" not in n and not n.startswith(_VALIDATION)]
        panels = [Panel(name.replace("_", " "), "log", self._of_runs(name), []) for name in others]
        if panels:
            yield self._draw("others", "Other metrics", "", panels)

    def _families(self) -> dict[str, list[str]]:
        """Base name -> the metrics BASE/MEMBER, members in the order of their numbers."""
        found: dict[str, list[str]] = {}
        for name in self.metrics:
            base, slash, _ = name.partition("/")
            if slash and not name.startswith(_VALIDATION):
                found.setdefault(base, []).append(name)
        return {base: sorted(names, key=_natural) for base, names in found.items()}

    def _family(self, base: str, names: list[str]) -> Picture:
        shown = base.replace("_", " ")
        title, label, axis, text = _FAMILIES.get(base, (shown.capitalize(), shown, "log", ""))
        panels = self._panels(base, names, label, axis)
        if any(panel.bands for panel in panels):
            text += f" {len(names)} members: the line is their median, the band reaches from the least to the greatest."
        return self._draw(self._unused(base), title, text.strip(), panels)

    def _unused(self, base: str) -> str:
        """A file's name for a family that no other figure has: a user's metrics can be called anything."""
        wanted = re.sub(r"[^\w.-]", "-", base)[:60].lstrip(".") or "family"
        tries = itertools.chain([wanted], (f"{wanted}-{number}" for number in itertools.count(2)))
        name = next(name for name in tries if name.lower() not in self.taken)
        self.taken.add(name.lower())  # some file systems do not tell capitals from small letters
        return name

    def _panels(self, base: str, names: list[str], label: str, axis: Axis) -> list[Panel]:
        if len(self.runs) == 1:
            return [Panel(label, axis, self._of_members(base, names), [])]
        if len(names) <= _MOST_PANELS:
            return [Panel(label, axis, self._of_runs(name), [], self._member(base, name)) for name in names]
        return [Panel(label, axis, [], [band for run in range(len(self.runs)) if (band := self._band(run, names))])]

    def _of_runs(self, metric: str) -> list[Line]:
        places = [place for place, run in enumerate(self.runs) if metric in run.curves]
        return [Line(place, self.labels[place], style_of(place), self.runs[place].curves[metric]) for place in places]

    def _of_members(self, base: str, names: list[str]) -> list[Line]:
        """Of the only run. Many members have colours in their order."""
        (run,) = self.runs
        lines = []
        for place, name in enumerate(names):
            member = self._member(base, name)
            style = style_of(place) if len(names) <= 8 else Style(_gradient(place / (len(names) - 1)), "-", "o")
            lines.append(Line(self._arm(member), member, style, run.curves[name]))
        return lines

    def _arm(self, member: str) -> int:
        """The same for a member of several families: it is shown in all of their figures."""
        return self.members.setdefault(member, len(self.members))

    def _member(self, base: str, name: str) -> str:
        """What a curve of a family is of: the first validation set has no name in its metrics."""
        if "/" in name:
            return name.partition("/")[2]
        sets = self.runs[0].config.get("data.validation")
        first = sets[0].get("name") if isinstance(sets, list) and sets and isinstance(sets[0], dict) else None
        return first or base

    def _band(self, place: int, names: list[str]) -> tuple[Line, Curve, Curve] | None:
        """Median, least and greatest of a family's members in one run."""
        curves = self.runs[place].curves
        found: dict[int, list[float]] = {}
        for name in names:
            for step, value in curves[name].finite if name in curves else ():
                found.setdefault(step, []).append(value)
        if not found:
            return None
        steps = sorted(found)
        median, low, high = (Curve(steps, [of(found[s]) for s in steps]) for of in (statistics.median, min, max))
        return Line(place, self.labels[place], style_of(place), median), low, high

    # ------------------------------------------------------------------------------------------------------- drawing

    def _draw(self, name: str, title: str, caption: str, panels: Sequence[Panel]) -> Picture:
        drawn = [(panel, [*panel.lines, *(line for line, _, _ in panel.bands)]) for panel in panels]
        shown = {line.said: line for _, lines in drawn for line in lines}
        lines = list(shown.values())
        if len(self.runs) == 1:
            lines = lines if any(len(panel.lines) > 1 for panel in panels) else []
            lines = lines if len(lines) <= 16 else [lines[0], lines[len(lines) // 2], lines[-1]]
        legend = [(line.arm, line.said, line.style) for line in lines]
        longest = max((len(line.curve.steps) for _, lines in drawn for line in lines), default=0)
        if longest > _MOST_POINTS:
            caption += f" Long curves are drawn as means of {-(-longest // _MOST_POINTS)} records."
        picture, axes = empty_picture(
            name, title, caption, legend, len(panels), min(_COLUMNS, len(panels)), 3.9 if len(panels) > 1 else 4.4
        )
        for one, (panel, lines) in zip(axes, drawn):
            for line, low, high in panel.bands:
                _range(one, line, low, high)
            for line in lines:
                _curve(picture, one, line, panel.label, smooth=name == "loss")
            _set_axes(one, panel, [value for line in lines for _, value in line.curve.finite], self.span)
        return picture


def _range(axes: Axes, line: Line, low: Curve, high: Curve) -> None:
    """The band of a family in one run."""
    low, high = thinned(low), thinned(high)
    look = {"color": line.style.colour, "alpha": 0.18, "linewidth": 0, "gid": mark_of(line.arm)}
    axes.fill_between(low.steps, low.values, high.values, **look)


def _curve(picture: Picture, axes: Axes, line: Line, metric: str, smooth: bool) -> None:
    """A curve with what is under the pointer. smooth: one of many records lies behind its running mean."""
    curve = thinned(line.curve)
    mark, look = mark_of(line.arm), line.style.curve()
    thin: dict[str, Any] = {**look, "linestyle": "-", "linewidth": 0.7, "alpha": 0.3}
    if smooth and len(curve.finite) >= _SMOOTHED:
        axes.plot(curve.steps, curve.values, **thin, gid=mark)
        steps, values = zip(*curve.finite)
        axes.plot(steps, trend(values), **look, gid=mark)
    else:
        few = len(curve.finite) <= _FEW_POINTS
        axes.plot(curve.steps, curve.values, **look, marker=line.style.marker if few else None, markersize=4, gid=mark)
    if points := line.curve.finite:
        texts = [f"{line.said}\nstep {step}\n{metric} {value:.4g}" for step, value in points]
        steps, values = zip(*points)
        picture.series.append(curve_series(line.arm, axes, steps, values, texts))


def _set_axes(axes: Axes, panel: Panel, values: Sequence[float], span: tuple[int, int]) -> None:
    """span: the first and the last step of all curves, so that all panels have the same steps below each other."""
    from matplotlib.ticker import MaxNLocator

    axes.set(xlabel="step", ylabel=panel.label)
    axes.set_title(panel.title, fontsize="small")
    margin = 0.03 * (span[1] - span[0]) or 0.5
    axes.set_xlim(span[0] - margin, span[1] + margin)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if panel.axis == "log" and is_wide(values):
        set_log(axes, "y")
    elif panel.axis == "zero" and values and min(values) >= 0:
        axes.set_ylim(0, 1.08 * max(values) or 1)


def thinned(curve: Curve, most: int = _MOST_POINTS) -> Curve:
    """At most so many points: means of equal stretches of the curve, at their last step."""
    length = -(-len(curve.steps) // most)
    if length < 2:
        return curve
    steps, values = [], []
    for begin in range(0, len(curve.steps), length):
        finite = [value for value in curve.values[begin : begin + length] if math.isfinite(value)]
        steps.append(curve.steps[begin : begin + length][-1])
        values.append(statistics.fmean(finite) if finite else math.nan)
    return Curve(steps, values)


def _gradient(share: float) -> str:
    """A colour from dark blue to yellow-green."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return to_hex(colormaps["viridis"](0.9 * share))


def _natural(name: str) -> list[tuple[int, str]]:
    """For sorting: slice 10 comes after slice 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
