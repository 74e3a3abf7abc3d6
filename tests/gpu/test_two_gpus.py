"""On two CUDA devices: `./run_tests.sh -m gpu`. What nccl carries between workers is what one worker computes."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from tests.kit import runs
from tests.kit.commands import REPOSITORY

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices"),
]
# fp32 on both, in another order of sums; Adam amplifies it over the steps.
LOSS_TOLERANCE = 1e-4
# The exported weights after six steps, of which Adam amplifies the order of sums.
WEIGHT_TOLERANCE = 1e-3


@pytest.fixture
def arguments(tmp_path: Path):
    sizes = {"hidden_size": 64, "head_dim": 16, "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 52}
    runs.write_model(tmp_path / "model", **sizes)
    runs.write_records(tmp_path / "records.jsonl", count=60)

    def options(dump: str, **changes) -> list[str]:
        values = {"hdpissa__num_adapters": 4, "training__global_batch_size": 8, "training__steps": 6} | changes
        return runs.options(tmp_path / "model", tmp_path / "records.jsonl", tmp_path / dump, **values)

    return options


def losses(options: list[str], workers: int, **environment: str) -> list[float]:
    command = [str(REPOSITORY / "run_train.sh"), "--config", "/dev/null", *options]
    subprocess.run(command, env={**os.environ, "NGPU": str(workers), **environment}, check=True)
    (dump,) = (Path(o.partition("=")[2]) for o in options if o.startswith("--job.dump_folder="))
    return [json.loads(line)["loss"] for line in (dump / "metrics.jsonl").read_text().splitlines()]


CHANGES = {
    "factors": {"hdpissa__exchange": "factors"},
    "dense": {"hdpissa__exchange": "dense"},
    "shared adapter": {"hdpissa__num_adapters": 1},
    "all samples": {"hdpissa__samples": "all"},
    "local steps": {"hdpissa__local_steps": 2},
    "slices anew": {"hdpissa__refresh_steps": 2, "hdpissa__factor_scale": "unit"},
    "int8": {"hdpissa__exchange_dtype": "int8"},
    "int8, local steps, slices anew": {
        "hdpissa__exchange_dtype": "int8",
        "hdpissa__local_steps": 2,
        "hdpissa__refresh_steps": 4,
    },
    "gathered once": {"parallelism__fsdp_reshard_after_forward": "never"},
    "hsdp": {"parallelism__data_parallel_replicate_degree": 2},
    "tp": {"parallelism__tensor_parallel_degree": 2},
    "compiled": {"compile__enable": "true", "activation_checkpoint__mode": "selective"},
    "bf16 masters": {"training__master_dtype": "bfloat16"},
    "lora": {"adapter__method": "lora"},
    "full": {"adapter__method": "full"},
}


@pytest.mark.parametrize("name", CHANGES)
def test_two_gpus_equal_one_and_two_gloo_workers(name: str, arguments, tmp_path: Path):
    changes = CHANGES[name]
    alone = {key: value for key, value in changes.items() if not key.startswith("parallelism__data")}
    alone |= {"parallelism__tensor_parallel_degree": 1}
    one, two = losses(arguments("one", **alone), 1), losses(arguments("two", **changes), 2)
    gloo = losses(arguments("gloo", **changes), 2, CUDA_VISIBLE_DEVICES="")
    assert two == pytest.approx(one, rel=LOSS_TOLERANCE)
    assert two == pytest.approx(gloo, rel=LOSS_TOLERANCE)
    want = runs.exported(tmp_path / "one")
    for key, weight in runs.exported(tmp_path / "two").items():
        torch.testing.assert_close(weight, want[key], rtol=WEIGHT_TOLERANCE, atol=WEIGHT_TOLERANCE)


def test_a_background_save_resumes_on_another_number_of_gpus(arguments):
    saved = {"checkpoint__enable": "true", "checkpoint__interval": 3, "checkpoint__async_mode": "async"}
    whole = losses(arguments("run", **saved), 2)
    assert losses(arguments("run", **saved, checkpoint__load_step=3), 1) == pytest.approx(whole, rel=LOSS_TOLERANCE)
