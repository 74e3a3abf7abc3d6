"""HumanEval and MBPP: the program in a model's output, and whether it passes the problem's tests."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from titan_hd.evaluation.sandbox import Sandbox
from titan_hd.evaluation.task import Problem, Score

# Fences in pairs (what stands behind one that closes opens nothing): of a line alone, or the kind of text and the text.
_FENCE = re.compile(r"`{3,}(?:[^`\n]*`{3,}|([^`\n]*)\n(.*?)(?:`{3,}|\Z))", re.S)
_KINDS = (("python", "python3", "py"), ("",))  # of text that may be the program; those of the first are preferred
_REQUEST = "Create a Python script for this problem:\n"  # WizardCoder's, as is what follows for MBPP
_SIGNATURE = "calculate_polygons(startx, starty, endx, endy, radius)"  # of 493, whose tests it finds too long
# Where the protocol has a program end. The published script cuts at the first "assert" anywhere, even in the docstring
# of a problem of HumanEval that has one, and so fails whoever repeats that problem's prompt.
_END = re.compile(r"^(if __name__|# Example usage|assert\b)", re.M)


@dataclass(frozen=True)
class Job:
    """A program and its tests, as `Sandbox.run` takes them."""

    program: str
    tests: str
    names: Sequence[str]
    prelude: str = ""


def extract_program(output: str) -> str:
    """The program in an output: what stands in the first fence of Python, else in the first that does not say of what,
    else all; cut before the first line that begins with `if __name__`, "# Example usage" or `assert`."""
    fenced = [((kind.split() or [""])[0].lower(), text) for kind, text in _FENCE.findall(output) if kind or text]
    found = [text for kinds in _KINDS for kind, text in fenced if kind in kinds]
    # A text that follows a prompt may begin with the space between them; no program does.
    program = found[0] if found else re.sub(r"\A (?=\S)", "", output)
    return _END.split(program, maxsplit=1)[0].rstrip()


def humaneval_job(record: Mapping[str, Any], output: str) -> Job:
    """A problem of HumanEval with an output: a whole function, or what follows the prompt.

    record: prompt, entry_point, test.
    """
    program = extract_program(output)
    prompt, entry_point = record["prompt"], record["entry_point"]
    whole = re.search(rf"^def {re.escape(entry_point)}\b", program, re.M)
    return Job(
        program=f"{prompt}\n{program}" if whole else prompt + program,  # the prompt has imports and helpers
        tests=f"{record['test']}\ncheck({entry_point})",
        names=[entry_point],
        prelude=prompt,
    )


def mbpp_job(record: Mapping[str, Any], output: str) -> Job:
    """A problem of MBPP, either form, with an output.

    record: test_list, code (a right solution: which names it defines), test_setup_code or test_imports.
    """
    reference = ast.parse(record["code"])
    defined = {node.name for node in reference.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    imports = [ast.unparse(node) for node in reference.body if isinstance(node, ast.Import | ast.ImportFrom)]
    tests = "\n".join([record.get("test_setup_code") or "", *record["test_list"]])
    used = {node.id for node in ast.walk(ast.parse(tests)) if isinstance(node, ast.Name)}
    return Job(
        program=extract_program(output),
        tests=tests,
        names=sorted(defined & used),
        prelude="\n".join([*imports, *(record.get("test_imports") or [])]),
    )


# ---- the entries of the tasks ----------------------------------------------------------------------------------------


def humaneval_instruction(question: str, record: Mapping[str, Any]) -> str:
    """What a model is asked.

    Raises:
        ValueError: the record has no tests.
    """
    for column in ("test", "entry_point"):
        if not isinstance(record.get(column), str):
            raise ValueError(f"{column}: must be a text")
    return f"{_REQUEST}{question}"


def mbpp_instruction(question: str, record: Mapping[str, Any]) -> str:
    """What a model is asked: the tests say the function's name.

    Raises:
        ValueError: the record has no tests.
    """
    tests = record.get("test_list")
    if not tests or not all(isinstance(test, str) for test in tests):
        raise ValueError("test_list: must be a list of texts")
    python_source("\n".join([record.get("test_setup_code") or "", *tests]), "test_list: ")
    if tests[0].startswith(f"assert {_SIGNATURE.partition('(')[0]}("):
        tests = [_SIGNATURE]
    return f"{_REQUEST}\n{question}\nTest examples:\n" + "\n".join(tests)


def is_in_test_split(record: Mapping[str, Any]) -> bool:
    """MBPP's file holds all splits; problems 11 to 510 are its test split. Records without such a number are kept."""
    number = record.get("task_id")
    return not isinstance(number, int) or 11 <= number <= 510


def python_source(source: str, what: str = "") -> str:
    """The source as it is.

    Raises:
        ValueError: it is no Python.
    """
    try:
        ast.parse(source)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{what}is no Python: {error}") from None
    return source


_open_sandboxes: list[Sandbox] = []


def open_sandbox(allow_unsandboxed: bool = False) -> Sandbox:
    """The sandbox in which answers are scored; the first call decides.

    Raises:
        UserError: the kernel refuses, and `allow_unsandboxed` is False.
    """
    if not _open_sandboxes:
        _open_sandboxes.append(Sandbox(allow_unsandboxed=allow_unsandboxed))
    return _open_sandboxes[0]


def score_humaneval(problem: Problem, output: str) -> Score:
    return _score(humaneval_job(problem.record, output), output)


def score_mbpp(problem: Problem, output: str) -> Score:
    return _score(mbpp_job(problem.record, output), output)


def _score(job: Job, output: str) -> Score:
    """The kind of verdict alone: what an exception says may hold addresses, which differ from run to run."""
    verdict = open_sandbox().run(job.program, job.tests, job.names, job.prelude)
    return Score(verdict.passed, extract_program(output) or None, {"verdict": verdict.result})


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The probability that at least one of k programs passes, estimated without bias from `samples` programs of which
    `right` passed: 1 - C(samples - right, k) / C(samples, k).

    Raises:
        ValueError: k is more than `samples`, or a number makes no sense.
    """
    if not 0 <= right <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass@{k} cannot be estimated from {right} right of {samples} samples")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)
