"""MT-Bench: questions of several turns, answered through the model's chat template for a judge to read.

Nothing here scores: a judge does (`titan_hd.evaluation.judge`, or FastChat's scripts, whose form the answers have).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_hd.data.sources import read_records
from titan_hd.data.text.chat import load_chat_template
from titan_hd.data.text.templates import load_template
from titan_hd.data.text.tokenizer_base import Tokenizer
from titan_hd.errors import UserError
from titan_hd.evaluation.answering import Progress, resume
from titan_hd.evaluation.backends import Backend, Request
from titan_hd.evaluation.samples import line

NAME = "mt_bench"
FILES = ("mt_bench/question.jsonl", "question.jsonl")
MAX_NEW_TOKENS = 1024  # FastChat's


@dataclass(frozen=True)
class Question:
    """What a user says in each turn; `id` as the file has it. Some categories are judged by a reference."""

    id: int | str
    turns: list[str]
    category: str = ""


def read_questions(source: str, limit: int | None = None) -> list[Question]:
    """The first `limit` questions, all by default.

    Raises:
        UserError: names the file and the line of what is no question.
    """
    questions: dict[int | str, Question] = {}
    for record in read_records(source, NAME):
        if limit is not None and len(questions) == limit:
            break
        name, turns = record.get("question_id"), record.get("turns")
        if not isinstance(name, int | str) or not isinstance(turns, list) or not turns:
            raise UserError(
                f"{record.where}: {NAME} needs the columns question_id and turns; it has {', '.join(record)}"
            )
        if not all(isinstance(turn, str) and turn for turn in turns):
            raise UserError(f"{record.where}: turns: must be texts")
        if name in questions:
            raise UserError(f"{record.where}: a question {name} was there before")
        questions[name] = Question(name, turns, str(record.get("category") or ""))
    return list(questions.values())


def answer(
    path: Path,
    questions: Sequence[Question],
    model_name: str,
    backend: Backend,
    tokenizer: Tokenizer,
    batch_size: int,
    max_new_tokens: int = MAX_NEW_TOKENS,
) -> Iterator[Progress]:
    """Ask what is not answered yet, greedily, and write each batch's answers to `path`; reports after each batch.

    FastChat draws from a temperature by category in place of that; these answers are the same every time.

    Raises:
        UserError: there is no chat template, or it refuses the turns; the file has answers of something else.
    """
    talk = _Conversations(backend, tokenizer, max_new_tokens)
    batches = [questions[start : start + batch_size] for start in range(0, len(questions), batch_size)]
    keys = [[(question.id, model_name) for question in batch] for batch in batches]
    whole = resume(path, keys, lambda row: (row["question_id"], row["model_id"]))
    started, done = time.perf_counter(), 0
    with open(path, "a", encoding="utf-8", newline="\n") as file:
        for number, batch in enumerate(batches):
            if number == whole:
                yield Progress(NAME, done, len(questions), 0, time.perf_counter() - started)
            done += len(batch)
            if number >= whole:
                answers = talk.answers(batch)
                lines = [_line(question, model_name, turns) for question, turns in zip(batch, answers)]
                file.write("".join(lines))
                file.flush()
            if number >= whole or number == len(batches) - 1:
                yield Progress(NAME, done, len(questions), talk.tokens, time.perf_counter() - started)


class _Conversations:
    """Answers turn after turn. tokens: how many were generated so far."""

    def __init__(self, backend: Backend, tokenizer: Tokenizer, max_new_tokens: int):
        self._backend, self._tokenizer, self._max_new_tokens = backend, tokenizer, max_new_tokens
        self._template = load_chat_template(tokenizer)
        self._stop_ids = load_template("chat", tokenizer).stop_ids(tokenizer)
        self.tokens = 0

    def answers(self, questions: Sequence[Question]) -> list[list[str]]:
        """The answers of each question, a text for every turn."""
        chats: list[list[dict[str, Any]]] = [[] for _ in questions]
        for turn in range(max(len(question.turns) for question in questions)):
            asked = [n for n, question in enumerate(questions) if turn < len(question.turns)]
            for n in asked:
                chats[n].append({"role": "user", "content": questions[n].turns[turn]})
            prompts = [self._ids(chats[n]) for n in asked]
            rows = self._backend.generate(prompts, Request(self._stop_ids, self._max_new_tokens))
            self.tokens += sum(map(len, rows))
            for n, row in zip(asked, rows):
                chats[n].append({"role": "assistant", "content": self._tokenizer.decode(row).strip()})
        return [[message["content"] for message in chat if message["role"] == "assistant"] for chat in chats]

    def _ids(self, chat: list[dict[str, Any]]) -> list[int]:
        return self._tokenizer.encode(self._template.render(chat, add_generation_prompt=True), special=True)


def _line(question: Question, model_name: str, turns: list[str]) -> str:
    """FastChat's form. Neither a time nor a random name: the same model gives the same file."""
    row = {
        "question_id": question.id,
        "answer_id": f"{model_name}-{question.id}",
        "model_id": model_name,
        "choices": [{"index": 0, "turns": turns}],
        "tstamp": 0.0,
    }
    return line(row)
