"""Which titan_hd runs: the git repository that its source lies in, and the commit."""

from __future__ import annotations

import functools
import os
import subprocess
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent


@functools.cache
def repository(package: Path = _PACKAGE) -> Path | None:
    """The top folder of titan_hd's own git repository; None without one, or without git.

    A repository in which titan_hd merely lies (a virtual environment in somebody's project, a copy that its repository
    does not hold) is not its own: nor is one that GIT_DIR names. What such a repository's commit is says nothing of
    titan_hd.
    """
    root = package.parent
    top = _git(root, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root:
        return None
    return root if _git(root, "ls-files", "--error-unmatch", f"{package.name}/train.py") else None


def commit(package: Path = _PACKAGE) -> str | None:
    """The commit of titan_hd's source, "+changes" where the files differ from it; None where it is in no repository of
    its own."""
    root = repository(package)
    if root is None:
        return None
    head, changes = _git(root, "rev-parse", "HEAD"), _git(root, "status", "--porcelain", "--untracked-files=no")
    return None if head is None or changes is None else head + ("+changes" if changes else "")


def _git(folder: Path, *arguments: str) -> str | None:
    """What git says of a folder; None if it cannot say. Variables such as GIT_DIR, which a hook of another repository
    sets, are not for it. It takes no lock: others may work there."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True, env=environment)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout.strip()
