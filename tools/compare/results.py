"""What the runs of a comparison came to: a row for each, in grid.csv, and their curves, in losses.csv."""

from __future__ import annotations

import csv
import json
import shutil
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from compare.delta_rank import delta_ranks
from compare.running import COMPLETE, PlannedRun
from compare.schedule import Run
from compare.sizes import trained_parameters
from titan_hd.adapters.inject import targeted
from titan_hd.components.records import read_records
from titan_hd.files import replace_file
from titan_hd.fitting import estimate_run

Row = dict[str, Any]
_RESULT = "result.json"


def read_row(folder: Path) -> Row | None:
    """The row of a run that has ended; None for one that has not."""
    path = folder / _RESULT
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def write_row(run: PlannedRun, status: str, threshold: float) -> Row:
    """Read what a run has left, and keep it as its result.

    status: complete, or how it failed: then there are no metrics. threshold: see `delta_ranks`.
    """
    row: Row = {"status": status, **_sizes(run)}
    if status == COMPLETE:
        row |= {**_metrics(run.folder), **_ranks(run, threshold)}
    replace_file(run.folder / _RESULT, lambda partial: partial.write_text(json.dumps(row, indent=1), encoding="utf-8"))
    return row


def _sizes(run: PlannedRun) -> Row:
    plan = run.plan
    held = estimate_run(plan, "cpu").held["optimizer's moments"]
    return {
        "rank": run.config.adapter.rank if "adapter.rank" in plan.method.keys else "",
        "num_adapters": plan.num_adapters,
        "trained_parameters": trained_parameters(run.config, plan.decoder, plan.num_adapters),
        "moments_per_worker": held // 4,  # kept in fp32
    }


def _metrics(folder: Path) -> Row:
    """loss: mean over the last tenth of the steps; seconds: of all steps; validation: the last, and before the first
    step; step_seconds and tokens_per_second: medians without the first step; peak_memory_gib: of the first worker."""
    records = read_records(folder / "metrics.jsonl")
    steps = [record for record in records if "loss" in record]
    timed = [record for record in steps if record["step"] > 1] or steps
    last = [record["loss"] for record in steps[-max(1, len(steps) // 10) :]]
    before: Row = {}
    after: Row = {}
    for record in records:
        found = {key: value for key, value in record.items() if key.startswith("validation_")}
        if record["step"] == 0:
            before |= {f"before:{key}": value for key, value in found.items()}
        else:
            after |= found
    return {
        "loss": statistics.mean(last),
        **after,
        **before,
        "exchange_gb": steps[-1]["exchange_gb"],
        "step_seconds": statistics.median(record["step_seconds"] for record in timed),
        "seconds": sum(record["step_seconds"] for record in steps),
        "tokens_per_second": statistics.median(record["tokens_per_second"] for record in timed),
        "peak_memory_gib": max(record["peak_memory_gib"] for record in steps),
    }


def _ranks(run: PlannedRun, threshold: float) -> Row:
    base, decoder = Path(run.config.model.hf_assets_path), run.plan.decoder
    kinds = targeted(decoder.linear_shapes(), run.config.adapter.target_modules)  # the others are as they were
    ranks = delta_ranks(base, run.folder / "hf", decoder, threshold, kinds)["all"]
    return {f"dw_{name}": getattr(ranks, name) for name in ("above", "entropy", "stable", "relative_norm")}


def remove_weights(folder: Path) -> None:
    """Remove a finished run's checkpoint and exported model; its metrics and its result stay."""
    for name in ("checkpoint", "hf"):
        shutil.rmtree(folder / name, ignore_errors=True)


def write_grid(folder: Path, rows: Mapping[Run, Row], keys: Sequence[str], rank_by: str) -> None:
    """Write grid.csv, a line for each run. keys: of the grid, each a column; rank_by: a metric that is one even where
    no run has it yet."""
    lines = [{**_head(run, keys), **row} for run, row in rows.items()]
    columns = [key for line in lines for key in line]
    _write_csv(folder / "grid.csv", lines, list(dict.fromkeys([*columns, rank_by])))


def write_losses(folder: Path, rows: Mapping[Run, Row], keys: Sequence[str], places: Mapping[Run, Path]) -> None:
    """Write losses.csv, a line for each step of the runs that were completed. places: the folder of each run."""
    complete = [run for run, row in rows.items() if row["status"] == COMPLETE]
    lines = ({**_head(run, keys), **point} for run in complete for point in _curve(places[run]))
    columns = ["arm", *keys, "seed", "step", "seconds", "loss", "validation_loss"]
    _write_csv(folder / "losses.csv", lines, columns)


def _head(run: Run, keys: Sequence[str]) -> Row:
    return {"arm": run.arm, **{key: dict(run.point).get(key, "") for key in keys}, "seed": run.seed}


def _curve(folder: Path) -> Iterable[Row]:
    seconds = 0.0
    for record in read_records(folder / "metrics.jsonl"):
        seconds += record.get("step_seconds", 0.0)
        if "loss" in record or "validation_loss" in record:
            shown = {key: record[key] for key in ("step", "loss", "validation_loss") if key in record}
            yield {**shown, "seconds": round(seconds, 3)}


def _write_csv(path: Path, rows: Iterable[Row], columns: Sequence[str]) -> None:
    def write(partial: Path) -> None:
        with open(partial, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)

    replace_file(path, write)
