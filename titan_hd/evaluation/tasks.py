"""The tasks. Adding one is an entry here.

The protocols are those of PiSSA (GSM8K, MATH, HumanEval, MBPP) and of LLM-Adapters (commonsense), by which the methods
that are trained here have been compared in print; docs/evaluation.md says where each file comes from.
"""

from __future__ import annotations

from collections.abc import Callable

from titan_hd.evaluation import code, extraction, math_answers
from titan_hd.evaluation.task import Problem, Score, Task

_STEP_BY_STEP = " Let's think step by step."


def _equal(extract: Callable[[str], str | None]) -> Callable[[Problem, str], Score]:
    """Right is an output whose extracted answer is the reference."""

    def score(problem: Problem, output: str) -> Score:
        extracted = extract(output)
        return Score(extracted == problem.reference, extracted)

    return score


def _score_math(problem: Problem, output: str) -> Score:
    extracted = extraction.marked_formula(output)
    right = extracted is not None and math_answers.same_answer(extracted, problem.reference)
    if not math_answers.has_math_verify():
        return Score(right, extracted)
    return Score(right, extracted, {"math_verify": math_answers.verified(output, extracted, problem.reference)})


def _commonsense(name: str, folder: str, choices: str) -> Task:
    """A task in LLM-Adapters' form: the question names its choices, and the output the chosen one."""

    def reference(answer: str) -> str:
        found = extraction.first_choice(answer, choices)
        if found is None:
            raise ValueError(f"must be one of {choices}")
        return found

    return Task(
        name=name,
        files=tuple(f"{place}{folder}/test.json" for place in ("llm_adapters/", "", "dataset/")),
        columns=(("instruction", "answer"),),
        reference=reference,
        score=_equal(lambda output: extraction.first_choice(output, choices)),
        max_new_tokens=32,
        beams=4,
    )


_ENTRIES = (
    Task(
        name="gsm8k",
        files=("gsm8k/test.jsonl", "gsm8k/main/test-*.parquet", "metamath/GSM8K_test.jsonl", "GSM8K_test.jsonl"),
        columns=(("question", "answer"), ("query", "response")),
        reference=extraction.gsm8k_reference,
        score=_equal(extraction.whole_number),
        cue=_STEP_BY_STEP,
    ),
    Task(
        name="math",
        files=(
            *("math/test.jsonl", "math/test.json", "math/test-*.parquet", "math/MATH_test.jsonl", "MATH_test.jsonl"),
            *("MATH/test/*/*.json", "math/test/*/*.json", "metamath/MATH_test.jsonl"),
        ),
        columns=(
            *(("problem", "solution"), ("instruction", "output"), ("query", "response")),
            *(("problem", "answer"), ("question", "answer")),
        ),
        reference=extraction.math_reference,
        score=_score_math,
        vote=math_answers.normalised,
        cue=_STEP_BY_STEP,
    ),
    Task(
        name="humaneval",
        files=(
            *("humaneval/HumanEval.jsonl", "humaneval/HumanEval.jsonl.gz", "HumanEval.jsonl", "HumanEval.jsonl.gz"),
            "humaneval/openai_humaneval/test-*.parquet",
        ),
        columns=(("prompt", "canonical_solution"),),
        reference=str,
        score=code.score_humaneval,
        id_column="task_id",
        instruction=code.humaneval_instruction,
        runs_programs=True,
    ),
    Task(
        name="mbpp",
        files=("mbpp/mbpp.jsonl", "mbpp.jsonl", "mbpp/full/test-*.parquet", "mbpp/sanitized-mbpp.json"),
        columns=(("text", "code"), ("prompt", "code")),
        reference=code.python_source,
        score=code.score_mbpp,
        id_column="task_id",
        instruction=code.mbpp_instruction,
        keep=code.is_in_test_split,
        runs_programs=True,
    ),
    _commonsense("boolq", "boolq", "true|false"),
    _commonsense("piqa", "piqa", "solution[12]"),
    _commonsense("siqa", "social_i_qa", "answer[1-5]"),
    _commonsense("hellaswag", "hellaswag", "ending[1-4]"),
    _commonsense("winogrande", "winogrande", "option[12]"),
    _commonsense("arc_easy", "ARC-Easy", "answer[1-5]"),
    _commonsense("arc_challenge", "ARC-Challenge", "answer[1-5]"),
    _commonsense("openbookqa", "openbookqa", "answer[1-5]"),
)
TASKS: dict[str, Task] = {task.name: task for task in _ENTRIES}


def own_task(prompt_field: str, response_field: str, marker: str) -> Task:
    """A user's own file: what follows the last marker is compared, word by word, with what follows it in the response.

    Its name is "own".
    """

    def reference(response: str) -> str:
        found = extraction.final_answer(response, marker)
        if not found:
            raise ValueError(f"has no answer behind the marker {marker!r}")
        return found

    return Task(
        name="own",
        files=(),
        columns=((prompt_field, response_field),),
        reference=reference,
        score=_equal(lambda output: extraction.final_answer(output, marker) or None),
        id_column="id",
    )
