"""The line of a logged step: columns that stand below each other, and the time that is left."""

from __future__ import annotations

import pytest

from titan_hd.components.step_line import StepLines

RECORD = {
    "loss": 2.64123,
    "grad_norm": 13.7712,
    "lr": 0.012,
    "tokens_per_second": 5738.4,
    "step_seconds": 0.5,
    "peak_memory_gib": 0.4025,
}
SMALL = {**RECORD, "loss": 11.1, "grad_norm": 0.000123456, "lr": 0.0, "tokens_per_second": 1234567.0, "mfu": 0.4123}


@pytest.fixture
def lines():
    """Of a run of 120 steps that went on after step 20, and a clock that is set by hand."""
    clock = [1000.0]
    lines = StepLines(20, 120, lambda: clock[0])

    def advance(seconds: float, steps: int = 1) -> list[str]:
        said = []
        for _ in range(steps):
            clock[0] += seconds
            said.append(lines.advance(lines.step + 1))
        return [line for line in said if line]

    return lines, advance


def test_columns_are_aligned(lines, monkeypatch):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    lines, advance = lines
    first = lines.line(1, RECORD)
    assert first.startswith("step   1/120  loss   2.6412  grad_norm     13.8  lr 1.20e-02  tokens/s     5,738  memory")
    assert first.endswith("  memory   0.40 GiB  ETA        -")
    advance(60)
    advance(2, 9)
    second = lines.line(30, {key: value for key, value in SMALL.items() if key != "mfu"})
    assert len(second) == len(first)
    assert second.endswith("grad_norm 0.000123  lr 0.00e+00  tokens/s 1,234,567  memory   0.40 GiB  ETA     3:00")
    assert "tokens/s 1,234,567  mfu 41.2%  memory" in lines.line(31, SMALL)


def test_what_is_no_step_has_all_its_values(lines):
    assert lines[0].line(0, {"validation_loss": 3.44561, "count": 7}) == "step   0/120  validation_loss 3.446  count 7"


def test_the_first_step_which_compiles_counts_for_nothing(lines):
    lines, advance = lines
    assert lines.seconds_left() is None
    assert advance(100) == []
    assert lines.seconds_left() is None
    assert advance(2) == []
    assert lines.seconds_left() == 2 * 98


def test_what_is_to_be_expected_is_said_once(lines):
    _, advance = lines
    said = advance(50) + advance(2, 30)
    assert said == ["2 s a step, with what came between the steps: the other 96 of 120 will take about 3:12"]


def test_steps_that_were_made_without_it_are_not_made_again(lines):
    """By hand, before and between: the steps are the run's."""
    lines, advance = lines
    lines.advance(50)
    assert advance(2, 2) == []
    assert lines.seconds_left() == 2 * 68
    (said,) = [line for line in (lines.advance(step) for step in (60, 61)) if line]
    assert "the other 60 of 120 will" in said


def test_nothing_is_expected_of_a_run_that_is_over():
    lines = StepLines(0, 4)
    assert [lines.advance(step) for step in range(1, 5)] == [None] * 4
