"""What tools/compare_methods.py refuses before it makes a run."""

from __future__ import annotations

from pathlib import Path

import compare_methods
import pytest
from compare import results
from compare.outcome import read_outcome
from compare.schedule import Run
from compare_methods import metric_of

from tests.kit import runs
from tests.kit.commands import call_tool
from titan_hd.config.job_config import Data, JobConfig, Validation
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
        ("validation_matthews", LOSSES, "validation_matthews"),
    ],
)
def test_the_metric_that_ranks(rank_by: str | None, config: JobConfig, metric: str):
    assert metric_of(rank_by, config) == metric


@pytest.mark.parametrize(
    ("rank_by", "config"),
    [
        ("validation_loss", JobConfig()),
        ("validation_exact_match", LOSSES),
        ("accuracy", ANSWERS),
        ("validation_accuracy", JobConfig(data=Data(format="chat"), validation=Validation(enable=True))),
    ],
)
def test_a_metric_that_no_run_logs(rank_by: str, config: JobConfig):
    with pytest.raises(UserError, match=rf"^--rank-by: must be one of loss.*, not '{rank_by}'$"):
        metric_of(rank_by, config)


@pytest.fixture
def dry_run(tmp_path: Path):
    """Lists a comparison's runs. Options, then changes of the configuration."""
    runs.write_model(tmp_path / "model")
    runs.write_records(tmp_path / "records.jsonl")

    def call(*options: object, **changes: object):
        argv = runs.options(tmp_path / "model", tmp_path / "records.jsonl", tmp_path / "unused", **changes)
        if "training__epochs" in changes:
            argv = [option for option in argv if not option.startswith("--training.steps=")]
        return call_tool(compare_methods.main, *options, "--folder", tmp_path / "all", "--dry-run", *argv)

    return call


def test_how_long_it_will_take(dry_run, tmp_path: Path):
    grid = "--grid", "optimizer.lr=1e-3:4e-3:3", "--methods", "lora", "--workers", 1, "--seeds", 2
    *lines, last = dry_run(*grid).stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == [f"lora/optimizer.lr=0.00{n},seed=42" for n in (1, 2, 4)]
    assert all(line.endswith(" s, at most, by its operations") for line in lines)
    assert last.startswith("3 runs of the grid, 0 of them made, at most 4 more where the best lies on an edge, 3 with")
    made = tmp_path / "all" / "lora" / "optimizer.lr=0.001,seed=42"
    made.mkdir(parents=True)
    (made / "result.json").write_text('{"status": "complete", "loss": 1.0, "seconds": 585}')
    first, *_, last = dry_run(*grid).stdout.splitlines()
    assert first.endswith(": complete")
    assert last.endswith(
        "1 of them made, at most 4 more where the best lies on an edge, 3 with other seeds; "
        "20 min for the grid, at most 90 min for all"
    )
    (made / "result.json").unlink()
    *lines, last = dry_run(*grid, training__epochs=1).stdout.splitlines()
    assert all(line.endswith(": as long as its epochs take") for line in lines)
    assert last.endswith("; how long they take is known when a run of every method has been made")


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            ("--methods", "lora", "--grid", "training.seed=1,2"),
            "--grid: training.seed cannot be changed here: the first",
        ),
        (("--methods", "lora+export.dtype=bfloat16"), "export.dtype cannot be changed here: every run has float32"),
        (
            ("--methods", "lora", "--grid", "adapter.method=lora,full"),
            "adapter.method cannot be changed here: --methods",
        ),
        (("--methods", "lora", "--grid", "optimizer.lr=1e-3,0.001"), "optimizer.lr=1e-3,0.001 has a value twice"),
        (
            ("--methods", "lora,full+optimizer.lr=1e-5:1e-4:2", "--grid", "optimizer.lr=1e-3:4e-3:3"),
            "--budget equal: every arm needs as many points of its grid (lora has 3, full has 2); or --budget needed",
        ),
    ],
)
def test_what_no_comparison_can_have(dry_run, options: tuple[str, ...], line: str):
    done = dry_run(*options)
    assert done.returncode == 2
    assert line in done.stderr


@pytest.mark.parametrize("number", ["0", "two"])
def test_a_number_of_workers_that_is_none(dry_run, monkeypatch: pytest.MonkeyPatch, number: str):
    monkeypatch.setenv("NGPU", number)
    done = dry_run("--methods", "lora")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"NGPU: must be a whole number above 0, not {number!r}" in done.stderr


def test_a_report_where_nothing_was_completed(tmp_path: Path):
    rows = {Run("lora", (("optimizer.lr", lr),), 42): {"status": "diverged", "rank": 8} for lr in ("1e3", "1e4")}
    results.write_grid(tmp_path, rows, ["optimizer.lr"], "loss")
    (tmp_path / "comparison.json").write_text('{"grid": ["optimizer.lr"], "rank_by": "loss"}')
    (arm,) = read_outcome(tmp_path).arms.values()
    assert arm.best is None
    assert arm.failures() == {"diverged": 2}
