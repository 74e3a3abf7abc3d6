"""What is written is read again, by name and in parts, without reading the rest; and by DCP as any other checkpoint."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.kit.checkpoints import Run
from titan_hd.checkpoint import pieces, stored_tensor
from titan_hd.checkpoint.pieces import owned_pieces, stored_tensors
from titan_hd.checkpoint.reader import TABLE, CheckpointReader
from titan_hd.checkpoint.stored_tensor import StoredTensor, narrowed
from titan_hd.checkpoint.table import TableOfContents
from titan_hd.checkpoint.writer import Entry, write_pieces
from titan_hd.errors import UserError

STATE = {f"model.layers.{i}.w": torch.randn(3, 4, 5) for i in range(5)} | {
    "model.embed": torch.randn(7, 3).T,
    "model.halves": torch.randn(9, dtype=torch.bfloat16),
    "optimizer.step": torch.tensor(3.0),
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of STATE, the five blocks in pieces of two."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 2 * 3 * 4 * 5 * 4)
    stored, table = stored_tensors(STATE), TableOfContents()
    entries, files = write_pieces(tmp_path, 0, owned_pieces(stored, rank=0))
    assert files["__0_0.distcp"]["size"] == (tmp_path / "__0_0.distcp").stat().st_size
    table.update(0, entries)
    (tmp_path / TABLE).write_bytes(table.content(list(stored)))
    assert table.content(list(stored)) is table.content(list(stored)), "made once"
    return tmp_path


@pytest.mark.parametrize("small", [0, 2**20])
def test_every_tensor_comes_back_by_its_name(folder: Path, monkeypatch: pytest.MonkeyPatch, small: int):
    monkeypatch.setattr(stored_tensor, "_SMALL_BYTES", small)
    reader = CheckpointReader(folder)
    assert set(reader.read_metadata().state_dict_metadata) == set(STATE)
    got = {name: torch.zeros_like(value) for name, value in STATE.items()}
    reader.fill(got)
    for name, value in STATE.items():
        one = {name: torch.zeros_like(value)}
        CheckpointReader(folder).fill(one)
        assert torch.equal(got[name], value), name
        assert torch.equal(one[name], value), name


def test_dcp_reads_it_as_it_is_stored(folder: Path):
    got = {"model.layers.*.w": torch.zeros(5, 3, 4, 5), "optimizer.step": torch.tensor(0.0)}
    dcp.load(got, checkpoint_id=str(folder), no_dist=True)
    assert torch.equal(got["model.layers.*.w"], torch.stack([STATE[f"model.layers.{i}.w"] for i in range(5)]))
    assert got["optimizer.step"] == 3


def test_a_tensor_that_is_missing_is_one_line(folder: Path):
    with pytest.raises(UserError, match=r"cannot be read: .*model\.layers\.5\.w"):
        CheckpointReader(folder).fill({"model.layers.5.w": torch.zeros(3, 4, 5)})


def test_pieces_that_are_not_the_whole(folder: Path):
    """A bug of whoever dealt them; no such checkpoint may get its name."""
    stored = stored_tensors({"w": torch.zeros(4, 2)})
    for entries in ([("w", (0, 0), (2, 2))], [("w", (0, 0), (2, 2)), ("w", (0, 0), (2, 2))]):
        table = TableOfContents()
        for rank, entry in enumerate(entries):
            table.update(rank, [Entry(*entry, f"__{rank}_0.distcp", 0, 9)])
        with pytest.raises(RuntimeError, match=r"w: (the ranks' pieces are not the whole|two ranks have written)"):
            table.content(list(stored))


class Counted(io.BytesIO):
    read_bytes = 0

    def readinto(self, buffer) -> int:
        self.read_bytes += len(buffer)
        return super().readinto(buffer)


def saved(value: object) -> Counted:
    file = Counted()
    file.write(b"what is before it")
    torch.save(value, file)
    return file


def stored(file: Counted) -> StoredTensor:
    return StoredTensor(file, 17, len(file.getvalue()) - 17)


class TestStoredTensor:
    @pytest.fixture(autouse=True)
    def nothing_is_small(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(stored_tensor, "_SMALL_BYTES", 0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
    def test_a_part_alone_is_read(self, dtype: torch.dtype):
        values = torch.arange(6 * 50 * 4).view(6, 50, 4).to(dtype)
        file = saved(values)
        assert stored(file).read(8) is None
        part = stored(file).read_part(4, (20, 1), (5, 2))
        assert torch.equal(part, values[4, 20:25, 1:3])
        assert torch.equal(stored(file).read_part(None, (2, 7, 0), (3, 4, 4)), values[2:5, 7:11])
        assert file.read_bytes == (5 * 4 + 3 * 50 * 4) * dtype.itemsize
        assert torch.equal(stored(file).read(600), values)

    @pytest.mark.parametrize(
        "value",
        [torch.arange(6.0).view(2, 3).T, torch.arange(6.0)[2:], torch.arange(3).to(torch.float8_e4m3fn)],
        ids=["not contiguous", "not alone", "another form"],
    )
    def test_any_other_tensor_is_read_whole(self, value: torch.Tensor):
        whole = stored(saved(value)).read(1)
        assert whole is not None
        assert torch.equal(whole.float(), value.float())
        assert torch.equal(narrowed(whole, (1,), (1,)).float(), value[1:2].float())

    def test_no_code_is_run(self, tmp_path: Path):
        file = saved(Run(open, str(tmp_path / "made"), "w"))
        with pytest.raises(pickle.UnpicklingError):
            stored(file).read(1)
        assert not (tmp_path / "made").exists()

    def test_a_file_that_is_cut_off(self):
        file = saved(torch.arange(100.0))
        tensor = stored(file)
        file.truncate(800)
        with pytest.raises(EOFError, match="the file ends before byte"):
            tensor.read(100)
