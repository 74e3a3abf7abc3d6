"""On a CUDA device: `./run_tests.sh -m gpu`. The same run on the GPU (nccl, one worker) and on the CPU (gloo)."""

import json
import os
import subprocess

import pytest
import torch

from tests import runs
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.gpu
# fp32 on both, in another order of sums; Adam amplifies it over the steps.
LOSS_TOLERANCE = 1e-4


def losses(arguments: list[str], dump, **environment) -> list[float]:
    subprocess.run(
        [REPOSITORY / "run_train.sh", "--config", "/dev/null", *arguments],
        env={**os.environ, "NGPU": "1", **environment},
        check=True,
    )
    return [json.loads(line)["loss"] for line in (dump / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("changes", [{}, {"compile__enable": "true", "activation_checkpoint__mode": "selective"}])
def test_gpu_equals_cpu_and_resumes(changes, tmp_path):
    runs.write_model(tmp_path / "model", hidden_size=64, head_dim=16, num_key_value_heads=2, intermediate_size=96)
    runs.write_records(tmp_path / "records.jsonl")

    def arguments(dump: str, **more) -> list[str]:
        values = {"hdpissa__num_adapters": 8, "training__global_batch_size": 8, "training__steps": 6} | changes | more
        return runs.options(tmp_path / "model", tmp_path / "records.jsonl", tmp_path / dump, **values)

    cpu = losses(arguments("cpu"), tmp_path / "cpu", CUDA_VISIBLE_DEVICES="")
    gpu = losses(arguments("gpu", checkpoint__enable="true", checkpoint__interval=3), tmp_path / "gpu")
    assert gpu == pytest.approx(cpu, rel=LOSS_TOLERANCE)
    again = arguments("gpu", checkpoint__enable="true", checkpoint__load_step=3)
    assert losses(again, tmp_path / "gpu") == pytest.approx(gpu, rel=1e-6)
