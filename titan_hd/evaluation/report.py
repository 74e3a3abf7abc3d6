"""What an evaluation found: summary.json and the table on the console."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from titan_hd.data.sources import Record
from titan_hd.errors import UserError
from titan_hd.evaluation.code import pass_at_k
from titan_hd.evaluation.samples import Key
from titan_hd.evaluation.statistics import compare, wilson
from titan_hd.evaluation.task import Problem, Task


def summarise(task: Task, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of the samples of a task: n problems, right samples, accuracy, its interval, how many had no answer that could be
    extracted, and what other scorers say, with the number of samples in which they differ.

    Where problems have several samples, accuracy is the mean over the problems of the share that is right, and there is
    what `several_samples` finds.
    """
    problems = _by_problem(rows)
    n, right = len(problems), sum(row["right"] for row in rows)
    several = any("sample" in row for row in rows)
    mean = _share(sum(_share_right(own) for own in problems) if several else right, n)
    summary = {
        "n": n,
        "right": right,
        **mean,
        "no_answer": sum(row["extracted"] is None for row in rows),
        **(several_samples(task, problems) if several else {}),
    }
    if n and all("math_verify" in row for row in rows):
        summary["math_verify"] = {
            "accuracy": sum(row["math_verify"] for row in rows) / n,
            "right_for_it_alone": sum(row["math_verify"] and not row["right"] for row in rows),
            "wrong_for_it_alone": sum(row["right"] and not row["math_verify"] for row in rows),
        }
    return summary


def several_samples(task: Task, problems: Sequence[Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """`samples`, the fewest that a problem has, and by that number k of them: for programs `pass_at`, the probability
    that one of k passes, for k of 1, 10, 100 and all; for other answers `majority`, the share of problems whose most
    frequent answer is right (of equally frequent ones the first; no answer does not vote)."""
    samples = min(map(len, problems))
    summary: dict[str, Any] = {"samples": samples}
    if not task.runs_programs:
        return summary | {"majority": _share(sum(_majority_right(task, own) for own in problems), len(problems))}
    counts = [(len(own), sum(row["right"] for row in own)) for own in problems]
    summary["pass_at"] = {
        str(k): _share(sum(pass_at_k(n, right, k) for n, right in counts), len(problems))
        for k in sorted({k for k in (1, 10, 100) if k <= samples} | {samples})
    }
    return summary


def _by_problem(rows: Iterable[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    problems: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        problems.setdefault(row["id"], []).append(row)
    return list(problems.values())


def _share(right: float, n: int) -> dict[str, float]:
    low, high = wilson(right, n)
    return {"accuracy": right / n if n else 0.0, "low": low, "high": high}


def _share_right(rows: Sequence[Mapping[str, Any]]) -> float:
    return sum(row["right"] for row in rows) / len(rows)


def _majority_right(task: Task, rows: Sequence[Mapping[str, Any]]) -> bool:
    votes = [(task.vote(row["extracted"]), row["right"]) for row in rows if row["extracted"] is not None]
    if not votes:
        return False
    ((winner, _),) = Counter(answer for answer, _ in votes).most_common(1)  # of equals the first that came
    return next(right for answer, right in votes if answer == winner)


def check_others(task: str, problems: Sequence[Problem], others: Mapping[Key, Record], key: str) -> None:
    """See that other samples can be compared with answers to these problems, before anybody is asked.

    Raises:
        UserError: there is none of these problems, one has not been scored, or one has another reference there.
    """
    references = {problem.id: problem.reference for problem in problems}
    theirs = [(name, other) for (of, name, _), other in others.items() if of == task and name in references]
    if not theirs:
        raise UserError(f"{key}: has no sample of a problem of {task} that is asked here")
    for name, other in theirs:
        if not isinstance(other.get("right"), bool):
            raise UserError(f'{key}: {other.where}: has no "right": score the file first, with --predictions')
        ours, reference = references[name], other.get("reference", references[name])
        if reference != ours:
            what = f"{task} {name} is another problem there: its reference is {reference!r:.80}, not {ours!r:.80}"
            raise UserError(f"{key}: {other.where}: {what}")


def compare_samples(
    rows: Iterable[Mapping[str, Any]], others: Mapping[Key, Mapping[str, Any]], key: str
) -> dict[str, Any]:
    """The paired comparison with other samples of the same task, on the problems that both answered; of several samples
    of a problem by the share that is right.

    others: which `check_others` has seen.

    Raises:
        UserError: there is no such problem.
    """
    answered: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for (task, name, _), other in others.items():
        answered.setdefault((task, name), []).append(other)
    places = [(own, (own[0]["task"], own[0]["id"])) for own in _by_problem(rows)]
    pairs = [(own, answered[place]) for own, place in places if place in answered]
    if not pairs:
        raise UserError(f"{key}: has no sample of a problem that was answered here")
    return asdict(compare([_share_right(own) for own, _ in pairs], [_share_right(theirs) for _, theirs in pairs]))


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
        if majority := summary.get("majority"):
            lines.append(f"{name}: the most frequent of {summary['samples']} answers {_with_interval(majority)}")
        if passed := summary.get("pass_at"):
            shares = ", ".join(f"pass@{k} {_with_interval(share)}" for k, share in passed.items())
            lines.append(f"{name}: of {summary['samples']} samples {shares}")
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


def _with_interval(share: Mapping[str, float]) -> str:
    return f"{100 * share['accuracy']:.2f}% ({100 * share['low']:.2f} - {100 * share['high']:.2f})"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest entry; the first to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]).rstrip()
        for row in rows
    ]
