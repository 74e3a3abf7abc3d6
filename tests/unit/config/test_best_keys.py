"""checkpoint.keep_best and validation.patience: what they need, and which metrics there are."""

from __future__ import annotations

import json

import pytest

from titan_hd.config import manager

NEEDED = ["--model.hf_assets_path=m", "--training.steps=3", "--data.train=t"]
VALIDATED = ["--validation.enable", "--data.validation=v"]
SETS = "--data.validation=" + json.dumps([{"name": "math", "path": "a"}, {"name": "plain", "path": "b"}])
BOTH = [*VALIDATED, "--checkpoint.enable"]


@pytest.mark.parametrize(
    ("words", "metric"),
    [
        (BOTH, "validation_loss"),
        ([*BOTH, "--validation.exact_match_samples=5"], "validation_exact_match"),
        ([*BOTH, SETS], "validation_loss/plain"),
        (BOTH, "validation_accuracy"),  # by the model, which is not known here
        ([*BOTH, "--data.format=classification"], "validation_pearson"),
        ([*BOTH, SETS, "--validation.exact_match_samples=5"], "validation_exact_match/plain"),
    ],
)
def test_metrics(words: list[str], metric: str):
    words = [*NEEDED, *words, f"--checkpoint.keep_best={metric}"]
    assert manager.load(words).checkpoint.keep_best == metric


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([*VALIDATED, "--checkpoint.keep_best=validation_loss"], "needs validation.enable and checkpoint.enable"),
        (
            ["--checkpoint.enable", "--checkpoint.keep_best=validation_loss"],
            "needs validation.enable and checkpoint.enable",
        ),
        (
            [*BOTH, "--checkpoint.keep_best=loss"],
            "must be validation_loss (what the validation logs), not 'loss'",
        ),
        (
            [*BOTH, "--data.format=text", "--checkpoint.keep_best=validation_accuracy"],
            "must be validation_loss (what the validation logs), not 'validation_accuracy'",
        ),
        (
            [*BOTH, "--checkpoint.keep_best=validation_exact_match"],
            "must be validation_loss (what the validation logs), not 'validation_exact_match'",
        ),
        (
            [*BOTH, SETS, "--checkpoint.keep_best=validation_loss/math"],
            "must be validation_loss or validation_loss/plain (what the validation logs), not 'validation_loss/math'",
        ),
    ],
)
def test_faults(words: list[str], says: str):
    with pytest.raises(manager.ConfigError) as caught:
        manager.load([*NEEDED, *words])
    assert caught.value.errors == [f"checkpoint.keep_best: {says}"]


def test_patience():
    with pytest.raises(manager.ConfigError) as caught:
        manager.load([*NEEDED, "--validation.patience=2"])
    assert caught.value.errors == ["validation.patience: needs validation.enable"]
    with pytest.raises(manager.ConfigError) as caught:
        manager.load([*NEEDED, "--validation.patience=-1"])
    assert caught.value.errors == ["validation.patience: must be at least 0, not -1"]
    assert manager.load([*NEEDED, *VALIDATED, "--validation.patience=2"]).validation.patience == 2, (
        "without checkpoints"
    )
