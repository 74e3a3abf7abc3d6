"""Outputs are scored once: a scoring that was ended goes on where it was, to the same file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from titan_hd.evaluation import samples, scoring
from titan_hd.evaluation.task import Problem
from titan_hd.evaluation.tasks import TASKS, own_task

SETTINGS = ("a marker", False)


def plan(outputs: str = "abcde", tests: str = "") -> list:
    """Two tasks; `tests`: a column of the problems beside their references."""
    problems = [Problem(str(i), "q", "1", {"tests": tests}) for i in range(3)]
    answers = [(problem, "", text, None) for problem, text in zip(problems, outputs)]
    several = [(problems[0], "", text, number) for number, text in enumerate(outputs[3:])]
    return [(TASKS["gsm8k"], answers), (own_task("q", "a", "Sum:"), several)]


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """The outputs that were scored."""
    found: list[str] = []
    real = samples.sample

    def sample(task, problem, prompt, output, number=None):
        if output == "stop":
            raise KeyboardInterrupt
        found.append(output)
        return real(task, problem, prompt, output, number)

    monkeypatch.setattr(samples, "sample", sample)
    return found


def run(output: Path, what: list, settings: object = SETTINGS) -> list[tuple[str, int, int]]:
    return [(step.task, step.done, step.total) for step in scoring.score(output, what, settings)]


def ended_after(output: Path, count: int, what: list) -> None:
    progress = scoring.score(output, what, SETTINGS)
    assert [step.done for _, step in zip(range(count + 1), progress)] == [*range(count + 1)]
    progress.close()


def test_progress_and_the_file(tmp_path: Path, calls: list[str]):
    said = run(tmp_path / "out", plan())
    assert said == [*(("gsm8k", done, 3) for done in range(4)), *(("own", done, 2) for done in range(3))]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["samples.jsonl"]
    rows = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert [(row["task"], row["id"], row.get("sample"), row["output"]) for row in rows] == [
        *(("gsm8k", str(i), None, text) for i, text in enumerate("abc")), ("own", "0", 0, "d"), ("own", "0", 1, "e"),
    ]  # fmt: skip
    run(tmp_path / "out", plan())  # a complete one begins anew
    assert calls == [*"abcde"] * 2


@pytest.mark.parametrize("torn", [False, True])
def test_what_is_scored_is_not_scored_again(torn: bool, tmp_path: Path, calls: list[str]):
    run(tmp_path / "whole", plan())
    calls.clear()
    ended_after(tmp_path / "out", 2, plan())
    assert not (tmp_path / "out" / "samples.jsonl").exists()
    if torn:
        partial = tmp_path / "out" / "samples.partial.jsonl"
        partial.write_bytes(partial.read_bytes()[:-5])
    said = run(tmp_path / "out", plan())
    assert said[0] == ("gsm8k", 1 if torn else 2, 3)
    assert calls == [*("abbcde" if torn else "abcde")]
    assert (tmp_path / "out" / "samples.jsonl").read_bytes() == (tmp_path / "whole" / "samples.jsonl").read_bytes()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["samples.jsonl"]


@pytest.mark.parametrize(
    "change",
    [
        lambda out: run(out, plan("axcde")),
        lambda out: run(out, plan(tests="others")),
        lambda out: run(out, plan(), ("another marker", False)),
    ],
    ids=["outputs", "problems", "settings"],
)
def test_another_scoring_begins_anew(change: Callable[[Path], list], tmp_path: Path, calls: list[str]):
    ended_after(tmp_path / "out", 2, plan())
    calls.clear()
    assert change(tmp_path / "out")[0] == ("gsm8k", 0, 3)
    assert len(calls) == 5


def test_an_interrupt_leaves_what_was_scored(tmp_path: Path, calls: list[str]):
    outputs = ["a", "b", "stop", "d", "e"]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", plan(outputs))
    lines = (tmp_path / "out" / "samples.partial.jsonl").read_text().splitlines()
    assert [json.loads(line).get("output") for line in lines] == [None, "a", "b"]
