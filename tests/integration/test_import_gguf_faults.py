"""tools/import_gguf.py: broken and hostile files, and disks that fail."""

from __future__ import annotations

import os
import re
import resource
import shutil
import struct
import sys
import zipfile
from pathlib import Path

import pytest

import tools.import_gguf
from tests.kit.gguf_files import gguf, write_gguf

TYPES = gguf.GGUFValueType
U32, I32, F32, STRING = ((kind,) for kind in (TYPES.UINT32, TYPES.INT32, TYPES.FLOAT32, TYPES.STRING))
U32S, STRINGS = (TYPES.ARRAY, TYPES.UINT32), (TYPES.ARRAY, TYPES.STRING)


class TestFaults:
    """What a file, or a disk, can have wrong: one line, exit status 2, and nothing is left behind."""

    @pytest.fixture
    def refusal(self, tmp_path: Path, monkeypatch, capsys):
        def run(file: Path, folder: Path | None = None, *options: str) -> str:
            folder = folder or tmp_path / "out" / "hf"
            monkeypatch.setattr("titan_hd.console.FIRST_LINE", 600)  # says how far it is on a slow machine
            monkeypatch.setattr(sys, "argv", ["import_gguf.py", str(file), str(folder), *options])
            with pytest.raises(SystemExit) as caught:
                tools.import_gguf.main()
            lines = [line for line in capsys.readouterr().err.splitlines() if line]
            assert caught.value.code == 2
            assert len(lines) == 1
            assert len(lines[0]) < 1000
            assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []
            return lines[0]

        return run

    @staticmethod
    def pack(tmp_path: Path, data: bytes = b"GGUF" * 1000) -> Path:
        with zipfile.ZipFile(tmp_path / "model.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("a.gguf", data)
        return tmp_path / "model.zip"

    # Offsets of the field in the header before the data, and in the one of the directory at the end.
    @pytest.mark.parametrize(
        ("field", "value", "line"),
        [
            ((6, 8), 1, "model.zip: cannot be unpacked: .*encrypted"),
            ((8, 10), 99, "model.zip: cannot be unpacked: .*compression"),
            ((30 + 6 + 8, None), 0xFFFF, "model.zip: cannot be unpacked: Error -3"),
            ((None, 0), 0, "is no GGUF file"),  # no directory: no zip file either
        ],
    )
    def test_zip(self, tmp_path: Path, refusal, field: tuple, value: int, line: str):
        path = self.pack(tmp_path)
        data = bytearray(path.read_bytes())
        for start, offset in zip((0, data.index(b"PK\1\2")), field):
            if offset is not None:
                data[start + offset : start + offset + 2] = struct.pack("<H", value)
        if field[0] is None:
            del data[-22:]
        path.write_bytes(data)
        assert re.search(line, refusal(path))

    def test_zip_of_many(self, tmp_path: Path, refusal):
        with zipfile.ZipFile(tmp_path / "many.zip", "w") as archive:
            for i in range(100):
                archive.writestr(f"{i}.gguf", "")
            archive.writestr("two\nlines.txt", "")
        assert "0.gguf, 1.gguf, 2.gguf and 97 more; name one" in refusal(tmp_path / "many.zip")
        assert "holds no 'x\\ny'" in refusal(tmp_path / "many.zip", None, "--member", "x\ny")
        assert "many.zip: is no GGUF file" in refusal(tmp_path / "many.zip", None, "--member", "7.gguf")

    @pytest.mark.parametrize("length", [2**60, 2**63])
    def test_array_longer_than_the_file(self, tmp_path: Path, refusal, length: int):
        """The gguf package reads bytes that are not there as empty ones, for as long as they last."""
        data = b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"a", TYPES.ARRAY, TYPES.UINT8, length)
        (tmp_path / "model.gguf").write_bytes(data + bytes(100))
        assert "is no GGUF file, or an incomplete one: it ends too early" in refusal(tmp_path / "model.gguf")

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("general.architecture", (["llama"], STRINGS)),
            ("llama.attention.head_count", (0, U32)),
            ("llama.attention.head_count", ([4, 4], U32S)),
            ("llama.attention.head_count", (128, U32)),
            ("llama.attention.head_count_kv", (3, U32)),
            ("llama.attention.key_length", (-8, I32)),
            ("llama.embedding_length", ("64", STRING)),
            ("llama.feed_forward_length", (2**31, U32)),
            ("llama.block_count", (2**31, U32)),
            ("llama.block_count", (999, U32)),
            ("llama.block_count", (1, U32)),
            ("llama.attention.layer_norm_rms_epsilon", (float("nan"), F32)),
            ("llama.rope.freq_base", (float("inf"), F32)),
            ("llama.rope.scaling.factor", (float("nan"), F32)),
            ("tokenizer.ggml.tokens", ("a", STRING)),
            ("tokenizer.ggml.merges", (["ab"], STRINGS)),
            ("tokenizer.ggml.pre", ("x\n" * 1000, STRING)),
            ("tokenizer.ggml.eos_token_id", (2**31, U32)),
        ],
    )
    def test_metadata(self, tmp_path: Path, refusal, key: str, value: tuple):
        """Values of another kind, and sizes that fit no model, before anything is built of them."""
        write_gguf(tmp_path / "model.gguf", "llama", metadata={key: value})
        assert str(tmp_path / "model.gguf") in refusal(tmp_path / "model.gguf")

    def test_folder(self, tmp_path: Path, refusal):
        write_gguf(tmp_path / "model.gguf", "llama")
        (tmp_path / "file").write_text("")
        for folder, line in (
            (Path("/proc/none/hf"), "/proc/none: cannot be written: No such file or directory"),
            (tmp_path / "file" / "hf", "cannot be written"),
            (tmp_path / "out" / ("x" * 250), "cannot be written: File name too long"),
        ):
            assert line in refusal(tmp_path / "model.gguf", folder)
        assert "no such file" in refusal(tmp_path / "file" / "model.gguf")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_read_only_folder(self, tmp_path: Path, refusal):
        write_gguf(tmp_path / "model.gguf", "llama")
        (tmp_path / "out").mkdir(mode=0o500)
        assert "cannot be written: Permission denied" in refusal(tmp_path / "model.gguf")

    def test_too_little_space(self, tmp_path: Path, refusal, monkeypatch):
        write_gguf(tmp_path / "model.gguf", "llama")
        path = self.pack(tmp_path, (tmp_path / "model.gguf").read_bytes())
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 1000))
        assert re.search(r"a.gguf of \S+ needs [\d.]+ kB, 1.00 kB are free", refusal(path))

    @pytest.mark.parametrize(("packed", "limit"), [(False, 1000), (False, 100_000), (True, 100_000)])
    def test_disk_that_fills_up(self, tmp_path: Path, refusal, packed: bool, limit: int):
        """While the tokenizer, the weights, or the unpacked file are written. A limit on files stands for the disk."""
        write_gguf(tmp_path / "model.gguf", "llama")
        source = self.pack(tmp_path, (tmp_path / "model.gguf").read_bytes()) if packed else tmp_path / "model.gguf"
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            assert re.search("cannot be written: .*File too large", refusal(source, None, "--dtype", "float32"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
