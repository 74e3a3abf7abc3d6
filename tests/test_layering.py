"""The import direction: tools, tests -> train -> components, data -> distributed -> adapters, models -> config.

Reads the imports of the package with `ast`, wherever they stand (also inside functions), and imports nothing itself.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "titan_hd"

# A room may import from rooms of a lower level and from itself. `data` stands below `components`, which read batches.
LEVELS = {"config": 0, "adapters": 1, "models": 1, "distributed": 2, "data": 3, "components": 4, "top": 5}
# Room -> libraries that it must not touch.
FORBIDDEN = {
    "root": ("torch",),
    "config": ("torch",),
    "adapters": ("torch.distributed",),
    "models": ("torch.distributed",),
}


def package_sources() -> dict[str, str]:
    """Dotted module name -> source of every module of the package; a folder's __init__ has the folder's name."""
    sources = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        sources[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return sources


def room(module: str, packages: set[str]) -> str:
    """`root` for titan_hd itself, the folder's name for what lies in a folder, `top` for train, launch, preflight."""
    parts = module.split(".")
    if len(parts) == 1:
        return "root"
    return parts[1] if parts[1] in packages else "top"


def imports(module: str, source: str, is_package: bool) -> list[tuple[int, str]]:
    """(line, dotted name) of everything that a module imports; `from a import b` gives a.b."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                base = ".".join([*parents, base] if base else parents)
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            found.append((node.lineno, "torch.distributed"))  # `import torch` was enough to reach it
    return found


def module_of(name: str, modules: set[str]) -> str:
    """The longest leading part of a dotted name that is a module: a.b.Class -> a.b."""
    while name not in modules and "." in name:
        name = name.rpartition(".")[0]
    return name


def violations(sources: dict[str, str]) -> list[str]:
    """One line for every import that goes upwards, sideways, in a circle, or to a library the room must not touch."""
    modules, lines = set(sources), []
    packages = {m.split(".")[1] for m in modules if m.count(".") >= 2} | (set(LEVELS) - {"top"})
    lines += [f"titan_hd.{name}: a folder without a level" for name in sorted(packages - LEVELS.keys())]
    graph: dict[str, set[str]] = {}
    for module, source in sources.items():
        own = room(module, packages)
        is_package = any(other.startswith(module + ".") for other in modules)
        for line, name in imports(module, source, is_package):
            where = f"{module}:{line}: imports {name}"
            if name.split(".")[0] in ("tests", "tools"):
                lines.append(f"{where}: the package must not know its {name.split('.')[0]}")
            if any(name == f or name.startswith(f + ".") for f in FORBIDDEN.get(own, ())):
                lines.append(f"{where}: {own} must not")
            if name.split(".")[0] != "titan_hd":
                continue
            target = module_of(name, modules)
            theirs = room(target, packages)
            graph.setdefault(module, set()).add(target)
            if own == "root":
                lines.append(f"{where}: the package's root must import nothing")
            elif theirs != "root" and theirs != own and LEVELS.get(theirs, 0) >= LEVELS.get(own, 0):
                lines.append(f"{where}: from {own} up or across to {theirs}")
    return lines + cycles(graph)


def cycles(graph: dict[str, set[str]]) -> list[str]:
    """One line for every module that can reach itself."""
    lines = []
    for start in graph:
        reached, open_ends = set(), list(graph[start])
        while open_ends:
            module = open_ends.pop()
            if module not in reached:
                reached.add(module)
                open_ends += graph.get(module, ())
        if start in reached:
            lines.append(f"{start}: imports itself in a circle")
    return lines


def test_imports_go_down_only():
    sources = package_sources()
    assert {"titan_hd", "titan_hd.train", "titan_hd.config.manager", "titan_hd.adapters.hdpissa"} <= sources.keys()
    assert violations(sources) == []


BAD = [
    ("titan_hd.config.manager", "from titan_hd.models import registry", "from config up or across to models"),
    ("titan_hd.config.manager", "def f():\n    import torch", "config must not"),
    ("titan_hd", "import torch.nn", "root must not"),
    ("titan_hd", "from titan_hd.config import manager", "root must import nothing"),
    ("titan_hd.models.decoder", "from titan_hd.adapters.svd import slice_factors", "up or across to adapters"),
    ("titan_hd.adapters.svd", "import titan_hd.models.registry", "up or across to models"),
    ("titan_hd.adapters.svd", "from ..models import registry", "up or across to models"),
    ("titan_hd.adapters.svd", "import torch.distributed as dist", "adapters must not"),
    ("titan_hd.adapters.svd", "from torch import distributed", "adapters must not"),
    ("titan_hd.adapters.svd", "import torch\ntorch.distributed.barrier()", "adapters must not"),
    ("titan_hd.distributed.slices", "from titan_hd.data.loader import Batch", "up or across to data"),
    ("titan_hd.data.loader", "from titan_hd.components.loss import token_loss_sum", "up or across to components"),
    ("titan_hd.components.loss", "from titan_hd.train import Trainer", "up or across to top"),
    ("titan_hd.components.loss", "from titan_hd import preflight", "up or across to top"),
    ("titan_hd.train", "from tools.plot import plot", "must not know its tools"),
    ("titan_hd.newroom.thing", "", "a folder without a level"),
    ("titan_hd.preflight", "from titan_hd import train", "imports itself in a circle"),
]


@pytest.mark.parametrize(("module", "source", "line"), BAD, ids=[f"{m}-{s[:30]!r}" for m, s, _ in BAD])
def test_checker_finds_a_bad_import(module: str, source: str, line: str):
    """Each bad import, put behind the real source of a module, is found."""
    sources = package_sources()
    sources[module] = sources.get(module, "") + "\n" + source
    found = violations(sources)
    assert found
    assert any(line in text for text in found), found


def test_checker_allows_what_goes_down():
    sources = package_sources()
    sources["titan_hd.train"] += "\nfrom titan_hd.config.job_config import JobConfig\nimport torch.distributed"
    sources["titan_hd.components.loss"] += "\nfrom titan_hd.data import loader\nfrom titan_hd.distributed import slices"
    sources["titan_hd.data.loader"] += "\nfrom titan_hd.models.registry import DecoderConfig"
    assert violations(sources) == []
