"""What tools/evaluate.py needs to have MT-Bench's answers judged: its options, and all that is checked beforehand."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from titan_hd.errors import UserError
from titan_hd.evaluation import judge, mt_bench
from titan_hd.evaluation.answering import Progress
from titan_hd.evaluation.endpoint import KEY_VARIABLE, Endpoint, read_key
from titan_hd.evaluation.task import find_source
from titan_hd.files import disk_faults, user_path

_OPTIONS = ("judge_model", "judge_key_file", "judge_answers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group(
        "mt_bench's judge", f"its key is read from {KEY_VARIABLE} or a file; a server of your own may need none"
    ).add_argument
    add("--judge-url", metavar="URL", help="an OpenAI-compatible service, as https://api.openai.com/v1")
    add("--judge-model", metavar="NAME", help="its model, as gpt-4")
    add("--judge-key-file", type=user_path, metavar="FILE", help=f"default: {KEY_VARIABLE} in the environment")
    add("--judge-requests", type=int, default=4, metavar="N", help="at the same time; default: 4")
    add(
        "--judge-answers",
        type=user_path,
        metavar="FILE",
        help="in place of a model, its answers in FastChat's form (model_answer/NAME.jsonl)",
    )


@dataclass(frozen=True)
class Judging:
    """A judge that is there, and what it is asked with."""

    endpoint: Endpoint
    prompts: dict[str, judge.JudgePrompt]
    references: dict[int | str, list[str]]
    at_once: int

    def judge(
        self,
        output: Path,
        questions: Sequence[mt_bench.Question],
        answers: Path,
        show_progress: Callable[[Iterator[Progress]], None],
    ) -> dict[str, Any]:
        """Judge the answers in a file; the judgments go below `output`, the scores are returned.

        Raises:
            UserError: an answer is missing, or the judge fails.
        """
        texts, model = judge.read_answers(str(answers))
        requests = judge.plan(questions, texts, self.references, self.prompts, str(answers))
        path = judge.judgment_file(output, self.endpoint.model)
        with disk_faults(output):
            show_progress(judge.judge(path, requests, model, self.endpoint, self.at_once))
        return judge.summarise(path, requests, model, self.endpoint.model)


def prepare(args: argparse.Namespace, questions: Sequence[mt_bench.Question]) -> Judging | None:
    """See that the judge, its prompts and its references are there, before a model works for hours; None: no judge is
    asked for.

    Raises:
        UserError: one of them is not.
    """
    if args.judge_url is None:
        for option in _OPTIONS:
            if getattr(args, option) is not None:
                raise UserError(f"--{option.replace('_', '-')}: needs --judge-url, the service that judges")
        return None
    if not questions:
        raise UserError("--judge-url: is for mt_bench, which --tasks does not name")
    if not args.judge_model:
        raise UserError("--judge-model: missing: the name of the model that judges, such as gpt-4")
    if args.data is None:
        raise UserError("--data: missing: the directory with mt_bench/judge_prompts.jsonl")
    prompts = judge.read_prompts(
        find_source("mt_bench's judge (FastChat's judge_prompts.jsonl)", judge.PROMPT_FILES, args.data)
    )
    source = find_source("mt_bench's reference answers", judge.REFERENCE_FILES, args.data)
    references, _ = judge.read_answers(source)
    judge.check_references(questions, references, source)
    endpoint = Endpoint(args.judge_url, args.judge_model, read_key(args.judge_key_file))
    endpoint.check()
    return Judging(endpoint, prompts, references, args.judge_requests)
