"""Validation: loss over held-out records, and exact match of greedily generated answers."""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from titan_hd.components.classification import measure, metric_names, predict
from titan_hd.components.generation import generate, text_behind
from titan_hd.config.job_config import JobConfig
from titan_hd.data.dataset import FiniteDataset
from titan_hd.data.loader import Batch, validation_batches
from titan_hd.data.text.answers import final_answer
from titan_hd.data.text.tokenizer import Tokenizer
from titan_hd.distributed.collectives import gather_on_rank_zero
from titan_hd.distributed.parallel_dims import ParallelDims
from titan_hd.distributed.parallelize import reshard
from titan_hd.errors import UserError
from titan_hd.models.model import Model
from titan_hd.models.roberta import Roberta

logger = logging.getLogger("titan_hd")

_SHOWN = 4  # answers of a set that are shown, of those that are scored, if validation.samples does not say


@dataclass(frozen=True)
class Sharers:
    """The data-parallel workers that share out the records, and this one among them."""

    rank: int
    size: int
    group: dist.ProcessGroup
    device: torch.device


@torch.no_grad()
def validation_loss(model: nn.Module, batches: Iterable[Batch], sharers: Sharers) -> float:
    """Mean loss per trained token over the batches of all workers; each worker has equally many."""
    device = sharers.device
    totals = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in batches:
        here = batch.on(device)
        totals[0] += model(here.input_ids, targets=here.labelled)
        totals[1] += batch.trained_tokens
    dist.all_reduce(totals, group=sharers.group)
    return (totals[0] / totals[1].clamp(min=1)).item()


@torch.no_grad()
def own_answers(
    dataset: FiniteDataset,
    count: int,
    answer: Callable[[list[list[int]]], list[str]],
    batch_size: int,
    sharers: Sharers,
) -> dict[int, str]:
    """Generated answers to this worker's share of the first `count` records, by record.

    answer: the texts that continue a batch of prompts; all workers call it equally often.
    """
    count = min(count, len(dataset))
    own = list(range(sharers.rank, count, sharers.size))
    per_worker = -(-count // sharers.size)
    padded = (own + [0] * per_worker)[:per_worker]  # equal numbers everywhere; the surplus is not used
    answers: list[str] = []
    for start in range(0, per_worker, batch_size):
        answers += answer([dataset.prompt_ids(i) for i in padded[start : start + batch_size]])
    return dict(zip(own, answers))


def is_right(dataset: FiniteDataset, record: int, text: str, marker: str) -> bool:
    """Whether a generated final answer equals the reference's."""
    reference = final_answer(dataset.response(record), marker)
    return reference is not None and final_answer(text, marker) == reference


def exact_match(dataset: FiniteDataset, samples: int, marker: str, answers: dict[int, str], sharers: Sharers) -> float:
    """Share of the first `samples` records that are answered right. answers: of `own_answers`, for at least these."""
    samples = min(samples, len(dataset))
    right = sum(is_right(dataset, i, text, marker) for i, text in answers.items() if i < samples)
    total = torch.tensor(right, device=sharers.device)
    dist.all_reduce(total, group=sharers.group)
    return total.item() / samples


def check_references(dataset: FiniteDataset, samples: int, marker: str, of: str = "") -> None:
    """See that generated answers can be compared with the first `samples` records, and warn of those that cannot.

    of: " of NAME" where messages shall name the records.

    Raises:
        UserError: with none of them: the score would be 0 whatever the model says.
    """
    if not dataset.answerable:
        raise UserError("validation.exact_match_samples: needs records with a prompt and a response")
    count = min(samples, len(dataset))
    answers = [final_answer(dataset.response(index), marker) for index in range(count)]
    missing = answers.count(None)
    if missing == count:
        raise UserError(
            f"validation.answer_marker: none of the {count} responses{of} to compare with holds {marker!r}; the first "
            f"is {dataset.response(0)[:80]!r}"
        )
    if missing:
        line = "validation.answer_marker: %d of the %d responses%s to compare with lack %r; no answer to them is right"
        logger.warning(line, missing, count, of, marker)


@dataclass(frozen=True)
class ValidationSet:
    """suffix: what the names of its metrics end in: "" for the main set, "/NAME" for another. answers: how many of its
    first records are answered and scored; 0: none, it has a loss alone. shown: how many of its first records are
    answered to be shown."""

    dataset: FiniteDataset
    suffix: str
    answers: int
    shown: int = 0


def validation_sets(datasets: dict[str, FiniteDataset], config: JobConfig) -> list[ValidationSet]:
    """datasets: by name, the main one first. The log says which of the others cannot have an exact match or samples,
    and why.

    Raises:
        UserError: exact match is asked for, and the main set cannot have it, or the one of checkpoint.keep_best.
    """
    sets: list[ValidationSet] = []
    settings, best = config.validation, config.checkpoint.keep_best
    for name, dataset in datasets.items():
        answers, called = settings.exact_match_samples, dataset.statistics.name
        try:
            if answers:
                check_references(dataset, answers, settings.answer_marker, f" of {called}" if sets else "")
        except UserError as error:
            if not sets:
                raise
            if best == f"validation_exact_match/{name}":
                raise UserError(f"checkpoint.keep_best: {best} cannot be measured: {error}") from None
            answers = 0
            logger.info("%s: its loss is measured, but no exact match (%s)", called, error)
        shown = min(_SHOWN, answers) if settings.samples < 0 else settings.samples
        if shown and not dataset.answerable:
            if not sets:
                raise UserError("validation.samples: needs records with a prompt and a response")
            shown = 0
            logger.warning("validation.samples: %s has no prompts and responses; none of it is answered", called)
        sets.append(ValidationSet(dataset, f"/{name}" if sets else "", answers, min(shown, len(dataset))))
    return sets


class Validator:
    """What a run validates on, and how.

    tokenizer: called only to generate answers. num_labels: of a classifier, else 0.

    Attributes:
        shown: of the last `run`, by name ("samples", "samples/NAME" of another set), on rank 0: its first answers with
            prompt and reference, in the order of the records, by `tracker.SAMPLE_COLUMNS`.
    """

    def __init__(
        self,
        config: JobConfig,
        dims: ParallelDims,
        device: torch.device,
        sets: list[ValidationSet],
        tokenizer: Callable[[], Tokenizer],
        num_labels: int = 0,
    ):
        self.of_classes = metric_names(num_labels) if num_labels else ()
        self.settings, self.dims, self.device, self.sets = config.validation, dims, device, sets
        self.batch_size = config.validation.batch_size or config.training.local_batch_size
        self.tokenizer = tokenizer
        self.shown: dict[str, list[dict[str, Any]]] = {}
        self._progress: Callable[[], object] = lambda: None

    def run(self, model: Model, progress: Callable[[], object] = lambda: None) -> dict[str, float]:
        """validation_loss and, if asked for, validation_exact_match of the main set (of a classifier, the metrics of
        `classification.measure`), then those of the others under their names; rank 0's, so that all agree what is best.
        Collective; leaves the model as for training.

        progress: called for each of the `batches`.
        """
        self._progress = progress
        model.eval()
        self.shown = {}
        values: dict[str, float] = {}
        for one in self.sets:
            values |= self._measure(model, one)
        model.train()
        reshard(model)
        agreed = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        dist.broadcast(agreed, src=0)
        return dict(zip(values, agreed.tolist()))

    def batches(self) -> int:
        """How many batches of records, and of answers, this worker goes through."""
        total, per_round = 0, self.dims.dp_size * self.batch_size
        for one in self.sets:
            rounds = math.ceil(len(one.dataset) / per_round)
            total += rounds if self.settings.steps < 0 else min(rounds, self.settings.steps)
            answers = min(len(one.dataset), max(one.answers, one.shown))
            total += math.ceil(math.ceil(answers / self.dims.dp_size) / self.batch_size)
        return total

    def measured_on(self) -> dict[str, str]:
        """By the name of each metric, a text that tells whether its values compare with those of another run."""
        s, texts = self.settings, {}
        for one in self.sets:
            size, summary = len(one.dataset), one.dataset.summary()
            read = size if s.steps < 0 else min(size, s.steps * self.batch_size * self.dims.dp_size)
            for name in ("loss", *self.of_classes):
                texts[f"validation_{name}{one.suffix}"] = f"{read} of {summary}"
            if one.answers:
                answers = f"{min(size, one.answers)} answers of up to {s.max_new_tokens} tokens, {s.answer_marker!r}"
                texts[f"validation_exact_match{one.suffix}"] = f"{answers}, of {summary}"
        return texts

    def _measure(self, model: Model, one: ValidationSet) -> dict[str, float]:
        s, rank, size = self.settings, self.dims.dp_rank, self.dims.dp_size
        sharers = Sharers(rank, size, self.dims.dp_mesh.get_group(), self.device)
        if isinstance(model, Roberta):
            batches = validation_batches(one.dataset, rank, size, self.batch_size, s.steps, packed=True)
            found = predict(model, self._counted(batches), size, sharers.group, self.device)
            return {f"validation_{name}{one.suffix}": value for name, value in measure(*found).items()}
        batches = validation_batches(one.dataset, rank, size, self.batch_size, s.steps)
        values = {f"validation_loss{one.suffix}": validation_loss(model, self._counted(batches), sharers)}
        if count := max(one.answers, one.shown):
            answer = functools.partial(self._answer, model, one.dataset.stop_ids())
            answers = own_answers(one.dataset, count, answer, self.batch_size, sharers)
            if one.answers:
                exact = exact_match(one.dataset, one.answers, s.answer_marker, answers, sharers)
                values[f"validation_exact_match{one.suffix}"] = exact
            if one.shown:
                self._show(one, answers)
        return values

    def _show(self, one: ValidationSet, answers: dict[int, str]) -> None:
        """Collect what is shown of a set, on rank 0. Collective."""
        decode, marker = self.tokenizer().decode, self.settings.answer_marker
        own = [
            {
                "record": record,
                "prompt": decode(one.dataset.prompt_ids(record)),
                "reference": one.dataset.response(record),
                "output": text,
                "right": is_right(one.dataset, record, text, marker) if record < one.answers else None,
            }
            for record, text in answers.items()
            if record < one.shown
        ]
        rows = gather_on_rank_zero(None if self.dims.tp_rank else own)  # the ranks of a tp group have the same
        if self.dims.rank == 0:
            parts = itertools.chain.from_iterable(rows)
            self.shown[f"samples{one.suffix}"] = sorted(parts, key=itemgetter("record"))

    def _counted(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            yield batch
            self._progress()

    def _answer(self, model: Model, stop_ids: frozenset[int], prompts: list[list[int]]) -> list[str]:
        answers = generate(
            model,
            prompts,
            stop_ids,
            self.settings.max_new_tokens,
            self.device,
            group=dist.group.WORLD,
            tp_group=self.dims.world["tp"].get_group() if self.dims.tp > 1 else None,
        )
        self._progress()
        return [text_behind(self.tokenizer(), prompt, ids) for prompt, ids in zip(prompts, answers)]
