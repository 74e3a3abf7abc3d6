"""What the folder of a run says of it: the metrics by step, and the configuration."""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_hd.errors import UserError
from titan_hd.files import shown

METRICS, ENVIRONMENT = "metrics.jsonl", "environment.jsonl"
# What runs have that are alike otherwise.
_OF_ONE_RUN = ("job.", "metrics.", "checkpoint.folder", "profiling.", "comm.")


@dataclass(frozen=True)
class Curve:
    """One metric of one run. steps ascend; a value that was not finite is nan."""

    steps: list[int]
    values: list[float]

    @property
    def finite(self) -> list[tuple[int, float]]:
        return [(step, value) for step, value in zip(self.steps, self.values) if math.isfinite(value)]


@dataclass(frozen=True)
class Run:
    """config: section.key -> value of the run's last start; empty where it is not known. notes: what a reader of its
    curves must know."""

    name: str
    folder: Path
    curves: dict[str, Curve]
    config: dict[str, object]
    notes: list[str]


def read_run(path: Path, name: str) -> Run:
    """The run in a folder, or one that a file of metrics is of.

    Raises:
        UserError: there are no metrics, or they cannot be read; one line that names the folder or the file.
    """
    file = path if path.is_file() else path / METRICS
    folder = file.parent
    if not file.exists():
        raise UserError(f"{path}: holds no {METRICS}; name the folder of a run (its job.dump_folder), or such a file")
    notes: list[str] = []
    curves = _curves(file, notes)
    if not curves:
        raise UserError(f"{file}: holds no record of a step yet")
    earlier = sorted(other.name for other in folder.glob("metrics.*.jsonl") if other != file)
    if earlier and file.name == METRICS:
        notes.append(f"{', '.join(earlier)}: of earlier runs in the same folder, not drawn; name such a file to see it")
    for metric, curve in curves.items():
        bad = [step for step, value in zip(curve.steps, curve.values) if not math.isfinite(value)]
        if bad:
            where = f"at step {bad[0]}" if len(bad) == 1 else f"{len(bad)} times from step {bad[0]} to {bad[-1]}"
            notes.append(f"{metric} is no finite number {where}")
    config = _config(folder / ENVIRONMENT, notes) if file.name == METRICS else {}
    return Run(name, folder, curves, config, notes)


def _curves(file: Path, notes: list[str]) -> dict[str, Curve]:
    """Of a run that went back to an earlier step, what it wrote last."""
    found: defaultdict[str, dict[int, float]] = defaultdict(dict)
    last = -1
    for step, values in _records(file, notes):
        if step < last:
            for points in found.values():
                for later in [other for other in points if other >= step]:
                    del points[later]
        last = step
        for name, value in values.items():
            found[name][step] = value
    return {name: Curve(list(points), list(points.values())) for name, points in found.items() if points}


def _records(file: Path, notes: list[str]) -> Iterator[tuple[int, dict[str, float]]]:
    """Step and numbers of every record; a note of what is left out."""
    try:
        *lines, rest = file.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    bad, others = [], set()
    for number, line in enumerate([*lines, rest], 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            if number <= len(lines):  # else it is being written, or a full disk has cut it
                bad.append(number)
            continue
        step = record.pop("step", None) if isinstance(record, dict) else None
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            bad.append(number)
            continue
        numbers = {name: _number(value) for name, value in record.items()}
        others |= {name for name, value in numbers.items() if value is None}
        yield step, {name: value for name, value in numbers.items() if value is not None}
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        notes.append(f"{file}:{bad[0]}{more}: no record of a step; left out")
    if others:
        notes.append(f"{file}: no numbers, hence left out: {', '.join(map(shown, sorted(others)))}")


def _number(value: object) -> float | None:
    """None: it is none. JSON's null stands for one that is not finite."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else math.nan
    except OverflowError:
        return math.nan


def _config(file: Path, notes: list[str]) -> dict[str, object]:
    """Of the last start that file tells of; a note where it cannot be read."""
    if not file.is_file():
        return {}
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        notes.append(f"{file}: cannot be read: {error.strerror}")
        return {}
    for line in reversed(lines):
        try:
            return dict(_flat(json.loads(line)["config"]))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
    return {}


def _flat(sections: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, object]]:
    for section, keys in sections.items():
        for key, value in keys.items():
            yield f"{section}.{key}", value


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Key -> its value in each run, of the keys in which runs differ; "?" where it is not known: of a run without its
    configuration, or of an earlier version that did not have the key."""
    known = [run.config for run in runs if run.config]
    keys = dict.fromkeys(key for config in known for key in config if not key.startswith(_OF_ONE_RUN))
    found = {key: [_shown(run.config[key]) if key in run.config else "?" for run in runs] for key in keys}
    return {key: values for key, values in found.items() if len({value for value in values if value != "?"}) > 1}


def _shown(value: object) -> str:
    if value is None:
        return "not set"
    text = f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)
    return shown(text) if text else '""'


def names_of(paths: Sequence[Path]) -> list[str]:
    """Short names of the runs at some paths that tell them apart: what is left of a path below the folder that all of
    them have in common."""
    whole = [path.resolve() for path in paths]
    common = os.path.commonpath([path.parent for path in whole])
    return [path.relative_to(common).as_posix() for path in whole]
