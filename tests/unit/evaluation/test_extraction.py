"""What is read off an output, against what a reader of the published protocols reads off it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from titan_hd.evaluation import extraction
from titan_hd.evaluation.task import Problem
from titan_hd.evaluation.tasks import TASKS


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 9 * 2 = 18.\nThe answer is: 18", "18"),
        ("The answer is: 5. No: The answer is: 7 eggs", "7"),
        ("The answer is: $1,450.", "1450"),
        ("The answer is: 1,450,000", "1450000"),
        ("The answer is: -3", "-3"),
        ("The answer is: 2.6", "3"),
        ("The answer is: 9/2", "4"),  # halves to even
        ("The answer is: 7/0", "7"),
        ("The answer is: .75", "1"),
        ("The answer is: x = 12", "12"),
        ("The answer is: none", None),
        ("The answer is 18", None),
        ("#### 18", None),
        ("", None),
    ],
)
def test_whole_number(text: str, number: str | None):
    assert extraction.whole_number(text) == number


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{1} and \boxed{2}", "2"),
        (r"\fbox{3}", "3"),
        (r"$x = \boxed 5$.", "5"),
        (r"\boxed{\left\{1,2\right\}}", r"\left\{1,2\right\}"),
        (r"\boxed{unfinished", None),
        ("nothing", None),
    ],
)
def test_boxed(text: str, content: str | None):
    assert extraction.boxed(text) == content


@pytest.mark.parametrize(
    ("text", "formula"),
    [
        ("Hence.\nThe answer is: $x+1$.", "$x+1$"),
        ("The answer is: 3.\nAnd more. The end.", "3"),
        ("The answer is: 3.5", "3.5"),
        ("no mark", None),
        ("The answer is: 3\nThe answer is: .", None),
    ],
)
def test_marked_formula(text: str, formula: str | None):
    assert extraction.marked_formula(text) == formula


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("the correct answer is answer2", "answer2"),
        ("Below is an instruction that describes a task. answer1/answer2\n\n### Response:\nanswer3, not 4", "answer3"),
        (
            "<s> Below is an instruction that describes a task.\nanswer1\n### Response: answer3\n### Response: x",
            "answer3",
        ),
        (" answer2\n\n### Instruction:\nanswer1\n\n### Response: answer4", "answer2"),
        ("Below is an instruction that describes a task. answer1", None),
        ("answer9", None),
        ("Answer2", None),
    ],
)
def test_first_choice(text: str, choice: str | None):
    assert extraction.first_choice(text, "answer[1-5]") == choice


def test_references():
    assert extraction.gsm8k_reference("steps\n#### 1,450,000") == "1450000"
    assert extraction.math_reference(r"Since 2, \boxed{4}.") == "4"
    assert extraction.math_reference("Since.\nThe answer is: 4") == "4"
    assert extraction.math_reference("4") == "4"
    for bad in ("18", "#### eighteen"):
        with pytest.raises(ValueError, match="#### and a whole number"):
            extraction.gsm8k_reference(bad)
    with pytest.raises(ValueError, match="boxed"):
        extraction.math_reference("Since.\nTherefore.")


def test_outputs_of_a_real_model_are_read_as_by_hand():
    """Sixty of SmolLM2-135M-Instruct, with two or three examples in front of the question and temperatures of 0 to 1.1.
    They were labelled by hand, by the words of the protocol, before this code read them: units, commas, signs and
    fractions; "The answer is: " twice, with nothing or another question's answer behind it; chatter after the answer;
    questions that the model asks itself; "yes" for true, "True.", "Solutions 1 and 2"."""
    lines = Path(__file__).with_name("smollm2_outputs.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 60
    assert sum(row["extracted"] is not None for row in rows) == 45
    for row in rows:
        assert TASKS[row["task"]].score(Problem("0", "", ""), row["output"]).extracted == row["extracted"], row
