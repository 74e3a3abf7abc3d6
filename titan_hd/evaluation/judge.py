"""MT-Bench's judge: FastChat's grading of single answers by a model behind an OpenAI-compatible URL.

In words: the judge is asked once about the first turn of each question, and once about the second, where it sees both.
It writes what it thinks and a rating, [[1]] to [[10]]. Questions of mathematics, reasoning and coding come with GPT-4's
answers to them. Each judgment is written as it comes, in the form of FastChat's model_judgment, and is not asked for a
second time; at the end they stand in the order of the questions.

The texts of the prompts are FastChat's file judge_prompts.jsonl, which lies beside the questions.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from titan_hd.data.sources import read_records
from titan_hd.errors import UserError
from titan_hd.evaluation.answering import Progress
from titan_hd.evaluation.endpoint import Endpoint
from titan_hd.evaluation.mt_bench import Question
from titan_hd.evaluation.samples import line
from titan_hd.evaluation.statistics import mean_interval
from titan_hd.files import replace_file

PROMPT_FILES = ("mt_bench/judge_prompts.jsonl", "judge_prompts.jsonl")
REFERENCE_FILES = (
    *("mt_bench/reference_answer/gpt-4.jsonl", "mt_bench/reference_answer_gpt-4.jsonl"),
    "reference_answer/gpt-4.jsonl",
)
TEMPERATURE, MAX_TOKENS = 0.0, 2048  # FastChat's
_WITH_REFERENCE = ("math", "reasoning", "coding")
_RATING = re.compile(r"\[\[(\d+\.?\d*)\]\]", re.ASCII)
_RATING_IN_ONE_BRACKET = re.compile(r"\[(\d+\.?\d*)\]", re.ASCII)
_NO_RATING = -1
_FIELDS = {  # what each prompt is made of
    "single-v1": ("question", "answer"),
    "single-math-v1": ("question", "ref_answer_1", "answer"),
    "single-v1-multi-turn": ("question_1", "answer_1", "question_2", "answer_2"),
    "single-math-v1-multi-turn": (
        *("question_1", "ref_answer_1", "question_2", "ref_answer_2"),
        *("answer_1", "answer_2"),
    ),
}


@dataclass(frozen=True)
class JudgePrompt:
    """How a judge is asked: a system text, and a text with {question} and the like."""

    name: str
    system: str
    text: str

    def fill(self, values: Mapping[str, str]) -> str:
        return re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), self.text)


@dataclass(frozen=True)
class Request:
    """One judgment to ask for: turn 1 or 2 of a question."""

    question: Question
    turn: int
    prompt: JudgePrompt
    text: str


def read_prompts(source: str) -> dict[str, JudgePrompt]:
    """FastChat's four prompts for single answers, by their names; others in the file are passed over.

    Raises:
        UserError: one is missing, or is not in FastChat's form.
    """
    prompts = {}
    for record in read_records(source, "judge"):
        name, system, text = (record.get(column) for column in ("name", "system_prompt", "prompt_template"))
        if name not in _FIELDS:
            continue
        if not isinstance(system, str) or not isinstance(text, str):
            raise UserError(f"{record.where}: {name} needs the texts system_prompt and prompt_template")
        missing = [field for field in _FIELDS[name] if f"{{{field}}}" not in text]
        if missing:
            raise UserError(f"{record.where}: prompt_template: {name} needs {{{missing[0]}}}")
        prompts[name] = JudgePrompt(name, system, text)
    for name in _FIELDS:
        if name not in prompts:
            raise UserError(f"{source}: has no prompt {name!r}; it must be FastChat's judge_prompts.jsonl")
    return prompts


def read_answers(source: str) -> tuple[dict[int | str, list[str]], str]:
    """The turns of each question in a file of FastChat's model_answer or reference_answer, and the model's name.

    Raises:
        UserError: names the file and the line of what is not in that form; there are answers of several models.
    """
    answers: dict[int | str, list[str]] = {}
    model = ""
    for record in read_records(source, "mt_bench"):
        question, name, choices = (record.get(column) for column in ("question_id", "model_id", "choices"))
        try:
            turns = choices[0]["turns"]  # pyrefly: ignore
        except (TypeError, KeyError, IndexError):
            turns = None
        texts = isinstance(turns, list) and turns and all(isinstance(turn, str) for turn in turns)
        if not isinstance(question, int | str) or not isinstance(name, str) or not texts:
            raise UserError(f"{record.where}: needs question_id, model_id and choices with turns, as FastChat has them")
        if question in answers:
            raise UserError(f"{record.where}: question {question} was answered before")
        if model and name != model:
            raise UserError(f"{record.where}: has an answer of {name}, those before are of {model}")
        answers[question], model = turns, name
    return answers, model


def check_references(questions: Sequence[Question], references: Mapping[int | str, Sequence[str]], source: str) -> None:
    """Raises:
    UserError: a question that is judged by a reference has none.
    """
    for question in questions:
        if question.category in _WITH_REFERENCE and len(references.get(question.id, ())) < len(question.turns):
            raise UserError(f"{source}: has no answer to each turn of question {question.id} ({question.category})")


def plan(
    questions: Sequence[Question],
    answers: Mapping[int | str, Sequence[str]],
    references: Mapping[int | str, Sequence[str]],
    prompts: Mapping[str, JudgePrompt],
    source: str,
) -> list[Request]:
    """What is asked, question by question; a second turn where the question has two.

    source: where the answers are from, for messages.

    Raises:
        UserError: a turn of a question has no answer.
    """
    requests = []
    for question in questions:
        answer = answers.get(question.id, ())
        if len(answer) < len(question.turns):
            raise UserError(f"{source}: has {len(answer)} answers to question {question.id}, not {len(question.turns)}")
        kind = "single-math-v1" if question.category in _WITH_REFERENCE else "single-v1"
        values = {"question": question.turns[0], "answer": answer[0]}
        for name, turns in (
            ("question", question.turns),
            ("answer", answer),
            ("ref_answer", references.get(question.id, ())),
        ):
            values |= {f"{name}_{number}": turn for number, turn in enumerate(turns, 1)}
        for turn, prompt in ((1, prompts[kind]), (2, prompts[f"{kind}-multi-turn"])):
            if turn == 1 or len(question.turns) == 2:
                requests.append(Request(question, turn, prompt, prompt.fill(values)))
    return requests


def rating(judgment: str) -> float:
    """The first [[n]] in a judgment, else the first [n], as FastChat reads it; -1 where there is none from 1 to 10."""
    found = _RATING.search(judgment) or _RATING_IN_ONE_BRACKET.search(judgment)
    value = float(found[1]) if found else _NO_RATING
    if not 1 <= value <= 10:
        return _NO_RATING
    return int(value) if value == int(value) else value


def judgment_file(output: Path, judge: str) -> Path:
    """FastChat's place, below the directory of an evaluation."""
    return output / "mt_bench" / "model_judgment" / f"{judge.replace('/', '_')}_single.jsonl"


def judge(path: Path, requests: Sequence[Request], model: str, endpoint: Endpoint, at_once: int) -> Iterator[Progress]:
    """Ask for the judgments that `path` does not have, so many at once, and write them as they come.

    model: whose answers they are.

    Raises:
        UserError: the file has judgments of other answers, or the judge is not to be had; what came is kept.
    """
    others, known = _read_judgments(path, requests, model, endpoint.model)
    waiting = [request for request in requests if _key(request) not in known]
    started = time.perf_counter()
    yield _progress(known, requests, started)
    with open(path, "a", encoding="utf-8", newline="\n") as file:
        for request, text in _answers(waiting, endpoint, at_once):
            row = _row(request, text, model, endpoint.model)
            file.write(line(row))
            file.flush()
            known[_key(request)] = row
            yield _progress(known, requests, started)
    if waiting:
        rows = [*others, *(known[_key(request)] for request in requests)]
        replace_file(path, lambda partial: partial.write_text("".join(map(line, rows)), encoding="utf-8"))


def _answers(waiting: Sequence[Request], endpoint: Endpoint, at_once: int) -> Iterator[tuple[Request, str]]:
    """Answers as they come. At the first failure nothing more is asked; what is under way is paid, and still comes."""
    failure: BaseException | None = None
    with ThreadPoolExecutor(at_once) as threads:
        queue = iter(waiting)
        running: dict[Future[str], Request] = {}
        try:
            while True:
                while failure is None and len(running) < at_once and (request := next(queue, None)) is not None:
                    running[threads.submit(_ask, endpoint, request)] = request
                if not running:
                    break
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    request = running.pop(future)
                    if error := future.exception():
                        failure = failure or error
                        endpoint.stop()
                    else:
                        yield request, future.result()
        except BaseException:  # an interrupt: nobody waits for pauses any more
            endpoint.stop()
            raise
    if failure is not None:
        raise failure


def _ask(endpoint: Endpoint, request: Request) -> str:
    messages = [
        {"role": "system", "content": request.prompt.system},
        {"role": "user", "content": request.text},
    ]
    return endpoint.chat(messages, TEMPERATURE, MAX_TOKENS)


def _progress(known: Mapping[Any, Any], requests: Sequence[Request], started: float) -> Progress:
    return Progress("judge", len(known), len(requests), 0, time.perf_counter() - started)


# ---- the file --------------------------------------------------------------------------------------------------------


def _key(request: Request) -> tuple[int | str, int]:
    return request.question.id, request.turn


def _row(request: Request, judgment: str, model: str, judge_model: str) -> dict[str, Any]:
    return {
        "question_id": request.question.id,
        "model": model,
        "judge": [judge_model, request.prompt.name],
        "user_prompt": request.text,
        "judgment": judgment,
        "score": rating(judgment),
        "turn": request.turn,
        "tstamp": time.time(),
    }


def _read_judgments(
    path: Path, requests: Sequence[Request], model: str, judge_model: str
) -> tuple[list[dict[str, Any]], dict[tuple[int | str, int], dict[str, Any]]]:
    """The rows of other models or questions, and those of these requests. A line that a kill tore is cut off.

    Raises:
        UserError: a row is no judgment, or one of another answer.
    """
    others: list[dict[str, Any]] = []
    known: dict[tuple[int | str, int], dict[str, Any]] = {}
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return others, known
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    texts = {_key(request): request.text for request in requests}
    for number, text in enumerate(whole.splitlines(), 1):
        try:
            row = json.loads(text)
            key, score = (row["question_id"], row["turn"]), row["score"]
            of, by, prompt = row["model"], row["judge"][0], row["user_prompt"]
        except (ValueError, TypeError, LookupError):
            raise UserError(f"{path}:{number}: is no judgment in FastChat's form") from None
        if of != model or by != judge_model or key not in texts:
            others.append(row)
        elif prompt != texts[key] or not isinstance(score, int | float):
            raise UserError(
                f"{path}:{number}: judges another answer to question {key[0]}, turn {key[1]}, than there is now; "
                "name another directory, or remove the file"
            )
        else:
            known[key] = row
    return others, known


# ---- the scores ------------------------------------------------------------------------------------------------------


def summarise(path: Path, requests: Sequence[Request], model: str, judge_model: str) -> dict[str, Any]:
    """Means of the ratings: of all, of each turn and each category; judgments without one are not counted.

    low, high: the 95% interval of the mean, from questions (the mean of a question's turns) as independent samples.
    """
    _, rows = _read_judgments(path, requests, model, judge_model)
    rated = [request for request in requests if rows[_key(request)]["score"] != _NO_RATING]
    scores = {_key(request): float(rows[_key(request)]["score"]) for request in rated}

    def mean(of: Sequence[Request]) -> float | None:
        return fmean(scores[_key(request)] for request in of) if of else None

    def means(of: Sequence[Request]) -> dict[str, float | None]:
        turns = {f"turn_{turn}": mean([request for request in of if request.turn == turn]) for turn in (1, 2)}
        return {"score": mean(of), **turns}

    questions = dict.fromkeys(request.question.id for request in rated)
    each = [fmean(score for (name, _), score in scores.items() if name == question) for question in questions]
    low, high = mean_interval(each) if each else (None, None)
    categories = dict.fromkeys(request.question.category for request in requests)
    return {
        "judge": judge_model,
        "questions": len({request.question.id for request in requests}),
        "judgments": len(requests),
        "no_rating": len(requests) - len(rated),
        **means(rated),
        "low": low,
        "high": high,
        "categories": {
            category: means([request for request in rated if request.question.category == category])
            for category in categories
        },
    }
