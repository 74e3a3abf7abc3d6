"""Micro-batches of one worker for step after step, and the batches of a validation.

What a batch holds is a pure function of (seed, position), see `order.sample_order`. A worker computes its own part of
any global batch from that. So the loader's whole state is the number of optimizer steps done, and a run sees the same
batches on any number of workers, and with any number of data worker processes.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler
from torchdata.stateful_dataloader import StatefulDataLoader

from titan_hd.data.example import IGNORE, NOTHING, Example, Examples, SizedExamples
from titan_hd.data.order.sample_order import Order
from titan_hd.errors import UserError
from titan_hd.models.head import Targets


@dataclass(frozen=True)
class Batch:
    """The samples of a micro-batch as rows.

    input_ids: [B, T] int64, padded at the right.
    targets: [B, T] int64; targets[:, t] is the label of the token that follows position t.
    tokens: number of ids without padding. sequences: number of records; squares: the sum of their squared lengths.
    documents: where rows are packs, [B, T] int32: the number of each token's record within its row. Padding is a
        document of its own.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    tokens: int
    sequences: int
    squares: int = 0
    documents: torch.Tensor | None = None

    def on(self, device: torch.device) -> Batch:
        """The same on a device. From pinned memory (`pinned`) a GPU copies it while the host goes on."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """The same in page-locked memory."""
        return self._mapped(torch.Tensor.pin_memory)

    def _mapped(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        documents = None if self.documents is None else function(self.documents)
        batch = replace(self, input_ids=function(self.input_ids), documents=documents)
        # The targets themselves are needed by nobody there, and their positions are found on the host.
        batch.__dict__["labelled"] = Targets(*map(function, self.labelled))
        return batch

    @functools.cached_property
    def labelled(self) -> Targets:
        """The positions that have a label, for the head and the loss."""
        return Targets.of(self.targets)

    @property
    def trained_tokens(self) -> int:
        return len(self.labelled.labels)


def length_buckets(seq_len: int) -> tuple[int, ...]:
    """The lengths to which rows are padded where each length has a price (a compiled graph, a plan of a kernel):
    multiples of 64, at most eight, the last one seq_len."""
    step = -(-seq_len // (8 * 64)) * 64
    return (*range(step, seq_len, step), seq_len)


def collate(examples: Sequence[Example], pad_to: Sequence[int] = ()) -> Batch:
    """A row for every example, padded at the right to the smallest length of `pad_to` (ascending) that holds the
    longest one; without lengths, to a multiple of eight.

    Padding is never attended to by real tokens (attention is causal) and has no labels.
    """
    return _collate([[example] for example in examples], pad_to)


def collate_packs(packs: Sequence[Sequence[Example]], pad_to: Sequence[int] = ()) -> Batch:
    """A row for every pack of examples, with the documents' numbers; padded as in `collate`.

    The last token of a document has no target: the first token of the next is none of its business.
    """
    batch = _collate(packs, pad_to)
    documents = torch.empty(batch.input_ids.shape, dtype=torch.int32)
    for row, pack in enumerate(packs):
        sizes = [len(example.input_ids) for example in pack]
        sizes.append(documents.shape[1] - sum(sizes))
        documents[row] = torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int32), torch.tensor(sizes))
    return replace(batch, documents=documents)


def _collate(rows: Sequence[Sequence[Example]], pad_to: Sequence[int]) -> Batch:
    sizes = [sum(len(example.input_ids) for example in row) for row in rows]
    longest = max(sizes)
    length = next(n for n in pad_to if n >= longest) if pad_to else -(-longest // 8) * 8
    input_ids = torch.zeros(len(rows), length, dtype=torch.long)
    targets = torch.full((len(rows), length), IGNORE, dtype=torch.long)
    for row, examples in enumerate(rows):
        end = 0
        for example in examples:
            start, end = end, end + len(example.input_ids)
            input_ids[row, start:end] = torch.tensor(example.input_ids)
            targets[row, start : end - 1] = torch.tensor(example.labels[1:])
    lengths = [len(example.input_ids) for row in rows for example in row]
    return Batch(input_ids, targets, sum(lengths), len(lengths), sum(n * n for n in lengths))


class GlobalBatches(Dataset):
    """Any part of any optimizer step's global batch. packed: with the documents' numbers: samples are packs, or the
    model sees both ways, so that it must be told what is padding."""

    def __init__(self, examples: Examples, order: Order, global_batch_size: int, pad_to: Sequence[int], packed: bool):
        self.examples, self.order, self.global_batch_size = examples, order, global_batch_size
        self.pad_to, self.packed = pad_to, packed

    def __getitem__(self, part: tuple[int, range]) -> Batch:
        """part: the optimizer step (0-based), and places in its global batch."""
        step, places = part
        first = step * self.global_batch_size
        rows = [[self.examples[int(i)] for i in self.order.sample(first + place)] for place in places]
        return collate_packs(rows, self.pad_to) if self.packed else _collate(rows, self.pad_to)


class _Answers(Dataset):
    """What a data worker process makes of the parts it is asked for. A UserError is an answer like any other: raised in
    that process, it would arrive wrapped into a traceback."""

    def __init__(self, batches: GlobalBatches):
        self._batches = batches

    def __getitem__(self, part: tuple[int, range]) -> Batch | UserError:
        try:
            return self._batches[part]
        except UserError as error:
            return error


class _Cursor(Sampler):
    """The parts of global batches that are a worker's micro-batches, from one step on without an end."""

    def __init__(self, step: int, micro_batches: Sequence[range]):
        self.step, self.micro_batches = step, micro_batches

    def __iter__(self) -> Iterator[tuple[int, range]]:
        return ((step, places) for step in itertools.count(self.step) for places in self.micro_batches)


def _ignore_interrupts(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the trainer answers it


class TrainLoader:
    """The micro-batches of one worker, read ahead by `num_workers` processes (0: read when they are asked for).

    The processes are started by a fork server, a fresh process: a fork of the trainer would inherit the locks of the
    threads of gloo, nccl and CUDA in whatever state they are. They get the batches' source once, pickled.

    micro_batches: for each micro-batch of a step, the worker's places in the global batch.
    """

    def __init__(self, batches: GlobalBatches, micro_batches: Sequence[range], num_workers: int = 0):
        self._batches, self._micro_batches, self._num_workers = batches, list(micro_batches), num_workers
        self._iterator: Any = None
        self._next_step = -1

    def step(self, step: int) -> list[Batch]:
        """The micro-batches of optimizer step `step` (0-based). Steps may be asked in any order; what is read ahead is
        for those that follow."""
        if step != self._next_step:
            self._start(step)
        try:
            found = list(map(_received, itertools.islice(self._iterator, len(self._micro_batches))))
        except (RuntimeError, OSError, EOFError) as error:
            self.close()
            if not self._num_workers:
                raise
            line = "a data worker process failed or was killed (out of memory?); data.num_workers = 0 starts none"
            raise RuntimeError(f"{line}: {error}") from error
        self._next_step = step + 1
        return found

    def _start(self, step: int) -> None:
        self.close()
        context = None
        if self._num_workers:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(["titan_hd.data.ignore_hangups", __name__])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # torchdata 0.11 calls it, torch 2.13 warns
            # torchdata's loader, as in torchtitan, although its state_dict() is not needed while a sample is a function
            # of its position: the sampler starts at any step, on any number of workers, which that state cannot.
            loader = StatefulDataLoader(
                _Answers(self._batches),
                batch_size=None,
                sampler=_Cursor(step, self._micro_batches),
                num_workers=self._num_workers,
                multiprocessing_context=context,
                worker_init_fn=_ignore_interrupts,
                collate_fn=_sent,
                generator=torch.Generator(),  # it draws a seed for its processes: not from the run's generator
            )
        self._iterator = iter(loader)

    def close(self) -> None:
        """End the processes."""
        if self._iterator is not None and self._num_workers:
            self._iterator._shutdown_workers()  # the iterator may live on, in a traceback
        self._iterator, self._next_step = None, -1


class ReadAhead:
    """Reads the next step's micro-batches in a thread while this step's are computed.

    end: the number of steps of the run; nothing is read beyond it. pin: put them into page-locked memory.
    """

    def __init__(self, loader: TrainLoader, end: int, pin: bool):
        self._loader, self._end, self._pin = loader, end, pin
        self._thread = ThreadPoolExecutor(1, "read-ahead")
        self._next: tuple[int, Future[list[Batch]]] | None = None

    def step(self, step: int) -> list[Batch]:
        """The micro-batches of optimizer step `step` (0-based).

        Raises:
            UserError: a record of this step cannot be used.
        """
        ahead, self._next = self._next, None
        if ahead is not None and ahead[0] != step:
            ahead[1].exception()  # it reads for a step that nobody wants; the loader is free when it is done
            ahead = None
        batches = ahead[1].result() if ahead is not None else self._read(step)
        if step + 1 < self._end:
            self._next = step + 1, self._thread.submit(self._read, step + 1)
        return batches

    def _read(self, step: int) -> list[Batch]:
        batches = self._loader.step(step)
        return [batch.pinned() for batch in batches] if self._pin else batches

    def close(self) -> None:
        """End the thread, and the loader's processes."""
        self._thread.shutdown(cancel_futures=True)
        self._loader.close()


def _sent(batch: Any) -> dict[str, Any] | str:
    """A Batch as arrays, which come through a pipe; a UserError as its line. Tensors would take shared memory and open
    files: that costs more than the batch itself."""
    if isinstance(batch, UserError):
        return str(batch)
    return {key: value.numpy() if isinstance(value, torch.Tensor) else value for key, value in vars(batch).items()}


def _received(fields: dict[str, Any] | str) -> Batch:
    if isinstance(fields, str):
        raise UserError(fields)
    for key, value in fields.items():
        fields[key] = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
    return Batch(**fields)


def validation_batches(
    examples: SizedExamples, worker: int, workers: int, batch_size: int, limit: int, packed: bool = False
) -> Iterator[Batch]:
    """Every record exactly once over all workers, and the same number of batches on each, the last ones perhaps empty
    of labels: a worker that stopped early would leave the others in a collective. limit: batches at most, -1 for all.
    packed: as of `GlobalBatches`.
    """
    per_round, size = workers * batch_size, len(examples)
    rounds = -(-size // per_round)
    for i in range(rounds if limit < 0 else min(limit, rounds)):
        start = i * per_round + worker * batch_size
        indices = range(start, start + batch_size)
        rows = [[examples[j] if j < size else NOTHING] for j in indices]
        yield collate_packs(rows) if packed else _collate(rows, ())
