"""HumanEval and MBPP: the program in a model's output, and whether it passes the problem's tests."""

from __future__ import annotations

import ast
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from titan_hd.evaluation.sandbox import Sandbox, Verdict

_FENCE = re.compile(r"```(?:python|py)?[ \t]*\r?\n(.*?)(?:```|\Z)", re.S | re.I)
_CUTS = ("if __name__", "# Example usage", "assert")  # where the protocol has a program end


@dataclass(frozen=True)
class Job:
    """A program and its tests, as `Sandbox.run` takes them."""

    program: str
    tests: str
    names: Sequence[str]
    prelude: str = ""


def extract_program(output: str) -> str:
    """The program in an output: the first fence of Python if there is one, cut before `if __name__`, "# Example usage"
    and the first "assert", wherever it stands."""
    fence = _FENCE.search(output)
    program = fence.group(1) if fence else output
    for cut in _CUTS:
        program = program.partition(cut)[0]
    return program.rstrip()


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
    tests = "\n".join([record.get("test_setup_code", ""), *record["test_list"]])
    used = {node.id for node in ast.walk(ast.parse(tests)) if isinstance(node, ast.Name)}
    return Job(
        program=extract_program(output),
        tests=tests,
        names=sorted(defined & used),
        prelude="\n".join([*imports, *record.get("test_imports", [])]),
    )


def run_jobs(sandbox: Sandbox, jobs: Iterable[Job], at_once: int | None = None) -> list[Verdict]:
    """The verdicts in the order of the jobs.

    at_once: how many run at the same time; one for each processor by default.
    """
    with ThreadPoolExecutor(at_once or os.cpu_count()) as threads:
        return list(threads.map(lambda job: sandbox.run(job.program, job.tests, job.names, job.prelude), jobs))


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The probability that at least one of k programs passes, estimated without bias from `samples` programs of which
    `right` passed: 1 - C(samples - right, k) / C(samples, k).

    Raises:
        ValueError: k is more than `samples`, or a number makes no sense.
    """
    if not 0 <= right <= samples or not 1 <= k <= samples:
        raise ValueError(f"pass@{k} cannot be estimated from {right} right of {samples} samples")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)
