"""DCP's table of contents is a pickle; reading one must not run what it says, nor open what it points to."""

from __future__ import annotations

import enum
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.kit.checkpoints import Run
from titan_hd.checkpoint.reader import CheckpointReader
from titan_hd.errors import UserError

TENSORS = {"model.a": torch.arange(12.0).view(3, 4), "model.b": torch.ones(2, dtype=torch.bfloat16), "step": 3}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    dcp.save(dict(TENSORS), checkpoint_id=str(tmp_path / "step-1"), no_dist=True)
    return tmp_path / "step-1"


def test_what_dcp_wrote_is_read(folder: Path):
    reader = CheckpointReader(folder)
    assert reader.tensor_dtypes({"a": torch.Size([3, 4]), "b": torch.Size([2])}) == {torch.float32, torch.bfloat16}
    got = {name: torch.zeros_like(value) for name, value in TENSORS.items() if name != "step"}
    dcp.load(got, storage_reader=reader, no_dist=True)
    assert all(torch.equal(got[name], TENSORS[name]) for name in got)


class _OlderPickler(pickle.Pickler):
    """Members of enumerations as Python 3.11.0 to 3.11.3 pickle them."""

    def reducer_override(self, obj: object):
        return (getattr, (type(obj), obj.name)) if isinstance(obj, enum.Enum) else NotImplemented


def test_what_an_older_python_wrote_is_read(folder: Path):
    with (folder / ".metadata").open("rb") as file:
        table = pickle.load(file)
    with (folder / ".metadata").open("wb") as file:
        _OlderPickler(file).dump(table)
    assert b"getattr" in (folder / ".metadata").read_bytes()
    test_what_dcp_wrote_is_read(folder)


@pytest.mark.parametrize("function", [open, eval, getattr, print, torch.load, Path.unlink])
def test_nothing_is_called(folder: Path, tmp_path: Path, function):
    (folder / ".metadata").write_bytes(pickle.dumps(Run(function, str(tmp_path / "made"), "w")))
    with pytest.raises(UserError, match=r"\.metadata: cannot be read: .*is no part of a table of contents"):
        CheckpointReader(folder).read_metadata()
    assert not (tmp_path / "made").exists()


def test_an_object_is_not_read_as_a_tensor(folder: Path):
    """DCP would unpickle it, and run what it says."""
    with pytest.raises(UserError, match="cannot be read: step is no tensor"):
        CheckpointReader(folder).fill({"step": torch.tensor(0)})


def test_other_tables_are_one_line(folder: Path):
    for content in (b"", b"torn", pickle.dumps({"a": 1}), pickle.dumps(torch.Size([3]))):
        (folder / ".metadata").write_bytes(content)
        with pytest.raises(UserError, match="cannot be read") as caught:
            CheckpointReader(folder).read_metadata()
        assert "\n" not in str(caught.value)
    (folder / ".metadata").unlink()
    with pytest.raises(UserError, match=r"holds no \.metadata"):
        CheckpointReader(folder).read_metadata()


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "sub/file"])
def test_no_file_outside_is_opened(folder: Path, name: str):
    table = CheckpointReader(folder).read_metadata()
    for info in table.storage_data.values():
        info.relative_path = name
    (folder / ".metadata").write_bytes(pickle.dumps(table))
    with pytest.raises(UserError, match="which is not a file of the folder"):
        CheckpointReader(folder).read_metadata()


def test_what_does_not_fit_the_model_is_named(folder: Path):
    with pytest.raises(UserError) as caught:
        CheckpointReader(folder).tensor_dtypes({"a": torch.Size([4, 3]), "c": torch.Size([2])})
    assert str(caught.value).splitlines() == [
        f"{folder}: model.b: is not part of the model",
        f"{folder}: model.a: has shape [3, 4], must be [4, 3]",
        f"{folder}: model.c: is missing",
    ]
