"""Which folders are checkpoints, what a save that fails leaves, what is purged, and which damage is noticed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.kit.checkpoints import STATE, best_of, save
from titan_hd.checkpoint.folder import (
    BEST,
    MANIFEST,
    STATE_FILE,
    CheckpointFolder,
    damage,
    incomplete,
    read_manifest,
    read_train_state,
    write_text,
)
from titan_hd.errors import UserError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class TestCandidates:
    def test_the_latest_by_number(self, tmp_path: Path):
        for name in ("step-9", "step-100", "step-20"):
            (tmp_path / name).mkdir()
        folder = CheckpointFolder(tmp_path, 2)
        assert folder.candidates(-1) == [100, 20, 9]
        assert folder.candidates(20) == [20]
        assert folder.candidates(0) == []

    def test_what_is_no_checkpoint(self, tmp_path: Path):
        for name in ("step-5", "step-9.partial", "step-x", "abandoned-7"):
            (tmp_path / name).mkdir()
        folder = CheckpointFolder(tmp_path, 2)
        assert folder.steps() == [5]
        with pytest.raises(UserError, match=r"checkpoint.load_step: .* has no complete checkpoint 7 \(has 5\)"):
            folder.candidates(7)

    def test_no_checkpoint_yet(self, tmp_path: Path):
        folder = CheckpointFolder(tmp_path / "none", 2)
        assert folder.candidates(-1) == folder.candidates(0) == []
        with pytest.raises(UserError, match=r"has no complete checkpoint 3 \(has none\)"):
            folder.candidates(3)

    def test_a_folder_that_the_disk_refuses(self, tmp_path: Path):
        with pytest.raises(UserError, match=r"x/step: cannot be read: File name too long$"):
            CheckpointFolder(tmp_path / ("x" * 300) / "step", 2).candidates(-1)

    def test_a_folder_that_cannot_be_listed_is_not_empty(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        (tmp_path / "step-5").mkdir()

        def refuse(path):
            raise PermissionError(13, "Permission denied", str(path))

        for scan in ("listdir", "scandir"):
            monkeypatch.setattr(os, scan, refuse)
        with pytest.raises(UserError, match="cannot be read: Permission denied"):
            CheckpointFolder(tmp_path, 2).candidates(-1)

    def test_the_first_that_is_whole(self, tmp_path: Path, monkeypatch, caplog):
        """As far as sizes show it."""
        monkeypatch.setattr("titan_hd.checkpoint.folder.logger.propagate", True)
        folder = CheckpointFolder(tmp_path, 0)
        paths = [save(folder, step) for step in (1, 2, 3, 4)]
        assert folder.first_whole([4, 3, 2, 1], -1, incomplete) == 4
        assert folder.first_whole([], -1, incomplete) is None
        assert caplog.text == ""
        shards, table = paths[3] / "__0_0.distcp", paths[2] / ".metadata"
        shards.write_text("shard")
        table.unlink()
        (paths[1] / MANIFEST).unlink()
        assert folder.first_whole([4, 3, 2, 1], -1, incomplete) == 1
        assert [record.getMessage().partition(": cannot be read")[0] for record in caplog.records] == [
            f"checkpoint {paths[3]} is damaged, and skipped: {shards}: has 5 bytes, must have 6",
            f"checkpoint {paths[2]} is damaged, and skipped: {table}",
            f"checkpoint {paths[1]} is damaged, and skipped: {paths[1] / MANIFEST}",
        ]
        for steps, load_step, left in (
            ([4], 4, "it is the one that is asked for"),
            ([3, 4], -1, "no whole checkpoint is left"),
        ):
            with pytest.raises(UserError) as told:
                folder.first_whole(steps, load_step, incomplete)
            advice = f"{left}: name another checkpoint.load_step, or 0 to start anew"
            assert str(told.value) == f"{shards}: has 5 bytes, must have 6 ({advice})"


class TestPublish:
    def test_the_latest_are_kept(self, tmp_path: Path):
        for keep, left in ((0, [1, 2, 3, 4]), (1, [4]), (3, [2, 3, 4])):
            folder = CheckpointFolder(tmp_path / str(keep), keep)
            for step in (1, 2, 3, 4):
                assert read_train_state(save(folder, step))["step"] == step
            assert folder.steps() == left

    def test_a_disk_that_is_full_at_the_end_costs_nothing_that_was_there(self, tmp_path: Path, monkeypatch):
        folder = CheckpointFolder(tmp_path, 1)
        before = save(folder, 3)
        partial = folder.start(4)
        monkeypatch.setattr("titan_hd.checkpoint.folder.os.fsync", self.full)
        with pytest.raises(OSError, match="No space"):
            folder.publish(4, STATE, {})
        monkeypatch.undo()
        assert names(tmp_path) == ["step-3", "step-4.partial"]
        assert read_manifest(before).keys() == {"__0_0.distcp", ".metadata", STATE_FILE}
        assert partial.exists()
        folder.clear_partial()
        assert names(tmp_path) == ["step-3"]

    def test_a_rank_that_wrote_to_a_disk_of_its_own(self, tmp_path: Path):
        """A folder that the nodes do not share: the checkpoint would have a manifest, and never load."""
        folder = CheckpointFolder(tmp_path, 1)
        before = save(folder, 3)
        files = {".metadata": write_text(folder.start(4) / ".metadata", "shards")}
        missing = {"__1_0.distcp": {"size": 6, "crc32": 1}}
        with pytest.raises(OSError, match=r"__1_0\.distcp is not there .* one file system \(job\.dump_folder\)"):
            folder.publish(4, STATE, files | missing)
        assert folder.steps() == [3]
        assert before.exists()

    def test_an_old_one_that_stays_is_no_save_that_failed(self, tmp_path: Path, monkeypatch, caplog):
        folder = CheckpointFolder(tmp_path, 1)
        save(folder, 3)
        monkeypatch.setattr(CheckpointFolder, "_purge", self.full)
        monkeypatch.setattr("titan_hd.checkpoint.folder.logger.propagate", True)
        save(folder, 4)
        assert folder.steps() == [3, 4]
        assert "an old checkpoint cannot be removed: [Errno 28]" in caplog.text

    @staticmethod
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    def test_what_a_save_left_that_was_cut_off_is_written_over(self, tmp_path: Path):
        folder = CheckpointFolder(tmp_path, 2)
        (folder.start(3) / "leftover").write_text("x")
        assert names(save(folder, 3)) == sorted([".metadata", "__0_0.distcp", MANIFEST, STATE_FILE])

    @pytest.mark.parametrize("first", [0, 500])
    def test_a_run_that_went_back_keeps_what_it_saves(self, tmp_path: Path, first: int):
        """checkpoint.load_step = 0 or an early step: the steps after it belong to a run that is not this one. They are
        moved aside, and of those as many stay as of the run's own."""
        for step in (500, 1000, 9500, 10000):
            save(CheckpointFolder(tmp_path, 0), step, "of the first run")
        folder = CheckpointFolder(tmp_path, 2)
        folder.candidates(first)
        for step, age in ((1000, 3), (9500, 2), (10000, 1)):
            os.utime(folder.path(step), (1e9 - age, 1e9 - age))
        save(folder, 1000, "of the second run")
        assert (folder.path(1000) / "__0_0.distcp").read_text() == "of the second run"
        assert names(tmp_path) == ["abandoned-10000", "abandoned-9500", "step-1000", "step-500"]


class TestBest:
    def test_it_is_kept_beside_the_latest(self, tmp_path: Path):
        """Until another one is the best."""
        folder = CheckpointFolder(tmp_path, 1)
        assert folder.best() is None
        for step, best, left in ((1, 1, [1]), (2, 1, [1, 2]), (3, 1, [1, 3]), (4, 4, [4]), (5, 4, [4, 5])):
            save(folder, step, best=best_of(best))
            assert (folder.steps(), folder.best()) == (left, best_of(best))
        assert json.loads((tmp_path / BEST).read_text()) == {"step": 4, "metric": "validation_loss", "value": 0.25}
        save(folder, 6)
        assert (folder.steps(), folder.best()) == ([4, 6], best_of(4)), "a run without keep_best leaves it alone"

    def test_one_that_could_not_be_saved(self, tmp_path: Path):
        folder = CheckpointFolder(tmp_path, 1)
        save(folder, 1, best=best_of(1))
        save(folder, 3, best=best_of(2))
        assert (folder.steps(), folder.best()) == ([1, 3], best_of(1)), "the best that there is"

    def test_a_run_that_goes_back(self, tmp_path: Path):
        folder = CheckpointFolder(tmp_path, 0)
        for step in (1, 2, 3):
            save(folder, step, best=best_of(min(step, 2)))
        folder.set_aside(2)
        folder.name_best(best_of(1))
        assert folder.best() == best_of(1)
        folder.set_aside(1)
        folder.name_best(None)
        assert not (tmp_path / BEST).exists()

    def test_what_a_crash_left_is_mended(self, tmp_path: Path):
        """Between the checkpoint's name and best.json."""
        folder = CheckpointFolder(tmp_path, 1)
        save(folder, 1, best=best_of(1))
        save(folder, 2)
        assert folder.best() == best_of(1)
        folder.name_best(best_of(2))
        assert folder.best() == best_of(2)

    @pytest.mark.parametrize("text", ["", "[]", "null", '{"step": 1}', '{"step": "../1", "metric": "m", "value": 1}'])
    def test_a_file_that_names_none(self, tmp_path: Path, text: str):
        folder = CheckpointFolder(tmp_path, 1)
        save(folder, 1)
        (tmp_path / BEST).write_text(text)
        assert folder.best() is None
        save(folder, 2)
        assert names(tmp_path) == ["step-2"]

    def test_a_disk_that_takes_no_best_json_fails_no_save(self, tmp_path: Path, monkeypatch, caplog):
        folder = CheckpointFolder(tmp_path, 1)
        monkeypatch.setattr(CheckpointFolder, "name_best", TestPublish.full)
        monkeypatch.setattr("titan_hd.checkpoint.folder.logger.propagate", True)
        save(folder, 1)
        save(folder, 2)
        assert folder.steps() == [2]
        assert "best.json cannot be written: [Errno 28]" in caplog.text


class TestDamage:
    @pytest.fixture
    def checkpoint(self, tmp_path: Path) -> Path:
        return save(CheckpointFolder(tmp_path, 2), 3)

    def found(self, checkpoint: Path) -> list[str]:
        files = read_manifest(checkpoint)
        return [line for name in sorted(files) if (line := damage(checkpoint / name, files[name]))]

    def test_none(self, checkpoint: Path):
        assert self.found(checkpoint) == []

    @pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", STATE_FILE])
    def test_a_bit_a_byte_or_a_file_less(self, checkpoint: Path, name: str):
        path = checkpoint / name
        content = bytearray(path.read_bytes())
        content[1] ^= 8
        path.write_bytes(content)
        assert self.found(checkpoint) == [f"{path}: its content has changed since it was written"]
        path.write_bytes(content[:-1])
        assert self.found(checkpoint) == [f"{path}: has {len(content) - 1} bytes, must have {len(content)}"]
        path.unlink()
        assert self.found(checkpoint) == [f"{path}: cannot be read: No such file or directory"]

    @pytest.mark.parametrize(
        "manifest",
        [
            "",
            "[]",
            "null",
            '{"files": 1}',
            '{"files": {}}',
            '{"files": {"../x": {"size": 1, "crc32": 1}}}',
            "[" * 10**5,
        ],
    )
    def test_a_manifest_that_is_none(self, checkpoint: Path, manifest: str):
        (checkpoint / MANIFEST).write_text(manifest)
        with pytest.raises(UserError, match=r"manifest\.json: cannot be read"):
            read_manifest(checkpoint)

    @pytest.mark.parametrize("state", ["", "[]", '{"step": 1}', json.dumps({**STATE, "config": "= 1"})])
    def test_a_state_that_is_none(self, checkpoint: Path, state: str):
        (checkpoint / STATE_FILE).write_text(state)
        with pytest.raises(UserError, match="is not the state of a titan_hd run"):
            read_train_state(checkpoint)
