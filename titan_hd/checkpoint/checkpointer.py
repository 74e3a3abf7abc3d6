"""Checkpoints through torch.distributed.checkpoint: complete or absent, written in the background, loaded on any mesh.

A checkpoint is a folder `step-N` with DCP's files (weights, fixed factors and optimizer moments as DTensors),
`train_state.json` (step, runs of the trackers, identity, resolved configuration) and `manifest.json` (size and checksum
of every file). The data cursor and the learning rate are functions of the step, random numbers of (seed, step, sample):
none of them needs saving. Nor do dA and dB, which are zero after a fold; what is in them otherwise is saved: residuals
that int8 leaves, and local steps that no fold has taken yet.

A save, told in order: wait for the save before; copy the shards to the host (training goes on from here, if it is
asynchronous); every rank writes its shards to `step-N.partial`, a checksum beside, and waits for its disk; rank 0 gets
the checksums, writes table of contents, state and manifest, and renames the folder; what is then too old is purged. The
ranks talk over a group of their own, so that a thread may do it. Whatever fails on any rank (a full disk) fails on all,
and leaves nothing behind.

DCP's `.metadata` is a pickle: `checkpoint.reader` reads it without running the code in it.
"""

from __future__ import annotations

import copy
import datetime
import logging
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from titan_hd.checkpoint.folder import CheckpointFolder, Files, damage, read_manifest, read_train_state
from titan_hd.checkpoint.reader import CheckpointReader
from titan_hd.checkpoint.writer import CheckpointWriter
from titan_hd.components.best_validation import Best
from titan_hd.console import Progress
from titan_hd.distributed.collectives import on_rank_zero
from titan_hd.distributed.watch import enter_phase
from titan_hd.errors import UserError
from titan_hd.files import folder_size, shown_size

logger = logging.getLogger("titan_hd")

T = TypeVar("T")


class HostCopies:
    """Copies of tensors on the host. Tensors that lie on the host already are copied too: the training changes them in
    place. The buffers, pinned where there is a GPU, are kept for the next save. (DCP's own stager fails on DTensors
    whose storage is wrapped.)"""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def take(self, values: dict[str, Any]) -> dict[str, Any]:
        """The same values as they are now; DTensors keep mesh and placements. Overwrites what was taken before."""
        taken = {name: self._take(name, value) for name, value in values.items()}
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return taken

    def _take(self, name: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return copy.deepcopy(value)
        local = value.to_local() if isinstance(value, DTensor) else value
        buffer = self._buffers.get(name)
        if buffer is None or (buffer.shape, buffer.dtype) != (local.shape, local.dtype):
            buffer = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
            self._buffers[name] = buffer
        buffer.copy_(local, non_blocking=True)
        return DTensor(buffer, value._spec, requires_grad=False) if isinstance(value, DTensor) else buffer


class Checkpointer:
    """Saves to and loads from `folder`. Collective: every rank calls every method, `warn_of_failure` apart.

    asynchronous: a save returns when the shards are copied to the host; the rest is done by a thread. One save is under
    way at a time.
    """

    def __init__(self, folder: Path, keep_latest_k: int, asynchronous: bool, timeout_seconds: float):
        self.files = CheckpointFolder(folder, keep_latest_k)
        # Its own time-out: the slowest disk may take longer than any collective of the training.
        timeout = datetime.timedelta(seconds=timeout_seconds)
        group = dist.new_group(backend="gloo", timeout=timeout, group_desc="checkpoints")
        assert isinstance(group, dist.ProcessGroup)  # of all ranks
        self.group = group
        self.last_step: int | None = None  # of the last save, whatever became of it
        self._failure: str | None = None
        self._pending: Future[str | None] | None = None
        self._executor = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self._host = HostCopies()

    # -------------------------------------------------------------------------------------------------------- saving

    def save(self, step: int, tensors: dict[str, Any], train_state: dict[str, Any], best: Best | None = None) -> None:
        """Save `step-N`, or begin to. `wait` and `warn_of_failure` say how it went. best: as for
        `CheckpointFolder.publish`."""
        start = time.perf_counter()
        self.wait()
        self.warn_of_failure()
        self.last_step = step
        if not self._executor:
            with self._writing(step, tensors):
                self._failure = self._write(step, tensors, train_state, best, start)
            return
        staged = self._host.take(tensors)
        logger.info("checkpoint of step %d: training stopped for %.3f s", step, time.perf_counter() - start)
        self._pending = self._executor.submit(self._write, step, staged, train_state, best, start)

    def wait(self) -> str | None:
        """Wait for the save that is under way. Returns why the last one failed, None if it did not."""
        if self._pending:
            with Progress("waiting for the last checkpoint to be written", shown=dist.get_rank() == 0):
                self._failure, self._pending = self._pending.result(), None
        return self._failure

    def warn_of_failure(self) -> None:
        """Log, once, that the last save failed. Not collective; returns at once while a save is under way."""
        if self._pending and self._pending.done():
            self.wait()
        if not self._pending and self._failure:
            logger.warning("%s; training goes on", self._failure)
            self._failure = None

    def close(self) -> None:
        """End the thread that writes, once it has written what it has."""
        if self._executor:
            self._executor.shutdown()

    def _writing(self, step: int, tensors: dict[str, Any]) -> Progress:
        """Shows how many bytes of a checkpoint are on the disk."""
        size = sum(t.numel() * t.element_size() for t in tensors.values() if isinstance(t, torch.Tensor))
        what, partial = f"saving step {step}", self.files.partial(step)
        return Progress(what, size, "B", shown=dist.get_rank() == 0, poll=lambda: min(size, folder_size(partial)))

    def _write(
        self, step: int, tensors: dict[str, Any], train_state: dict[str, Any], best: Best | None, start: float
    ) -> str | None:
        """Everything after the copy. Returns the line that says what the disk refused, the same on every rank."""
        final, partial = self.files.path(step), self.files.partial(step)
        written: Files = {}
        fault = self._on_rank_zero(lambda: self.files.start(step))
        if not fault:
            writer = CheckpointWriter(partial)
            try:
                dcp.save(tensors, storage_writer=writer, process_group=self.group)
            except CheckpointException as error:
                fault = _disk_fault(error)
            else:
                for part in self._gather(writer.checksums):
                    written |= part
                fault = self._on_rank_zero(lambda: self.files.publish(step, train_state, written, best))
        if fault:
            self._on_rank_zero(lambda: shutil.rmtree(partial, ignore_errors=True))
            return f"{final}: the checkpoint cannot be saved: {fault}; earlier ones are untouched"
        size = shown_size(sum(entry["size"] for entry in written.values()))
        logger.info("saved checkpoint %s (%s) in %.2f s", final, size, time.perf_counter() - start)
        return None

    def _on_rank_zero(self, function: Callable[[], object]) -> str | None:
        """Do something with files on rank 0; returns, on every rank, what the disk said against it."""
        fault = None
        if dist.get_rank() == 0:
            try:
                function()
            except OSError as error:
                fault = str(error)
        return self._from_rank_zero(fault)

    def _gather(self, value: T) -> list[T]:
        values: list[T] = [value] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self.group)
        return values

    def _from_rank_zero(self, value: T) -> T:
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    # ------------------------------------------------------------------------------------------------------- loading

    def choose(self, load_step: int) -> int | None:
        """The step to resume from: for -1 the latest whose files are all as they were written; None for 0, or where
        there is none.

        Raises:
            UserError: the step that is asked for is not there or damaged, or all are.
        """
        steps, fault = [], None
        if dist.get_rank() == 0:  # a shared file system may show a new folder to some ranks first
            try:
                steps = self.files.candidates(load_step)
                self.files.clear_partial()
            except UserError as error:
                fault = str(error)
        steps, fault = self._from_rank_zero((steps, fault))
        if fault:
            raise UserError(fault)
        return self.files.first_whole(steps, load_step, self._verify)

    def leave_behind(self, step: int, best: Best | None = None) -> None:
        """Rename the checkpoints after `step` to abandoned-N. This run drops the lines after `step` from metrics.jsonl,
        so a later start must not resume beyond it: the lines between would be missing.

        best: the best checkpoint up to `step`; None if the run knows of none.

        Raises:
            UserError: the disk refuses it.
        """

        def leave() -> None:
            self.files.set_aside(step + 1)
            self.files.name_best(best)
            if best and not self.files.path(best.step).is_dir():
                line = "checkpoint.keep_best: the best so far, %s %.4g of step %d, is not there any more"
                logger.warning(line, best.metric, best.value, best.step)

        fault = self._on_rank_zero(leave)
        if fault:
            raise UserError(f"{self.files.folder}: the checkpoints after step {step} cannot be set aside: {fault}")

    def _verify(self, folder: Path) -> list[str]:
        """A line for each damaged file of a checkpoint, the same on every rank. Each rank reads its share of them."""
        files, fault = {}, None
        if dist.get_rank() == 0:
            try:
                files = read_manifest(folder)
            except UserError as error:
                fault = str(error)
        files, fault = self._from_rank_zero((files, fault))
        mine = sorted(files)[dist.get_rank() :: dist.get_world_size()]
        found, size = [], sum(files[name]["size"] for name in mine)
        with Progress(f"checking {folder.name}", size, "B", shown=dist.get_rank() == 0) as progress:
            for name in mine:
                found += [line] if (line := damage(folder / name, files[name])) else []
                progress.update(files[name]["size"])
        return [fault] if fault else [line for lines in self._gather(found) for line in lines]

    def tell_of_best(self, step: int) -> None:
        """Log which checkpoint is the best. step: the last one, whose weights are exported."""
        best = self.files.best() if dist.get_rank() == 0 else None
        if best:
            path = self.files.path(best.step)
            exported = "" if best.step == step else f"; an export has the weights of step {step}"
            logger.info("best checkpoint by %s: %s (%.4g)%s", best.metric, path, best.value, exported)

    def train_state(self, step: int) -> dict[str, Any]:
        return read_train_state(self.files.path(step))

    def reader(self, step: int) -> CheckpointReader:
        """The reader of `step-N`. Rank 0 reads the table of contents and sends it to the others. Collective."""
        path = self.files.path(step)
        table = on_rank_zero("reading the checkpoint's table of contents", CheckpointReader(path).read_metadata)
        return CheckpointReader(path, table)

    def load(self, reader: CheckpointReader, tensors: dict[str, Any]) -> None:
        """Fill `tensors` in place from a checkpoint, whatever mesh wrote it."""
        enter_phase("reading the checkpoint")
        with Progress(f"reading {reader.folder.name}", shown=dist.get_rank() == 0):
            dcp.load(tensors, storage_reader=reader, process_group=self.group)


def _disk_fault(error: CheckpointException) -> str:
    """The line for the first rank's error, if all failed ranks had an OSError; any other error is raised again."""
    causes = {rank: cause for rank, (cause, _) in error.failures.items() if isinstance(cause, OSError)}
    if len(causes) < len(error.failures):
        raise error
    rank, cause = next(iter(causes.items()))
    return f"{cause.strerror or cause} (on rank {rank})"
