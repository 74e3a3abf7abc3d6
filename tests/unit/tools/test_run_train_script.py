"""run_train.sh with a stand-in for Python: what it starts, called from anywhere and in every way."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.kit.commands import REPOSITORY
from titan_hd.config import manager

# Says in which folder it is started, and its arguments one a line.
PYTHON = """#!/usr/bin/env bash
[ "$1" != -c ] || exit 0
pwd
echo "$PYTHONPATH"
echo "safe path $PYTHONSAFEPATH"
printf '%s\\n' "$@"
"""
PROGRAM, QUICKSTART_PROGRAM = ["-m", "titan_hd.launch"], [f"{REPOSITORY}/tools/quickstart.py"]
HEAD = ["--nproc_per_node", "3", "--"]
QUICKSTART = ["--config", f"{REPOSITORY}/train_configs/quickstart.toml"]


@pytest.fixture
def call(tmp_path: Path):
    """Runs it in a folder of its own; returns what it would have started, by Python's arguments."""
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    folder = tmp_path / "a folder"
    folder.mkdir()

    def run(
        *words: str,
        script: str = f"{REPOSITORY}/run_train.sh",
        cwd: Path = folder,
        program: list[str] = PROGRAM,
        **variables: str,
    ) -> list[str]:
        environment = {"PATH": os.environ["PATH"], "PYTHON": str(tmp_path / "python"), "NGPU": "3", **variables}
        done = subprocess.run([script, *words], env=environment, cwd=cwd, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        where, path, safe, *arguments = done.stdout.splitlines()
        assert where == str(cwd), "relative paths are the caller's"
        assert path == str(REPOSITORY)
        assert safe == "safe path 1", "a titan_hd, or a json.py, of the caller's folder is not what is meant"
        head = [*program, *HEAD]
        assert arguments[: len(head)] == head
        return arguments[len(head) :]

    return run


def test_the_callers_arguments_are_passed_on_as_they_are(call):
    words = ["--config", "my run.toml", "--data.train=data.jsonl", "--job.description", "", "--training.steps", "3"]
    assert call(*words) == words


def test_without_a_configuration_the_documented_defaults_hold(call):
    words = ["--model.hf_assets_path=model", "--data.train=data.jsonl", "--training.steps=1"]
    assert call(*words) == words
    assert call("--help") == ["--help"]


def test_the_quick_start_runs_without_arguments_or_by_its_flag(call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    program = QUICKSTART_PROGRAM
    assert call(program=program) == call("--quickstart", program=program) == QUICKSTART
    more = call("--training.steps=3", "--quickstart", program=program)
    assert more == [*QUICKSTART, "--training.steps=3"], "the caller's hold"
    monkeypatch.chdir(tmp_path)
    config = manager.load(QUICKSTART)
    named = (config.model.hf_assets_path, config.data.train, config.data.validation, config.data.template)
    files = ("model", "train.jsonl", "validation.jsonl", "template.txt")
    assert named == tuple(f"{REPOSITORY}/assets/quickstart/{name}" for name in files)
    assert all(Path(path).exists() for path in named)


def test_it_has_a_configuration_of_its_own():
    words = [REPOSITORY / "run_train.sh", "--quickstart", "--config=run.toml"]
    done = subprocess.run(words, env={**os.environ, "PYTHON": "true"}, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("titan_hd: error: --quickstart: has a configuration of its own")


def test_by_links_to_it(call, tmp_path: Path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "second").symlink_to(REPOSITORY / "run_train.sh")
    (tmp_path / "bin" / "titan").symlink_to("second")
    assert call("--config=a", script=str(tmp_path / "bin" / "titan")) == ["--config=a"]
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    assert call("-c", "titan --config=a", script="bash", PATH=path) == ["--config=a"]


def test_cdpath_does_not_lead_it_astray(call):
    """With it, cd writes where it goes to standard output."""
    relative = f"{REPOSITORY.name}/run_train.sh"
    words = {"script": relative, "cwd": REPOSITORY.parent, "CDPATH": str(REPOSITORY.parent)}
    assert call("--config=a", **words) == ["--config=a"]


def test_in_a_wheel_nothing_is_installed(tmp_path: Path):
    """Where no pyproject.toml is beside it, the Python that it is given is taken, whatever that has."""
    for name in ("run_train.sh", "tools/environment.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((REPOSITORY / name).read_bytes())
    (tmp_path / "python").write_text(PYTHON.replace("exit 0", "exit 1"))
    (tmp_path / "python").chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "PYTHON": str(tmp_path / "python"), "NGPU": "3"}
    words = ["bash", str(tmp_path / "run_train.sh"), "--config=a"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[3:] == [*PROGRAM, *HEAD, "--config=a"], done.stderr
    assert not (tmp_path / ".venv").exists()


def test_run_tests_neither(tmp_path: Path):
    (tmp_path / "tests").symlink_to(REPOSITORY / "run_tests.sh")
    (tmp_path / "python").write_text(PYTHON.replace('echo "safe path $PYTHONSAFEPATH"', ""))
    (tmp_path / "python").chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "PYTHON": str(tmp_path / "python"), "CDPATH": str(REPOSITORY.parent)}
    words = [str(tmp_path / "tests"), "-x"]
    done = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [str(REPOSITORY), str(REPOSITORY), "-m", "pytest", "-x"], done.stderr
