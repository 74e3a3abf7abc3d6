"""tools/evaluate.py as a user starts it, on two processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.kit.commands import CPU_ONLY, REPOSITORY, call_tool
from tools import evaluate

SETTINGS = ["--limit", "4", "--max-new-tokens", "6", "--batch-size", "1", "--dtype", "float32", "--device", "cpu"]


def start(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(REPOSITORY / "tools" / "evaluate.py"), *map(str, arguments)]
    environment = {**CPU_ONLY, "NGPU": "2"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def model(shared_data: Path, tmp_path_factory) -> Path:
    """A real model of 260,032 parameters, with a chat template for mt_bench."""
    folder = tmp_path_factory.mktemp("evaluate") / "model"
    shutil.copytree(shared_data / "stories260k-hf", folder, copy_function=shutil.copyfile)
    template = "{% for m in messages %}{{ m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture(scope="module")
def alone(model: Path, shared_data: Path, tmp_path_factory) -> Path:
    """The evaluation of one process."""
    output = tmp_path_factory.mktemp("evaluate") / "alone"
    result = call_tool(evaluate.main, model, *arguments(shared_data, output))
    assert result.returncode == 0, result.stderr
    return output


def arguments(data: Path, output: Path) -> list[object]:
    return ["--tasks", "gsm8k,boolq,mt_bench", "--data", data, "--output", output, *SETTINGS]


def files_of(output: Path) -> dict[str, bytes]:
    return {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}


def test_two_processes_go_on_with_what_one_began(model: Path, alone: Path, shared_data: Path, tmp_path: Path):
    output = tmp_path / "out"
    shutil.copytree(alone, output)
    (output / "summary.json").unlink()
    content = (output / "samples.jsonl").read_bytes()
    (output / "samples.jsonl").write_bytes(content[: len(content) // 3])
    result = start(model, *arguments(shared_data, output))
    assert result.returncode == 0, result.stderr
    assert files_of(output) == files_of(alone)
    assert [line.split()[:2] for line in result.stdout.splitlines()[1:3]] == [["gsm8k", "4"], ["boolq", "4"]]
    assert result.stderr.count("gsm8k: 100%") == 1  # one bar


def test_shards_of_the_model_give_the_same_files(model: Path, alone: Path, shared_data: Path, tmp_path: Path):
    result = start(model, *arguments(shared_data, tmp_path / "out"), "--shard-weights")
    assert result.returncode == 0, result.stderr
    assert files_of(tmp_path / "out") == files_of(alone)


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_all(model: Path, shared_data: Path, tmp_path: Path):
    """With one line and its signal's status; one process goes on with what is written, to the same file."""
    options = ["--tasks", "gsm8k", "--data", shared_data, "--limit", 40, "--max-new-tokens", 40, "--device", "cpu"]
    command = [sys.executable, str(REPOSITORY / "tools" / "evaluate.py"), str(model), *map(str, options)]
    output = tmp_path / "out"
    with subprocess.Popen(
        [*command, "--output", str(output)],
        env={**CPU_ONLY, "NGPU": "2"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as launcher:  # fmt: skip
        until = time.monotonic() + 100
        while not (output / "samples.jsonl").exists() or not (output / "samples.jsonl").read_bytes().count(b"\n"):
            assert time.monotonic() < until
            time.sleep(0.01)
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        ranks = {pid: Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in children}
        (second,) = (int(pid) for pid, variables in ranks.items() if b"RANK=1" in variables)
        os.kill(second, signal.SIGKILL)
        _, said = launcher.communicate(timeout=60)
    assert launcher.returncode == 128 + signal.SIGKILL
    assert "titan_hd: worker 1 ended with signal 9" in said
    assert "Traceback" not in said
    written = (output / "samples.jsonl").read_bytes()
    assert 0 < written.count(b"\n") < 40
    for place in (output, tmp_path / "undisturbed"):
        result = call_tool(evaluate.main, model, *options, "--output", place)
        assert result.returncode == 0, result.stderr
    content = (output / "samples.jsonl").read_bytes()
    assert content == (tmp_path / "undisturbed" / "samples.jsonl").read_bytes()
    assert content.startswith(written)


@pytest.mark.slow
def test_a_worker_that_fails_ends_all(model: Path, shared_data: Path, tmp_path: Path):
    """A fault that all meet is said once; the launcher ends with its status."""
    broken = tmp_path / "model"
    shutil.copytree(model, broken, copy_function=shutil.copyfile)
    (broken / "tokenizer.model").unlink(missing_ok=True)
    (broken / "tokenizer.json").unlink(missing_ok=True)
    result = start(broken, *arguments(shared_data, tmp_path / "out"))
    assert result.returncode == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("titan_hd: error: ")]
    assert len(errors) == 1
    assert "holds no tokenizer.json and no tokenizer.model" in errors[0]
    assert "Traceback" not in result.stderr
    (first, *_) = [json.loads(line) for line in (tmp_path / "out" / "errors.jsonl").read_text().splitlines()]
    assert first["status"] == 2
