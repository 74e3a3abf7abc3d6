"""The order of samples and their batches, as pure functions of (seed, position).

Position p counts samples over the whole run. It lies in epoch p // N; within the epoch it stands at place p % N of a
permutation seeded by (seed, epoch). A worker computes its own part of any global batch from that, so the loader's whole
state is the number of optimizer steps done, and the same run sees the same batches on any number of workers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from titan_hd.config.seeding import stable_seed
from titan_hd.data.records import IGNORE, Example


class Records(Protocol):
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


@dataclass(frozen=True)
class Batch:
    """input_ids and targets [B, T] on the host. targets[:, t] is the label of the token that follows position t.

    tokens: ids without padding.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    tokens: int

    @property
    def trained_tokens(self) -> int:
        return int((self.targets != IGNORE).sum())


class SampleOrder:
    """Maps a position of the run to the index of a record.

    size: samples of an epoch.
    index: the record at (epoch, place), for a mixture; without it every record has its own place.
    """

    def __init__(self, size: int, shuffle: bool, seed: int, index: Callable[[int, int], int] | None = None):
        self.size, self.shuffle, self.seed, self._index = size, shuffle, seed, index
        self._permutation = functools.lru_cache(maxsize=2)(self._permute)

    def __getitem__(self, position: int) -> int:
        epoch, place = divmod(position, self.size)
        place = self._permutation(epoch)[place] if self.shuffle else place
        return self._index(epoch, place) if self._index else place

    def _permute(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(stable_seed("order", self.seed, epoch))
        return torch.randperm(self.size, generator=generator).tolist()


def collate(examples: Sequence[Example], pad_to: int | None) -> Batch:
    """Pad at the right to `pad_to`, or to the longest example rounded up to a multiple of eight.

    Padding is never attended to by real tokens (attention is causal) and has no labels.
    """
    length = pad_to or -(-max(len(e.input_ids) for e in examples) // 8) * 8
    input_ids = torch.zeros(len(examples), length, dtype=torch.long)
    targets = torch.full((len(examples), length), IGNORE, dtype=torch.long)
    for row, example in enumerate(examples):
        size = len(example.input_ids)
        input_ids[row, :size] = torch.tensor(example.input_ids)
        targets[row, : size - 1] = torch.tensor(example.labels[1:])
    return Batch(input_ids, targets, sum(len(e.input_ids) for e in examples))


class TrainLoader:
    """Micro-batches of one worker for any optimizer step.

    samples: for micro-batch m, the worker's places in a global batch.
    """

    def __init__(self, records: Records, order: SampleOrder, global_batch_size: int, pad_to: int | None):
        self.records, self.order = records, order
        self.global_batch_size, self.pad_to = global_batch_size, pad_to

    def batch(self, step: int, samples: range) -> Batch:
        """The records at `samples` of optimizer step `step` (0-based)."""
        start = step * self.global_batch_size
        return collate([self.records[self.order[start + j]] for j in samples], self.pad_to)


def validation_batches(
    records: Records, worker: int, workers: int, batch_size: int, pad_to: int | None, limit: int
) -> Iterator[Batch]:
    """Every record exactly once over all workers, and the same number of batches on each, the last ones perhaps empty
    of labels: a worker that stopped early would leave the others in a collective. limit: batches at most, -1 for all.
    """
    per_round = workers * batch_size
    rounds = -(-len(records) // per_round)
    filler = Example([0], [IGNORE])
    for i in range(rounds if limit < 0 else min(limit, rounds)):
        start = i * per_round + worker * batch_size
        indices = range(start, start + batch_size)
        yield collate([records[j] if j < len(records) else filler for j in indices], pad_to)
