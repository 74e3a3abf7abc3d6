"""Gold answers score 100% and mutated ones 0%, on the files as they are published."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from titan_hd.errors import UserError
from titan_hd.evaluation import math_answers
from titan_hd.evaluation.task import Problem, find_source, load_problems
from titan_hd.evaluation.tasks import TASKS, own_task

SIZES = {
    "gsm8k": 1319, "boolq": 3270, "piqa": 1838, "siqa": 1954, "winogrande": 1267, "arc_easy": 2376,
    "arc_challenge": 1172, "openbookqa": 500,
}  # fmt: skip


def gold(name: str, problem: Problem) -> str:
    """An output as a model that was trained on the task's own form would write it."""
    if name == "gsm8k":
        steps, number = problem.record["answer"].split("#### ")
        return f"{steps}#### {number}\nThe answer is: {number}"
    return problem.record["output"]


def mutated(name: str, output: str) -> str:
    if name == "gsm8k":
        head, number = output.rsplit("The answer is: ", 1)
        return f"{head}The answer is: {int(number.replace(',', '')) + 1}"
    swaps = {"true": "false", "false": "true", "1": "2", "2": "1", "3": "4", "4": "3", "5": "1"}
    return re.sub(r"(true|false|\d)$", lambda found: swaps[found[0]], output)


@pytest.mark.parametrize("name", SIZES)
def test_gold_answers_are_right_and_mutated_ones_wrong(name: str, shared_data: Path):
    task = TASKS[name]
    problems = load_problems(task, find_source(name, task.files, shared_data))
    assert len(problems) == SIZES[name]
    right = [task.score(problem, gold(name, problem)).right for problem in problems]
    wrong = [task.score(problem, mutated(name, gold(name, problem))).right for problem in problems]
    assert (sum(right), sum(wrong)) == (len(problems), 0)


MATH = [
    ("What is $1/2$?", r"It is $\boxed{\dfrac12}$.", r"\frac{1}{2}", r"\frac{1}{3}"),
    ("Where?", r"At $\boxed{\left(1, -2\right)}$.", "(1,-2)", "(1,2)"),
    ("How many?", r"There are $\boxed{12\text{ cm}}$.", "12", "13"),
    ("Which?", r"$x=\boxed{\text{Monday}}$", r"\text{Monday}", r"\text{Tuesday}"),
]


@pytest.mark.parametrize(("question", "answer"), [("problem", "solution"), ("instruction", "output")])
def test_math_by_solutions(question: str, answer: str, tmp_path: Path):
    rows = [json.dumps({question: text, answer: solution, "type": "Algebra"}) for text, solution, *_ in MATH]
    (tmp_path / "MATH_test.jsonl").write_text("\n".join(rows))
    problems = load_problems(TASKS["math"], find_source("math", TASKS["math"].files, tmp_path))
    for problem, (_, solution, right, wrong) in zip(problems, MATH):
        score = TASKS["math"].score(problem, f"{solution}\nThe answer is: {right}.\n")
        assert (score.right, score.extracted) == (True, right)
        assert not TASKS["math"].score(problem, f"{solution}\nThe answer is: {wrong}").right
        assert not TASKS["math"].score(problem, solution).right  # the protocol reads marked answers alone
        if math_answers.has_math_verify():
            assert score.also == {"math_verify": True}


def test_math_as_it_was_published(tmp_path: Path):
    """A directory for each subject, in it a file for each problem, over several lines."""
    for subject, number, solution in (("algebra", 1, r"\boxed{3}"), ("geometry", 7, r"\boxed{\pi}")):
        folder = tmp_path / "MATH" / "test" / subject
        folder.mkdir(parents=True)
        record = {"problem": subject, "level": "Level 1", "type": subject, "solution": solution}
        (folder / f"{number}.json").write_text(json.dumps(record, indent=4))
    problems = load_problems(TASKS["math"], find_source("math", TASKS["math"].files, tmp_path))
    assert [(problem.id, problem.prompt, problem.reference) for problem in problems] == [
        ("0", "algebra", "3"),
        ("1", "geometry", r"\pi"),
    ]
    assert len(load_problems(TASKS["math"], find_source("math", TASKS["math"].files, tmp_path), limit=1)) == 1


@pytest.mark.parametrize("name", ["data [v2]", "data*"])
def test_a_folder_with_the_signs_of_a_glob(name: str, tmp_path: Path):
    data, files = tmp_path / name, TASKS["math"].files
    (data / "MATH" / "test" / "algebra").mkdir(parents=True)
    (data / "MATH" / "test" / "algebra" / "1.json").write_text('{"problem": "p", "solution": "\\\\boxed{3}"}')
    assert [problem.prompt for problem in load_problems(TASKS["math"], find_source("math", files, data))] == ["p"]
    rows = [{"instruction": "q", "answer": "true"}]
    path = data / next(file for file in TASKS["boolq"].files if file.endswith(".json"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))
    source = find_source("boolq", TASKS["boolq"].files, data)
    assert (source, len(load_problems(TASKS["boolq"], source))) == (str(path), 1)


def test_a_file_of_ones_own(tmp_path: Path):
    path = tmp_path / "own.jsonl"
    path.write_text('{"q": "2 + 2", "a": "So: 4 apples", "id": "sum"}\n{"q": "3", "a": "So: 3"}\n')
    task = own_task("q", "a", "So:")
    first, second = load_problems(task, str(path))
    assert (first.id, first.reference, second.id) == ("sum", "4 apples", "1")
    assert task.score(first, "So: 5\nSo: 4 apples\nbye").right
    assert not task.score(first, "4 apples").right
    assert task.score(first, "So: ").extracted is None


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        (
            "gsm8k",
            [{"question": "q"}],
            r":1: gsm8k needs the columns question and answer or query and response; it has",
        ),
        ("gsm8k", [{"question": "q", "answer": "no number"}], r":1: answer: must end with #### and a whole number"),
        ("gsm8k", [{"question": 7, "answer": "#### 1"}], r":1: question: must be a text"),
        ("boolq", [{"instruction": "q", "answer": "maybe"}], r":1: answer: must be one of true\|false"),
        ("math", [{"problem": "q", "solution": "a\nb"}], r":1: solution: has neither"),
    ],
)
def test_bad_columns(name: str, rows: list[dict], message: str, tmp_path: Path):
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=message):
        load_problems(TASKS[name], str(path))


def test_missing_files(tmp_path: Path):
    with pytest.raises(UserError, match=r"has no file of hellaswag; looked for llm_adapters/hellaswag/test.json"):
        find_source("hellaswag", TASKS["hellaswag"].files, tmp_path)
    with pytest.raises(UserError, match="no such directory"):
        find_source("gsm8k", TASKS["gsm8k"].files, tmp_path / "nowhere")
