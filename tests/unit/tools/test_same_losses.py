"""tools/same_losses.py: what counts as equal, what is read of a run, and two whole runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.kit import runs
from tests.kit.commands import REPOSITORY
from titan_hd.errors import UserError
from tools.same_losses import Trained, checked_out, compare, first_difference, read_run, train

RUN = Trained([(2.5, 0.1), (2.25, 0.3), (float("nan"), 0.2)], "weights")


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (RUN, ""),
        (RUN._replace(steps=[(2.5, 0.1), (np.nextafter(2.25, 3).item(), 0.3), (float("nan"), 0.2)]), "step 2"),
        (RUN._replace(steps=[(2.5, 0.1), (2.25, 0.3 + 1e-16), (float("nan"), 0.2)]), "step 2"),
        (RUN._replace(steps=RUN.steps[:2]), "step 3"),
        (RUN._replace(steps=[*RUN.steps, (1.0, 1.0)]), "step 4"),
        (RUN._replace(weights="others"), "weights"),
    ],
)
def test_the_first_difference(other: Trained, difference: str):
    assert first_difference(RUN, other) == first_difference(other, RUN) == difference


def write_run(folder: Path, weight: float) -> Path:
    (folder / "hf").mkdir(parents=True)
    lines = [json.dumps({"step": step, "loss": 1 / step, "grad_norm": 0.1, "lr": 1.0}) for step in (1, 2, 3)]
    lines.insert(1, json.dumps({"step": 1, "validation_loss": 2.0}))
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    save_file({"b": np.zeros(2, np.float32), "a": np.array([weight], np.float32)}, folder / "hf" / "model.safetensors")
    return folder


def test_what_is_read_of_a_run(tmp_path: Path):
    """Numbers come back bit for bit, and the hash tells weights apart that differ in the last bit."""
    run = read_run(write_run(tmp_path / "a", 1.0))
    assert run.steps == [(1.0, 0.1), (0.5, 0.1), (1 / 3, 0.1)]
    assert run == read_run(write_run(tmp_path / "b", 1.0))
    other = read_run(write_run(tmp_path / "c", np.nextafter(np.float32(1), np.float32(2))))
    assert first_difference(run, other) == "weights"


def test_a_revision_that_is_none(tmp_path: Path):
    with pytest.raises(UserError, match="no-such-revision"):
        checked_out("no-such-revision", tmp_path / "tree")


@pytest.mark.slow  # four launches
def test_a_revision_equals_itself_and_another_learning_rate_is_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert compare((".", "."), "hdpissa+num_adapters=4", 2, [])
    assert "hdpissa+num_adapters=4                           2  yes" in capsys.readouterr().out
    runs.write_model(tmp_path / "model")
    runs.write_records(tmp_path / "records.jsonl")
    options = runs.options(tmp_path / "model", tmp_path / "records.jsonl", tmp_path)
    rates = ("1e-2", "1.0001e-2")
    old, new = (train(REPOSITORY, [*options, f"--optimizer.lr={lr}"], tmp_path / lr) for lr in rates)
    assert first_difference(old, new) == "step 2"
