"""Who may import whom: the contracts of import-linter in pyproject.toml hold, and each of them can fail."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kit.commands import REPOSITORY


def lint_imports(repository: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    environment = {**os.environ, "PYTHONPATH": str(repository), "NO_COLOR": "1"}
    return subprocess.run([*command, "--no-cache"], cwd=repository, env=environment, capture_output=True, text=True)


def test_imports_go_down_only():
    result = lint_imports(REPOSITORY)
    assert result.returncode == 0, result.stdout + result.stderr


BAD = [
    ("config/manager.py", "from titan_hd.models import registry", "Imports go down only"),
    ("config/manager.py", "def f():\n    import torch", "The configuration is read without torch"),
    ("adapters/svd.py", "from ..models import registry", "Imports go down only"),
    ("data/loader.py", "from titan_hd.components import metrics", "Imports go down only"),
    ("components/metrics.py", "from titan_hd import preflight", "Imports go down only"),
    ("newroom/thing.py", "", "Imports go down only"),
    ("models/decoder_config.py", "from titan_hd.models import decoder", "No circles"),
    ("export/hf.py", "from titan_hd.evaluation import tasks", "Training knows no evaluation"),
    ("evaluation/tasks.py", "from titan_hd.config import job_config", "Evaluation knows no training"),
    ("train.py", "from tools import plot", "The package knows neither"),
]


@pytest.mark.parametrize(("module", "line", "contract"), BAD, ids=[f"{m}-{line[:30]!r}" for m, line, _ in BAD])
def test_a_bad_import_is_found(tmp_path: Path, module: str, line: str, contract: str):
    """Each bad import, put behind the real source of a module, breaks the contract that names it."""
    shutil.copytree(REPOSITORY / "titan_hd", tmp_path / "titan_hd", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    path = tmp_path / "titan_hd" / module
    path.parent.mkdir(exist_ok=True)
    (path.parent / "__init__.py").touch()
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    result = lint_imports(tmp_path)
    assert result.returncode != 0
    assert re.search(rf"^{contract}.* BROKEN$", result.stdout, re.M), result.stdout


def imports_of_test_modules(source: str) -> list[str]:
    """Modules named test_* that some code imports, wherever it does."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module or ''}.{alias.name}" for alias in node.names]
    return [name for name in names if any(part.startswith("test_") for part in name.split("."))]


def test_what_tests_share_lies_in_the_kit():
    """A test module imports no other one, and the kit none."""
    found = {
        str(path.relative_to(REPOSITORY)): imports_of_test_modules(path.read_text(encoding="utf-8"))
        for path in (REPOSITORY / "tests").rglob("*.py")
    }
    assert {path: names for path, names in found.items() if names} == {}


def test_an_import_of_a_test_module_is_found():
    assert imports_of_test_modules("def f():\n    from tests.unit.test_a import b") == ["tests.unit.test_a.b"]
    assert imports_of_test_modules("import tests.test_a\nfrom . import test_b") == ["tests.test_a", ".test_b"]
    assert imports_of_test_modules("from tests.kit import runs") == []
