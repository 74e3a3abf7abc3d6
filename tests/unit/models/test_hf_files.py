"""Weight files: what is written in place is what safetensors reads, and everything wrong with a directory is said."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from titan_hd.errors import UserError
from titan_hd.models import hf_files as hf_weights
from titan_hd.models.hf_files import WeightFiles, check_space, plan_files, write_headers, write_rows
from titan_hd.models.safetensors_header import read_header

INDEX = "model.safetensors.index.json"


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.weight": (7, 5), "norm.weight": (9,), "b.weight": (4, 6), "c.bias": (3,), "d.weight": (1, 2)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def shapes_of(values: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in values.items()}


def write(folder: Path, values: dict[str, torch.Tensor], max_file_bytes: int, pieces: int) -> list[Path]:
    """Write every tensor in `pieces` row ranges, the last ones first, as workers that overtake each other would."""
    dtype = next(iter(values.values())).dtype
    slots, headers = plan_files(folder, shapes_of(values), dtype, max_file_bytes)
    write_headers(slots, headers)
    for name, value in reversed(list(values.items())):
        chunk = -(-len(value) // pieces)
        for start in reversed(range(0, len(value), chunk)):
            write_rows(slots[name], start, value[start : start + chunk])
    return list(headers)


def written_index(folder: Path, values: dict[str, torch.Tensor]) -> dict[str, str]:
    """Two files and an index, made by safetensors itself."""
    names = list(values)
    weight_map = {}
    for i, part in enumerate((names[:2], names[2:])):
        save_file({name: values[name] for name in part}, folder / f"part{i}.safetensors")
        weight_map |= dict.fromkeys(part, f"part{i}.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def entry(offsets: list[int], shape: list[int] | None = None, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": [2] if shape is None else shape, "data_offsets": offsets}


def raw_file(folder: Path, header: object, data: int) -> Path:
    """model.safetensors with any header (text, or what JSON can say) and so many bytes of data."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path = folder / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))
    return path


def errors_of(folder: Path, expected: dict[str, torch.Size], tied_head: bool = False) -> list[str]:
    with pytest.raises(ValueError) as caught:
        WeightFiles(folder, expected, tied_head)
    return str(caught.value).split("\n")


class TestWriting:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("pieces", [1, 2, 3])
    def test_one_file(self, tmp_path: Path, dtype: torch.dtype, pieces: int):
        values = tensors(dtype)
        assert write(tmp_path, values, 2**30, pieces) == [tmp_path / "model.safetensors"]
        assert not (tmp_path / INDEX).exists()
        found = load_file(tmp_path / "model.safetensors")
        assert found.keys() == values.keys()
        for name, value in values.items():
            assert found[name].dtype == dtype
            assert torch.equal(found[name], value), name

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_several_files_and_their_index(self, tmp_path: Path, dtype: torch.dtype):
        values = tensors(dtype)
        limit = 44 * values["a.weight"].element_size()  # a + norm; b + c + d
        paths = write(tmp_path, values, limit, 2)
        assert [p.name for p in paths] == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        index = json.loads((tmp_path / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(v.numel() * v.element_size() for v in values.values())
        found = {}
        for path in paths:
            part = load_file(path)
            assert {index["weight_map"][name] for name in part} == {path.name}
            assert sum(v.numel() * v.element_size() for v in part.values()) <= limit
            found |= part
        assert found.keys() == values.keys() == index["weight_map"].keys()
        assert all(torch.equal(found[name], value) for name, value in values.items())

    def test_a_tensor_larger_than_the_limit_gets_a_file_of_its_own(self, tmp_path: Path):
        values = tensors()
        paths = write(tmp_path, values, 1, 1)
        assert len(paths) == len(values)
        assert all(torch.equal(load_file(p)[n], v) for p, (n, v) in zip(paths, values.items(), strict=True))

    def test_rows_of_a_strided_tensor(self, tmp_path: Path):
        value = torch.randn(6, 4).T
        slots, headers = plan_files(tmp_path, {"w": value.shape}, value.dtype)
        write_headers(slots, headers)
        write_rows(slots["w"], 2, value[2:])
        write_rows(slots["w"], 0, value[:2])
        assert torch.equal(load_file(tmp_path / "model.safetensors")["w"], value)

    def test_blocks_of_columns(self, tmp_path: Path):
        """As the ranks of tensor parallelism write and read a weight that is split by columns."""
        value = torch.randn(5, 7)
        slots, headers = plan_files(tmp_path, {"w": value.shape}, torch.float32)
        write_headers(slots, headers)
        for row, column in ((3, 4), (0, 4), (3, 0), (0, 0)):
            write_rows(
                slots["w"],
                row,
                value[row : row + 3 if row == 0 else 5, column : column + 4 if not column else 7],
                column,
            )
        assert torch.equal(load_file(tmp_path / "model.safetensors")["w"], value)
        files = WeightFiles(tmp_path, {"w": value.shape}, tied_head=False)
        out = torch.empty(2, 3, dtype=torch.float64)
        files.read_into("w", out, row=3, column=4)
        assert torch.equal(out, value[3:, 4:].double())
        assert files.bytes_read == 2 * 3 * 4, "only the block"

    @pytest.mark.parametrize("piece_bytes", [1, 50, 2**24])
    def test_pieces_of_any_size(self, tmp_path: Path, monkeypatch, piece_bytes: int):
        monkeypatch.setattr(hf_weights, "PIECE_BYTES", piece_bytes)
        values = tensors()
        write(tmp_path, values, 2**30, 1)
        files = WeightFiles(tmp_path, shapes_of(values), tied_head=False)
        assert all(torch.equal(files.read_rows(n, 0, len(v)), v) for n, v in values.items())
        assert files.bytes_read == sum(v.nbytes for v in values.values())

    def test_rounded_once_to_nearest(self, tmp_path: Path):
        value = torch.randn(64, 3)
        slots, headers = plan_files(tmp_path, {"w": value.shape}, torch.bfloat16)
        write_headers(slots, headers)
        write_rows(slots["w"], 0, value)
        assert torch.equal(load_file(tmp_path / "model.safetensors")["w"], value.bfloat16())

    def test_rows_at_the_end_that_nobody_wrote_are_noticed(self, tmp_path: Path):
        """The file is shorter than its header says, so it is no safetensors file."""
        values = tensors()
        slots, headers = plan_files(tmp_path, shapes_of(values), torch.float32)
        write_headers(slots, headers)
        for name, value in list(values.items())[:-1]:
            write_rows(slots[name], 0, value)
        assert "is it complete?" in errors_of(tmp_path, shapes_of(values))[0]

    def test_a_disk_that_is_too_small(self, tmp_path: Path):
        shapes = {"w": torch.Size((2**30, 2**30))}
        slots, _ = plan_files(tmp_path, shapes, torch.float32)
        with pytest.raises(UserError, match=r"the weights need 4611686018\.43 GB, \S+ GB are free"):
            check_space(tmp_path, slots, shapes)

    def test_format_metadata_and_alignment(self, tmp_path: Path):
        """transformers insists on the format entry; data starts at a multiple of eight bytes."""
        write(tmp_path, tensors(), 2**30, 1)
        with safe_open(tmp_path / "model.safetensors", "pt") as file:
            assert file.metadata() == {"format": "pt"}
        length = int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
        assert length % 8 == 0

    @pytest.mark.parametrize("limit", [2**30, 200])
    def test_what_is_written_can_be_read_back(self, tmp_path: Path, limit: int):
        values = tensors()
        write(tmp_path, values, limit, 3)
        files = WeightFiles(tmp_path, shapes_of(values), tied_head=False)
        assert all(torch.equal(files.read_rows(n, 0, len(v)), v) for n, v in values.items())


class TestReading:
    @pytest.mark.parametrize("several", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_rows(self, tmp_path: Path, several: bool, dtype: torch.dtype):
        values = tensors(dtype)
        if several:
            written_index(tmp_path, values)
        else:
            save_file(values, tmp_path / "model.safetensors")
        files = WeightFiles(tmp_path, shapes_of(values), tied_head=False)
        for name, value in values.items():
            for start in range(len(value)):
                for stop in range(start, len(value) + 1):
                    rows = files.read_rows(name, start, stop)
                    assert rows.dtype == dtype
                    assert torch.equal(rows, value[start:stop]), (name, start, stop)

    def test_all_faults_are_listed_at_once(self, tmp_path: Path):
        values = tensors()
        save_file({**values, "extra.weight": torch.ones(2)}, tmp_path / "model.safetensors")
        expected = shapes_of(values)
        expected["a.weight"] = torch.Size((5, 7))
        expected["c.bias"] = torch.Size((4,))
        expected |= {"lost.weight": torch.Size((2, 2)), "gone.bias": torch.Size((2,))}
        lines = errors_of(tmp_path, expected)
        assert sorted(line.partition(": ")[2] for line in lines) == [
            "a.weight: has shape [7, 5], must be [5, 7]",
            "c.bias: has shape [3], must be [4]",
            "extra.weight: is not part of the model",
            "gone.bias: is missing",
            "lost.weight: is missing",
        ]
        assert all(line.startswith(str(tmp_path)) for line in lines)

    def test_whole_numbers_are_no_weights(self, tmp_path: Path):
        save_file({"w": torch.ones(2, 2, dtype=torch.int8)}, tmp_path / "model.safetensors")
        (line,) = errors_of(tmp_path, {"w": torch.Size((2, 2))})
        assert "w: has dtype I8, must be one of F32, BF16, F16, F64" in line

    @pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "I64", "BOOL", "U8", "F4"])
    def test_a_dtype_that_is_refused_is_named(self, tmp_path: Path, dtype: str):
        bits = {"I64": 64, "F4": 4}.get(dtype, 8)
        raw_file(tmp_path, {"w": entry([0, 4 * bits // 8], [2, 2], dtype)}, 4 * bits // 8)
        (line,) = errors_of(tmp_path, {"w": torch.Size((2, 2))})
        assert f"w: has dtype {dtype}, must be one of F32" in line

    def test_the_index_names_what_its_file_does_not_hold(self, tmp_path: Path):
        values = tensors()
        weight_map = written_index(tmp_path, values)
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": {**weight_map, "a.weight": "part1.safetensors"}}))
        (line,) = errors_of(tmp_path, shapes_of(values))
        path = tmp_path / "part1.safetensors"
        assert line == f"{path}: a.weight: the index names it, the file lacks it; part0.safetensors holds it"

    @pytest.mark.parametrize("file", ["../outside.safetensors", "/etc/model.safetensors", "sub/part0.safetensors"])
    def test_the_index_must_stay_in_its_directory(self, tmp_path: Path, file: str):
        """The file is there and holds the tensor; it is refused for where it lies."""
        folder = tmp_path / "model"
        (folder / "sub").mkdir(parents=True)
        values = {"w": torch.ones(2, 2)}
        for place in (tmp_path / "outside.safetensors", folder / "sub" / "part0.safetensors"):
            save_file(values, place)
        (folder / INDEX).write_text(json.dumps({"weight_map": {"w": file}}))
        (line,) = errors_of(folder, shapes_of(values))
        assert line == f"{folder / INDEX}: weight_map: {file!r} is not a file of the directory"

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            ("{", "not valid JSON"),
            ("[]", "not valid JSON: must be an object"),
            ("{}", "weight_map: must be an object of file names"),
            ('"weights"', "not valid JSON: must be an object"),
            ("\ufeff", "not valid JSON"),
        ],
    )
    def test_a_broken_index(self, tmp_path: Path, content: str, says: str):
        (tmp_path / INDEX).write_text(content)
        (line,) = errors_of(tmp_path, {})
        assert line.startswith(f"{tmp_path / INDEX}: {says}")

    @pytest.mark.parametrize("weight_map", [["w"], "w", {"w": 3}])
    def test_a_broken_weight_map(self, tmp_path: Path, weight_map):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        (line,) = errors_of(tmp_path, {})
        assert line.startswith(f"{tmp_path / INDEX}: ")

    def test_a_file_that_the_index_names_is_not_there(self, tmp_path: Path):
        values = tensors()
        written_index(tmp_path, values)
        (tmp_path / "part1.safetensors").unlink()
        lines = errors_of(tmp_path, shapes_of(values))
        assert lines[0].startswith(f"{tmp_path / 'part1.safetensors'}: cannot be read as safetensors")

    @pytest.mark.parametrize("keep", [0, 4, 60, -1])
    def test_a_truncated_file(self, tmp_path: Path, keep: int):
        values = tensors()
        path = tmp_path / "model.safetensors"
        save_file(values, path)
        path.write_bytes(path.read_bytes()[:keep])
        assert errors_of(tmp_path, shapes_of(values))[0].startswith(f"{path}: cannot be read as safetensors")

    def test_a_pointer_of_git_lfs_is_called_by_its_name(self, tmp_path: Path):
        (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\n")
        (line,) = errors_of(tmp_path, {})
        assert "git lfs pull" in line

    def test_each_absent_file_is_one_line(self, tmp_path: Path):
        values = tensors()
        written_index(tmp_path, values)
        for i in range(2):
            (tmp_path / f"part{i}.safetensors").unlink()
        lines = errors_of(tmp_path, shapes_of(values))
        assert lines == [
            f"{tmp_path / f'part{i}.safetensors'}: cannot be read as safetensors: No such file or directory"
            for i in range(2)
        ]

    def test_a_broken_file_does_not_hide_the_faults_of_the_others(self, tmp_path: Path):
        values = tensors()
        written_index(tmp_path, values)
        (tmp_path / "part0.safetensors").write_bytes(b"nothing")
        lines = errors_of(tmp_path, {**shapes_of(values), "b.weight": torch.Size((6, 4)), "lost": torch.Size((1,))})
        assert [line.rpartition("/")[2] for line in lines] == [
            "part0.safetensors: cannot be read as safetensors: Error while deserializing header: header too small "
            "(it has 7 bytes; is it complete?)",
            "part1.safetensors: b.weight: has shape [4, 6], must be [6, 4]",
            f"{tmp_path.name}: lost: is missing",
        ]

    def test_files_that_the_index_does_not_name_are_passed_over(self, tmp_path: Path):
        values = tensors()
        written_index(tmp_path, values)
        (tmp_path / "consolidated.safetensors").write_bytes(b"")
        (tmp_path / "pytorch_model.bin").write_bytes(b"")
        WeightFiles(tmp_path, shapes_of(values), tied_head=False)

    def test_one_file_and_an_index_of_others(self, tmp_path: Path):
        values = tensors()
        written_index(tmp_path, values)
        save_file(values, tmp_path / "model.safetensors")
        (line,) = errors_of(tmp_path, shapes_of(values))
        assert line.startswith(f"{tmp_path}: holds both model.safetensors and an index of other files")
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(values, "model.safetensors")}))
        WeightFiles(tmp_path, shapes_of(values), tied_head=False)

    def test_a_tensor_in_two_files(self, tmp_path: Path):
        values = tensors()
        written_index(tmp_path, values)
        names = list(values)
        save_file({name: values[name] for name in names[1:]}, tmp_path / "part1.safetensors")
        lines = errors_of(tmp_path, shapes_of(values))
        assert f"{tmp_path / 'part1.safetensors'}: {names[1]}: is in part0.safetensors too" in lines

    def test_a_tensor_that_the_index_forgot(self, tmp_path: Path):
        values = tensors()
        weight_map = written_index(tmp_path, values)
        file = weight_map.pop("a.weight")
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        (line,) = errors_of(tmp_path, shapes_of(values))
        assert line == f"{tmp_path / file}: a.weight: is in this file, the index does not name it"

    def test_links_as_in_the_cache_of_the_hub(self, tmp_path: Path):
        values, snapshot, blobs = tensors(), tmp_path / "snapshots" / "c0ffee", tmp_path / "blobs"
        for folder in (snapshot, blobs):
            folder.mkdir(parents=True)
        written_index(blobs, values)
        for path in list(blobs.iterdir()):
            blob = path.rename(blobs / f"{path.name}-blob")
            (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
        files = WeightFiles(snapshot, shapes_of(values), tied_head=False)
        assert all(torch.equal(files.read_rows(n, 0, len(v)), v) for n, v in values.items())

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"])
    def test_pickled_weights_are_refused_by_name(self, tmp_path: Path, name: str):
        (tmp_path / name).write_bytes(b"")
        (line,) = errors_of(tmp_path, {})
        assert str(tmp_path / name) in line
        assert "convert the weights to safetensors" in line
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"w": name}}))
        (line,) = errors_of(tmp_path, {})
        assert f"{name} is pickled" in line

    def test_a_pipe_is_no_file(self, tmp_path: Path):
        """Opening one would wait for ever."""
        os.mkfifo(tmp_path / "model.safetensors")
        (line,) = errors_of(tmp_path, {})
        assert "it is no regular file" in line

    def test_a_directory_that_is_not_there(self, tmp_path: Path):
        assert errors_of(tmp_path / "no", {}) == [f"model.hf_assets_path: {tmp_path / 'no'} is no directory"]

    def test_a_model_without_its_head(self, tmp_path: Path):
        """Its names lack `model.`: one line, not one for every tensor."""
        save_file(
            {"embed_tokens.weight": torch.ones(4, 2), "norm.weight": torch.ones(2)}, tmp_path / "model.safetensors"
        )
        expected = {"model.embed_tokens.weight": (4, 2), "model.norm.weight": (2,), "lm_head.weight": (4, 2)}
        (line,) = errors_of(tmp_path, {name: torch.Size(shape) for name, shape in expected.items()})
        assert "lack the prefix 'model.'" in line

    def test_a_head_is_missing(self, tmp_path: Path):
        save_file({"model.embed_tokens.weight": torch.ones(4, 2)}, tmp_path / "model.safetensors")
        expected = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), torch.Size((4, 2)))
        assert errors_of(tmp_path, expected) == [f"{tmp_path}: lm_head.weight: is missing"]

    def test_no_weights_at_all(self, tmp_path: Path):
        (line,) = errors_of(tmp_path, {})
        assert line.startswith(f"model.hf_assets_path: {tmp_path} holds no model.safetensors")

    def test_a_head_that_a_tied_model_repeats_is_passed_over(self, tmp_path: Path):
        values = {"model.embed_tokens.weight": torch.ones(4, 2), "lm_head.weight": torch.ones(4, 2)}
        save_file(values, tmp_path / "model.safetensors")
        expected = {"model.embed_tokens.weight": torch.Size((4, 2))}
        assert not WeightFiles(tmp_path, expected, tied_head=True).heads_differ()
        (line,) = errors_of(tmp_path, expected)
        assert line.endswith("lm_head.weight: is not part of the model")
        save_file({**values, "lm_head.weight": torch.ones(5, 2)}, tmp_path / "model.safetensors")
        (line,) = errors_of(tmp_path, expected, tied_head=True)
        assert line.endswith("lm_head.weight: has shape [5, 2], the tied embedding [4, 2]")

    def test_frequencies_of_old_checkpoints_are_passed_over(self, tmp_path: Path):
        name = "model.layers.0.self_attn.rotary_emb.inv_freq"
        save_file({"w": torch.ones(2), name: torch.ones(3)}, tmp_path / "model.safetensors")
        WeightFiles(tmp_path, {"w": torch.Size((2,))}, tied_head=False)


class TestHeaders:
    """A header is checked in itself and against the size of its file, by the library: these are what it must notice."""

    @pytest.mark.parametrize(
        ("header", "data", "reason"),
        [
            ("[]", 0, "invalid type: sequence"),
            ("{", 0, "invalid JSON in header"),
            ("[" * 100_000, 0, "invalid JSON in header"),
            (f'{{"w": {json.dumps(entry([0, 8]))}, "w": {json.dumps(entry([0, 8]))}}}', 8, "w stands there twice"),
            ({"w": 3}, 0, "invalid JSON in header: invalid type: integer `3`"),
            ({"w": {"dtype": "F32"}}, 0, "missing field `shape`"),
            ({"w": entry([0, 8], dtype="F33")}, 8, "unknown variant `F33`"),
            ({"w": entry([0, 8], dtype=[])}, 8, "invalid JSON in header"),
            ({"w": entry([0, 8], [-2])}, 8, "integer `-2`, expected usize"),
            ({"w": entry([0, 8], [True])}, 8, "boolean `true`, expected usize"),
            ({"w": entry([0, 8], [2.0])}, 8, "floating point `2.0`, expected usize"),
            ({"w": entry([0, 8], [1] * 9)}, 8, "invalid shape, data type, or offset"),
            ({"w": entry([0, 8], [2**62, 2**62, 0])}, 8, "overflow computing buffer size"),
            ({"w": entry([0, 8], [2**32, 2**32])}, 8, "overflow computing buffer size"),
            ({"w": entry([0, 12])}, 12, "invalid shape, data type, or offset"),
            ({"w": entry([8, 0])}, 8, "invalid offset for tensor `w`"),
            ({"w": entry([-8, 0])}, 8, "integer `-8`, expected usize"),
            ({"w": entry([0])}, 8, "expected a tuple of size 2"),
            ({"w": entry([0, 8])}, 7, "file not fully covered"),
            ({"w": entry([0, 8])}, 9, "file not fully covered"),
            ({"v": entry([0, 8]), "w": entry([16, 24])}, 24, "invalid offset for tensor `w`"),
            ({"v": entry([0, 8]), "w": entry([4, 12])}, 12, "invalid offset for tensor `w`"),
            ({"v": entry([0, 8]), "w": entry([0, 8])}, 8, "invalid offset for tensor"),
        ],
    )
    def test_faults(self, tmp_path: Path, header: object, data: int, reason: str):
        path = raw_file(tmp_path, header, data)
        (line,) = errors_of(tmp_path, {"w": torch.Size((2,))})
        assert line.startswith(str(path))
        assert reason in line

    @pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**9, 100])
    def test_a_length_that_the_file_does_not_have(self, tmp_path: Path, length: int):
        path = tmp_path / "model.safetensors"
        path.write_bytes(length.to_bytes(8, "little") + b"{}")
        (line,) = errors_of(tmp_path, {})
        assert "(it has 10 bytes; is it complete?)" in line

    def test_a_header_that_is_too_long(self, tmp_path: Path):
        path = tmp_path / "model.safetensors"
        path.write_bytes((10**9).to_bytes(8, "little"))
        os.truncate(path, 2 * 10**9)  # a sparse file
        (line,) = errors_of(tmp_path, {})
        assert "header too large" in line

    def test_a_name_cannot_forge_a_line(self, tmp_path: Path):
        raw_file(tmp_path, {"w\ntitan_hd: all is well": entry([0, 8])}, 8)
        (line, _) = errors_of(tmp_path, {"v": torch.Size((2,))})
        assert "'w\\ntitan_hd: all is well': is not part of the model" in line

    def test_empty_tensors_take_no_room(self, tmp_path: Path):
        path = raw_file(tmp_path, {"w": entry([0, 8]), "e": entry([0, 0], [0, 5]), "z": entry([8, 8], [0])}, 8)
        assert read_header(path).keys() == {"w", "e", "z"}

    @settings(deadline=None)
    @given(st.integers(0, 400), st.binary(min_size=1, max_size=6))
    def test_whatever_stands_there_is_a_user_error_or_what_the_library_reads(self, tmp_path_factory, place, junk):
        folder = tmp_path_factory.getbasetemp() / "junk"
        folder.mkdir(exist_ok=True)
        path, values = folder / "model.safetensors", tensors()
        save_file(values, path)
        whole = path.read_bytes()
        path.write_bytes(whole[:place] + junk + whole[place + len(junk) :])
        try:
            found = read_header(path)
        except UserError:
            return
        with safe_open(path, "pt") as file:
            assert set(file.keys()) == found.keys()
            assert all(list(found[n].shape) == file.get_slice(n).get_shape() for n in found)
