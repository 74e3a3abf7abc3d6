"""A frozen base in the dtype of its files, and checkpoints without it: nothing is lost, and older runs go on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.kit import runs
from titan_hd.distributed.shards import base_parameters


def rewrite(file: Path, dtype: torch.dtype) -> None:
    save_file({name: weight.to(dtype) for name, weight in load_file(file).items()}, file)


@pytest.fixture
def argv(tmp_path: Path):
    """Options of a run of lora in bf16 on a model whose files are bf16."""
    runs.write_model(tmp_path / "model")
    runs.write_records(tmp_path / "records.jsonl")
    rewrite(tmp_path / "model" / "model.safetensors", torch.bfloat16)

    def options(dump: str, **overrides):
        values = {"adapter__method": "lora", "training__mixed_precision_param": "bfloat16"} | overrides
        return runs.options(tmp_path / "model", tmp_path / "records.jsonl", tmp_path / dump, **values)

    return options


OLD = {"training__master_dtype": "float32", "checkpoint__base": "full"}  # what the defaults were


@pytest.mark.parametrize(("method", "dtype"), [("lora", "bfloat16"), ("dora", "bfloat16"), ("hira", "float16")])
def test_nothing_is_lost(method: str, dtype: str, argv, workers, tmp_path: Path):
    """The weights are the files' either way: losses and merged weights are the same bit for bit."""
    rewrite(tmp_path / "model" / "model.safetensors", getattr(torch, dtype))
    fp32 = workers.run(2, runs.train, argv("fp32", adapter__method=method, **OLD))[0]
    saved = {"checkpoint__enable": "true", "checkpoint__interval": 100}
    half = workers.run(2, runs.train, argv("half", adapter__method=method, **saved))[0]
    assert half == fp32
    want = runs.exported(tmp_path / "fp32")
    assert all(torch.equal(weight, want[name]) for name, weight in runs.exported(tmp_path / "half").items())
    state = json.loads((tmp_path / "half" / "checkpoint" / "step-4" / "train_state.json").read_text())
    assert state["identity"]["training.master_dtype"] == dtype


def test_checkpoints_hold_the_adapters_alone_and_older_ones_go_on(argv, workers, tmp_path: Path):
    whole = workers.run(1, runs.train, argv("whole"))[0]
    saved = {"checkpoint__enable": "true", "checkpoint__interval": 1}
    sizes = {}
    for name, before in (("new", {}), ("old", OLD)):
        first = workers.run(1, runs.train, argv(name, **saved, **before), stop_after=2)[0]
        folder = tmp_path / name / "checkpoint"
        sizes[name] = sum(file.stat().st_size for file in (folder / "step-2").iterdir())
        assert first + workers.run(1, runs.train, argv(name, **saved))[0] == whole
        state = json.loads((folder / "step-4" / "train_state.json").read_text())
        kept = {"new": ("delta", "bfloat16"), "old": ("full", "float32")}
        assert (state["base"], state["identity"]["training.master_dtype"]) == kept[name]
    assert sizes["new"] < sizes["old"]


WHAT_CHANGES = {
    "hdpissa": {"proj"},
    "pissa": {"proj"},
    "q-alone": {"q_proj"},
    "lora": set(),
    "full": {"embed", "norm", "proj", "head"},
}
RUNS = {
    "hdpissa": {"adapter__method": "hdpissa", "hdpissa__num_adapters": 4},
    "pissa": {"adapter__method": "pissa"},
    "q-alone": {"adapter__method": "hdpissa", "adapter__target_modules": '["q_proj"]'},
    "lora": {},
    "full": {"adapter__method": "full"},
}


def dtypes(argv: list[str]) -> dict[str, torch.dtype]:
    run = runs.trainer(argv)
    run.train_step()
    held = {name: p.dtype for name, p in base_parameters(run.model)}
    run.close()
    return held


@pytest.mark.parametrize("name", RUNS)
def test_what_no_method_changes_is_held_as_the_files_have_it(name: str, argv, workers):
    """In the fp32 masters of what is changed nothing is saved; training.master_dtype = float32 is heeded."""
    for parameter, dtype in workers.run(1, dtypes, argv("dtypes", **RUNS[name]))[0].items():
        changed = any(part in parameter for part in WHAT_CHANGES[name])
        assert dtype == (torch.float32 if changed else torch.bfloat16), parameter
    explicit = argv("explicit", **RUNS[name], training__master_dtype="float32")
    assert set(workers.run(1, dtypes, explicit)[0].values()) == {torch.float32}


@pytest.mark.parametrize("name", ["hdpissa", "pissa", "q-alone"])
def test_nothing_is_lost_beside_weights_that_change(name: str, argv, workers, tmp_path: Path):
    """Losses and exported weights bit for bit, and the checkpoint of the one is resumed by the other."""
    fp32 = workers.run(2, runs.train, argv("fp32", **RUNS[name], training__master_dtype="float32"))[0]
    assert workers.run(2, runs.train, argv("auto", **RUNS[name]))[0] == fp32
    want = runs.exported(tmp_path / "fp32")
    assert all(torch.equal(weight, want[key]) for key, weight in runs.exported(tmp_path / "auto").items())
    saved = {**RUNS[name], "checkpoint__enable": "true"}
    for first, then in (("float32", "auto"), ("auto", "float32")):
        began = workers.run(2, runs.train, argv(first + then, **saved, training__master_dtype=first), stop_after=2)[0]
        assert began + workers.run(2, runs.train, argv(first + then, **saved, training__master_dtype=then))[0] == fp32


@pytest.mark.parametrize("changes", [{"adapter__method": "pissa"}, {"adapter__init": "olora"}])
def test_rounding_a_base_of_its_own_costs_no_training_but_the_exported_weights(changes, argv, workers, tmp_path: Path):
    """pissa and OLoRA: the compute rounds what it gathers, whatever the masters are; the merged weights are of
    W - s B A as it is held, so that they differ by bf16's rounding."""
    exact = workers.run(1, runs.train, argv("exact", **changes))[0]
    rounded = workers.run(1, runs.train, argv("rounded", training__master_dtype="bfloat16", **changes))[0]
    assert rounded == exact
    want, got = runs.exported(tmp_path / "exact"), runs.exported(tmp_path / "rounded")
    errors = [((got[name] - want[name]).norm() / want[name].norm()).item() for name in want]
    assert 1e-4 < max(errors) < 2**-8
