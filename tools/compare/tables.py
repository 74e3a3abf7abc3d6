"""The tables of a comparison: for reading (table.md, the page) and for other programs (table.csv, points.csv)."""

from __future__ import annotations

import csv
import io
import math
from typing import Any

from charts.page import Table

from compare.outcome import BEFORE, FAILURES, Arm, Outcome, Point, show_value
from compare.statistics import Summary, scipy_is_there

Row = dict[str, Any]

# Columns of grid.csv: (heading in the table, how a number is shown, or its unit).
_SIZES = {
    "rank": ("rank", ".0f"),
    "num_adapters": ("K", ".0f"),
    "trained_parameters": ("trained parameters", ",.0f"),
    "moments_per_worker": ("moments per worker", ",.0f"),
    "exchange_gb": ("exchange per worker and step, GB", ".3g"),
}
_SPEEDS = {
    "step_seconds": ("step time", "s"),
    "tokens_per_second": ("tokens/s", ""),
    "peak_memory_gib": ("peak memory", "GiB"),
}
_RANKS = {
    "dw_above": ("dW: values counted", ".1f"),
    "dw_entropy": ("dW: entropy rank", ".1f"),
    "dw_stable": ("dW: stable rank", ".1f"),
    "dw_relative_norm": ("dW / W", ".2e"),
}


def tables_of(outcome: Outcome) -> list[Table]:
    """What table.md shows, the best arm first; a table of which nothing was measured is left out."""
    arms = outcome.ranked
    unit = unit_arm(outcome)
    found = [
        Table(f"{outcome.rank_by} at the best point of each arm", _filled([_ranking(outcome, arm) for arm in arms])),
        Table("What else was measured there (mean over the seeds)", _filled([_metrics(outcome, arm) for arm in arms])),
        Table("Sizes, speed and the change of the weights", _filled([_costs(arm, unit) for arm in arms])),
    ]
    return [table for table in found if len(table.rows[0]) > 1]


def points_table(outcome: Outcome) -> Table:
    """Every point that was run, arm by arm."""
    return Table("Every point", [_point(outcome, arm, point) for arm in outcome.arms.values() for point in arm.points])


def unit_arm(outcome: Outcome) -> Arm | None:
    """The arm that speeds and memory are related to: lora, or else the first that is lora with other settings."""
    ran = [arm for arm in outcome.arms.values() if arm.best is not None]
    loras = [arm for arm in ran if arm.name.partition("+")[0] == "lora"]
    return next((arm for arm in loras if arm.name == "lora"), loras[0] if loras else None)


def _ranking(outcome: Outcome, arm: Arm) -> dict[str, str]:
    value, difference = arm.at_best(outcome.rank_by), outcome.difference(arm)
    others, failed = arm.chosen_by_others(), sum(arm.failures().values())
    row = {"arm": arm.name}
    for place, key in enumerate(outcome.grid):
        row[f"best {key.rpartition('.')[2]}"] = "-" if arm.best is None else show_value(arm.best[place])
    row |= {
        "runs complete / failed": f"{arm.runs - failed} / {failed}",
        "seeds": str(value.n if value else 0),
        "mean": _number(_value(value)),
        "sd": _number(value.sd if value else None, ".2g"),
        "95% interval": _interval(value),
        "point chosen on the other seeds": _number(others),
    }
    if outcome.baseline:
        row |= {
            f"less {outcome.baseline}": _number(_value(difference), "+.3g"),
            "95% interval (paired)": _interval(difference, "+.3g"),
            "pairs": "-" if arm.name == outcome.baseline else str(difference.n if difference else 0),
        }
    return row


def _metrics(outcome: Outcome, arm: Arm) -> dict[str, str]:
    row = {"arm": arm.name, "training loss": _mean(arm, "loss")}
    row |= {metric: _mean(arm, metric) for metric in _others(outcome) if metric != "loss"}
    for metric in outcome.further:
        lost = outcome.forgetting(arm, metric)
        row[f"{metric}: after - before"] = _number(_value(lost), "+.3g") + (
            "" if lost is None or lost.sd is None else f" (sd {lost.sd:.2g})"
        )
    return row


def _costs(arm: Arm, unit: Arm | None) -> dict[str, str]:
    row = {"arm": arm.name}
    row |= {heading: _number(arm.median_at_best(column), form) for column, (heading, form) in _SIZES.items()}
    for column, (heading, measure) in _SPEEDS.items():
        value = arm.median_at_best(column)
        if unit is None:
            row[f"{heading}, {measure}".rstrip(", ")] = _number(value)
        else:
            row[f"{heading} / {unit.name}"] = _number(_ratio(value, unit.median_at_best(column)), ".2f")
    row |= {heading: _number(_value(arm.at_best(column)), form) for column, (heading, form) in _RANKS.items()}
    return row


def _point(outcome: Outcome, arm: Arm, point: Point) -> dict[str, str]:
    value = arm.at(point, outcome.rank_by)
    return {
        "arm": arm.name,
        **{key: show_value(part) for key, part in zip(outcome.grid, point)},
        "best": "best" if point == arm.best else "" if point in arm.repeated else "fewer seeds",
        "seeds": str(value.n if value else 0),
        "mean": _number(_value(value)),
        "sd": _number(value.sd if value else None, ".2g"),
        "failed": ", ".join(f"{count} {status.replace('_', ' ')}" for status, count in arm.failures(point).items()),
    }


def _filled(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Without the columns in which no arm has a value."""
    return [{key: row[key] for key in row if any(other[key] != "-" for other in rows)} for row in rows]


def _others(outcome: Outcome) -> list[str]:
    """What was measured beside the ranking metric."""
    return [metric for metric in dict.fromkeys(["loss", *outcome.metrics]) if metric != outcome.rank_by]


def _mean(arm: Arm, column: str) -> str:
    return _number(_value(arm.at_best(column)))


def _value(summary: Summary | None) -> float | None:
    return summary.mean if summary else None


def _ratio(value: float | None, unit: float | None) -> float | None:
    return value / unit if value is not None and unit else None


def _number(value: float | None, form: str = ".4g") -> str:
    return "-" if value is None or math.isnan(value) else format(value, form)


def _interval(summary: Summary | None, form: str = ".4g") -> str:
    if summary is None or summary.interval is None:
        return "-"
    return f"[{', '.join(format(end, form) for end in summary.interval)}]"


# ---------------------------------------------------------------------------------------------------------------------
# What a reader must know of the numbers


def notes_of(outcome: Outcome) -> list[str]:
    """One sentence or two each, the general ones first."""
    least = "least" if outcome.better == "min" else "greatest"
    notes = [
        f"An arm's best point is the one with the {least} mean {outcome.rank_by} over seeds, among the points that "
        "completed with the most seeds. Points with fewer seeds are shown, not chosen.",
    ]
    notes += _seed_notes(outcome)
    spent: dict[int, list[str]] = {}
    for arm in outcome.arms.values():
        spent.setdefault(arm.runs, []).append(arm.name)
    if len(spent) > 1:
        counts = "; ".join(f"{runs}: {', '.join(names)}" for runs, names in sorted(spent.items()))
        notes.append(f"The arms did not have the same number of runs ({counts}).")
    for arm in outcome.arms.values():
        if arm.best is None:
            ways = ", ".join(f"{count} {status.replace('_', ' ')}" for status, count in arm.failures().items())
            notes.append(f"{arm.name}: no run completed ({ways}).")
        elif arm.failures(arm.best):
            notes.append(f"{arm.name}: {sum(arm.failures(arm.best).values())} of the runs at its best point failed.")
        if arm.name in outcome.edges:
            notes.append(f"{arm.name}: {outcome.edges[arm.name]}")
    return notes


def _seed_notes(outcome: Outcome) -> list[str]:
    notes = []
    seeds: dict[int, list[str]] = {}
    for arm in outcome.arms.values():
        if arm.best is not None:
            seeds.setdefault(len(arm.complete(arm.best)), []).append(arm.name)
    if not scipy_is_there() and any(n > 1 for n in seeds):
        notes.append("No 95% intervals: scipy, which has Student's quantiles, is missing (the extra `plots`).")
    if 1 in seeds:
        notes.append(
            f"One seed, hence no standard deviation and no interval, and a best value that owes something to luck: "
            f"{', '.join(seeds[1])}."
        )
    if len(seeds) > 1:
        counts = "; ".join(f"{n}: {', '.join(names)}" for n, names in sorted(seeds.items()))
        notes.append(f"The best points do not have the same number of seeds ({counts}).")
    return notes


# ---------------------------------------------------------------------------------------------------------------------
# Forms


def markdown(table: Table) -> str:
    """A Markdown table whose columns are aligned as plain text, too."""
    lines = [list(table.rows[0]), *(list(row.values()) for row in table.rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = [f"| {' | '.join(cell.ljust(width) for cell, width in zip(line, widths))} |" for line in lines]
    return "\n".join([text[0], f"|{'|'.join('-' * (width + 2) for width in widths)}|", *text[1:]]) + "\n"


def table_md(outcome: Outcome) -> str:
    parts = [f"{table.title}:\n\n{markdown(table)}" for table in tables_of(outcome)]
    return "\n".join([*parts, "".join(f"* {note}\n" for note in notes_of(outcome))])


def table_csv(outcome: Outcome) -> str:
    """One line per arm with every number in full, in the order of grid.csv; what there is not is empty."""
    unit = unit_arm(outcome)
    return _csv([_arm_numbers(outcome, arm, unit) for arm in outcome.arms.values()])


def points_csv(outcome: Outcome) -> str:
    """One line per arm and point, with the mean of the ranking metric over its seeds."""
    rows: list[Row] = []
    for arm in outcome.arms.values():
        for point in arm.points:
            failures = arm.failures(point)
            row: Row = {"arm": arm.name, **dict(zip(outcome.grid, point)), "best": int(point == arm.best)}
            row |= _numbers(outcome.rank_by, arm.at(point, outcome.rank_by))
            rows.append(row | {status: failures.get(status, 0) for status in FAILURES})
    return _csv(rows)


def _arm_numbers(outcome: Outcome, arm: Arm, unit: Arm | None) -> Row:
    point = arm.best if arm.best is not None else ("",) * len(outcome.grid)
    failures = arm.failures()
    row: Row = {"arm": arm.name, **dict(zip(outcome.grid, point)), "runs": arm.runs}
    row |= {"complete": arm.runs - sum(failures.values()), **{status: failures.get(status, 0) for status in FAILURES}}
    row |= _numbers(outcome.rank_by, arm.at_best(outcome.rank_by))
    row[f"{outcome.rank_by}:chosen_by_other_seeds"] = arm.chosen_by_others()
    if outcome.baseline:
        row |= _numbers(f"difference_to:{outcome.baseline}", outcome.difference(arm))
    for metric in _others(outcome):
        row |= _numbers(metric, arm.at_best(metric))
    for metric in outcome.metrics:
        row[BEFORE + metric] = _value(arm.at_best(BEFORE + metric))
    for metric in outcome.further:
        row |= _numbers(f"forgetting:{metric}", outcome.forgetting(arm, metric))
    row |= {column: arm.median_at_best(column) for column in _SIZES}
    for column in _SPEEDS:
        value = arm.median_at_best(column)
        row[column] = value
        if unit is not None:
            row[f"{column}:to_{unit.name}"] = _ratio(value, unit.median_at_best(column))
    return row | {column: _value(arm.at_best(column)) for column in _RANKS}


def _numbers(name: str, summary: Summary | None) -> Row:
    interval = summary.interval if summary else None
    low, high = interval or (None, None)
    return {
        name: _value(summary),
        f"{name}:sd": summary.sd if summary else None,
        f"{name}:low": low,
        f"{name}:high": high,
        f"{name}:n": summary.n if summary else 0,
    }


def _csv(rows: list[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
