"""What an evaluation found: summary.json and the table on the console."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from titan_hd.errors import UserError
from titan_hd.evaluation.samples import Key
from titan_hd.evaluation.statistics import compare, wilson


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of the samples of one task: n, right, accuracy, its interval, how many had no answer that could be extracted,
    and what other scorers say, with the number of samples in which they differ."""
    n, right = len(rows), sum(row["right"] for row in rows)
    low, high = wilson(right, n)
    summary = {
        "n": n,
        "right": right,
        "accuracy": right / n if n else 0.0,
        "low": low,
        "high": high,
        "no_answer": sum(row["extracted"] is None for row in rows),
    }
    if n and all("math_verify" in row for row in rows):
        summary["math_verify"] = {
            "accuracy": sum(row["math_verify"] for row in rows) / n,
            "right_for_it_alone": sum(row["math_verify"] and not row["right"] for row in rows),
            "wrong_for_it_alone": sum(row["right"] and not row["math_verify"] for row in rows),
        }
    return summary


def compare_samples(
    rows: Iterable[Mapping[str, Any]], others: Mapping[Key, Mapping[str, Any]], key: str
) -> dict[str, Any]:
    """The paired comparison with other samples of the same task, on the problems that both answered.

    Raises:
        UserError: there is no such problem, or the other samples have not been scored.
    """
    pairs = [(row, others[row["task"], row["id"]]) for row in rows if (row["task"], row["id"]) in others]
    if not pairs:
        raise UserError(f"{key}: has no sample of a problem that was answered here")
    for _, other in pairs:
        if not isinstance(other.get("right"), bool):
            raise UserError(f'{key}: a sample has no "right": score it first, with --predictions')
    return asdict(compare([row["right"] for row, _ in pairs], [other["right"] for _, other in pairs]))


def table(tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The lines of a table: a row for each task, and the mean of their shares where there are several."""
    rows: list[tuple[str, ...]] = [("task", "n", "right", "%", "95% interval", "no answer")]
    for name, summary in tasks.items():
        interval = f"{100 * summary['low']:.2f} - {100 * summary['high']:.2f}"
        numbers = (summary["n"], summary["right"], f"{100 * summary['accuracy']:.2f}", interval, summary["no_answer"])
        rows.append((name, *map(str, numbers)))
    if len(tasks) > 1:
        mean = sum(summary["accuracy"] for summary in tasks.values()) / len(tasks)
        rows.append(("mean of tasks", "", "", f"{100 * mean:.2f}", "", ""))
    return [*_aligned(rows), *_remarks(tasks)]


def judged_table(summary: Mapping[str, Any]) -> list[str]:
    """The lines of MT-Bench's ratings: a row for each category, and one of all."""
    rows: list[tuple[str, ...]] = [(f"mt_bench by {summary['judge']}", "turn 1", "turn 2", "mean")]
    for name, means in (*summary["categories"].items(), ("all", summary)):
        ratings = (means[key] for key in ("turn_1", "turn_2", "score"))
        rows.append((name or "-", *("-" if value is None else f"{value:.2f}" for value in ratings)))
    lines = _aligned(rows)
    if summary["low"] is not None:
        interval = f"{summary['low']:.2f} - {summary['high']:.2f}"
        lines.append(f"mt_bench: 95% interval of the mean {interval}, {summary['questions']} questions")
    if summary["no_rating"]:
        count = f"{summary['no_rating']} of {summary['judgments']}"
        lines.append(f"mt_bench: {count} judgments hold no rating, and are not counted")
    return lines


def _remarks(tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    lines = []
    for name, summary in tasks.items():
        if verify := summary.get("math_verify"):
            more, fewer = verify["right_for_it_alone"], verify["wrong_for_it_alone"]
            share = f"{100 * verify['accuracy']:.2f}%"
            lines.append(f"{name}: by math-verify {share}: {more} more are right to it, and {fewer} wrong")
        if against := summary.get("against"):
            low, high = 100 * against["low"], 100 * against["high"]
            lines.append(
                f"{name}: against the other samples {100 * against['difference']:+.2f} points, 95% interval "
                f"{low:+.2f} to {high:+.2f}, on {against['n']} problems; {against['gained']} gained, "
                f"{against['lost']} lost"
            )
    return lines


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest entry; the first to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]).rstrip()
        for row in rows
    ]
