"""Writes the figures and the page of some runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from charts.drawing import matplotlib_is_there, save
from charts.page import Table, bullets, figure_element, page, section

from run_plots.figures import pictures_of
from run_plots.records import Run, differences
from titan_hd.errors import UserError
from titan_hd.files import disk_faults, replace_file

PAGE = "run.html"
_LONGEST = 44  # letters of what a legend says of a run's configuration
_FIRST = ("adapter.", "hdpissa.", "optimizer.", "lr_scheduler.", "training.")  # sections: what readers look for


def write(runs: Sequence[Run], output: Path, title: str = "") -> Path:
    """Write a PNG file for each figure, and the page; returns its path.

    Raises:
        UserError: matplotlib is missing; there is nothing to draw; the folder cannot be written.
    """
    if not matplotlib_is_there():
        raise UserError("matplotlib is missing, which draws: install titan_hd's extra `plots` (pip install matplotlib)")
    differ = differences(runs)
    pictures = pictures_of(runs, labels_of(runs, differ))
    if not pictures:
        raise UserError(f"{runs[0].folder}: its metrics have no finite number that could be drawn")
    with disk_faults(output):
        output.mkdir(parents=True, exist_ok=True)
        save(pictures, output)
        parts = [
            section(_differences(runs, differ)) if differ else "",
            *map(figure_element, pictures),
            section(_last_values(runs)),
            bullets(notes_of(runs)),
        ]
        title = title or (runs[0].name if len(runs) == 1 else f"{len(runs)} runs")
        text = page(title, parts, pictures)
        replace_file(output / PAGE, lambda path: path.write_text(text, encoding="utf-8"))
    return output / PAGE


def labels_of(runs: Sequence[Run], differ: dict[str, list[str]]) -> list[str]:
    """What a legend calls each run: its name, and those keys that differ for which there is room in all of them."""
    facts: list[list[str]] = [[] for _ in runs]
    for key in sorted(differ, key=lambda key: [not key.startswith(first) for first in _FIRST]):
        longer = [[*had, f"{key.rpartition('.')[2]} {value}"] for had, value in zip(facts, differ[key])]
        if all(len(", ".join(words)) <= _LONGEST for words in longer):
            facts = longer
    return [f"{run.name}: {', '.join(words)}" if words else run.name for run, words in zip(runs, facts)]


def notes_of(runs: Sequence[Run]) -> list[str]:
    """What a reader of the figures must know."""
    several = len(runs) > 1
    notes = [f"{run.name}: {note}" if several else note for run in runs for note in run.notes]
    unknown = [run.name for run in runs if not run.config]
    if several and unknown:
        notes.append(f"The configuration is not known of {', '.join(unknown)}.")
    return notes


def _differences(runs: Sequence[Run], differ: dict[str, list[str]]) -> Table:
    """A row for each run, or, where more keys differ than there are runs, for each key."""
    if len(differ) > len(runs):
        rows = [{"key": key, **dict(zip((run.name for run in runs), values))} for key, values in differ.items()]
    else:
        rows = [{"run": run.name, **{key: differ[key][place] for key in differ}} for place, run in enumerate(runs)]
    return Table("What differs", rows)


def _last_values(runs: Sequence[Run]) -> Table:
    """Of every metric that is no member of a family, or is a validation's."""
    names = dict.fromkeys(name for run in runs for name in run.curves)
    rows = []
    for name in names:
        if "/" in name and not name.startswith("validation_"):
            continue
        row = {"metric": name}
        for run in runs:
            points = run.curves[name].finite if name in run.curves else []
            row[run.name] = f"{points[-1][1]:.4g} (step {points[-1][0]})" if points else "-"
        rows.append(row)
    return Table("Last values", rows)
