"""Prompts of a task, as text and as token ids, and the order in which they are asked."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from titan_hd.data.text.chat_encoding import ChatTurns
from titan_hd.data.text.templates import Template
from titan_hd.data.text.tokenizer_base import Tokenizer
from titan_hd.errors import UserError
from titan_hd.evaluation.task import Problem, Task


@dataclass(frozen=True)
class Prompt:
    """A problem of a task as the model is given it, and the tokens that end an answer.

    sample: number of the sample; None where the problem has one alone.
    """

    task: Task
    problem: Problem
    text: str
    ids: list[int]
    stop_ids: frozenset[int] = frozenset()
    sample: int | None = None

    @property
    def key(self) -> str:
        """What its sampled tokens depend on, with the seed."""
        return f"{self.task.name}/{self.problem.id}/{self.sample or 0}"


def write_prompts(
    task: Task, problems: Sequence[Problem], template: Template | ChatTurns, tokenizer: Tokenizer
) -> list[Prompt]:
    """The prompts of a task. What the response is to begin with stands behind the template; in a chat, where the
    model's turn is its own, at the end of the question.

    Raises:
        UserError: a problem is no text that the tokenizer takes; names it.
    """
    prompts, stop_ids = [], template.stop_ids(tokenizer)
    for problem in problems:
        try:
            if isinstance(template, ChatTurns):
                text = template.write(problem.prompt + task.cue, "")
                ids = template.prompt_ids(tokenizer, problem.prompt + task.cue, "")
            else:
                text = template.write(problem.prompt, "") + task.cue
                ids = template.prompt_ids(tokenizer, problem.prompt, "", task.cue)
        except UserError as error:
            raise UserError(f"{task.name}: problem {problem.id}: {error}") from None
        prompts.append(Prompt(task, problem, text, ids, stop_ids))
    return prompts


def several(prompts: Sequence[Prompt], samples: int) -> list[Prompt]:
    """Each prompt as often as it is to be sampled."""
    if samples == 1:
        return list(prompts)
    return [replace(prompt, sample=number) for prompt in prompts for number in range(samples)]


def batches(prompts: Sequence[Prompt], batch_size: int) -> list[list[Prompt]]:
    """Batches of prompts of like length, the longest first: what needs the most memory shows at once. Prompts of equal
    length stay in the order of the file, so that the batches depend on nothing else."""
    ordered = sorted(prompts, key=lambda prompt: -len(prompt.ids))
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """A number that other prompts or references do not have."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(repr((prompt.problem.id, prompt.problem.reference, prompt.ids)).encode())
    return digest.hexdigest()[:16]
