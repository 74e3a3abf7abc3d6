"""What a trace of a whole run has, and that the run is the same without one."""

from __future__ import annotations

import json

from tests.kit import runs


def test_a_trace_names_every_part_of_a_step(workers, tmp_path):
    """The second of two workers, in the step that takes the slices anew."""
    runs.write_model(tmp_path / "model")
    runs.write_records(tmp_path / "records.jsonl")
    common = {"hdpissa__num_adapters": 2, "hdpissa__refresh_steps": 2, "export__enable": "false"}
    traced = {"profiling__enable_profiling": "true", "profiling__profile_steps": 3, "profiling__profile_ranks": 1}
    losses = [
        workers.run(
            2, runs.train, runs.options(tmp_path / "model", tmp_path / "records.jsonl", tmp_path / name, **more)
        )
        for name, more in (("plain", common), ("traced", {**common, **traced}))
    ]
    assert losses[0] == losses[1]
    files = sorted(path.name for path in (tmp_path / "traced" / "profile_traces").iterdir())
    assert files == ["step3-rank1.json", "step3-rank1.txt"]
    events = json.loads((tmp_path / "traced" / "profile_traces" / files[0]).read_text())["traceEvents"]
    names = {event["name"] for event in events if event["name"].startswith("titan_hd::")}
    parts = {"data", "forward_backward", "optimizer", "exchange", "fold", "refresh"}
    assert names == {f"titan_hd::{part}" for part in parts}
    assert any(event["name"].startswith("FSDP::all_gather") for event in events), "torch names the gathers of W"
    assert not (tmp_path / "plain" / "profile_traces").exists()
