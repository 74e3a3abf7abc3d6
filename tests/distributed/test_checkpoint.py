"""Checkpoints of whole runs: damage, other numbers of workers, deltas, full disks, and wandb's run."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import tarfile
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.kit import runs
from tests.kit.recovery import records, tiny_run
from titan_hd.checkpoint.folder import CheckpointFolder
from titan_hd.checkpoint.pretrained import load_pretrained, load_sharded
from titan_hd.components.validation import Validator
from titan_hd.errors import UserError

# Sums over other numbers of workers, in fp32, through Adam: relative to the change of W.
RESHARDED_TOLERANCE = 1e-5


def train_or_say(argv: list[str], stop_after: int | None = None) -> list[float] | str:
    try:
        return runs.train(argv, stop_after)
    except UserError as error:
        return str(error)


def same(first: Path, second: Path) -> bool:
    got, want = runs.exported(first), runs.exported(second)
    return got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


def choose_with_each_damage(folder: Path) -> list[tuple[str, int | None, list[str]]]:
    """What is chosen when one file of step-4 is cut off at the end, emptied, has one bit changed, is gone; for every
    file: (its path, the step, the warnings). At last, when nothing whole is left: (the error, None, the warnings)."""
    import torch.distributed as dist

    import titan_hd.checkpoint.checkpointer as checkpoint

    checkpointer = checkpoint.Checkpointer(CheckpointFolder(folder, 2), False, 60)
    said: list[str] = []

    def choose(path: Path, content: bytes | None) -> int | None:
        dist.barrier()
        if dist.get_rank() == 0:
            path.unlink() if content is None else path.write_bytes(content)
        dist.barrier()
        said.clear()
        return checkpointer.choose(-1)

    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.logger, "warning", lambda text, *args: said.append(text % args))
        for path in sorted((folder / "step-4").iterdir()):
            content = path.read_bytes()
            middle = len(content) // 2
            flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
            for damaged in (content[:-1], b"", flipped, None):
                found.append((str(path), choose(path, damaged), list(said)))
            assert choose(path, content) == 4
        choose(folder / "step-4" / "manifest.json", None)
        try:
            choose(next((folder / "step-2").glob("*.distcp")), b"")
        except UserError as error:
            found.append((str(error), None, list(said)))
    return found


def test_any_damage_is_noticed_and_the_checkpoint_before_is_used(workers, tmp_path: Path):
    workers.run(2, runs.train, tiny_run(tmp_path, "dump", training__steps=4, checkpoint__interval=2))
    first, second = workers.run(2, choose_with_each_damage, tmp_path / "dump" / "checkpoint")
    assert first == second, "every rank knows the same"
    *damaged, (error, _, _) = first
    assert len(damaged) == 4 * 5, "two ranks' shards, table of contents, state, manifest"
    for path, step, said in damaged:
        assert step == 2, path
        assert any(path in line for line in said), said
    assert "no whole checkpoint is left: name another checkpoint.load_step, or 0 to start anew" in error


@pytest.mark.parametrize("base", ["full", "delta"])
def test_the_number_of_workers_changes_twice(workers, tmp_path: Path, base: str):
    """4 -> 1 -> 2 (as HSDP): the losses and the change of W of a run that stayed on 2."""
    changes = {"hdpissa__num_adapters": 4, "training__global_batch_size": 4, "training__steps": 9}
    changes |= {"checkpoint__base": base, "adapter__dropout": 0}
    want = workers.run(2, runs.train, tiny_run(tmp_path, "undisturbed", **changes))[0]
    argv = tiny_run(tmp_path, "dump", **changes)
    losses = workers.run(4, runs.train, argv, 3)[0]
    losses += workers.run(1, runs.train, argv, 3)[0]
    losses += workers.run(2, runs.train, [*argv, "--parallelism.data_parallel_replicate_degree=2"])[0]
    assert losses == pytest.approx(want, rel=RESHARDED_TOLERANCE)
    start = runs.load_file(tmp_path / "model" / "model.safetensors")
    got, reference = runs.exported(tmp_path / "dump"), runs.exported(tmp_path / "undisturbed")
    assert max(runs.delta_error(got, reference, start).values()) < RESHARDED_TOLERANCE


def weights_of_shards(path: Path) -> dict[str, torch.Tensor]:
    """The weights of a model that is loaded in shards."""
    model, _, group = load_sharded(path, "", torch.float32, torch.device("cpu"))
    assert group.size() == 2
    assert all(p.to_local().numel() < p.numel() for p in model.parameters())
    return {name: p.full_tensor() for name, p in model.named_parameters()}


def test_a_delta_leaves_the_base_models_weights_to_it(workers, tmp_path: Path):
    """Smaller, the same run bit for bit, open to the tools; and of no use with another base model."""
    sizes = {}
    for base in ("full", "delta"):
        argv = tiny_run(tmp_path, base, checkpoint__base=base, training__steps=6)
        workers.run(2, runs.train, argv, 3)
        files = (tmp_path / base / "checkpoint" / "step-3").glob("*.distcp")
        sizes[base] = sum(path.stat().st_size for path in files)
        workers.run(2, runs.train, argv)
    assert same(tmp_path / "delta", tmp_path / "full")
    embeddings = 2 * 50 * 22 * 4  # with the head; each of them in one piece per rank
    assert sizes["full"] - sizes["delta"] > embeddings
    step = tmp_path / "delta" / "checkpoint" / "step-6"
    model, _ = load_pretrained(step, "", torch.float32, torch.device("cpu"))
    exported = runs.exported(tmp_path / "delta")
    assert all(torch.equal(p, exported[name]) for name, p in model.named_parameters())
    for place in (step, tmp_path / "delta" / "hf"):
        for found in workers.run(2, weights_of_shards, place):
            assert all(torch.equal(found[name], exported[name]) for name, _ in model.named_parameters())

    runs.write_model(tmp_path / "model", seed=1)
    with pytest.raises(UserError, match=r"its weights are not those that .*step-6 builds on"):
        load_pretrained(step, "", torch.float32, torch.device("cpu"))
    for said in workers.run(2, train_or_say, [*argv, "--training.steps=8", '--checkpoint.allow_mismatch=["weights"]']):
        assert said.startswith("weights: the checkpoint has ")


def test_what_may_differ_and_what_may_not(workers, tmp_path: Path):
    argv = tiny_run(tmp_path, "dump", training__steps=3)
    workers.run(2, runs.train, argv)
    runs.write_records(tmp_path / "records.jsonl", count=25)
    argv += ["--training.steps=6", "--optimizer.lr=1e-3"]
    for changes, line in (
        ((), "data.train: the checkpoint has '24 records of format tokens, "),
        (("--hdpissa.num_adapters=1", '--checkpoint.allow_mismatch=["data.train"]'), "hdpissa.num_adapters: the check"),
        (("--adapter.rank=2", '--checkpoint.allow_mismatch=["data.train"]'), "adapter.rank: the checkpoint has 1, th"),
    ):
        assert [said[: len(line)] for said in workers.run(2, train_or_say, [*argv, *changes])] == [line] * 2
    (losses, _) = workers.run(2, train_or_say, [*argv, '--checkpoint.allow_mismatch=["data.train"]'])
    assert len(losses) == 3


def test_a_run_that_went_back_and_was_killed_goes_on_from_there(workers, tmp_path: Path):
    """Before its first save: later checkpoints are no longer the run's, and metrics.jsonl gets no gap. Nor does a run
    with fewer steps than its checkpoint export that as if it were its own."""
    argv = tiny_run(tmp_path, "dump", training__steps=6)
    workers.run(1, runs.train, argv)
    for said in workers.run(1, train_or_say, [*argv, "--training.steps=5"]):
        assert said.startswith("training.steps, training.epochs: 5 steps, but the checkpoint to resume from has 6; ")
    workers.run(1, start_alone, [*argv, "--checkpoint.load_step=3"])
    names = {path.name for path in (tmp_path / "dump" / "checkpoint").iterdir()}
    assert names == {"step-3", "abandoned-6"}
    assert len(workers.run(1, runs.train, argv)[0]) == 3
    assert [record["step"] for record in records(tmp_path / "dump")] == list(range(1, 7))


def save_and_fail(argv: list[str]) -> dict[str, object]:
    """Two saves, one in which the disk of rank 2 is full, one with a bug there. What this rank saw."""
    import titan_hd.checkpoint.checkpointer as checkpoint

    run = runs.trainer(argv)
    saver, told = run.checkpointer, []
    gather, write = checkpoint.gather_on_rank_zero, checkpoint.write_pieces

    def gather_and_note(value: bytes, group) -> list[bytes]:
        told.append(pickle.loads(value).entries)
        return gather(value, group)

    def failing(error: Exception):
        def write_or_fail(folder, rank, pieces):
            if rank == 2:
                raise error
            return write(folder, rank, pieces)

        return write_or_fail

    seen: dict[str, object] = {"failures": []}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "gather_on_rank_zero", gather_and_note)
        for error in (None, None, OSError(28, "No space left on device")):
            run.train_step()
            if error:
                patch.setattr(checkpoint, "write_pieces", failing(error))
            run.save()
            seen["failures"].append(saver.wait())
        patch.setattr(checkpoint, "write_pieces", failing(ValueError("a bug")))
        run.train_step()
        run.save()
        with pytest.raises(RuntimeError) as caught:
            saver.wait()
    run.close()
    sent = [entries if entries is None else len(entries) for entries in told]
    return seen | {
        "bug": str(caught.value),
        "writers": saver.writers,
        "sent": sent,
        "copies": len(saver._host._buffers),
    }


def test_a_rank_without_anything_of_its_own_does_nothing(workers, tmp_path: Path):
    """2 replicas x 2 shards, 2 holders of adapters on 2 ranks each: rank 3 has nothing that no other has before it, but
    knows how a save went. What the others have to say of where things lie they say once."""
    degrees = {"parallelism__data_parallel_replicate_degree": 2, "training__global_batch_size": 4}
    argv = tiny_run(tmp_path, "dump", training__steps=9, checkpoint__keep_latest_k=9, **degrees)
    seen = workers.run(4, save_and_fail, argv)
    folder = tmp_path / "dump" / "checkpoint"
    full = f"{folder}/step-3: the checkpoint cannot be saved: No space left on device (on rank 2); earlier ones are un"
    for one in seen:
        assert one["writers"] == [0, 1, 2]
        assert one["failures"][:2] == [None, None]
        assert one["failures"][2].startswith(full)
        assert one["bug"] == "the checkpoint of step 4: RuntimeError: on rank 2: ValueError: a bug"
    assert (seen[3]["sent"], seen[3]["copies"]) == ([], 0)
    adapters = 7 * 2 * 3  # A or B of 7 layers of a block: the factor, two moments
    weights = 12  # by kind, those outside of blocks among them
    assert seen[2]["sent"] == [adapters, None, None, None]
    assert seen[0]["sent"] == [weights + adapters + 1, None, None, None]
    for step in (1, 2):
        files = {path.name for path in (folder / f"step-{step}").iterdir()}
        assert {name for name in files if name.endswith(".distcp")} == {f"__{rank}_0.distcp" for rank in range(3)}
    assert {path.name for path in folder.iterdir()} >= {"step-1", "step-2"}
    assert not (folder / "step-3").exists()
    assert not list(folder.glob("step-3.partial"))


# What `old_checkpoints` were written with, by two workers after the third of six steps.
SMALL = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 10, "num_attention_heads": 2, "head_dim": 4}
OLD = {"hdpissa": {"hdpissa__num_adapters": 2}, "lora": {"adapter__method": "lora"}}


@pytest.mark.parametrize("method", OLD)
def test_a_checkpoint_from_before_there_were_stacks(workers, tmp_path: Path, method: str):
    """Of torch.distributed.checkpoint's own planner: a tensor for each layer, a count of steps for each parameter."""
    runs.write_model(tmp_path / "model", **SMALL)
    runs.write_records(tmp_path / "records.jsonl", vocab_size=20)
    shared = {"checkpoint__enable": "true", "training__steps": 6, "training__global_batch_size": 4, **OLD[method]}
    argv = {
        name: runs.options(tmp_path / "model", tmp_path / "records.jsonl", tmp_path / name, **shared)
        for name in ("old", "new")
    }
    want = workers.run(2, runs.train, argv["new"])[0]
    (tmp_path / "old").mkdir()
    with tarfile.open(Path(__file__).parent / "old_checkpoints" / f"{method}.tar.xz") as archive:
        known = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python 3.11.4
        archive.extractall(tmp_path / "old" / "checkpoint", **known)
    assert workers.run(2, runs.train, argv["old"])[0] == pytest.approx(want[3:], rel=1e-6)
    got, reference = runs.exported(tmp_path / "old"), runs.exported(tmp_path / "new")
    start = runs.load_file(tmp_path / "model" / "model.safetensors")
    assert max(runs.delta_error(got, reference, start).values()) < RESHARDED_TOLERANCE


def fail_while_saving(argv: list[str]) -> bool:
    """A loss that is no number, in the step after a slow save; whether the checkpoint is there when that is said."""
    from titan_hd.train import Trainer

    step, publish = Trainer.train_step, CheckpointFolder.publish

    def failing(self):
        if self.step == 3:
            raise FloatingPointError("step 4: the gradient norm is nan")
        return step(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", failing)
        patch.setattr(CheckpointFolder, "publish", lambda *args: time.sleep(1) or publish(*args))
        with pytest.raises(FloatingPointError):
            runs.train(argv)
        folder = next(a for a in argv if a.startswith("--job.dump_folder=")).partition("=")[2]
        return (Path(folder) / "checkpoint" / "step-3").exists()


def test_a_run_that_fails_finishes_the_save_that_is_under_way(workers, tmp_path: Path):
    assert workers.run(2, fail_while_saving, tiny_run(tmp_path, "dump", training__steps=6)) == [True, True]


def train_beside_a_dead_disk(argv: list[str]) -> tuple[str, int, bool]:
    """From the save of step 6 on, the disk of rank 2 does not answer; what this rank says, after how many steps, and
    whether others can go on to talk over the groups of the checkpoints."""
    answers, fsync = threading.Event(), os.fsync

    def dead(descriptor: int) -> None:
        if run.step >= 6 and torch.distributed.get_rank() == 2:
            answers.wait()
        fsync(descriptor)

    run = runs.trainer(argv)
    run.add_hook(1, lambda _: run.save() if run.step == 6 else time.sleep(0.03))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("titan_hd.checkpoint.folder.os.fsync", dead)
        with pytest.raises(UserError) as caught:
            run.train()
    whole = run.checkpointer.choose(-1) == 3
    answers.set()
    run.close()
    return str(caught.value), run.step, whole


@pytest.mark.parametrize(
    ("mode", "interval"),
    [("async", 1000), pytest.param("async", 3, marks=pytest.mark.slow), ("disabled", 3)],
    ids=["nobody_waits", "the_next_save_waits", "in_the_foreground"],
)
def test_a_disk_that_does_not_answer_ends_the_run_and_is_named(workers, tmp_path: Path, mode: str, interval: int):
    """Not by a time-out of gloo, of which nobody knows what it waited for."""
    argv = tiny_run(tmp_path, "dump", training__steps=3, checkpoint__keep_latest_k=9)
    workers.run(4, runs.train, argv)
    changes = {"checkpoint__async_mode": mode, "checkpoint__interval": interval, "training__steps": 1000}
    argv = tiny_run(tmp_path, "dump", comm__save_timeout_seconds=2, **changes)
    folder = tmp_path / "dump" / "checkpoint"
    ends = workers.run(4, train_beside_a_dead_disk, argv)
    assert len(set(ends)) == 1
    said, step, whole = ends[0]
    start = f"{folder}/step-6: the checkpoint cannot be saved: rank 2 has waited for "
    middle = r"\d s of 2 s \(comm.save_timeout_seconds\) for its disk, in titan_hd/checkpoint/folder.py:\d+; "
    assert re.fullmatch(re.escape(start) + middle + "earlier ones are untouched", said)
    assert 6 < step < 200
    assert whole


def start_alone(argv: list[str]) -> None:
    """All of a run but its steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("titan_hd.train.Trainer.train", lambda self: 0)
        runs.train(argv)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB; a checkpoint of the tiny run takes a quarter of it."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    mount = subprocess.run(command, capture_output=True, text=True, check=False)
    if mount.returncode:
        pytest.skip(f"no file system can be mounted: {mount.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def train_on_a_disk_that_fills(argv: list[str]) -> str:
    """As train_or_say; the disk has room when the save begins, and none when it is written."""
    plenty = types.SimpleNamespace(disk_usage=lambda _: types.SimpleNamespace(free=2**40))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("titan_hd.checkpoint.writer.shutil", plenty)
        return train_or_say(argv)


@pytest.mark.parametrize("mode", ["async", "disabled"])
@pytest.mark.parametrize("train", [train_or_say, train_on_a_disk_that_fills])
def test_a_full_disk_costs_nothing_that_was_there(workers, tmp_path: Path, small_disk: Path, mode: str, train):
    """Saves fail and training goes on; the model is exported, the run fails at its end, the old checkpoint is whole."""
    changes = {"checkpoint__keep_latest_k": 9, "checkpoint__async_mode": mode, "training__steps": 9}
    argv = tiny_run(tmp_path, "small/dump", **changes)
    folder = small_disk / "dump" / "checkpoint"
    workers.run(2, train_or_say, argv, 3)
    free = shutil.disk_usage(small_disk).free
    (small_disk / "filler").write_bytes(bytes(free - 200 * 1024))  # enough for metrics and export, not for a save
    for said in workers.run(2, train, argv):
        assert said.startswith(f"{folder}/step-9: the checkpoint cannot be saved: No space left on device"), said
    assert [path.name for path in folder.iterdir()] == ["step-3"]
    assert [record["step"] for record in records(small_disk / "dump")][-6:] == list(range(4, 10))
    first = runs.exported(small_disk / "dump")
    (small_disk / "filler").unlink()
    assert len(workers.run(2, train_or_say, argv)[0]) == 6, "the same command goes on from step 3"
    second = runs.exported(small_disk / "dump")
    assert all(torch.equal(first[name], second[name]) for name in first)


def start_wandb(argv: list[str]) -> list[str | None]:
    """Train on rank 0 with a stand-in for wandb; the identifiers that it was started with."""
    from titan_hd.components.wandb_run import WandbRun

    starts = []

    def start(_, folder, run_id, mode, words):
        starts.append(run_id)
        nothing = lambda *args, **kwargs: None  # noqa: E731
        return types.SimpleNamespace(id=run_id or "abc", step=100, dir=folder, log=nothing, finish=nothing)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WandbRun, "_start", start)
        runs.train(argv)
    return starts


def test_wandb_goes_on_with_the_same_run(workers, tmp_path: Path):
    """Its identifier comes back out of the checkpoint, also after a part of the run without wandb."""
    argv = tiny_run(tmp_path, "dump", metrics__enable_wandb="true", export__enable="false")
    starts = [
        workers.run(1, start_wandb, [*argv, f"--training.steps={steps}", f"--metrics.enable_wandb={enable}"])[0]
        for steps, enable in ((3, "true"), (6, "true"), (9, "false"), (12, "true"))
    ]
    assert starts == [[None], ["abc"], [], ["abc"]]
    assert [record["step"] for record in records(tmp_path / "dump")] == list(range(1, 13))
    state = json.loads((tmp_path / "dump" / "checkpoint" / "step-12" / "train_state.json").read_text())
    assert state["trackers"] == {"wandb": "abc"}


def train_on_losses(argv: list[str], losses: list[float], fails_after: int = -1) -> tuple[list[int], int]:
    """Train with these validation losses after steps 0, 1, ..., of which rank 1 sees the opposite; the steps that were
    trained, and the exit status. A run that fails has what it had saved."""
    from titan_hd.train import Trainer

    steps, now = [], 0
    train_step, validate = Trainer.train_step, Trainer.validate

    def stepping(self):
        if self.step == fails_after:
            raise FloatingPointError("this run is to fail")
        steps.append(self.step + 1)
        return train_step(self)

    def validating(self):
        nonlocal now
        now = self.step
        validate(self)

    def measured(self, model, one):
        return {f"validation_loss{one.suffix}": losses[now] if self.dims.rank == 0 else -losses[now]}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", stepping)
        patch.setattr(Trainer, "validate", validating)
        patch.setattr(Validator, "_measure", measured)
        run = runs.trainer(argv)
        try:
            status = run.train()
        except FloatingPointError:
            status = 1
        run.close()
    return steps, status


def test_the_best_checkpoint_and_an_early_stop(workers, tmp_path: Path):
    """By a second set; the same after a failure between two checkpoints. What is kept is the run of two steps."""
    validation = {
        "validation__enable": "true",
        "validation__freq": 1,
        "validation__patience": 3,
        "data__validation": json.dumps([{"name": n, "path": str(tmp_path / "records.jsonl")} for n in ("a", "b")]),
        "checkpoint__keep_best": "validation_loss/b",
        "checkpoint__keep_latest_k": 1,
    }
    losses = [1.0, 3.0, 2.0, 2.5, 2.0, 2.25, 1.0, 1.0, 1.0, 1.0]
    argv = tiny_run(tmp_path, "dump", training__steps=9, **validation)
    folder = tmp_path / "dump" / "checkpoint"
    assert workers.run(2, train_on_losses, argv, losses, 4) == [([1, 2, 3, 4], 1)] * 2
    assert sorted(path.name for path in folder.iterdir()) == ["best.json", "step-2", "step-3"]
    assert workers.run(2, train_on_losses, argv, losses) == [([4, 5], 0)] * 2
    assert sorted(path.name for path in folder.iterdir()) == ["best.json", "step-2", "step-5"]
    assert json.loads((folder / "best.json").read_text()) == {"step": 2, "metric": "validation_loss/b", "value": 2.0}
    assert runs.exported(tmp_path / "dump").keys(), "an early end is an end"
    assert workers.run(2, train_on_losses, argv, losses) == [([], 0)] * 2, "it has ended"
    assert [record["step"] for record in records(tmp_path / "dump") if "loss" in record] == [1, 2, 3, 4, 5]
    workers.run(2, runs.train, tiny_run(tmp_path, "two", training__steps=2, checkpoint__enable="false"))
    model, _ = load_pretrained(folder / "step-2", "", torch.float32, torch.device("cpu"))
    two_steps = runs.exported(tmp_path / "two")
    assert all(torch.equal(p, two_steps[name]) for name, p in model.named_parameters())
