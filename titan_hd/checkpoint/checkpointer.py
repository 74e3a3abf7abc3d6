"""Checkpoints through torch.distributed.checkpoint: complete or absent, written in the background, loaded on any mesh.

A checkpoint is a folder `step-N` with DCP's files (weights, fixed factors and optimizer moments as DTensors),
`train_state.json` (step, runs of the trackers, identity, resolved configuration) and `manifest.json` (size and checksum
of every file). The data cursor and the learning rate are functions of the step, random numbers of (seed, step, sample):
none of them needs saving. Nor do dA and dB, which are zero after a fold; what is in them otherwise is saved: residuals
that int8 leaves, and local steps that no fold has taken yet.

A save, told in order: wait for the save before; find out which parts this rank is the first to hold (`pieces`), and
which ranks have any: the writers. They copy their parts to the host (training goes on from here, if it is
asynchronous), write them to `step-N.partial`, a checksum beside, and wait for their disks; rank 0 gets what they have
written and where (the latter only if it is not as in the save before), writes table of contents, state and manifest,
and renames the folder; what is then too old is purged. The writers talk over a group of their own, so that a thread may
do it; the other ranks do nothing until `wait`, where rank 0 tells all how it went. Whatever fails on any rank (a full
disk) fails on all, and leaves nothing behind. A disk that does not answer fails the save before the collectives of the
writers give up (`disk`): all know whose it is, and the run ends.

DCP's `.metadata` is a pickle: `checkpoint.reader` reads it without running the code in it.
"""

from __future__ import annotations

import datetime
import logging
import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from titan_hd.checkpoint.copies import send_copies, to_read
from titan_hd.checkpoint.disk import Disk, DiskIsLate
from titan_hd.checkpoint.folder import CheckpointFolder, Files, damage, read_manifest, read_train_state, write_content
from titan_hd.checkpoint.pieces import Piece, Stored, owned_pieces, stored_tensors
from titan_hd.checkpoint.reader import TABLE, CheckpointReader
from titan_hd.checkpoint.table import TableOfContents
from titan_hd.checkpoint.writer import Entry, bytes_of, check_space, write_pieces
from titan_hd.components.best_validation import Best
from titan_hd.console import Progress
from titan_hd.distributed.collectives import gather_on_rank_zero, on_rank_zero
from titan_hd.distributed.watch import enter_phase, waits_for
from titan_hd.errors import UserError
from titan_hd.files import shown_size

logger = logging.getLogger("titan_hd")

T = TypeVar("T")


class HostCopies:
    """Copies of pieces on the host. Tensors that lie on the host already are copied too: the training changes them in
    place. The buffers, pinned where there is a GPU, are kept for the next save."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}

    @torch.no_grad()
    def take(self, pieces: list[Piece]) -> list[Piece]:
        """The same pieces with the values that they have now. Overwrites what was taken before."""
        taken = [piece.copied_to(self._buffer(piece)) for piece in pieces]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return taken

    def _buffer(self, piece: Piece) -> torch.Tensor:
        place, dtype = (piece.tensor.name, piece.offsets), piece.tensor.dtype
        buffer = self._buffers.get(place)
        if buffer is None or (tuple(buffer.shape), buffer.dtype) != (piece.sizes, dtype):
            buffer = torch.empty(piece.sizes, dtype=dtype, pin_memory=piece.parts[0].is_cuda)
            self._buffers[place] = buffer
        return buffer


class _Contents(NamedTuple):
    """Of a checkpoint, beside the pieces; best: as for `CheckpointFolder.publish`. start: when its save began."""

    step: int
    stored: list[Stored]
    train_state: dict[str, Any]
    best: Best | None
    start: float


class _Fault(NamedTuple):
    """Why a save failed. late: a disk did not answer."""

    said: str
    late: bool = False


class _Written(NamedTuple):
    """What a writer tells rank 0. entries: None if they are those of the save before."""

    entries: list[Entry] | None
    files: Files
    fault: _Fault | None = None  # what its disk said
    bug: str | None = None  # any other error


def _fault_of(disk: Disk, function: Callable[[], object]) -> _Fault | None:
    """Do something with files on rank 0; what the disk said against it."""
    try:
        disk.call(function)
    except OSError as error:
        return _Fault(str(error))
    except DiskIsLate as error:
        return _Fault(f"rank 0 {error}", late=True)
    return None


class Checkpointer:
    """Saves to and loads from `files`. Collective: every rank calls every method, `warn_of_failure` apart.

    asynchronous: a save returns when the shards are copied to the host; the rest is done by a thread. One save is under
    way at a time.
    """

    def __init__(self, files: CheckpointFolder, asynchronous: bool, timeout_seconds: float):
        self.files = files
        # Its own time-out: the slowest disk may take longer than any collective of the training.
        self._timeout = datetime.timedelta(seconds=timeout_seconds)
        group = dist.new_group(backend="gloo", timeout=self._timeout, group_desc="checkpoints")
        assert isinstance(group, dist.ProcessGroup)  # of all ranks
        self._world = group
        self._writers_group: dist.ProcessGroup | None = None  # None on other ranks
        self.writers: list[int] = []  # ranks that take part in saves
        self.last_step: int | None = None  # of the last save, whatever became of it
        # Of the save that is under way: waits for this rank's part in it, and says what failed; None if it has none.
        self._part: Callable[[], _Fault | None] | None = None
        self._pending: Future[_Fault | None] | None = None
        self._under_way = self._told = False
        self._failure: _Fault | None = None  # of the last save
        self._entries: list[Entry] | None = None  # that rank 0 has of this rank
        self._table = TableOfContents()
        self._executor = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self._thread = self._executor.submit(threading.get_ident).result() if self._executor else 0
        self._host = HostCopies()

    @property
    def groups(self) -> set[dist.ProcessGroup]:
        """Those whose time-out is to stay."""
        return {self._world} | ({self._writers_group} if self._writers_group else set())

    # -------------------------------------------------------------------------------------------------------- saving

    def save(
        self, step: int, tensors: dict[str, torch.Tensor], train_state: dict[str, Any], best: Best | None = None
    ) -> None:
        """Save `step-N`, or begin to. `wait` and `warn_of_failure` say how it went. best: as for
        `CheckpointFolder.publish`.

        Raises:
            UserError: on all ranks, if a disk did not answer in the save before.
        """
        start = time.perf_counter()
        self.wait()
        if self._failure and self._failure.late:
            raise UserError(self._failure.said)
        self.warn_of_failure()
        self.last_step, self._under_way, self._told = step, True, False
        stored = stored_tensors(tensors)
        pieces = owned_pieces(stored, dist.get_rank())
        self._agree_on_writers(bool(pieces))
        contents = _Contents(step, list(stored), train_state, best, start)
        if not self._executor:
            with self._writing(step, tensors):
                self._part = (lambda: self._write(pieces, contents)) if self._writers_group else None
                self._settle()
            return
        if self._writers_group:
            staged = self._host.take(pieces)
            self._pending = self._executor.submit(self._write, staged, contents)
            self._part = self._wait_for_thread
        logger.info("checkpoint of step %d: training stopped for %.3f s", step, time.perf_counter() - start)

    def wait(self) -> str | None:
        """Wait for the save that is under way. Returns why the last one failed; None if it did not, or if a warning has
        said so."""
        if self._under_way:
            with Progress("waiting for the last checkpoint to be written", shown=dist.get_rank() == 0):
                self._settle()
        return self._failure.said if self._failure and not self._told else None

    def _wait_for_thread(self) -> _Fault | None:
        assert self._pending  # it has begun
        with waits_for(self._thread):
            return self._pending.result()

    def _settle(self) -> None:
        """Finish this rank's part in the save that is under way; rank 0 tells all ranks how it went."""
        try:
            outcome = (self._part() if self._part else None), None
        except Exception as error:
            outcome = None, f"the checkpoint of step {self.last_step}: {type(error).__name__}: {error}"
        self._failure, bug = self._from_rank_zero(outcome)
        self._under_way, self._part, self._pending = False, None, None
        if bug:
            raise RuntimeError(bug)

    def warn_of_failure(self) -> None:
        """Log, once, that the last save failed, unless that ends the run. Not collective; returns at once while a save
        is under way, of which at first only rank 0 knows whether it failed."""
        failure = self._known_failure()
        if failure and not failure.late and not self._told:
            logger.warning("%s; training goes on", failure.said)
            self._told = True

    @property
    def late(self) -> bool:
        """Whether the last save failed because a disk does not answer, as far as this rank knows: the run is to end. At
        first only rank 0 knows."""
        failure = self._known_failure()
        return bool(failure and failure.late)

    def _known_failure(self) -> _Fault | None:
        if not self._under_way:
            return self._failure
        done = self._pending and self._pending.done() and not self._pending.exception()
        return self._pending.result() if self._pending and done else None

    def close(self) -> None:
        """End the thread that writes, once it has written what it has."""
        if self._executor:
            self._executor.shutdown()

    def _agree_on_writers(self, has_pieces: bool) -> None:
        """Find out who has something to write, and make a group of those. Rank 0 always takes part."""
        takes_part = torch.zeros(dist.get_world_size(), dtype=torch.int8)
        takes_part[dist.get_rank()] = has_pieces or dist.get_rank() == 0
        dist.all_reduce(takes_part, group=self._world)
        writers = takes_part.nonzero().flatten().tolist()
        if writers == self.writers:
            return
        self.writers, self._entries, self._table = writers, None, TableOfContents()
        self._writers_group = self._world
        if len(writers) < len(takes_part):
            group = dist.new_group(writers, backend="gloo", timeout=self._timeout, group_desc="checkpoint_writers")
            self._writers_group = group if isinstance(group, dist.ProcessGroup) else None

    def _writing(self, step: int, tensors: dict[str, torch.Tensor]) -> Progress:
        """Shows how many bytes of a checkpoint are on the disk."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        shown = dist.get_rank() == 0
        return Progress(f"saving step {step}", size, "B", shown=shown, poll=lambda: min(size, self.files.written(step)))

    def _write(self, pieces: list[Piece], contents: _Contents) -> _Fault | None:
        """A writer's part of a save, all of it after the copy. Returns, on rank 0, the line that says what the disk
        refused."""
        disk, partial = Disk(self._timeout.total_seconds()), self.files.partial(contents.step)
        needed = torch.tensor(bytes_of(pieces))
        dist.all_reduce(needed, group=self._writers_group)

        def start() -> None:
            self.files.start(contents.step)
            check_space(partial, int(needed))

        fault = self._from_rank_zero(_fault_of(disk, start) if dist.get_rank() == 0 else None, self._writers_group)
        if not fault:
            # Pickled apart, so that rank 0's main thread gets Python's lock between them.
            told = gather_on_rank_zero(pickle.dumps(self._write_own(disk, partial, pieces)), self._writers_group)
            fault = self._publish(disk, contents, told) if dist.get_rank() == 0 else None
        if not fault or dist.get_rank():
            return None
        if not fault.late:  # who is late may yet write there; the next start removes it
            _fault_of(disk, lambda: self.files.discard(contents.step))
        final = self.files.path(contents.step)
        return _Fault(f"{final}: the checkpoint cannot be saved: {fault.said}; earlier ones are untouched", fault.late)

    def _write_own(self, disk: Disk, folder: Any, pieces: list[Piece]) -> _Written:
        """Write this rank's files. Whatever fails is told: the other writers wait for this rank."""
        rank = dist.get_rank()
        try:
            entries, files = disk.call(lambda: write_pieces(folder, rank, pieces))
        except OSError as error:
            return _Written(None, {}, _Fault(f"{error.strerror or error} (on rank {rank})"))
        except DiskIsLate as error:
            return _Written(None, {}, _Fault(f"rank {rank} {error}", late=True))
        except Exception as error:
            return _Written(None, {}, bug=f"on rank {rank}: {type(error).__name__}: {error}")
        news = None if entries == self._entries else entries
        self._entries = entries
        return _Written(news, files)

    def _publish(self, disk: Disk, contents: _Contents, told: list[bytes]) -> _Fault | None:
        """On rank 0: complete what all writers have written, and told in pickles of `_Written`. Returns what the disk
        said against it.

        Raises:
            RuntimeError: a writer had an error of another kind.
        """
        written: Files = {}
        parts: list[_Written] = [pickle.loads(one) for one in told]
        for rank, part in zip(self.writers, parts):
            self._table.update(rank, part.entries)
            written |= part.files
        if bug := next((part.bug for part in parts if part.bug), None):
            raise RuntimeError(bug)
        if fault := next((part.fault for part in parts if part.fault), None):
            return fault

        def publish() -> None:
            path = self.files.partial(contents.step) / TABLE
            written[TABLE] = write_content(path, self._table.content(contents.stored))
            self.files.publish(contents.step, contents.train_state, written, contents.best)

        if fault := _fault_of(disk, publish):
            return fault
        size, seconds = shown_size(sum(e["size"] for e in written.values())), time.perf_counter() - contents.start
        logger.info("saved checkpoint %s (%s) in %.2f s", self.files.path(contents.step), size, seconds)
        return None

    def _from_rank_zero(self, value: T, group: dist.ProcessGroup | None = None) -> T:
        """In the group of all ranks, if no other is given."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=group or self._world)
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
            except OSError as error:
                fault = f"{self.files.folder}: cannot be written: {error}"
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
            try:
                self.files.set_aside(step + 1)
                self.files.name_best(best)
            except OSError as error:
                folder = self.files.folder
                raise UserError(f"{folder}: the checkpoints after step {step} cannot be set aside: {error}") from None
            if best and not self.files.holds(best.step):
                line = "checkpoint.keep_best: the best so far, %s %.4g of step %d, is not there any more"
                logger.warning(line, best.metric, best.value, best.step)

        on_rank_zero("setting later checkpoints aside", leave)

    def _verify(self, folder: Any) -> list[str]:
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
        return [fault] if fault else self._all_lines(found)

    def _all_lines(self, found: list[str]) -> list[str]:
        """The lines of all ranks, on every rank. Where there are none, one number travels."""
        count = torch.tensor(len(found))
        dist.all_reduce(count, group=self._world)
        if not count:
            return []
        everywhere: list[list[str]] = [[]] * dist.get_world_size()
        dist.all_gather_object(everywhere, found, group=self._world)
        return [line for lines in everywhere for line in lines]

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
        table = on_rank_zero("reading the checkpoint's table of contents", lambda: CheckpointReader(path).table)
        return CheckpointReader(path, table)

    def load(self, reader: CheckpointReader, tensors: dict[str, torch.Tensor]) -> None:
        """Fill `tensors` in place from a checkpoint, whatever mesh wrote it. Each rank finds out by itself where its
        parts lie, and reads those that no rank before it holds; the others are sent to it.

        Raises:
            UserError: on all ranks, if a file cannot be read on one.
        """
        enter_phase("reading the checkpoint")
        faults = []
        with Progress(f"reading {reader.folder.name}", shown=dist.get_rank() == 0):
            try:
                reader.fill(to_read(tensors))
            except UserError as error:
                faults.append(str(error))
            faults = self._all_lines(faults)
            if faults:
                raise UserError("\n".join(dict.fromkeys(faults)))
            send_copies(tensors.values())
