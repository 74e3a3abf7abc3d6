"""HumanEval and MBPP: programs read off outputs; right solutions pass and mutated ones fail; pass@k."""

from __future__ import annotations

import itertools
import json
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.kit.commands import call_tool, error_lines
from titan_hd.data.sources import Record
from titan_hd.errors import UserError
from titan_hd.evaluation import code
from titan_hd.evaluation.code import Job, extract_program, humaneval_job, mbpp_job, pass_at_k
from titan_hd.evaluation.samples import scored
from titan_hd.evaluation.sandbox import Limits, Sandbox, Verdict
from titan_hd.evaluation.task import find_source, load_problems
from titan_hd.evaluation.tasks import TASKS
from tools import evaluate


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    try:
        return Sandbox(Limits())
    except UserError as error:
        pytest.skip(str(error))


# ---- programs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "program"),
    [
        ("def f():\n    return 1\n", "def f():\n    return 1"),
        ("    return 1\n", "    return 1"),  # what follows HumanEval's prompt keeps its indentation
        ("Sure:\n```python\ndef f():\n    return 1\n```\nIt is 1.\n```python\nf()\n```", "def f():\n    return 1"),
        ("```py\r\nx = 1\r\n```", "x = 1"),
        ("```\nx = 1\n```", "x = 1"),
        ("```python3\ndef f(a):\n    return a\n```\n", "def f(a):\n    return a"),
        ("```Python3 title=f\nx = 1\n```", "x = 1"),
        ("First:\n```bash\npip install x\n```\nThen:\n```python\nx = 1\n```\nDone.", "x = 1"),
        ("It prints\n```\n4\n```\nby\n```python\nprint(4)\n```", "print(4)"),
        ("```bash\nls\n```\nor ```x = 2``` or\n```\nx = 1\n```", "x = 1"),
        (" x = 1\nif x:\n    print(x)", "x = 1\nif x:\n    print(x)"),  # the space behind a prompt
        ("```python\nx = 1", "x = 1"),  # cut off by the limit of tokens
        ("x = 1\nif __name__ == '__main__':\n    main()", "x = 1"),
        ("x = 1\n# Example usage:\nprint(x)", "x = 1"),
        ("x = 1\nassert x == 1\nif __name__ == '__main__':\n    main()", "x = 1"),
        *[(inside, inside) for inside in ['def f(x):\n    """\n    assert f(1)\n    """\n    assert x']],
        ("", ""),
    ],
)
def test_extraction(output: str, program: str):
    assert extract_program(output) == program


PROBLEM = {
    "task_id": "HumanEval/x",
    "prompt": (
        'import math\n\ndef area(side):\n    return side * side\n\ndef root(number):\n    """The root.\n    """\n'
    ),
    "entry_point": "root",
    "canonical_solution": "    return math.sqrt(number)\n",
    "test": "def check(candidate):\n    assert area(candidate(2.0)) - 2.0 < 1e-9\n    assert candidate(9) == 3.0\n",
}
WHOLE = "def root(number):\n    return number ** 0.5\n"


@pytest.mark.parametrize(
    ("output", "result"),
    [
        (PROBLEM["canonical_solution"], "passed"),
        (f"Here:\n```python\n{WHOLE}```", "passed"),
        (WHOLE, "passed"),
        (f"def area(side):\n    return 0\n\n{WHOLE}", "passed"),  # a helper of the problem is not the model's to say
        ("def area(side):\n    return 2.0\n\ndef root(number):\n    return 3.0\n", "failed"),
        ("    return number\n", "failed"),
        ("I do not know.", "error"),
        ("", "error"),
    ],
)
def test_humaneval(sandbox: Sandbox, output: str, result: str):
    [verdict] = run_jobs(sandbox, [humaneval_job(PROBLEM, output)])
    assert verdict.result == result, verdict


def test_mbpp_takes_from_a_program_only_what_the_solution_defines(sandbox: Sandbox):
    """A program's own `set` does not stand in for Python's; a problem whose function is named `sum` has it tested."""
    record = {"code": "def f(x):\n    return x", "test_list": ["assert set(f((1, 2))) == set([1, 2])"]}
    [verdict] = run_jobs(sandbox, [mbpp_job(record, "def set(x):\n    return 1\ndef f(x):\n    return 5")])
    assert verdict.result == "error"
    record = {"code": "def sum(a, b):\n    return a * b", "test_list": ["assert sum(3, 4) == 12"]}
    assert [v.result for v in run_jobs(sandbox, [mbpp_job(record, record["code"]), mbpp_job(record, "")])] == [
        "passed",
        "error",
    ]


def run_jobs(sandbox: Sandbox, jobs: Sequence[Job]) -> list[Verdict]:
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(lambda job: sandbox.run(job.program, job.tests, job.names, job.prelude), jobs))


# ---- the files as published ------------------------------------------------------------------------------------------


def jobs_of(name: str, data: Path, mutated: bool) -> list[Job]:
    """The right solutions as outputs, or these with answers that are wrapped in a tuple."""
    path = {"humaneval": "humaneval/HumanEval.jsonl", "mbpp": "mbpp/mbpp.jsonl"}.get(name, "mbpp/sanitized-mbpp.json")
    text = (data / path).read_text()
    records = json.loads(text) if path.endswith(".json") else [json.loads(line) for line in text.splitlines()]
    jobs = []
    for record in records:
        human = name == "humaneval"
        solution = record["prompt"] + record["canonical_solution"] if human else record["code"]
        output = f"```python\n{solution}\n```"
        job = humaneval_job(record, output) if human else mbpp_job(record, output)
        if mutated:
            wrong = "".join(
                f"\n_{name} = {name}\ndef {name}(*values):\n    return (_{name}(*values), 'mutated')"
                for name in job.names
            )
            job = Job(job.program + wrong, job.tests, job.names, job.prelude)
        jobs.append(job)
    return jobs


@pytest.mark.parametrize("name", ["humaneval", "mbpp", "sanitized"])
@pytest.mark.parametrize(("mutated", "share"), [(False, 1.0), (True, 0.0)], ids=["right", "mutated"])
def test_solutions(sandbox: Sandbox, shared_data: Path, name: str, mutated: bool, share: float):
    jobs = jobs_of(name, shared_data, mutated)
    verdicts = run_jobs(sandbox, jobs[:: len(jobs) // 4])
    assert sum(verdict.passed for verdict in verdicts) == share * len(verdicts)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("humaneval", 164), ("mbpp", 974), ("sanitized", 427)])
@pytest.mark.parametrize(("mutated", "share"), [(False, 1.0), (True, 0.0)], ids=["right", "mutated"])
def test_all_solutions(sandbox: Sandbox, shared_data: Path, name: str, count: int, mutated: bool, share: float):
    jobs = jobs_of(name, shared_data, mutated)
    verdicts = run_jobs(sandbox, jobs)
    assert len(jobs) == count
    odd = [(job.tests[:200], verdict) for job, verdict in zip(jobs, verdicts) if verdict.passed == mutated]
    assert not odd


def test_the_tasks(sandbox: Sandbox, shared_data: Path):
    """The table's entries read the published files, ask for a function by its tests, and score."""
    humaneval, mbpp = (
        load_problems(TASKS[name], find_source(name, TASKS[name].files, shared_data)) for name in ("humaneval", "mbpp")
    )
    assert (len(humaneval), len(mbpp)) == (164, 500)
    assert humaneval[0].id == "HumanEval/0"
    assert humaneval[0].prompt.startswith("Create a Python script for this problem:\nfrom typing import List\n")
    assert mbpp[0].id == "11"
    assert mbpp[0].prompt == (
        "Create a Python script for this problem:\n\nWrite a python function to remove first and last occurrence of a "
        'given character from the string.\nTest examples:\nassert remove_Occ("hello","l") == "heo"\n'
        'assert remove_Occ("abcda","a") == "bcd"\nassert remove_Occ("PHP","P") == "H"'
    )
    assert (mbpp[482].id, mbpp[482].prompt.partition("Test examples:\n")[2]) == (
        "493", "calculate_polygons(startx, starty, endx, endy, radius)",
    )  # fmt: skip
    for task, problem in ((TASKS["humaneval"], humaneval[3]), (TASKS["mbpp"], mbpp[0])):
        right = task.score(problem, problem.reference)
        assert (right.right, right.also) == (True, {"verdict": "passed"})
        assert not task.score(problem, "").right


@pytest.mark.parametrize(
    ("task", "record", "message"),
    [
        ("humaneval", {"prompt": "def f():", "canonical_solution": "  1"}, "test: must be a text"),
        ("mbpp", {"text": "Q", "code": "def f(:"}, "code: is no Python: invalid syntax"),
        ("mbpp", {"text": "Q", "code": "def f(): 1"}, "test_list: must be a list of texts"),
        ("mbpp", {"text": "Q", "code": "def f(): 1", "test_list": ["assert ="]}, "test_list: is no Python"),
    ],
)
def test_bad_records(tmp_path: Path, task: str, record: dict, message: str):
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps(record) + "\n")
    with pytest.raises(UserError, match=f"problems.jsonl:1: {message}"):
        load_problems(TASKS[task], str(path))


def test_an_evaluation_without_a_sandbox_is_refused(monkeypatch: pytest.MonkeyPatch):
    """Before anything is asked of a model, and only where a task runs programs."""
    monkeypatch.setattr(code, "_open_sandboxes", [])
    monkeypatch.setattr(Sandbox, "_start", lambda self, job: {"refused": "no namespaces"})
    with pytest.raises(UserError, match=r"cannot be shut in here: no namespaces; .* give --allow-unsandboxed"):
        code.open_sandbox()
    assert not code.open_sandbox(allow_unsandboxed=True).confined


def test_the_tool(sandbox: Sandbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Outputs are scored; without a sandbox there is one line before anything else is done."""
    (tmp_path / "humaneval").mkdir()
    (tmp_path / "humaneval" / "HumanEval.jsonl").write_text(json.dumps(PROBLEM) + "\n")
    output = {"task": "humaneval", "id": PROBLEM["task_id"], "output": f"```python\n{WHOLE}```"}
    (tmp_path / "outputs.jsonl").write_text(json.dumps(output) + "\n")
    arguments = ("--predictions", tmp_path / "outputs.jsonl", "--data", tmp_path, "--output", tmp_path / "out")
    result = call_tool(evaluate.main, *arguments)
    assert result.returncode == 0, result.stderr
    sample = json.loads((tmp_path / "out" / "samples.jsonl").read_text())
    assert (sample["right"], sample["verdict"], sample["extracted"]) == (True, "passed", WHOLE.rstrip())
    monkeypatch.setattr(code, "_open_sandboxes", [])
    monkeypatch.setattr(Sandbox, "_start", lambda self, job: {"refused": "no namespaces"})
    refused = call_tool(evaluate.main, *arguments)
    assert refused.returncode == 2
    [line] = error_lines(refused)
    assert "no namespaces" in line


def test_programs_run_at_the_same_time(monkeypatch: pytest.MonkeyPatch):
    """Two wait for each other; their samples stand in the order of the answers."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    both = threading.Barrier(2, timeout=20)

    def run(self, program: str, *_: object) -> Verdict:
        both.wait()
        return Verdict("passed" if "3.0" in program else "failed", "")

    stand_in = Sandbox.__new__(Sandbox)
    monkeypatch.setattr(Sandbox, "run", run)
    monkeypatch.setattr(code, "_open_sandboxes", [stand_in])
    problem = TASKS["humaneval"].problem(Record(PROBLEM, "line 1"), "0")
    outputs = ["    return 3.0\n", "    return 2.0\n"] * 3
    rows = list(scored(TASKS["humaneval"], [(problem, "", text, number) for number, text in enumerate(outputs)]))
    assert [(row["sample"], row["right"]) for row in rows] == [(number, number % 2 == 0) for number in range(6)]


def test_a_program_that_cannot_be_started_is_one_line(monkeypatch: pytest.MonkeyPatch):
    """The machine has no room for another process, say: that is no verdict on the program."""
    stand_in = Sandbox.__new__(Sandbox)
    monkeypatch.setattr(Sandbox, "_start", lambda self, job: {"refused": "Resource temporarily unavailable"})
    with pytest.raises(UserError, match=r"^a program could not be started: Resource temporarily unavailable$"):
        stand_in.run("", "", [])


# ---- pass@k ----------------------------------------------------------------------------------------------------------


def test_pass_at_k_is_the_share_of_choices_with_a_right_one():
    for samples in range(1, 7):
        for right in range(samples + 1):
            for k in range(1, samples + 1):
                choices = list(itertools.combinations([number < right for number in range(samples)], k))
                assert pass_at_k(samples, right, k) == pytest.approx(sum(map(any, choices)) / len(choices), abs=1e-15)
    assert pass_at_k(2000, 1, 1) == pytest.approx(1 / 2000)


@pytest.mark.parametrize(("samples", "right", "k"), [(3, 4, 1), (3, -1, 1), (3, 1, 4), (3, 1, 0)])
def test_pass_at_k_refuses_what_makes_no_sense(samples: int, right: int, k: int):
    with pytest.raises(ValueError, match=f"pass@{k} cannot be estimated from {right} right of {samples} samples"):
        pass_at_k(samples, right, k)
