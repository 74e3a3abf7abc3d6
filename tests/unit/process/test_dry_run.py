"""job.dry_run, as the launcher does it: everything is checked, nothing starts, all faults come at once."""

from __future__ import annotations

import logging
import os
import pickle
import sys
import zlib
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata
from torch.distributed.fsdp import FSDPModule

from tests.kit import runs
from titan_hd import console
from titan_hd.checkpoint.folder import MANIFEST, CheckpointFolder
from titan_hd.components.assembly import assemble
from titan_hd.components.run_data import read_data
from titan_hd.config import manager
from titan_hd.preflight import plan_run, run_identity_of
from titan_hd.process import dry_run as module
from titan_hd.process import launch
from titan_hd.process.run_lock import HOLDER_FILE, LOCK_FILE, RunLock


@pytest.fixture
def ask(tmp_path: Path, monkeypatch, capsys):
    """Asks on one process whether a run of so many workers would start; (exit status, what it prints, error lines)."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 38}
    runs.write_model(tmp_path / "model", **sizes)
    runs.write_records(tmp_path / "records.jsonl")
    elastic = logging.getLogger("torch.distributed.elastic")
    before = elastic.handlers[:], elastic.level, elastic.propagate
    monkeypatch.setattr(launch, "start_workers", lambda *_: pytest.fail("a dry run starts nothing"))

    def dry_run(workers: int, *more: str, **overrides) -> tuple[int, str, list[str]]:
        options = runs.options(tmp_path / "model", tmp_path / "records.jsonl", tmp_path / "dump", **overrides)
        words = ["--nproc_per_node", str(workers), "--", *options, "--job.dry_run", *more]
        monkeypatch.setattr(sys, "argv", ["launch", *words])
        status = 0
        try:
            launch.main()
        except SystemExit as left:
            status = left.code
        said = capsys.readouterr()
        return status, said.out, [line for line in said.err.splitlines() if line.startswith("titan_hd: error: ")]

    with console.kept():
        yield dry_run
    elastic.handlers[:], elastic.level, elastic.propagate = before


@pytest.mark.parametrize(
    ("workers", "settings"),
    [
        (1, {}),
        (64, {"hdpissa__num_adapters": 8, "job__gpu_gib": 80}),
        (16, {"parallelism__data_parallel_replicate_degree": 2, "parallelism__tensor_parallel_degree": 2,
              "hdpissa__num_adapters": 4}),
        (8, {"adapter__method": "lora", "compile__enable": "true", "activation_checkpoint__mode": "selective"}),
        (4, {"adapter__method": "full", "validation__enable": "true", "data__validation": "{records}"}),
        (2, {"data__streaming": "true", "job__print_plan": "true"}),
    ],
)  # fmt: skip
def test_a_run_that_would_start(workers: int, settings: dict, ask, tmp_path: Path, monkeypatch):
    wrapped: list[tuple[int, FSDPModule]] = []

    def assembled(config, decoder, method, dims, untouched):
        wrapped.append((dims.world_size, assemble(config, decoder, method, dims, untouched).model))

    monkeypatch.setattr(module, "assemble", assembled)
    settings = {key: str(value).format(records=tmp_path / "records.jsonl") for key, value in settings.items()}
    status, out, errors = ask(workers, **settings)
    assert (status, errors) == (0, [])
    lines = out.splitlines()
    assert lines[0].startswith("titan_hd ")
    assert sum(line.startswith("  mesh ") for line in lines) == 1
    assert f"as rank 0 of {workers}" in " ".join(out.split())
    assert lines[-1] == "the run would start"
    assert ("update of " in out) == ("job__print_plan" in settings)
    assert "GPU of 80 GiB" in out or "job.gpu_gib" in out
    assert not (tmp_path / "dump").exists()
    ((size, model),) = wrapped
    assert size == workers, "a mesh of all of them, in this process"
    assert isinstance(model, FSDPModule)
    assert not dist.is_initialized()


def test_all_faults_at_once(ask, tmp_path: Path):
    path = tmp_path / "records.jsonl"
    path.write_text(path.read_text() + '{"input_ids": [1, 2], "labels": [1]}\n')
    (tmp_path / "dump").write_text("")
    status, out, errors = ask(2, job__gpu_gib=1)
    assert status == 2
    assert [line.removeprefix("titan_hd: error: ").partition(": ")[0] for line in errors] == [
        "job.dump_folder",
        f"{path}:25",
        "memory",
    ]
    assert "would start" not in out


def test_faults_of_the_plan_come_first(ask, tmp_path: Path):
    (tmp_path / "model" / "model.safetensors").unlink()
    status, _, errors = ask(3, training__global_batch_size=4, export__enable="false")
    assert status == 2
    assert len(errors) == 2
    assert ask(1, "--training.epochs", "1")[2] == [
        "titan_hd: error: training.steps: give either training.steps or training.epochs"
    ]


def test_what_is_missing_is_missing_in_spite_of_print_plan(ask):
    assert "data.train: is missing" in ask(1, "--job.print_plan", data__train="")[2][0]


def test_a_folder_that_cannot_be_written(ask, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    (line,) = ask(1, export__enable="false")[2]
    assert line == f"titan_hd: error: job.dump_folder: {tmp_path} cannot be written by this user; name another one"


def test_the_folder_of_another_run(ask, tmp_path: Path):
    """It is asked for without a trace: the lock and the name of its holder are the run's."""
    dump = tmp_path / "dump"
    lock = RunLock(dump)
    files = dump / LOCK_FILE, dump / HOLDER_FILE
    files[1].write_text("process 7 on another")
    before = [(path.stat().st_mtime_ns, path.read_text()) for path in files]
    (line,) = ask(1, export__enable="false")[2]
    assert line.startswith(f"titan_hd: error: job.dump_folder: another run writes to {dump} (process 7 on another); ")
    lock.release()
    assert ask(1, export__enable="false")[0] == 0
    assert [(path.stat().st_mtime_ns, path.read_text()) for path in files] == before
    assert sorted(dump.iterdir()) == sorted(files)


def test_a_folder_that_the_disk_refuses(ask, tmp_path: Path):
    """As the run says it, and once."""
    long = tmp_path / ("x" * 300) / "dump"
    (line,) = ask(1, job__dump_folder=long)[2]
    assert line == f"titan_hd: error: {long}: cannot be written: File name too long"
    lock = tmp_path / "dump" / LOCK_FILE
    lock.mkdir(parents=True)
    (line,) = ask(1)[2]
    assert line == f"titan_hd: error: {lock}: cannot be written: Is a directory"


def test_the_checkpoint_that_it_would_go_on_from(ask, tmp_path: Path):
    argv = runs.options(tmp_path / "model", tmp_path / "records.jsonl", tmp_path / "dump", checkpoint__enable="true")
    plan = plan_run(manager.load(argv), 2)
    identity = run_identity_of(plan, read_data(plan.config, plan.decoder.vocab_size, 2).summary)
    folder = CheckpointFolder(tmp_path / "dump" / "checkpoint", 0)

    def save(step: int, *tensors: str) -> Path:
        content = pickle.dumps(Metadata({name: BytesStorageMetadata() for name in tensors}))
        (folder.start(step) / ".metadata").write_bytes(content)
        state = {"step": step, "base": "full", "identity": identity, "config": ""}
        folder.publish(step, state, {".metadata": {"size": len(content), "crc32": zlib.crc32(content)}})
        return folder.path(step)

    def found(**settings) -> str:
        status, out, errors = ask(2, checkpoint__enable="true", **settings)
        assert (status, errors) == (0, [])
        return " ".join(out.split())

    path = save(3)
    assert f"from {path} " in found()
    (line,) = ask(2, checkpoint__enable="true", training__seed=7)[2]
    assert line.startswith("titan_hd: error: training.seed: the checkpoint has 42, this run 7")
    (line,) = ask(2, checkpoint__enable="true", training__steps=2)[2]
    assert "2 steps, but the checkpoint to resume from has 3" in line
    between_folds = save(4, "unfolded.rates")
    assert f"from {between_folds} " in found(training__steps=5)
    (line,) = ask(2, checkpoint__enable="true", training__steps=4)[2]
    assert line.startswith("titan_hd: error: training.steps, training.epochs: the checkpoint of step 4, with")

    # The run passes over what is damaged.
    table = between_folds / ".metadata"
    table.write_bytes(table.read_bytes()[:-1])
    (save(5) / MANIFEST).unlink()
    assert f"from {path} " in found(training__steps=4)
    (path / ".metadata").unlink()
    (line,) = ask(2, checkpoint__enable="true")[2]
    assert line.startswith(
        f"titan_hd: error: {path / '.metadata'}: cannot be read: No such file or directory (no whole"
    )
