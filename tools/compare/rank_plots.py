"""Pictures of what `rank_analysis.py` finds."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from charts.drawing import Picture, empty_picture, matplotlib_is_there, save, style_of

from compare.delta_rank import WeightDelta, mean_ranks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

logger = logging.getLogger("titan_hd")
_COLUMNS, _HEIGHT = 3, 3.6  # panels side by side, and how high they are, inches


def plot(folder: Path, deltas: dict[str, list[WeightDelta]], threshold: float, marks: Sequence[int]) -> None:
    """Write spectrum.png, layers.png and ranks.png, if matplotlib is there; otherwise say so once.

    deltas: of each run. marks: numbers of directions that the spectra show as a vertical line.
    """
    if not matplotlib_is_there():
        logger.warning("no pictures: matplotlib is missing (the extra `plots`); the tables are complete")
        return
    kinds = list(dict.fromkeys(delta.kind for found in deltas.values() for delta in found))
    save((_spectra(deltas, kinds, marks), _layers(deltas, kinds), _ranks(deltas, threshold)), folder)


def mean_spectrum(deltas: list[WeightDelta]) -> torch.Tensor:
    """The geometric mean over layers of each singular value, which is what a logarithmic axis shows as the middle."""
    values = torch.stack([delta.values for delta in deltas if delta.values[0] > 0])
    return values.clamp(min=torch.finfo(torch.float64).tiny).log().mean(0).exp()


def _panels(name: str, title: str, runs: Sequence[str], panels: int) -> tuple[Picture, list[Axes]]:
    legend = [(place, run, style_of(place)) for place, run in enumerate(runs)]
    return empty_picture(name, title, "", legend, panels, min(_COLUMNS, panels), _HEIGHT)


def _spectra(deltas: dict[str, list[WeightDelta]], kinds: Sequence[str], marks: Sequence[int]) -> Picture:
    title = "Singular values of dW; dotted: what rounding of the weights alone could make"
    picture, axes = _panels("spectrum", title, [*deltas], len(kinds))
    for kind, ax in zip(kinds, axes):
        lowest = []
        for place, found in enumerate(deltas.values()):
            of = [delta for delta in found if delta.kind == kind and delta.values[0] > 0]
            if of:
                ax.plot(range(1, len(of[0].values) + 1), mean_spectrum(of), **style_of(place).curve())
                floor = sum(delta.floor for delta in of) / len(of)
                ax.axhline(floor, color=style_of(place).colour, linestyle=":", linewidth=0.8)
                lowest.append(floor / 100)
        for mark in marks:
            ax.axvline(mark, color="grey", linestyle="--", linewidth=0.8)
        ax.set(title=kind, yscale="log", xlabel="index", ylabel="singular value of dW")
        if lowest:  # what lies far below every floor is rounding of the computation
            ax.set_ylim(bottom=min(lowest))
    return picture


def _layers(deltas: dict[str, list[WeightDelta]], kinds: Sequence[str]) -> Picture:
    picture, axes = _panels("layers", "Effective rank of every layer's dW", [*deltas], len(kinds))
    for kind, ax in zip(kinds, axes):
        for place, found in enumerate(deltas.values()):
            of, style = [delta for delta in found if delta.kind == kind], style_of(place)
            ax.plot(
                [d.layer for d in of], [d.rank.entropy for d in of], **style.curve(), marker=style.marker, markersize=4
            )
        ax.set(title=kind, xlabel="layer", ylabel="entropy rank of dW", yscale="symlog")
    return picture


def _ranks(deltas: dict[str, list[WeightDelta]], threshold: float) -> Picture:
    means = {name: mean_ranks(found)["all"] for name, found in deltas.items()}
    bars = {
        f"values > {threshold:g} of the largest": [rank.above for rank in means.values()],
        "entropy rank": [rank.entropy for rank in means.values()],
        "stable rank": [rank.stable for rank in means.values()],
    }
    picture, axes = _panels("ranks", "Ranks of dW, means of all weights", (), len(bars))
    for (title, values), ax in zip(bars.items(), axes):
        drawn = ax.barh(list(means), values, color=[style_of(place).colour for place in range(len(means))])
        ax.bar_label(drawn, fmt="%.1f", padding=2, fontsize="small")
        ax.set_title(title)
        ax.margins(x=0.15)
        ax.invert_yaxis()
    return picture
