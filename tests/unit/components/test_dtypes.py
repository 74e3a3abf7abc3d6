"""What "auto" stands for in training.mixed_precision_param, training.master_dtype and checkpoint.base."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from titan_hd.components import dtypes
from titan_hd.components.dtypes import dtype_warnings, has_bfloat16, resolve_dtypes
from titan_hd.config.job_config import JobConfig

BF16 = torch.bfloat16


def resolved(
    method: str = "lora", device: str = "cuda", files: torch.dtype | None = BF16, saved: dict | None = None, **training
) -> tuple[str, str, str]:
    config = JobConfig()
    config.adapter.method, config.model.hf_assets_path = method, "model"
    for key, value in training.items():
        setattr(config.training, key, value)
    c = resolve_dtypes(config, device, files, saved)
    assert config.checkpoint.base == "auto", "the given configuration stays as it is"
    return c.training.mixed_precision_param, c.training.master_dtype, c.checkpoint.base


def test_a_frozen_base_is_as_its_files_have_it():
    assert resolved() == ("bfloat16", "bfloat16", "delta")
    assert resolved(files=torch.float16) == ("bfloat16", "float16", "delta")
    assert resolved(files=torch.float32) == ("bfloat16", "float32", "delta")
    assert resolved(files=None) == ("bfloat16", "float32", "delta")
    assert resolved(mixed_precision_param="float32") == ("float32", "float32", "delta")


def test_a_base_that_the_method_changes_stays_exact():
    assert resolved("pissa") == ("bfloat16", "float32", "delta")


@pytest.mark.parametrize("method", ["full", "hdpissa"])
def test_what_is_trained_stays_fp32_and_whole(method: str):
    assert resolved(method) == ("bfloat16", "float32", "full")


def test_what_is_said_stays():
    assert resolved(master_dtype="float32")[1] == "float32"
    assert resolved("hdpissa", master_dtype="bfloat16")[1] == "bfloat16"


def test_a_run_that_resumes_keeps_what_its_checkpoint_has():
    saved = {"base": "full", "identity": {"training.master_dtype": "float32"}}
    assert resolved(saved=saved) == ("bfloat16", "float32", "full")


def test_random_weights_have_no_base_to_come_back_to():
    config = JobConfig()
    config.adapter.method, config.model.flavor = "lora", "8B"
    assert resolve_dtypes(config, "cuda", None, None).checkpoint.base == "full"


@pytest.mark.parametrize(("instructions", "fast"), [({"avx512_bf16": True}, True), ({"avx512_bf16": False}, False)])
def test_cpus_say_what_they_can(instructions: dict[str, bool], fast: bool):
    with mock.patch.object(torch.cpu, "get_capabilities", return_value=instructions, create=True):
        assert has_bfloat16("cpu") == fast
        assert has_bfloat16("cuda")


def test_older_gpus_have_none():
    config = JobConfig()
    config.training.mixed_precision_param = "bfloat16"
    with (
        mock.patch.object(torch.cuda, "is_available", return_value=True),
        mock.patch.object(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation),
    ):
        assert resolved(device="cuda")[0] == "float32"
        assert dtype_warnings(config, "cuda")[0].startswith("training.mixed_precision_param: this GPU has no units for")


def test_a_slow_choice_is_warned_about():
    config = JobConfig()
    with mock.patch.object(dtypes, "has_bfloat16", lambda device: device == "cuda"):
        assert resolved(device="cpu") == ("float32", "float32", "delta")
        assert dtype_warnings(config, "cpu") == []
        config.training.mixed_precision_param = "bfloat16"
        (line,) = dtype_warnings(config, "cpu")
        assert line.startswith("training.mixed_precision_param: this CPU has no instructions")
        assert dtype_warnings(config, "cuda") == []
