"""Puts what lies beside the package into a wheel, as titan_hd/bundle (pyproject.toml has everything else)."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

BUNDLED = ("run_train.sh", "tools/**/*.py", "tools/environment.sh", "train_configs/**/*", "assets/quickstart/**/*")


class BuildWithBundle(build_py):
    """An editable installation uses the files where they lie."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            for path in self._bundled():
                target = Path(self.build_lib, "titan_hd", "bundle", path)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, target)

    def get_source_files(self) -> list[str]:
        """For the source distribution, of which a wheel may be built."""
        return [*super().get_source_files(), *self._bundled()]

    def _bundled(self) -> list[str]:
        return sorted(str(path) for pattern in BUNDLED for path in Path().glob(pattern) if path.is_file())


setup(cmdclass={"build_py": BuildWithBundle})
