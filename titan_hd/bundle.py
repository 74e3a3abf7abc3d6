"""What lies beside the package in the repository, and inside it in a wheel: run_train.sh, tools, recipes, assets."""

from __future__ import annotations

import os.path
from pathlib import Path

from titan_hd.errors import UserError

_PACKAGE = Path(__file__).resolve().parent
# setup.py puts it there.
ROOT = _PACKAGE / "bundle" if (_PACKAGE / "bundle").is_dir() else _PACKAGE.parent
RECIPES = ROOT / "train_configs"


def recipe(name: str) -> str:
    """A file of the user's, else the bundled recipe of that name, as train_configs/paper/x.toml or paper/x.toml; the
    name itself where there is neither."""
    if os.path.exists(name):  # unlike Path's it says no to a name that is too long
        return name
    inside = name.removeprefix("./").removeprefix("train_configs/")
    bundled = RECIPES / inside
    return str(bundled) if os.path.isfile(bundled) and ".." not in Path(inside).parts else name


def check_bundle() -> None:
    """Raises UserError where the files are not there: a copy of the package alone."""
    if not (ROOT / "run_train.sh").is_file():
        raise UserError(f"{ROOT}: has no run_train.sh: install titan_hd by pip, or use its repository")
