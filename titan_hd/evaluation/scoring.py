"""Scores the outputs of any system, and writes each sample as it is scored; goes on where a killed scoring stopped.

While it runs its file is samples.partial.jsonl, whose first line says what is scored. It becomes samples.jsonl at the
end, so that a directory has the samples of a whole evaluation or none.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from titan_hd import __version__
from titan_hd.errors import UserError
from titan_hd.evaluation.answering import Progress, resume
from titan_hd.evaluation.samples import SAMPLES_FILE, Answer, line, scored
from titan_hd.evaluation.task import Task
from titan_hd.files import replace_file

PARTIAL_FILE = "samples.partial.jsonl"


def score(output: Path, plan: Sequence[tuple[Task, Sequence[Answer]]], settings: Any) -> Iterator[Progress]:
    """Score what is not scored yet; reports where each task starts, and after each sample.

    plan: the answers to each task.
    settings: what else the scores depend on; `repr` tells them apart.
    """
    output.mkdir(parents=True, exist_ok=True)
    path, what = output / PARTIAL_FILE, _fingerprint(plan, settings)
    before = _scored_before(path, plan, what)
    started = time.perf_counter()
    with open(path, "a", encoding="utf-8", newline="\n") as file:
        if before < 0:
            file.write(line({"scores": what}))
        for task, answers in plan:
            done = min(max(before, 0), len(answers))
            before -= done
            yield Progress(task.name, done, len(answers), 0, time.perf_counter() - started)
            for row in scored(task, answers[done:]):
                file.write(line(row))
                file.flush()
                done += 1
                yield Progress(task.name, done, len(answers), 0, time.perf_counter() - started)
    with open(path, encoding="utf-8", newline="\n") as file:
        file.readline()
        replace_file(output / SAMPLES_FILE, lambda partial: _copy_rest(file, partial))
    path.unlink()


def _scored_before(path: Path, plan: Sequence[tuple[Task, Sequence[Answer]]], what: str) -> int:
    """How many samples a file has of this plan; -1: not even its first line. Those of another plan are removed."""
    keys = [(task.name, problem.id, number) for task, answers in plan for problem, _, _, number in answers]

    def key(row: dict[str, Any]) -> Any:
        return row["scores"] if "scores" in row else (row["task"], row["id"], row.get("sample"))

    try:
        return resume(path, [[what], *([key] for key in keys)], key) - 1
    except UserError:
        path.unlink()
        return -1


def _fingerprint(plan: Sequence[tuple[Task, Sequence[Answer]]], settings: Any) -> str:
    """A number that other outputs, problems or settings do not have."""
    digest = hashlib.sha256(repr((__version__, settings)).encode())
    for task, answers in plan:
        for problem, *answer in answers:
            about = (problem.id, problem.prompt, problem.reference, sorted(problem.record.items()))
            digest.update(json.dumps([task.name, repr(about), *answer]).encode())
    return digest.hexdigest()[:16]


def _copy_rest(file: Any, path: Path) -> None:
    with open(path, "w", encoding="utf-8", newline="\n") as whole:
        shutil.copyfileobj(file, whole)
