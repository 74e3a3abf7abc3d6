"""Weights into the shards and out of them: bitwise on every mesh, each byte read once, in bounded memory.

workers  mesh (replicate x shard x tensor)  what it reaches
1        1 x 1 x 1                          the whole file
4        1 x 4 x 1                          uneven rows (50, 37, 22) and an empty shard (6 rows on 4: 2, 2, 2, 0)
4        2 x 2 x 1                          HSDP: one replica reads, the other receives; one of them writes
4        1 x 2 x 2                          blocks of columns of odd widths beside blocks of rows
4        2 x 1 x 2                          what is not split goes to replicas, then to tp ranks
2        1 x 1 x 2                          tensor parallelism alone
"""

from __future__ import annotations

import io
import json
import logging
import os
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.kit import runs

MESHES = [(1, 1, 1), (1, 4, 1), (2, 2, 1), (1, 2, 2), (2, 1, 2), (1, 1, 2)]
SPLITTABLE = {"num_key_value_heads": 2, "intermediate_size": 38}  # by tensor parallelism


def sharded_model(folder: Path, mesh: tuple[int, int, int], dtype: torch.dtype = torch.float32):
    from titan_hd.distributed.parallel_dims import ParallelDims
    from titan_hd.distributed.parallelize import parallelize
    from titan_hd.distributed.shards import materialize
    from titan_hd.distributed.tp.tensor_parallel import apply_tensor_parallel
    from titan_hd.models.decoder import Decoder
    from titan_hd.models.registry import read_hf_config

    replicate, shard, tp = mesh
    dims = ParallelDims(replicate, shard, "cpu", tp)
    with torch.device("meta"):
        model = Decoder(read_hf_config(folder)).to(dtype)
    if tp > 1:
        apply_tensor_parallel(model, dims.world["tp"])
    parallelize(model, dims, set(), torch.float32, "none", False)
    materialize(model, torch.device("cpu"))
    return model, dims


def load_and_write(
    folder: Path, out: Path, mesh: tuple[int, int, int], dtype: torch.dtype, master: torch.dtype = torch.float32
) -> tuple[int, int, int, list[str]]:
    """On each rank: read, write in `dtype`; bytes read, received, and held in the dtype of the files (which is
    `dtype`), and the lines of the log. Buckets are so small that weights lie in several, and several in one."""
    from titan_hd.distributed import weight_reading
    from titan_hd.distributed.shards import load_weights, write_weights

    lines = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("titan_hd")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        model, dims = sharded_model(folder, mesh, master)
        for parameter in model.parameters():  # whatever is not read is seen
            parameter.detach().to_local().fill_(float("nan"))
        with mock.patch.object(weight_reading, "PIECE_BYTES", 1500):
            read, received, *_ = load_weights(model, dims, str(folder))
        held = sum(p.detach().to_local().numel() for p in model.parameters()) * dtype.itemsize
        write_weights(model, dims, out, dtype, 10_000)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return read, received, held, lines


def load_directory(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def split_in_two(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Replace model.safetensors by two files and an index."""
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    weight_map = {}
    for file, part in (("a.safetensors", names[::2]), ("b.safetensors", names[1::2])):
        save_file({name: weights[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bitwise_and_reads_each_byte_once(mesh, tied, dtype, workers, tmp_path):
    """fp32 -> fp32 masters -> fp32, and bf16 -> fp32 masters -> bf16."""
    changes = SPLITTABLE if mesh[2] > 1 else {}
    _, weights = runs.write_model(tmp_path / "model", tie_word_embeddings=tied, **changes)
    weights = {name: value.to(dtype) for name, value in weights.items()}
    split_in_two(tmp_path / "model", weights)
    (tmp_path / "out").mkdir()
    results = workers.run(
        mesh[0] * mesh[1] * mesh[2], load_and_write, tmp_path / "model", tmp_path / "out", mesh, dtype
    )

    got = load_directory(tmp_path / "out")
    assert got.keys() == weights.keys()
    for name, value in weights.items():
        assert got[name].dtype == dtype
        assert torch.equal(got[name], value), name
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1

    size = sum(value.nbytes for value in weights.values())
    assert sum(read for read, *_ in results) == size, "each byte once"
    for rank, (read, received, held, _) in enumerate(results):
        assert read + received == held
        if rank >= mesh[1] * mesh[2]:
            assert read == 0, "the first replica reads"
    (said,) = [line for line in results[0][-1] if line.startswith("read ")]
    assert f"of {size / 2**30:.3f} GiB in " in said


@pytest.mark.parametrize(
    ("stored", "master"), [("float16", "float32"), ("float64", "float32"), ("float32", "bfloat16")]
)
def test_dtypes_are_converted_on_the_way(stored, master, workers, tmp_path):
    stored, master = getattr(torch, stored), getattr(torch, master)
    _, weights = runs.write_model(tmp_path / "model")
    weights = {name: value.to(stored) for name, value in weights.items()}
    save_file(weights, tmp_path / "model" / "model.safetensors")
    (tmp_path / "out").mkdir()
    workers.run(2, load_and_write, tmp_path / "model", tmp_path / "out", (1, 2, 1), master, master)
    got = load_directory(tmp_path / "out")
    assert all(torch.equal(got[name], value.to(master)) for name, value in weights.items())


def test_numbers_of_a_file_with_several_dtypes_lie_where_they_can_be_read(workers, tmp_path):
    """Three bf16 numbers of a norm, a rank's share of 12, are followed by fp32 ones in the same bucket."""
    _, weights = runs.write_model(tmp_path / "model", hidden_size=12, head_dim=6)
    weights = {name: value.to(torch.bfloat16) if "norm" in name else value for name, value in weights.items()}
    save_file(weights, tmp_path / "model" / "model.safetensors")
    (tmp_path / "out").mkdir()
    workers.run(4, load_and_write, tmp_path / "model", tmp_path / "out", (1, 4, 1), torch.float32, torch.float32)
    got = load_directory(tmp_path / "out")
    assert all(torch.equal(got[name], value.float()) for name, value in weights.items())


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def bar_of_a_load(folder: Path) -> tuple[str, str]:
    """What a load writes to a terminal, asked for a bar and not."""
    from titan_hd.console import use_bars
    from titan_hd.distributed.shards import load_weights

    model, dims = sharded_model(folder, (1, 2, 1))
    shown, stderr = [], sys.stderr
    for progress in (True, False):
        sys.stderr = Terminal()
        try:
            use_bars(progress)
            with mock.patch.dict(os.environ, TERM="xterm"):
                load_weights(model, dims, str(folder))
            shown.append(sys.stderr.getvalue())
        finally:
            use_bars(True)
            sys.stderr = stderr
    return tuple(shown)


def test_a_progress_bar_on_the_terminal_of_rank_0(workers, tmp_path):
    runs.write_model(tmp_path / "model")
    (asked, not_asked), other_rank = workers.run(2, bar_of_a_load, tmp_path / "model")
    assert "reading the weights: 100%" in asked
    assert "reading the weights" not in not_asked
    assert not any("reading the weights" in text for text in other_rank)


def load_expecting_errors(folder: Path, mesh: tuple[int, int, int] = (1, 2, 1)) -> tuple[list[str], bool]:
    from titan_hd.distributed import weight_reading
    from titan_hd.distributed.shards import load_weights
    from titan_hd.errors import UserError

    model, dims = sharded_model(folder, mesh)
    for parameter in model.parameters():
        parameter.detach().to_local().fill_(7.0)
    try:
        with mock.patch.object(weight_reading, "PIECE_BYTES", 1500):
            load_weights(model, dims, str(folder))
    except UserError as error:
        untouched = all(bool((p.detach().to_local() == 7.0).all()) for p in model.parameters())
        return str(error).splitlines(), untouched
    return [], False


def test_every_rank_says_all_faults_and_loads_nothing(workers, tmp_path):
    _, weights = runs.write_model(tmp_path / "model")
    weights.pop("model.norm.weight")
    weights["lm_head.weight"] = weights["lm_head.weight"][:-1].clone()
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"].to(torch.int32)
    save_file({**weights, "extra": torch.ones(1)}, tmp_path / "model" / "model.safetensors")
    for lines, untouched in workers.run(2, load_expecting_errors, tmp_path / "model"):
        assert untouched
        assert sorted(line.rpartition("/")[2] for line in lines) == [
            "model.safetensors: extra: is not part of the model",
            "model.safetensors: lm_head.weight: has shape [49, 22], must be [50, 22]",
            "model.safetensors: model.embed_tokens.weight: has dtype I32, must be one of F32, BF16, F16, F64",
            "model: model.norm.weight: is missing",
        ]


@pytest.mark.parametrize("mesh", [(1, 2, 1), (2, 1, 1)])
def test_every_rank_names_the_weight_with_a_nan(mesh, workers, tmp_path):
    """It lies in the rows of one rank alone; or a replica that does not read waits for what comes behind it."""
    _, weights = runs.write_model(tmp_path / "model")
    weights["model.layers.1.mlp.up_proj.weight"][0, 3] = float("nan")
    save_file(weights, tmp_path / "model" / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    line = f"{tmp_path}/model/model.safetensors: {name}: holds a value that is NaN or infinite"
    for lines, _ in workers.run(2, load_expecting_errors, tmp_path / "model", mesh):
        assert lines == [f"{line} (on rank 0, reading the weights)"]


def load_in_a_fake_world(folder: Path, mesh: tuple[int, int, int], rank: int) -> tuple[int, int, int]:
    """One rank of many whose collectives return at once: bytes read and received, and held in the files' dtype."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from titan_hd.distributed import shards

    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=mesh[0] * mesh[1] * mesh[2])
    model, dims = sharded_model(folder, mesh)
    with mock.patch.object(shards, "on_rank_zero", lambda what, function: function()):  # what rank 0 would have sent
        loaded = shards.load_weights(model, dims, str(folder))
    return *loaded[:2], sum(p.to_local().nbytes for p in model.parameters())


@pytest.mark.parametrize("shape", [(64, 8, 1), (512, 8, 1), (1, 512, 1), (256, 8, 2)])
def test_of_many_replicas_one_reads(shape, workers, tmp_path):
    """Of 512 or 4,096 ranks: the first replica's read what they hold, the others receive as much."""
    runs.write_model(tmp_path / "model", **SPLITTABLE)
    replica = shape[1] * shape[2]
    for rank in {0, replica - 1, replica, shape[0] * replica - 1} - {shape[0] * replica}:
        ((read, received, held),) = workers.run(1, load_in_a_fake_world, tmp_path / "model", shape, rank)
        if rank >= replica:
            assert (read, received) == (0, held)
        elif shape[2] == 1 or rank == 0:
            assert (read, received) == (held, 0)
        else:
            assert read + received == held
            assert read > 0, "tp ranks read what is split over them"


def zeros_of(folder: Path) -> list[str]:
    from titan_hd.distributed.shards import load_weights

    model, dims = sharded_model(folder, (1, 2, 1))
    return load_weights(model, dims, str(folder)).zeros


def test_a_weight_is_zero_if_it_is_on_every_rank(workers, tmp_path):
    _, weights = runs.write_model(tmp_path / "model")
    zero, half = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("down", "up"))
    weights[zero].zero_()
    weights[half][20:].zero_()
    save_file(weights, tmp_path / "model" / "model.safetensors")
    assert workers.run(2, zeros_of, tmp_path / "model") == [[zero], [zero]]


def fail_on_rank(rank: int, folder: Path, out: Path) -> str:
    """Write with a disk that fails on one rank alone; what this rank is told."""
    import torch.distributed as dist

    from titan_hd.distributed import shards as weights
    from titan_hd.errors import UserError

    model, dims = sharded_model(folder, (1, 2, 1))
    weights.load_weights(model, dims, str(folder))
    write_rows = weights.write_rows
    if dist.get_rank() == rank:
        weights.write_rows = full_disk
    try:
        weights.write_weights(model, dims, out, torch.float32, 5e9)
    except UserError as error:
        return str(error)
    finally:
        weights.write_rows = write_rows
    return ""


def full_disk(*args) -> None:
    raise OSError(28, os.strerror(28))


def test_a_disk_that_fails_on_one_rank_is_one_line_on_all(workers, tmp_path):
    runs.write_model(tmp_path / "model")
    (tmp_path / "out").mkdir()
    lines = workers.run(2, fail_on_rank, 1, tmp_path / "model", tmp_path / "out")
    assert (
        lines
        == [f"{tmp_path / 'out'}: cannot be written: No space left on device (on rank 1, writing the weights)"] * 2
    )


def peak_of_a_load(folder: Path) -> tuple[float, float]:
    """MiB by which this process's peak memory grew over the load, and MiB of its shards."""
    from titan_hd.distributed.shards import load_weights

    model, dims = sharded_model(folder, (1, 2, 1))
    for parameter in model.parameters():
        parameter.detach().to_local().zero_()  # the shards are resident; what grows now is the load's
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmHWM")
    load_weights(model, dims, str(folder))
    return (_status("VmHWM") - before) / 1024, sum(p.to_local().nbytes for p in model.parameters()) / 2**20


def _status(key: str) -> int:
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith(key + ":")))


# MiB: one piece of 16 MiB, and what the object collectives and the allocator keep.
LOAD_SLACK = 24


@pytest.mark.parametrize("layers", [1, pytest.param(6, marks=pytest.mark.slow)])
def test_a_load_needs_the_shards_and_one_piece(layers, workers, tmp_path):
    """fp32 in one file, 77 or 287 MiB of shards on each of two ranks; the largest tensor has 64 MiB."""
    sizes = {"hidden_size": 512, "intermediate_size": 6144, "vocab_size": 32_768, "head_dim": 64}
    runs.write_model(tmp_path / "model", num_hidden_layers=2 * layers, **sizes)
    for grown, shards in workers.run(2, peak_of_a_load, tmp_path / "model"):
        print(f"shards {shards:.0f} MiB, peak grew by {grown:.1f} MiB")
        assert shards > 60
        assert grown < LOAD_SLACK
