"""A comparison's arms as sweeps of Weights & Biases, which then chooses the values and starts the runs.

A sweep varies keys independently of each other, so that each arm is a sweep of its own, with as many runs as its grid.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # which wandb needs, too

from compare.arms import Arm, Axis
from compare.running import RUN_TRAIN
from titan_hd.files import disk_faults

SWEEP_METHODS = ("grid", "random", "bayes")  # wandb's, by which a sweep chooses


@dataclass(frozen=True)
class SweepSettings:
    """How all arms are swept. method: one of SWEEP_METHODS. metric: as it is logged; goal: "minimize" or "maximize".
    workers: of each run; None: as run_train.sh, where the agent runs."""

    folder: Path
    method: str
    metric: str
    goal: str
    project: str
    entity: str
    seeds: Sequence[int]
    workers: int | None = None


def write_sweep(arm: Arm, options: Sequence[str], settings: SweepSettings) -> Path:
    """FOLDER/sweeps/ARM.yaml, for `wandb sweep`. options: what run_train.sh gets beside the values that vary.

    Raises:
        UserError: the folder cannot be written.
    """
    place = settings.folder / "sweeps" / arm.name
    path = Path(f"{place}.yaml")
    entries = {key: value for key, value in _sweep(arm, options, settings, place).items() if value != ""}
    note = f"# wandb sweep {shlex.quote(str(path))}    prints the `wandb agent` to start\n"
    with disk_faults(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(note + yaml.safe_dump(entries, sort_keys=False), encoding="utf-8")
    return path


def _sweep(arm: Arm, options: Sequence[str], settings: SweepSettings, place: Path) -> dict[str, Any]:
    s = settings
    points = math.prod(len(axis.values) for axis in arm.axes.values())
    workers = [] if s.workers is None else ["/usr/bin/env", f"NGPU={s.workers}"]
    # The agent tells the run its identifier in its environment alone.
    shell = f'exec "$0" "$@" --job.dump_folder={shlex.quote(str(place.absolute()))}/"$WANDB_RUN_ID"'
    return {
        "name": f"{s.folder.name} {arm.name}",
        "project": s.project,
        "entity": s.entity,
        "program": str(RUN_TRAIN),
        "method": s.method,
        "metric": {"name": s.metric, "goal": s.goal},
        "run_cap": points * len(s.seeds),
        "parameters": {
            **{key: _values(axis, s.method) for key, axis in arm.axes.items()},
            "training.seed": {"values": list(s.seeds)},
        },
        "command": [*workers, "/bin/sh", "-c", shell, "${program}", *options, "--metrics.enable_wandb=true", "${args}"],
    }


def _values(axis: Axis, method: str) -> Mapping[str, Any]:
    """The values of the grid; of an axis that is spaced evenly, for the methods that draw, all between its ends."""
    if method == "grid" or axis.ratio is None:
        return {"values": [_number(value) for value in axis.values]}
    distribution = "q_log_uniform_values" if axis.whole else "log_uniform_values"
    return {"distribution": distribution, "min": _number(axis.values[0]), "max": _number(axis.values[-1])}


def _number(text: str) -> int | float | str:
    """As a number, so that wandb's charts have an axis for it."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
