"""Pictures of what `rank_analysis.py` finds."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from compare.delta_rank import WeightDelta, mean_ranks

logger = logging.getLogger("titan_hd")


def plot(folder: Path, deltas: dict[str, list[WeightDelta]], threshold: float, marks: list[int]) -> None:
    """Write spectrum.png, layers.png and ranks.png, if matplotlib is there; otherwise say so once.

    deltas: of each run. marks: numbers of directions that the spectra show as a vertical line.
    """
    try:
        import matplotlib
    except ImportError:
        logger.warning("no pictures: matplotlib is missing (the extra `plots`); the tables are complete")
        return
    matplotlib.use("Agg")
    kinds = list(dict.fromkeys(delta.kind for found in deltas.values() for delta in found))
    _spectra(folder / "spectrum.png", deltas, kinds, marks)
    _layers(folder / "layers.png", deltas, kinds)
    _ranks(folder / "ranks.png", deltas, threshold)


def mean_spectrum(deltas: list[WeightDelta]) -> torch.Tensor:
    """The geometric mean over layers of each singular value, which is what a logarithmic axis shows as the middle."""
    values = torch.stack([delta.values for delta in deltas if delta.values[0] > 0])
    return values.clamp(min=torch.finfo(torch.float64).tiny).log().mean(0).exp()


def _grid(count: int):
    from matplotlib import pyplot as plt

    columns = min(4, count)
    rows = -(-count // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 3.2 * rows), layout="constrained", squeeze=False)
    for unused in axes.flat[count:]:
        unused.axis("off")
    return plt, figure, axes.flat


def _spectra(path: Path, deltas: dict[str, list[WeightDelta]], kinds: list[str], marks: list[int]) -> None:
    plt, figure, axes = _grid(len(kinds))
    for kind, ax in zip(kinds, axes):
        lowest = []
        for name, found in deltas.items():
            of = [delta for delta in found if delta.kind == kind and delta.values[0] > 0]
            if of:
                (line,) = ax.plot(range(1, len(of[0].values) + 1), mean_spectrum(of), label=name, linewidth=1)
                floor = sum(delta.floor for delta in of) / len(of)
                ax.axhline(floor, color=line.get_color(), linestyle=":", linewidth=0.8)
                lowest.append(floor / 100)
        for mark in marks:
            ax.axvline(mark, color="grey", linestyle="--", linewidth=0.8)
        ax.set(title=kind, yscale="log", xlabel="index", ylabel="singular value of dW")
        if lowest:  # what lies far below every floor is rounding of the computation
            ax.set_ylim(bottom=min(lowest))
    _legend(figure, axes[0])
    figure.suptitle("dotted: what rounding of the weights alone could make", fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _layers(path: Path, deltas: dict[str, list[WeightDelta]], kinds: list[str]) -> None:
    plt, figure, axes = _grid(len(kinds))
    for kind, ax in zip(kinds, axes):
        for name, found in deltas.items():
            of = [delta for delta in found if delta.kind == kind]
            ax.plot([d.layer for d in of], [d.rank.entropy for d in of], marker=".", label=name, linewidth=1)
        ax.set(title=kind, xlabel="layer", ylabel="entropy rank of dW", yscale="symlog")
    _legend(figure, axes[0])
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _ranks(path: Path, deltas: dict[str, list[WeightDelta]], threshold: float) -> None:
    means = {name: mean_ranks(found)["all"] for name, found in deltas.items()}
    bars = {
        f"values > {threshold:g} of the largest": [rank.above for rank in means.values()],
        "entropy rank": [rank.entropy for rank in means.values()],
        "stable rank": [rank.stable for rank in means.values()],
    }
    plt, figure, axes = _grid(len(bars))
    for (title, values), ax in zip(bars.items(), axes):
        drawn = ax.barh(list(means), values)
        ax.bar_label(drawn, fmt="%.1f", padding=2, fontsize="small")
        ax.set_title(f"{title}, mean of all weights", fontsize="medium")
        ax.margins(x=0.15)
        ax.invert_yaxis()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _legend(figure, ax) -> None:
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=max(1, len(labels)), fontsize="small")
