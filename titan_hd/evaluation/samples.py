"""Samples: what was answered to each problem and whether it was right, one JSON object a line.

    {"task": "gsm8k", "id": "0", "prompt": "...", "output": "...", "extracted": "18", "reference": "18", "right": true}

Of several samples of a problem each has its number in "sample", from 0. Outputs of other systems need "task", "id" and
"output" alone (and "sample"), so that a file of samples can be scored again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from titan_hd.data.sources import Record, read_records
from titan_hd.errors import UserError
from titan_hd.evaluation.task import Problem, Task

SAMPLES_FILE = "samples.jsonl"
Key = tuple[str, str, int]  # task, id, number of the sample
Answer = tuple[Problem, str, str, int | None]  # a problem, and the other arguments of `sample`


def sample(task: Task, problem: Problem, prompt: str, output: str, number: int | None = None) -> dict[str, Any]:
    """The line of one answer.

    prompt: as the model was given it; empty where that is not known.
    number: of the sample, where the problem has several.
    """
    score = task.score(problem, output)
    return {
        "task": task.name,
        "id": problem.id,
        **({} if number is None else {"sample": number}),
        "prompt": prompt,
        "output": output,
        "extracted": score.extracted,
        "reference": problem.reference,
        "right": score.right,
        **score.also,
    }


def scored(task: Task, answers: Sequence[Answer]) -> Iterator[dict[str, Any]]:
    """The lines of answers to a task, in their order, as they come. Programs run at the same time, one for each
    processor."""
    if not task.runs_programs:
        yield from (sample(task, *answer) for answer in answers)
        return
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        yield from threads.map(lambda answer: sample(task, *answer), answers)


def line(row: Mapping[str, Any]) -> str:
    """A row as it stands in the file. Halves of surrogate pairs, which are no text, stay escaped as JSON has them."""
    text = json.dumps(row, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(row)
    return f"{text}\n"


def read_outputs(path: Path, key: str) -> dict[Key, Record]:
    """The records of a file of outputs (or of the samples.jsonl in a directory), by task, id and number of the sample
    (0 without one), in their order.

    Raises:
        UserError: the file is missing, a record lacks a field, or answers a problem a second time.
    """
    path = path / SAMPLES_FILE if path.is_dir() else path
    outputs: dict[Key, Record] = {}
    for record in read_records(str(path), key):
        task, name, output = (record.get(field) for field in ("task", "id", "output"))
        if not isinstance(task, str) or not isinstance(name, (str, int)) or not isinstance(output, str):
            raise UserError(f'{record.where}: needs "task", "id" and "output"; it has {", ".join(record)}')
        number = record.get("sample", 0)
        if not isinstance(number, int) or isinstance(number, bool) or number < 0:
            raise UserError(f"{record.where}: sample: must be the sample's number, from 0, not {number!r}")
        key_of = task, str(name), number
        if key_of in outputs:
            which = f"{task} {name}, sample {number}," if "sample" in record else f"{task} {name}"
            hint = "" if "sample" in record else '; several samples of a problem have their numbers in "sample"'
            raise UserError(f"{record.where}: {which} was answered before{hint}")
        outputs[key_of] = record
    return outputs


def find_answers(
    task: Task, problems: Iterable[Problem], outputs: Mapping[Key, Record], every: Collection[str] | None = None
) -> tuple[list[Answer], int]:
    """The outputs of a task in the order of its problems, and how many problems have none.

    every: the ids of all problems of the task, if `problems` are only some of them; outputs of the others are passed
        over.

    Raises:
        UserError: an output is of a problem that the task does not have.
    """
    known = {problem.id: problem for problem in problems}
    answers: dict[str, list[tuple[int, Record]]] = {}
    for (name, problem_id, number), record in outputs.items():
        if name == task.name and problem_id not in (known if every is None else every):
            raise UserError(f"{record.where}: {task.name} has no problem {problem_id!r}")
        if name == task.name:
            answers.setdefault(problem_id, []).append((number, record))
    found: list[Answer] = []
    for problem in known.values():
        for number, record in sorted(answers.get(problem.id, ()), key=lambda answer: answer[0]):
            prompt = record.get("prompt")
            prompt = prompt if isinstance(prompt, str) else ""
            found.append((problem, prompt, record["output"], number if "sample" in record else None))
    return found, len(known.keys() - answers.keys())
