"""Several runs of one configuration side by side: what to run, what came out, tables and plots."""

from __future__ import annotations

import csv
import dataclasses
import logging
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compare.delta_rank import DeltaRank, delta_ranks
from titan_hd.adapters.methods import METHODS, build_method, method_of
from titan_hd.components.metrics import read_metrics
from titan_hd.config.job_config import Adapter, HDPissa, JobConfig
from titan_hd.errors import UserError
from titan_hd.models.decoder import Decoder
from titan_hd.models.registry import DecoderConfig

logger = logging.getLogger("titan_hd")

# HD-PiSSA's own variants: the slices, how the updates are combined, the scalar of the paper, K.
ABLATIONS = (
    "hdpissa",
    "hdpissa+slices=top",
    "hdpissa+slices=random",
    "hdpissa+aggregate=sum",
    "hdpissa+mute_scalar=1e-2",
    "hdpissa+mute_scalar=1e-8",
    "hdpissa+mute_scalar=1e-16",
    "hdpissa+mute_scalar=1e-32",
    "hdpissa+num_adapters=1",
    "hdpissa+num_adapters=2",
    "hdpissa+num_adapters=4",
)


def parse_methods(text: str) -> dict[str, dict[str, str]]:
    """Name of each run -> keys that it changes, from "lora,hdpissa+slices=top,...", "all" or "ablations".

    Raises:
        UserError: a method or a key that there is not.
    """
    groups = {"all": METHODS, "ablations": ABLATIONS}
    names = [name for part in text.split(",") if part for name in groups.get(part, (part,))]
    if not names:
        raise UserError("--methods: names no method")
    return {name: _changes(name) for name in names}


def _changes(name: str) -> dict[str, str]:
    method, *settings = name.split("+")
    if method not in METHODS:
        raise UserError(f"--methods: {method!r} is none; there are {', '.join(METHODS)}, all, ablations")
    changes = {"adapter.method": method}
    if "adapter.dropout" not in METHODS[method].keys:  # what the others may have
        changes |= {"adapter.dropout": "0"}
    for setting in settings:
        key, equals, value = setting.partition("=")
        sections = [s for s, keys in (("adapter", Adapter), ("hdpissa", HDPissa)) if key in keys.__annotations__]
        if not equals or not (sections or "." in key):
            raise UserError(f"--methods: {name}: {setting!r} must be key=value with a key of [adapter] or [hdpissa]")
        changes[key if "." in key else f"{sections[0]}.{key}"] = value
    return changes


# ---------------------------------------------------------------------------------------------------------------------
# Sizes


def trained_parameters(config: JobConfig, decoder: DecoderConfig, num_adapters: int) -> int:
    """Number of trained parameters; for HD-PiSSA of all logical adapters together."""
    with torch.device("meta"):
        model = Decoder(decoder)
    method = build_method(config, num_adapters)
    method.apply(model, config.adapter.target_modules)
    return method.trained_parameters(model)


def match_rank(config: JobConfig, decoder: DecoderConfig) -> int:
    """The rank (block) at which the configuration's method has the number of parameters nearest to that of lora at
    adapter.rank. full has no rank, one logical adapter of hdpissa is as large as lora: both keep adapter.rank.

    Raises:
        UserError: the method fits the model at no rank.
    """
    if method_of(config).folds or "adapter.rank" not in method_of(config).keys:
        return config.adapter.rank
    block = dataclasses.replace(decoder, num_hidden_layers=1, layer_windows=decoder.layer_windows[:1])
    shapes = decoder.linear_shapes()
    shapes = {name: shapes[name] for name in config.adapter.target_modules or shapes}

    def at(rank: int, **changes: Any) -> JobConfig:
        return dataclasses.replace(config, adapter=dataclasses.replace(config.adapter, rank=rank, **changes))

    plain = {"init": "default", "rslora": False}
    budget = trained_parameters(at(config.adapter.rank, method="lora", **plain), block, 1)
    found: dict[int, int] = {}
    for rank in range(1, min(min(shape) for shape in shapes.values()) + 1):
        if not any(build_method(at(rank)).shape_error(name, shape) for name, shape in shapes.items()):
            found[rank] = trained_parameters(at(rank), block, 1)
            if found[rank] > budget:
                break
    if not found:
        raise UserError(f"adapter.rank: method {config.adapter.method} fits the shapes of this model at no rank")
    return min(found, key=lambda rank: abs(found[rank] - budget))


# ---------------------------------------------------------------------------------------------------------------------
# Results


@dataclass(frozen=True)
class Result:
    """What one run came to. loss: mean over the last tenth of the steps; step_seconds and tokens_per_second: medians
    without the first step; peak_memory_gib: of the first worker. ranks: of dW, by kind of layer and over "all"."""

    name: str
    rank: int
    parameters: int
    losses: dict[int, float]
    loss: float
    step_seconds: float
    tokens_per_second: float
    peak_memory_gib: float
    validation: dict[str, float]
    ranks: dict[str, DeltaRank]


def read_result(
    name: str, folder: Path, config: JobConfig, decoder: DecoderConfig, num_adapters: int, threshold: float
) -> Result:
    """Read a finished run's metrics.jsonl and its fp32 export in folder/hf. threshold: see `delta_rank`."""
    records = read_metrics(folder / "metrics.jsonl")
    steps = [record for record in records if "loss" in record]
    timed = [record for record in steps if record["step"] > 1] or steps
    last = [record["loss"] for record in steps[-max(1, len(steps) // 10) :]]
    validation: dict[str, float] = {}
    for record in records:
        validation |= {key: value for key, value in record.items() if key.startswith("validation_")}
    return Result(
        name,
        config.adapter.rank,
        trained_parameters(config, decoder, num_adapters),
        {record["step"]: record["loss"] for record in steps},
        statistics.mean(last),
        statistics.median(record["step_seconds"] for record in timed),
        statistics.median(record["tokens_per_second"] for record in timed),
        max(record["peak_memory_gib"] for record in steps),
        validation,
        delta_ranks(Path(config.model.hf_assets_path), folder / "hf", decoder, threshold),
    )


def write_tables(folder: Path, results: list[Result], threshold: float) -> str:
    """Write table.md, table.csv and losses.csv; returns what table.md holds."""
    unit = next((result for result in results if result.name.partition("+")[0] == "lora"), results[0])
    rows = [_row(result, unit, threshold) for result in results]
    _write_csv(folder / "table.csv", rows)
    steps = sorted({step for result in results for step in result.losses})
    _write_csv(folder / "losses.csv", [{"step": s, **{r.name: r.losses.get(s, "") for r in results}} for s in steps])
    kinds = [kind for kind in results[0].ranks if kind != "all"]
    per_kind = [{"run": r.name, **{kind: f"{r.ranks[kind].entropy:.1f}" for kind in kinds}} for r in results]
    text = f"{_markdown(rows)}\nEntropy rank of dW by kind of layer (mean over the blocks):\n\n{_markdown(per_kind)}"
    (folder / "table.md").write_text(text, encoding="utf-8")
    return text


def _row(result: Result, unit: Result, threshold: float) -> dict[str, str]:
    ranks = result.ranks["all"]
    return {
        "run": result.name,
        "rank": "-" if result.name.partition("+")[0] == "full" else str(result.rank),
        "trained parameters": f"{result.parameters:,}",
        "loss": f"{result.loss:.4f}",
        **{key.replace("_", " "): f"{value:.4g}" for key, value in result.validation.items()},
        f"step time / {unit.name}": f"{result.step_seconds / unit.step_seconds:.2f}",
        f"tokens/s / {unit.name}": f"{result.tokens_per_second / unit.tokens_per_second:.2f}",
        "peak memory GiB": f"{result.peak_memory_gib:.3f}",
        f"dW: values > {threshold:g} max": f"{ranks.above:.1f}",
        "dW: entropy rank": f"{ranks.entropy:.1f}",
        "dW / W": f"{ranks.relative_norm:.2e}",
    }


def _write_csv(path: Path, rows: list[dict]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _markdown(rows: list[dict[str, str]]) -> str:
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = [f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths))} |" for line in lines]
    return "\n".join([text[0], f"|{'|'.join('-' * (width + 2) for width in widths)}|", *text[1:]]) + "\n"


def plot(folder: Path, results: list[Result]) -> None:
    """Write losses.png and bars.png, if matplotlib is there."""
    try:
        import matplotlib
    except ImportError:
        logger.warning("no plots: matplotlib is missing (the extra `plots`); the tables are complete")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    for result in results:
        axes.plot(list(result.losses), list(result.losses.values()), label=result.name, linewidth=1)
    axes.set(xlabel="step", ylabel="training loss", yscale="log")
    axes.legend(fontsize="small")
    figure.savefig(folder / "losses.png", dpi=150, bbox_inches="tight")
    plt.close(figure)
    bars = {
        "trained parameters": [r.parameters for r in results],
        "tokens/s": [r.tokens_per_second for r in results],
        "peak memory, GiB": [r.peak_memory_gib for r in results],
        "entropy rank of dW": [r.ranks["all"].entropy for r in results],
    }
    figure, grid = plt.subplots(2, 2, figsize=(10, 2 + 0.5 * len(results)), layout="constrained", sharey=True)
    for axes, (title, values) in zip(grid.flat, bars.items()):
        axes.barh([r.name for r in results], values)
        axes.set_title(title, fontsize="medium")
        axes.invert_yaxis()
    figure.savefig(folder / "bars.png", dpi=150)
    plt.close(figure)
