"""What tools/compare_methods.py refuses before it makes a run."""

from __future__ import annotations

import pytest
from compare_methods import metric_of

from titan_hd.config.job_config import JobConfig, Validation
from titan_hd.errors import UserError

LOSSES = JobConfig(validation=Validation(enable=True))
ANSWERS = JobConfig(validation=Validation(enable=True, exact_match_samples=8))


@pytest.mark.parametrize(
    ("rank_by", "config", "metric"),
    [
        (None, JobConfig(), "loss"),
        (None, LOSSES, "validation_loss"),
        ("loss", LOSSES, "loss"),
        ("validation_loss/plain", LOSSES, "validation_loss/plain"),
        ("validation_exact_match", ANSWERS, "validation_exact_match"),
    ],
)
def test_the_metric_that_ranks(rank_by: str | None, config: JobConfig, metric: str):
    assert metric_of(rank_by, config) == metric


@pytest.mark.parametrize(
    ("rank_by", "config"),
    [("validation_loss", JobConfig()), ("validation_exact_match", LOSSES), ("accuracy", ANSWERS)],
)
def test_a_metric_that_no_run_logs(rank_by: str, config: JobConfig):
    with pytest.raises(UserError, match=rf"^--rank-by: must be one of loss.*, not '{rank_by}'$"):
        metric_of(rank_by, config)
