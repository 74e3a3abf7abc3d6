"""Which validation is the best, and after how many without gain a run ends."""

from __future__ import annotations

import json

import pytest

from titan_hd.components.best_validation import Best, BestValidation
from titan_hd.config.job_config import Checkpoint, JobConfig, Validation

NAN = float("nan")


def best_by(metric: str, patience: int = 0, measured_on: str = "all records") -> BestValidation:
    config = JobConfig(checkpoint=Checkpoint(keep_best=metric), validation=Validation(patience=patience))
    return BestValidation(config, {metric or "validation_loss": measured_on})


@pytest.mark.parametrize(
    ("metric", "values", "kept"),
    [
        ("validation_loss", [9, 3, 2, 2, 2.5, 1], [1, 2, 5]),
        ("validation_loss/plain", [1, 3, 4, 2], [1, 3]),
        ("validation_exact_match", [0.9, 0, 0.5, 0.5, 0.4, 0.6], [1, 2, 5]),
        ("validation_exact_match/math", [0, 0.2, 0.1], [1]),
        ("validation_loss", [9, NAN, float("inf"), 5, NAN, 4], [3, 5]),
    ],
)
def test_which_checkpoints_are_kept(metric: str, values: list[float], kept: list[int]):
    """Of a loss the less, of an exact match the more; an equal value is no gain, nor is one that is not finite. That of
    step 0 does not count, whatever it is."""
    best = best_by(metric)
    assert [step for step, value in enumerate(values) if best.add(step, {metric: value, "other": 0})] == kept
    assert best.to_keep == Best(kept[-1], metric, values[kept[-1]])


def steps_until_exhausted(best: BestValidation, losses: list[float], first: int = 1) -> int | None:
    for step, loss in enumerate(losses, first):
        best.add(step, {"validation_loss": loss})
        if best.exhausted:
            return step
    return None


def test_patience():
    assert steps_until_exhausted(best_by("", 2), [5, 6, 4, 4, 4.5, 1]) == 5
    assert steps_until_exhausted(best_by("", 1), [5, 6]) == 2
    assert steps_until_exhausted(best_by("", 3), [NAN, NAN, NAN]) == 3
    assert steps_until_exhausted(best_by("", 0), [1, 2, 3, 4, 5]) is None


def test_without_keep_best_no_checkpoint_is_kept():
    best = best_by("", 2)
    assert not best.add(1, {"validation_loss": 5})
    assert best.best
    assert best.to_keep is None


def test_a_resumed_run_knows_it_all():
    """Through a checkpoint's JSON, at every step: it stops where the undisturbed run does."""
    losses = [5, 6, 4.1, 4.1, 4.5, 1]
    for killed in range(5):
        before, after = best_by("validation_loss", 2), best_by("validation_loss", 2)
        steps_until_exhausted(before, losses[:killed])
        after.go_on_from(json.loads(json.dumps(before.state())))
        assert steps_until_exhausted(after, losses[killed:], killed + 1) == 5
        assert after.to_keep == Best(3, "validation_loss", 4.1)


def test_a_run_that_validates_otherwise_begins_anew(caplog):
    """By another metric, or with a value that does not compare with the checkpoint's. An old checkpoint has none."""
    before = best_by("validation_loss", 2)
    for metric, measured_on, other in (
        ("validation_exact_match", "all records", "by validation_loss"),
        ("validation_loss", "half of them", "on other records or settings"),
    ):
        before.best, after = None, best_by(metric, 2, measured_on)
        after.go_on_from(None)
        after.go_on_from(before.state())
        assert not caplog.text
        before.add(1, {"validation_loss": 5})
        before.add(2, {"validation_loss": 5})
        after.go_on_from(before.state())
        assert (after.best, after.without_gain) == (None, 0)
        assert caplog.messages == [
            f"the checkpoint's best validation is {other}; the best by {metric}, and validation.patience, count from "
            "here on"
        ]
        caplog.clear()
    without = best_by("", 0, "")
    without.go_on_from(before.state())
    assert not caplog.text
    assert without.state() == before.state(), "a run that does not validate hands it on"


def test_what_is_said_of_an_early_stop(caplog):
    caplog.set_level("INFO", "titan_hd")
    best = best_by("", 1)
    best.add(10, {"validation_loss": 2.5})
    best.add(20, {"validation_loss": 3})
    best.tell_of_early_stop(20, 20, resumed=False)
    assert not caplog.messages, "it is the last step"
    best.tell_of_early_stop(20, 90, resumed=False)
    best.tell_of_early_stop(20, 90, resumed=True)
    why = "after step 20 of 90: 1 validation(s) in a row without gain of validation_loss (the best, 2.5, is of step 10)"
    advice = "; to train on, raise validation.patience or set it to 0"
    assert caplog.messages == [f"stopped early {why}", f"this run has stopped early {why}{advice}"]
