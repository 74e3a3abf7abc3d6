"""What a task is: where its problems lie, how they are asked, and what makes an answer right.

A task is one entry of `titan_hd.evaluation.tasks.TASKS`. Nothing else knows a task by its name.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from titan_hd.data.sources import Record, read_records
from titan_hd.errors import UserError
from titan_hd.files import read_json_object


@dataclass(frozen=True)
class Problem:
    """One question.

    id: the task's own name for it, else its number in the file, from 0.
    prompt: the instruction, before a template is put around it.
    reference: the answer that is right, in the form in which `extracted` is compared with it.
    record: its other columns (tests of a program, for example).
    """

    id: str
    prompt: str
    reference: str
    record: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """What became of one answer.

    extracted: the part of the output that was compared; None: none was found, which is wrong.
    also: what else its line in samples.jsonl says: verdicts of other scorers, by name.
    """

    right: bool
    extracted: str | None
    also: Mapping[str, bool | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """A benchmark and its protocol.

    files: where its file lies in a data directory; the first that is there is read. Patterns with * name directories
        of files that hold one JSON object each.
    columns: the columns of a record that are its question and its answer; the first pair that is there.
    reference: the reference out of the answer column. Raises ValueError, whose text says what is missing.
    score: the verdict on an output.
    template: by which the prompt is written (`titan_hd.data.text.templates`).
    cue: what the response begins with: it is written behind the template, and is no part of the output.
    max_new_tokens, beams: how the protocol generates; one beam is greedy.
    id_column: the column with the task's own name of a problem.
    instruction: the prompt out of a question and its record, where the question alone is not it. Raises ValueError,
        whose text says what is wrong with the record.
    keep: which records are problems of the task.
    runs_programs: `score` runs what the model wrote, in the sandbox.
    vote: the form of an extracted answer in which the samples of a problem are counted for a majority.
    """

    name: str
    files: tuple[str, ...]
    columns: tuple[tuple[str, str], ...]
    reference: Callable[[str], str]
    score: Callable[[Problem, str], Score]
    template: str = "alpaca"
    cue: str = ""
    max_new_tokens: int = 1024
    beams: int = 1
    id_column: str | None = None
    instruction: Callable[[str, Mapping[str, Any]], str] | None = None
    keep: Callable[[Mapping[str, Any]], bool] = lambda record: True
    runs_programs: bool = False
    vote: Callable[[str], str] = str

    def problem(self, record: Record, default_id: str) -> Problem:
        """The problem that a record is.

        Raises:
            UserError: the columns are not there, or hold no text or no answer; names the file and the line.
        """
        pair = next((pair for pair in self.columns if all(name in record for name in pair)), None)
        if pair is None:
            wanted = " or ".join(f"{question} and {answer}" for question, answer in self.columns)
            raise UserError(f"{record.where}: {self.name} needs the columns {wanted}; it has {', '.join(record)}")
        question, answer = (record[name] for name in pair)
        for name, value in zip(pair, (question, answer)):
            if not isinstance(value, str) or not value.strip():
                raise UserError(f"{record.where}: {name}: must be a text")
        try:
            reference = self.reference(answer)
        except ValueError as error:
            raise UserError(f"{record.where}: {pair[1]}: {error}") from None
        try:
            prompt = self.instruction(question, record) if self.instruction else question
        except ValueError as error:
            raise UserError(f"{record.where}: {error}") from None
        own_id = record.get(self.id_column) if self.id_column else None
        return Problem(default_id if own_id is None else str(own_id), prompt, reference, record)


def find_source(name: str, files: Sequence[str], data: Path) -> str:
    """The file, or pattern of files, of a task in a data directory: the first of `files` that is there.

    Raises:
        UserError: there is none; names those that were looked for.
    """
    for file in files:
        pattern = os.path.join(glob.escape(str(data)), file)
        if glob.glob(pattern):
            return pattern if glob.has_magic(file) else str(data / file)
    if not data.is_dir():
        raise UserError(f"--data: no such directory: {data}")
    raise UserError(f"--data: {data} has no file of {name}; looked for {', '.join(files)}")


def load_problems(task: Task, source: str, limit: int | None = None) -> list[Problem]:
    """The first `limit` problems of a task, all by default.

    source: a file, a directory or a pattern (JSONL, JSON, Parquet), or a data set of the Hub.

    Raises:
        UserError: what is wrong with a file, with its line; two problems have the same id.
    """
    problems: dict[str, Problem] = {}
    for number, record in enumerate(filter(task.keep, _records(source, task.name))):
        if limit is not None and number >= limit:
            break
        problem = task.problem(record, str(number))
        if problem.id in problems:
            raise UserError(f"{record.where}: a problem {problem.id} was there before")
        problems[problem.id] = problem
    return list(problems.values())


def _records(source: str, key: str):
    if "*" not in source or not source.endswith(".json") or os.path.exists(source):
        yield from read_records(source, key)
        return
    for path in sorted(glob.glob(source)):  # MATH as published: a file for every problem
        yield Record(read_json_object(Path(path)), path)
