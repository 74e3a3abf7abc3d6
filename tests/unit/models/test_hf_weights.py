"""Weight files: what is written in place is what safetensors reads, and everything wrong with a directory is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from titan_hd.models.hf_weights import WeightFiles, plan_files, write_headers, write_rows

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

    def test_a_row_that_nobody_wrote_is_noticed(self, tmp_path: Path):
        """The file is shorter than its header says, so it is no safetensors file."""
        values = tensors()
        slots, headers = plan_files(tmp_path, shapes_of(values), torch.float32)
        write_headers(slots, headers)
        for name, value in list(values.items())[:-1]:
            write_rows(slots[name], 0, value)
        assert "cannot be read as safetensors" in errors_of(tmp_path, shapes_of(values))[0]

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
        assert "w: has dtype I8, must be a floating-point type" in line

    def test_the_index_names_what_its_file_does_not_hold(self, tmp_path: Path):
        values = tensors()
        weight_map = written_index(tmp_path, values)
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": {**weight_map, "a.weight": "part1.safetensors"}}))
        (line,) = errors_of(tmp_path, shapes_of(values))
        assert "part1.safetensors: a.weight: the index names it, the file does not hold it" in line

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

    @pytest.mark.parametrize("content", ["{", "[]", "{}", '"weights"', "\ufeff"])
    def test_a_broken_index(self, tmp_path: Path, content: str):
        (tmp_path / INDEX).write_text(content)
        (line,) = errors_of(tmp_path, {})
        assert line == f"{tmp_path / INDEX}: must be a JSON object with a weight_map"

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

    def test_no_weights_at_all(self, tmp_path: Path):
        (line,) = errors_of(tmp_path, {})
        assert line.startswith(f"model.hf_assets_path: {tmp_path} holds no model.safetensors")

    def test_a_head_that_a_tied_model_repeats_is_passed_over(self, tmp_path: Path):
        values = {"model.embed_tokens.weight": torch.ones(4, 2), "lm_head.weight": torch.ones(4, 2)}
        save_file(values, tmp_path / "model.safetensors")
        expected = {"model.embed_tokens.weight": torch.Size((4, 2))}
        WeightFiles(tmp_path, expected, tied_head=True)
        (line,) = errors_of(tmp_path, expected)
        assert line.endswith("lm_head.weight: is not part of the model")

    def test_frequencies_of_old_checkpoints_are_passed_over(self, tmp_path: Path):
        name = "model.layers.0.self_attn.rotary_emb.inv_freq"
        save_file({"w": torch.ones(2), name: torch.ones(3)}, tmp_path / "model.safetensors")
        WeightFiles(tmp_path, {"w": torch.Size((2,))}, tied_head=False)
