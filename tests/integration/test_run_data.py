"""Whole runs on data as users have it: chats in several packed files, with bad and overlong ones among them."""

from __future__ import annotations

import gzip
import itertools
import json
import subprocess
from pathlib import Path

import pytest

from tests.kit import runs
from tests.kit.commands import error_lines
from tests.kit.forked import run_forked
from tests.kit.tokenizers import chat_directory
from titan_hd.data.text.tokenizer import load_tokenizer
from titan_hd.errors import UserError

ANIMALS = ["fox", "dog", "jug", "box"]
END_LOSS = 0.6  # of the first loss; 12 steps end at 0.41 of it


def conversation(place: int) -> list[dict]:
    animal = ANIMALS[place % 4]
    say = [("user", f"the {animal}?"), ("assistant", f"brown {animal}"), ("user", "and?"), ("assistant", "lazy")]
    return [{"role": role, "content": content} for role, content in say[: 2 + place % 3]]


@pytest.fixture
def setup(tmp_path: Path):
    """A tiny model with a chat template, and 25 records in two files: one is bad, one is cut before its answer."""
    size = load_tokenizer(chat_directory(tmp_path / "model")).vocab_size
    runs.write_model(tmp_path / "model", vocab_size=size, hidden_size=24)
    records = [{"messages": conversation(i)} for i in range(12)]
    others = [
        {"conversations": [{"from": m["role"], "value": m["content"]} for m in conversation(i)]} for i in range(11)
    ]
    others.insert(3, {"messages": [{"role": "user", "content": "x " * 200}, {"role": "assistant", "content": "y"}]})
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in records).encode()))
    (data / "b.jsonl").write_text("".join(json.dumps(r) + "\n" for r in others) + "{torn\n")

    def arguments(**overrides) -> list[str]:
        settings = {
            "data__format": "auto",
            "data__on_error": "skip",
            "data__shuffle": "true",
            "training__steps": 12,
            "training__seq_len": 128,
            "training__global_batch_size": 8,
            "optimizer__lr": 3e-2,
            "adapter__rank": 3,
            "hdpissa__num_adapters": 2,
        }
        return runs.options(tmp_path / "model", data, tmp_path / "dump", **{**settings, **overrides})

    return arguments


def test_chats_are_learned_the_same_on_any_number_of_workers(workers, setup):
    (alone,), both = (workers.run(n, runs.train, setup()) for n in (1, 2))
    assert both[0] == pytest.approx(alone, rel=1e-4)
    assert alone[-1] < END_LOSS * alone[0]
    assert sum(b < a for a, b in itertools.pairwise(alone)) >= 8


def run(arguments: list[str]) -> subprocess.CompletedProcess:
    """One worker, without a launcher."""
    return run_forked("titan_hd.train", *arguments)


def test_the_log_says_what_became_of_the_records(setup, tmp_path: Path):
    data = tmp_path / "data"
    validation = {"data__validation": data / "a.jsonl.gz", "validation__enable": "true"}
    result = run(setup(training__steps=1, export__enable="false", **validation))
    assert result.returncode == 0, result.stderr
    assert "data.train: format chat, because the first record has messages" in result.stderr
    assert f"data.train: 1 bad records are skipped; the first: {data}/b.jsonl:13: not valid JSON" in result.stderr
    assert (
        f"data.train: 1 records hold no label within training.seq_len = 128 and are skipped; the first: {data}/b"
        in (result.stderr)
    )
    assert "data.train: 23 records of format chat, " in result.stderr
    table = (tmp_path / "dump" / "plan.txt").read_text(encoding="utf-8").splitlines()
    rows = {line.split()[0]: line.split() for line in table if line.startswith("  data.")}
    assert rows["data.train"][1:3] == ["chat", "23"]
    assert rows["data.train"][5:8] == ["0", "1", "1"]
    assert rows["data.validation"][1:3] == ["chat", "12"]
    assert "  steps     1 of 8 records, 0.35 epochs of 23; " in result.stderr


def test_a_bad_record_ends_the_run_by_default(setup, tmp_path: Path):
    result = run(setup(data__on_error="raise"))
    (line,) = error_lines(result)
    assert line.startswith(f"titan_hd: error: {tmp_path}/data/b.jsonl:13: not valid JSON: ")
    assert "Traceback" not in result.stderr


def test_a_mixture_and_a_stream_are_the_same_on_any_number_of_workers(workers, setup, tmp_path: Path):
    """The mixture from two sources of other formats; the stream in small windows, over the end of the files."""
    rows = [{"ask": "the fox?", "say": f"brown {ANIMALS[i % 4]}"} for i in range(9)]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    asked = {"path": str(tmp_path / "asked.jsonl"), "template": "none", "prompt_field": "ask", "response_field": "say"}
    chats = {"path": str(tmp_path / "data" / "a.jsonl.gz")}
    settings = {"training__steps": 4, "optimizer__lr": 1e-2, "export__enable": "false"}
    mixture = setup(data__train=json.dumps([{**asked, "weight": 1.5}, {**chats, "samples": 5}]), **settings)
    stream = setup(data__train=json.dumps([asked, chats]), data__streaming="true", data__shuffle_window=8, **settings)
    for arguments in (mixture, stream):
        (alone,), both = (workers.run(n, runs.train, arguments) for n in (1, 2))
        assert len(alone) == 4
        assert both[0] == pytest.approx(alone, rel=1e-4)


def what_ends(arguments: list[str]) -> str:
    try:
        runs.train(arguments)
    except UserError as error:
        return str(error)
    return ""


def test_a_streams_bad_record_ends_every_worker_with_its_line(workers, setup, tmp_path: Path):
    """Only the second worker reads it; only the first says what is wrong."""
    rows = [json.dumps({"messages": conversation(i)}) for i in range(8)]
    (tmp_path / "torn.jsonl").write_text("\n".join([*rows[:5], "{torn", *rows[6:]]))
    settings = {"data__streaming": "true", "data__shuffle": "false", "data__on_error": "raise"}
    first, second = workers.run(2, what_ends, setup(data__train=tmp_path / "torn.jsonl", **settings))
    assert first == second
    assert first.startswith(f"{tmp_path}/torn.jsonl:6: not valid JSON")
    assert first.endswith("(on rank 1, step 1)")


def test_a_window_smaller_than_a_batch(setup):
    result = run(setup(data__streaming="true", data__shuffle_window=7))
    assert error_lines(result) == ["titan_hd: error: data.shuffle_window: must be at least the global batch, 8 records"]
