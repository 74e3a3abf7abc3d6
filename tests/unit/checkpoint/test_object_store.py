"""Checkpoints in a store that has no rename: complete or absent by the manifest, written last and the first to go."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest
import torch

from tests.kit.checkpoints import STATE, best_of, save
from titan_hd.checkpoint.folder import (
    BEST,
    MANIFEST,
    CheckpointFolder,
    check_files,
    read_manifest,
    read_train_state,
    write_text,
)
from titan_hd.checkpoint.object_store import ObjectStore, StorePath, checkpoint_folder, open_url
from titan_hd.checkpoint.pieces import owned_pieces, stored_tensors
from titan_hd.checkpoint.writer import write_pieces
from titan_hd.config.job_config import JobConfig
from titan_hd.errors import UserError

pytest.importorskip("fsspec")


@pytest.fixture(params=["memory", "file"])
def root(request, tmp_path: Path) -> StorePath:
    """Stores with and without folders."""
    return open_url(f"memory://{uuid.uuid4().hex}/run/" if request.param == "memory" else f"file://{tmp_path}/run")


def names(root: StorePath) -> set[str]:
    """The first part of the names of what is in the store."""
    return {name.partition("/")[0] for name in root.sizes()}


def test_the_latest_are_kept_and_whole(root: StorePath):
    for keep, left in ((0, [1, 2, 3, 4]), (1, [4]), (3, [2, 3, 4])):
        files = ObjectStore(root / str(keep), keep)
        assert files.steps() == files.candidates(-1) == []
        for step in (1, 2, 3, 4):
            assert read_train_state(save(files, step))["step"] == step
            check_files(files.path(step))
        assert files.steps() == left
        assert names(root / str(keep)) == {f"step-{step}" for step in left}


def test_without_its_manifest_it_is_none(root: StorePath):
    """A save that is cut off at any of its files, and a removal."""
    files = ObjectStore(root, 2)
    save(files, 3)
    place = files.start(6)
    for name in ("__0_0.distcp", ".metadata", "train_state.json"):
        write_text(place / name, "shards")
        assert files.steps() == [3]
        assert not files.holds(6)
    with pytest.raises(UserError, match=r"has no complete checkpoint 6 \(has 3\)"):
        files.candidates(6)
    files.clear_partial()
    assert names(root) == {"step-3"}


def test_a_store_that_fails_at_the_end_costs_nothing_that_was_there(root: StorePath, monkeypatch):
    files = ObjectStore(root, 1)
    save(files, 3)
    place, open_it = files.start(4), StorePath.open

    def failing(self, mode: str):
        if self.name == MANIFEST and mode == "wb":
            raise OSError(5, "the store is gone")
        return open_it(self, mode)

    monkeypatch.setattr(StorePath, "open", failing)
    written = {".metadata": write_text(place / ".metadata", "table")}
    with pytest.raises(OSError, match="the store is gone"):
        files.publish(4, STATE, written)
    monkeypatch.undo()
    assert files.steps() == [3]
    files.discard(4)
    assert names(root) == {"step-3"}


def test_the_manifest_is_written_last_and_goes_first(root: StorePath, monkeypatch):
    order, open_it, remove = [], StorePath.open, root.store.rm_file
    monkeypatch.setattr(StorePath, "open", lambda self, mode: order.append((mode, self.name)) or open_it(self, mode))
    monkeypatch.setattr(
        root.store, "rm_file", lambda path: order.append(("rm", path.rpartition("/")[2])) or remove(path)
    )
    files = ObjectStore(root, 1)
    save(files, 1)
    assert [name for mode, name in order if mode == "wb"][-1] == MANIFEST
    order.clear()
    save(files, 2)
    removed = [name for what, name in order if what == "rm"]
    assert removed[0] == MANIFEST
    assert len(removed) == 4, "of step 1"


def test_a_run_that_went_back_keeps_what_it_saves(root: StorePath):
    for step in (500, 1000, 1500):
        save(ObjectStore(root, 0), step, "of the first run")
    files = ObjectStore(root, 2)
    files.set_aside(1000)
    assert names(root) == {"step-500", "abandoned-1000", "abandoned-1500"}
    check_files(root / "abandoned-1500")
    save(files, 1000, "of the second run")
    assert files.steps() == [500, 1000]
    assert read_manifest(files.path(1000))["__0_0.distcp"]["size"] == len("of the second run")


def test_the_best_is_kept(root: StorePath):
    files = ObjectStore(root, 1)
    for step, best, left in ((1, 1, [1]), (2, 1, [1, 2]), (3, 1, [1, 3]), (4, 4, [4])):
        save(files, step, best=best_of(best))
        assert (files.steps(), files.best()) == (left, best_of(best))
    files.set_aside(4)
    files.name_best(None)
    assert BEST not in names(root)


def test_a_file_that_did_not_arrive(root: StorePath):
    files = ObjectStore(root, 1)
    files.start(4)
    with pytest.raises(OSError, match=r"__1_0\.distcp is not there as its rank has written it"):
        files.publish(4, STATE, {"__1_0.distcp": {"size": 6, "crc32": 1}})
    assert files.steps() == []


def test_damage_is_found(root: StorePath):
    files = ObjectStore(root, 1)
    place = save(files, 3)
    write_text(place / "__0_0.distcp", "sharps")
    with pytest.raises(UserError, match=r"step-3/__0_0\.distcp: its content has changed since it was written"):
        check_files(place)
    place.store.rm_file((place / "__0_0.distcp").path)
    with pytest.raises(UserError, match=r"step-3/__0_0\.distcp: cannot be read"):
        check_files(place)


def test_where_a_run_has_its_checkpoints(tmp_path: Path):
    config = JobConfig()
    config.job.dump_folder = str(tmp_path)
    assert type(checkpoint_folder(config)) is CheckpointFolder
    assert checkpoint_folder(config).folder == tmp_path / "checkpoint"
    config.checkpoint.folder = "memory://bucket/run"
    assert str(checkpoint_folder(config).path(3)) == "memory://bucket/run/step-3"
    config.checkpoint.folder = "nowhere://bucket"
    with pytest.raises(
        UserError, match=r"^checkpoint\.folder: nowhere://bucket: cannot be opened: .*titan_hd\[remote\]"
    ):
        checkpoint_folder(config)


class Failing:
    """Of a library that has errors of its own."""

    def __init__(self, *_: object, **__: object):
        pass

    def __enter__(self) -> Failing:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, data: bytes) -> int:
        raise KeyError("no such endpoint")


def test_any_error_of_a_store_is_one_of_a_disk(root: StorePath, monkeypatch):
    monkeypatch.setattr(root.store, "open", Failing)
    with pytest.raises(OSError, match="KeyError: 'no such endpoint'"):
        write_text(root / "x", "y")
    pieces = owned_pieces(stored_tensors({"w": torch.zeros(3)}), rank=0)
    with pytest.raises(OSError, match="KeyError: 'no such endpoint'"):  # and not what torch.save makes of it
        write_pieces(root, 0, pieces)


def test_a_store_that_does_not_answer_has_no_fewer_checkpoints(monkeypatch: pytest.MonkeyPatch):
    """fsspec's own isfile and isdir say no where they cannot ask."""
    root = open_url(f"memory://{uuid.uuid4().hex}/run")
    files = ObjectStore(root, 0)
    for step in (1, 2):
        save(files, step)
    before, info = root.sizes(), type(root.store).info

    def slow(store, path, **options):
        if path.endswith(("step-2/manifest.json", "/run")):
            raise TimeoutError("503 SlowDown")
        return info(store, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(type(root.store), "info", slow)
        for asked in (files.clear_partial, files.steps, lambda: files.holds(2)):
            with pytest.raises(OSError, match="503 SlowDown"):
                asked()
        with pytest.raises(UserError, match="cannot be read"):
            files.candidates(-1)
    assert {name: size for name, size in root.sizes().items() if name != "can_be_written"} == before
    assert files.steps() == [1, 2]
