"""tools/evaluate.py with several samples of a problem: what is drawn, and what is made of them; and wandb."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.kit.commands import call_tool, error_lines
from tools import evaluate


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three problems of MATH, two of HumanEval."""
    folder = tmp_path / "data"
    for task in ("math", "humaneval"):
        (folder / task).mkdir(parents=True)
    rows = [{"problem": f"Question {i}?", "answer": answer} for i, answer in enumerate(["3", r"\frac{1}{2}", "7"])]
    write_lines(folder / "math" / "test.jsonl", rows)
    rows = [
        {
            "task_id": f"HumanEval/{i}", "prompt": f"def f{i}(x):\n    \"\"\"The same.\"\"\"\n", "entry_point": f"f{i}",
            "canonical_solution": "    return x\n", "test": "def check(f):\n    assert f(3) == 3\n",
        }
        for i in range(2)
    ]  # fmt: skip
    write_lines(folder / "humaneval" / "HumanEval.jsonl", rows)
    return folder


def score(rows: list[dict], data: Path, output: Path, *arguments: object):
    predictions = write_lines(output.parent / f"{output.name}.jsonl", rows)
    return call_tool(evaluate.main, "--predictions", predictions, "--data", data, "--output", output, *arguments)


def answers(problem: int, *texts: str | None) -> list[dict]:
    said = ["" if text is None else f"The answer is: {text}" for text in texts]
    return [{"task": "math", "id": problem, "sample": n, "output": text} for n, text in enumerate(said)]


def test_means_and_majorities(data: Path, tmp_path: Path):
    """Spellings of one answer are votes for it; of equally frequent answers the first one wins; none does not vote."""
    rows = [
        *answers(0, "3", "4", "4", "3"),
        *answers(1, "0.25", r"\dfrac{1}{2}", "1/2", "0.3"),
        *answers(2, None, None, None, "7"),
    ]
    result = score(rows[::-1], data, tmp_path / "out")  # in any order
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())["tasks"]["math"]
    assert (summary["n"], summary["right"], summary["samples"], summary["no_answer"]) == (3, 5, 4, 3)
    assert summary["accuracy"] == pytest.approx((2 / 4 + 2 / 4 + 1 / 4) / 3)
    assert (summary["low"], summary["high"]) == pytest.approx((0.09108, 0.83583), abs=1e-4)  # Wilson's of 1.25 in 3
    assert summary["majority"]["accuracy"] == 1.0
    assert "math: the most frequent of 4 answers 100.00% (43.85 - 100.00)" in result.stdout
    lines = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert [(row["id"], row["sample"]) for row in lines] == [(str(i), n) for i in range(3) for n in range(4)]
    again = call_tool(evaluate.main, "--predictions", tmp_path / "out", "--data", data, "--output", tmp_path / "again")
    assert again.stdout == result.stdout
    assert (tmp_path / "again" / "samples.jsonl").read_bytes() == (tmp_path / "out" / "samples.jsonl").read_bytes()


def test_programs_that_pass_at_k(data: Path, tmp_path: Path):
    """1 of 3 and 3 of 3 samples are right: pass@1 is 2/3, and one of three passes always."""
    bodies = (["    return 1\n", "    return x\n", "    return 2\n"], ["    return x\n"] * 3)
    rows = [
        {"task": "humaneval", "id": f"HumanEval/{i}", "sample": n, "output": body}
        for i, own in enumerate(bodies)
        for n, body in enumerate(own)
    ]
    result = score(rows, data, tmp_path / "out", "--allow-unsandboxed")
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())["tasks"]["humaneval"]
    assert {k: share["accuracy"] for k, share in summary["pass_at"].items()} == pytest.approx({"1": 2 / 3, "3": 1.0})
    assert summary["accuracy"] == pytest.approx(2 / 3)
    assert "majority" not in summary
    assert "humaneval: of 3 samples pass@1 66.67% (" in result.stdout


def test_systems_are_compared_by_problem(data: Path, tmp_path: Path):
    """Also where they have different numbers of samples."""
    score([*answers(0, "3", "4"), *answers(1, "0.3", "0.3"), *answers(2, "7", "7")], data, tmp_path / "ours")
    theirs = [{"task": "math", "id": i, "output": "The answer is: 7"} for i in range(3)]
    score(theirs, data, tmp_path / "theirs", "--against", tmp_path / "ours")
    found = json.loads((tmp_path / "theirs" / "summary.json").read_text())["tasks"]["math"]["against"]
    assert (found["n"], found["difference"], found["gained"], found["lost"]) == (3, pytest.approx(-0.5 / 3), 0, 1)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (answers(0, "3") * 2, "outputs.jsonl:2: math 0, sample 0, was answered before"),
        ([{"task": "math", "id": 0, "output": ""}] * 2, 'several samples of a problem have their numbers in "sample"'),
        (
            [{"task": "math", "id": 0, "sample": -1, "output": ""}],
            "sample: must be the sample's number, from 0, not -1",
        ),
        ([{"task": "math", "id": 0, "sample": "a", "output": ""}], "sample: must be the sample's number, from 0"),
    ],
)
def test_bad_numbers(rows: list[dict], message: str, data: Path, tmp_path: Path):
    (line,) = error_lines(score(rows, data, tmp_path / "outputs"))
    assert message in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", 3], "--samples: 3 answers without --temperature would all be the same"),
        (["--samples", 0], "--samples: must be a whole number above 0, not 0"),
        (["--stop", ""], "--stop: must be a text: an empty one would end every answer at once"),
        (["--top-p", 0.5], "--top-p: is for tokens that are drawn: give --temperature"),
        (["--seed", 1], "--seed: is for tokens that are drawn"),
        (["--temperature", -1], "--temperature: must be a number from 0, not -1"),
        (["--temperature", 1, "--top-p", 2], "--top-p: must be above 0 and at most 1, not 2.0"),
        (["--shard-weights"], "--shard-weights: there is one process alone; say with NGPU=n how many"),
        (["--shard-weights", "--backend", "vllm"], "--shard-weights: is for the native backend"),
        (["--wandb-name", "x"], "--wandb-name: needs --wandb-project"),
    ],
)
def test_bad_options(arguments: list, message: str, data: Path, tmp_path: Path):
    fixed = ["nowhere", "--tasks", "math", "--data", data, "--output", tmp_path / "out"]
    (line,) = error_lines(call_tool(evaluate.main, *fixed, *arguments))
    assert message in line


def test_processes_are_a_number(data: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("NGPU", "two")
    (line,) = error_lines(call_tool(evaluate.main, "nowhere", "--tasks", "math", "--data", data, "--output", tmp_path))
    assert "NGPU: must be a whole number above 0, not 'two'" in line


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> Path:
    return shared_data / "stories260k-hf"


def drawn(model: Path, data: Path, output: Path, *arguments: object) -> dict[tuple, str]:
    """Two samples of each of three problems of three tasks."""
    settings = ["--temperature", 1.1, "--top-p", 0.95, "--samples", 2, "--limit", 3, "--max-new-tokens", 12]
    fixed = ["--data", data, "--tasks", "gsm8k,boolq", "--output", output, "--dtype", "float32", "--device", "cpu"]
    result = call_tool(evaluate.main, model, *fixed, *settings, *arguments)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (output / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 12
    return {(row["task"], row["id"], row["sample"]): row["output"] for row in rows}


def test_what_is_drawn_depends_on_the_sample_alone(stories: Path, shared_data: Path, tmp_path: Path):
    """Not on batches, nor on the library that computes the logits; on the seed it does. Commonsense, too, is drawn."""
    found = drawn(stories, shared_data, tmp_path / "out", "--batch-size", 5)
    assert len(set(found.values())) == 12
    assert found == drawn(stories, shared_data, tmp_path / "single", "--batch-size", 1)
    assert not set(found.values()) & set(drawn(stories, shared_data, tmp_path / "seed", "--seed", 1).values())
    pytest.importorskip("transformers")
    assert found == drawn(stories, shared_data, tmp_path / "theirs", "--backend", "transformers")
    arguments = [stories, "--data", shared_data, "--tasks", "gsm8k,boolq", "--output", tmp_path / "out"]
    (line,) = error_lines(call_tool(evaluate.main, *arguments, "--limit", 3, "--max-new-tokens", 12, "--batch-size", 5,
                                    "--dtype", "float32", "--device", "cpu"))  # fmt: skip
    assert "has an evaluation with another sampling ({'samples': 2, 'temperature': 1.1" in line


def test_scores_go_to_wandb(data: Path, tmp_path: Path, monkeypatch):
    """Offline: the files hold the scores and the table."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    result = score(answers(0, "3", "4"), data, tmp_path / "out", "--wandb-project", "p", "--wandb-name", "mine")
    assert result.returncode == 0, result.stderr
    (run,) = (tmp_path / "out" / "wandb").glob("offline-run-*")
    (table,) = run.glob("files/media/table/samples*.table.json")
    (first, _) = json.loads(table.read_text())["data"]
    assert first == ["math", "0", 0, "", "The answer is: 3", "3", "3", True]
    (record,) = run.glob("run-*.wandb")
    until = time.monotonic() + 30  # wandb's own process writes the last of it when the run has been finished
    while b"math/majority/accuracy" not in record.read_bytes():
        assert time.monotonic() < until
        time.sleep(0.05)
