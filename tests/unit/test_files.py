"""Files that somebody else changes meanwhile."""

from __future__ import annotations

import os
from pathlib import Path

from titan_hd.files import folder_size


def test_the_size_of_a_folder_whose_folders_come_and_go(tmp_path: Path, monkeypatch):
    for folder in (tmp_path / "stays", tmp_path / "goes"):
        folder.mkdir()
        (folder / "file").write_bytes(bytes(1000))
    (tmp_path / "lost").symlink_to("nowhere")
    assert folder_size(tmp_path) == 2000, "folders themselves and links to nothing count nothing"
    look = os.scandir

    def late(folder):
        if Path(folder).name == "goes":
            Path(folder).rename(tmp_path.parent / f"{tmp_path.name}-gone")
        return look(folder)

    monkeypatch.setattr(os, "scandir", late)
    assert folder_size(tmp_path) == 1000
    assert folder_size(tmp_path / "none") == 0
