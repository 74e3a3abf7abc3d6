"""What each rank opens while a run starts: thousands of ranks must not all read the same small files."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.kit import runs
from tests.kit.commands import run_train

# Writes down every file that a worker opens; os.write, because a worker leaves without cleaning up.
HOOK = """
import os, sys
if "RANK" in os.environ:
    log = os.open(os.environ["OPENED"] + os.environ["RANK"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    def note(event, arguments):
        if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
            os.write(log, os.fsencode(arguments[0]) + b"\\n")
    sys.addaudithook(note)
"""


@pytest.fixture
def start(tmp_path):
    """Runs with two workers up to a step; returns for each rank how often it opened what in a folder."""
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(HOOK)
    (tmp_path / "run.toml").write_text("")
    runs.write_model(tmp_path / "model")
    runs.write_records(tmp_path / "records.jsonl")

    def run(steps: int) -> list[dict[str, Counter]]:
        settings = {"export__enable": "false", "checkpoint__enable": "true", "training__steps": steps}
        options = runs.options(tmp_path / "model", tmp_path / "records.jsonl", tmp_path / "dump", **settings)
        environment = {"OPENED": f"{tmp_path}/{steps}-", "PYTHONPATH": str(tmp_path / "hook")}
        result = run_train("--config", str(tmp_path / "run.toml"), *options, **environment)
        assert result.returncode == 0, result.stderr
        return [opened_by_folder(tmp_path / f"{steps}-{rank}", tmp_path) for rank in range(2)]

    return run


def opened_by_folder(log: Path, root: Path) -> dict[str, Counter]:
    found: dict[str, Counter] = {"model": Counter(), "dump": Counter()}
    for line in log.read_text().splitlines():
        path = Path(line)
        for folder, counts in found.items():
            if path.is_relative_to(root / folder):
                counts[path.name] += 1
    return found


@pytest.mark.slow
def test_small_files_are_opened_by_rank_0_alone_and_large_ones_once(start):
    first, second = start(steps=1)
    assert {"config.json", "model.safetensors"} <= first["model"].keys()
    assert second["model"] == {"model.safetensors": 1}  # its shards
    written = {name for name in second["dump"] if not name.startswith("__1_")}
    assert not written, "rank 1 touches only its own shards of a checkpoint"

    first, second = start(steps=2)
    assert first["dump"][".metadata"] == 2  # verified, and read
    assert second["dump"][".metadata"] == 0
    assert not second["model"], "everything comes from the checkpoint"
    others = {name: count for name, count in second["dump"].items() if not name.startswith("__")}
    assert others in ({}, {"train_state.json": 1})  # its share of the verification
