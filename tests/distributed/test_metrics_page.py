"""docs/metrics.md names what a run writes, no more and no less; and the samples that a validation leaves."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests.kit import runs
from tests.kit.commands import REPOSITORY
from titan_hd.components.classification import OF_CLASSES, OF_SCORES

QUICKSTART = REPOSITORY / "assets" / "quickstart"
# Only on GPUs that are known, in runs whose slices are taken anew, and of classifiers.
ELSEWHERE = {"mfu", "hfu", "refresh_seconds", *(f"validation_{name}" for name in OF_CLASSES + OF_SCORES)}


def documented() -> set[str]:
    """Names in the first column of the tables of metrics."""
    page = (REPOSITORY / "docs" / "metrics.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`[^|]*`) \|[^|\n]*\|[^|\n]*\|$", page, re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`([^`]*)`", row)}


def general(name: str) -> str:
    """update_size/q_proj -> update_size/KIND."""
    name = re.sub(r"/\w+_proj$", "/KIND", name)
    return re.sub(r"/plain$", "/NAME", re.sub(r"/\d+$", "/I", name))


def test_the_page_has_what_a_run_writes(workers, tmp_path: Path):
    """Two workers share out the answers; what is shown goes beyond those that are scored."""
    validation = QUICKSTART / "validation.jsonl"
    sets = json.dumps([{"name": "math", "path": str(validation)}, {"name": "plain", "path": str(validation)}])
    argv = runs.options(
        QUICKSTART / "model",
        QUICKSTART / "train.jsonl",
        tmp_path / "dump",
        **{
            **{"data__format": "auto", "data__template": QUICKSTART / "template.txt", "data__validation": sets},
            **{"training__steps": 2, "training__seq_len": 96, "training__global_batch_size": 2},
            **{"adapter__rank": 2, "export__enable": "false", "metrics__update_freq": 2},
            **{"validation__enable": "true", "validation__steps": 1, "validation__exact_match_samples": 2},
            **{"validation__samples": 3, "validation__max_new_tokens": 4, "validation__batch_size": 2},
        },
    )
    workers.run(2, runs.train, argv)
    records = list(map(json.loads, (tmp_path / "dump" / "metrics.jsonl").read_text().splitlines()))
    written = {general(name) for record in records for name in record}
    assert written == documented() - ELSEWHERE
    last = next(record for record in reversed(records) if "loss" in record)
    shares = ("data_share", "forward_backward_share", "optimizer_share", "exchange_share")
    assert abs(sum(last[name] for name in shares) - 1) < 1e-9
    assert all(0 < last[name] < 1 for name in shares)

    samples = list(map(json.loads, (tmp_path / "dump" / "validation_samples.jsonl").read_text().splitlines()))
    questions = list(map(json.loads, validation.read_text().splitlines()))
    expected = [(step, name, i) for step in (0, 2) for name in ("samples", "samples/plain") for i in range(3)]
    assert [(row["step"], row["name"], row["record"]) for row in samples] == expected
    for row in samples:
        question = questions[row["record"]]
        assert row["reference"] == question["response"]
        assert question["query"] in row["prompt"]
        assert row["output"]
        assert row["right"] is (None if row["record"] == 2 else False)
