"""The commit that a run records: titan_hd's own, or none."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from titan_hd.components import source_code
from titan_hd.components.source_code import commit, repository


@pytest.fixture(autouse=True)
def forgets():
    repository.cache_clear()
    yield
    repository.cache_clear()


def git(folder: Path, *words: str) -> str:
    person = ["-c", "user.name=a", "-c", "user.email=a@b"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "-C", str(folder), *person, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.strip()


def package_in(folder: Path) -> Path:
    package = folder / "titan_hd"
    package.mkdir(parents=True)
    (package / "train.py").write_text("")
    return package


def new_repository(folder: Path, *files: str) -> str:
    """With one commit of these files; its hash."""
    folder.mkdir(parents=True, exist_ok=True)
    git(folder, "init", "--quiet")
    (folder / "README.md").touch()
    git(folder, "add", "README.md", *files)
    git(folder, "commit", "--quiet", "-m", "first")
    return git(folder, "rev-parse", "HEAD")


def test_its_own_repository(tmp_path: Path):
    package = package_in(tmp_path)
    head = new_repository(tmp_path, "titan_hd")
    assert commit(package) == head
    (package / "train.py").write_text("changed")
    assert commit(package) == f"{head}+changes"
    assert repository(package) == tmp_path


def test_a_virtual_environment_in_a_project_of_somebody_else(tmp_path: Path):
    package = package_in(tmp_path / ".venv" / "site-packages")
    new_repository(tmp_path, ".venv")
    assert commit(package) is None
    assert repository(package) is None


def test_a_copy_that_the_repository_around_it_does_not_hold(tmp_path: Path):
    package = package_in(tmp_path)
    new_repository(tmp_path)
    assert commit(package) is None


def test_no_repository(tmp_path: Path):
    assert commit(package_in(tmp_path)) is None


def test_a_repository_that_variables_name_is_not_meant(tmp_path: Path, monkeypatch):
    """As in a hook of git, where another project starts a run."""
    package = package_in(tmp_path / "own")
    head = new_repository(tmp_path / "own", "titan_hd")
    other = new_repository(tmp_path / "other")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other" / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path / "other"))
    assert commit(package) == head != other
    assert commit(package_in(tmp_path / "nowhere")) is None


def test_a_worktree_and_a_link_to_it(tmp_path: Path):
    package_in(tmp_path / "main")
    head = new_repository(tmp_path / "main", "titan_hd")
    git(tmp_path / "main", "worktree", "add", "--quiet", str(tmp_path / "second"))
    (tmp_path / "link").symlink_to(tmp_path / "second")
    assert commit((tmp_path / "link" / "titan_hd").resolve()) == head


def test_no_git(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit(package_in(tmp_path)) is None


def test_the_default_is_where_this_package_lies():
    assert source_code._PACKAGE.name == "titan_hd"
    assert (source_code._PACKAGE / "train.py").is_file()
