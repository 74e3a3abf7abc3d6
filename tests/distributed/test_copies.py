"""A checkpoint is read once, by the first of those that hold the same; the others get bit for bit what was saved."""

import math
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tests.kit import runs
from tests.kit.recovery import tiny_run
from titan_hd.checkpoint import copies
from titan_hd.checkpoint.reader import CheckpointReader

MESHES = {
    "replicas": {"parallelism.data_parallel_replicate_degree": 4},
    "hsdp": {"parallelism.data_parallel_replicate_degree": 2},
    "tp": {"parallelism.tensor_parallel_degree": 2, "parallelism.data_parallel_replicate_degree": 2},
}


def resumed(argv: list[str], bucket_bytes: int) -> tuple[int, int, dict[str, torch.Tensor]]:
    """Elements that this rank reads when it resumes, those that all ranks are to read, and the tensors as it has them.

    A mesh without tp, such as that of norms, is one of several that do not know each other; every rank reads numbers.
    """
    read, read_piece = [0], CheckpointReader._read_piece

    def counted(self, stored, items, planner):
        read[0] += sum(math.prod(item.lengths) for _, item in items)
        read_piece(self, stored, items, planner)

    with (
        mock.patch.object(CheckpointReader, "_read_piece", counted),
        mock.patch.object(copies, "BUCKET_BYTES", bucket_bytes),
    ):
        run = runs.trainer(argv)
    state = run.update.state(changed_only=False)
    there = {key: value.detach().full_tensor() for key, value in state.items() if hasattr(value, "full_tensor")}
    run.close()
    meshes = {key: dist.get_world_size() // value.device_mesh.size() for key, value in state.items() if key in there}
    wanted = sum(value.numel() * meshes.get(key, dist.get_world_size()) for key, value in state.items())
    return read[0], wanted, there


def saved(argv: list[str]) -> dict[str, torch.Tensor]:
    run = runs.trainer(argv)
    run.train_step()
    run.save()
    state = run.update.state(changed_only=False)
    there = {key: value.detach().full_tensor() for key, value in state.items() if hasattr(value, "full_tensor")}
    run.close()
    return there


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("method", ["hdpissa", "lora"])
def test_every_element_is_read_once(mesh: str, method: str, workers, tmp_path: Path):
    """An adapter for two workers; with tp, for two of its ranks as well, which hold some of it alike. A bucket of 1,000
    bytes cuts weights in parts."""
    num_adapters = 1 if mesh == "tp" else 2
    argv = tiny_run(tmp_path, "dump", hdpissa__num_adapters=num_adapters, training__global_batch_size=4)
    runs.write_model(tmp_path / "model", num_key_value_heads=2, intermediate_size=38)
    if method == "lora":
        argv += ["--adapter.method=lora", "--hdpissa.num_adapters=0", "--checkpoint.base=full"]
    argv += [f"--{key}={value}" for key, value in MESHES[mesh].items()]
    want = workers.run(4, saved, argv)[0]
    ranks = workers.run(4, resumed, argv, 1000)
    for _, _, there in ranks:
        assert there.keys() == want.keys()
        assert all(torch.equal(there[key], want[key]) for key in want)
    assert sum(read for read, _, _ in ranks) == ranks[0][1]
