"""The wheel, installed in a folder far from the repository: `titan-hd` has there what it needs.

The tests with pip and a launched run are slow; what is packed is tested by default.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kit.commands import CPU_ONLY, REPOSITORY

SOURCES = ("titan_hd", "tools", "train_configs", "assets/quickstart", "run_train.sh")
SOURCES += ("setup.py", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to build from, which leaves the repository as it is."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("no setuptools to build a wheel with")
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        place = REPOSITORY / name
        (source / name).parent.mkdir(exist_ok=True)
        if place.is_dir():
            shutil.copytree(place, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(place, source / name)
    return source


@pytest.fixture(scope="module")
def installed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that pip has installed the wheel into."""
    target = tmp_path_factory.mktemp("installed")
    offline = ("--quiet", "--no-index", "--no-deps", "--disable-pip-version-check")
    wheel = ("wheel", *offline, "--no-build-isolation", "-w", str(target), str(source))
    install = ("install", *offline, "--find-links", str(target), "--target", str(target), "titan_hd")
    for words in (wheel, install):
        _call([sys.executable, "-m", "pip", *words], target)
    return target


def _call(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def titan_hd(installed: Path, folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {**CPU_ONLY, "PYTHONPATH": str(installed), "NGPU": "2", **variables}
    environment.pop("PYTHON", None)
    return subprocess.run(
        [str(installed / "bin" / "titan-hd"), *words],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )


def files_of(root: Path, folder: str) -> set[Path]:
    files = (path for path in (root / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(root) for path in files}


def test_it_holds_what_the_repository_holds(source: Path, tmp_path: Path):
    """What is built is what a wheel is made of; its command finds the recipes in it, and needs nothing else."""
    command = [sys.executable, "-c", "import setup", "--quiet", "build_py", "--build-lib", str(tmp_path)]
    _call(command, source)
    inside = tmp_path / "titan_hd" / "bundle"
    for folder in ("tools", "train_configs", "assets/quickstart"):
        assert files_of(inside, folder) == files_of(REPOSITORY, folder)
    assert os.access(inside / "run_train.sh", os.X_OK), "the comparison starts it"
    assert [path.name for path in tmp_path.iterdir()] == ["titan_hd"], "it takes no other package's name"
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from titan_hd.cli import main; main()"
    assert str(inside / "train_configs") in _call([sys.executable, "-c", code, "--help"], tmp_path)


@pytest.mark.slow
def test_from_any_folder_the_commands_find_recipes_and_quick_start(installed: Path, tmp_path: Path):
    result = titan_hd(installed, tmp_path, "plan", "--quickstart")
    assert result.returncode == 0, result.stderr
    assert "K = 8, r = 8, 1 x 2 workers" in result.stdout
    refused = titan_hd(installed, tmp_path, "train", "--config", "quickstart_lora.toml", "--training.steps=none")
    assert refused.stderr == "titan_hd: error: training.steps: give either training.steps or training.epochs\n"
    assert refused.returncode == 2
    words = ("--methods=hdpissa", "--dry-run", "--config=quickstart.toml")
    compared = titan_hd(installed, tmp_path, "compare", *words)
    assert compared.returncode == 0, compared.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_without_arguments_train_runs_the_quick_start(installed: Path, tmp_path: Path):
    """Cut to two steps."""
    words = ("train", "--quickstart", "--training.steps=2", "--validation.enable=false")
    result = titan_hd(installed, tmp_path, *words)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "outputs" / "quickstart" / "hf" / "model.safetensors").is_file()
    prompt = ("--prompt", "How many?", "--max_new_tokens", "2")
    answer = titan_hd(installed, tmp_path, "generate", "outputs/quickstart/hf", *prompt)
    assert answer.returncode == 0, answer.stderr
