"""A run on one screen: what will be trained, how, on what, and with how much memory; and the tables behind it.

The screen goes to the log at the start. The tables are what job.print_plan prints; every run writes both to plan.txt in
its dump folder.
"""

from __future__ import annotations

import functools
import logging
import math
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TextIO

import torch

from titan_hd import __version__
from titan_hd.components.memory import GB, state_tensors
from titan_hd.components.run_data import RunData
from titan_hd.config.job_config import JobConfig
from titan_hd.console import painted, printable
from titan_hd.data.dataset import Dataset, FiniteDataset
from titan_hd.data.tokens.statistics import Statistics, statistics_table
from titan_hd.distributed.mesh_picture import mesh_picture
from titan_hd.files import replace_file, shown_size
from titan_hd.fitting import estimate_run, gathering, too_little, trained_size
from titan_hd.models.registry import parameter_shapes
from titan_hd.preflight import RunPlan, refresh_line, update_plan

logger = logging.getLogger("titan_hd")

PLAN_FILE = "plan.txt"
_WIDTH, _LABEL = 110, 10
Lines = list[tuple[str, str]]  # label and text


def screen(lines: Iterable[tuple[str, str]], stream: TextIO | None) -> str:
    """Labels in a column, texts beside them, wrapped; coloured if it is for a stream that has colours."""
    shown = []
    for label, text in lines:
        first, *more = textwrap.wrap(
            printable(text), _WIDTH - _LABEL - 2, break_long_words=False, break_on_hyphens=False
        ) or [""]
        name = f"{label:<{_LABEL}}"
        shown.append(f"  {painted(name, 'dim', stream) if stream else name}{first}")
        shown += [" " * (_LABEL + 2) + line for line in more]
    return "\n".join(shown)


class Overview:
    """What is known of a run before anything is loaded.

    device_type: "cuda" or "cpu". device: its name, as people say it. available: bytes that a worker may take; None
    where that is not known.
    """

    def __init__(self, plan: RunPlan, device_type: str, device: str, available: int | None):
        self.plan, self.device_type, self.device, self.available = plan, device_type, device, available
        self.estimate = estimate_run(plan, device_type)
        self.updates = update_plan(plan.config, plan) if plan.method.folds else None

    @functools.cached_property
    def lines(self) -> Lines:
        """Model, method, adapters, mesh, what is trained, batch, memory, exchange."""
        p, workers = self.plan, self.plan.dp_replicate * self.plan.dp_shard
        micro_batches = p.global_batch_size // (workers * p.config.training.local_batch_size)
        batch = f"{p.global_batch_size:,} records per step: {micro_batches} micro-batch(es) of "
        lines = [
            ("model", self._model()),
            ("method", p.method.sentence()),
            ("adapters", _adapters(p, workers)),
            ("mesh", f"{' x '.join(map(str, p.mesh))} (replicas x shards x tensor parallelism) on {self._devices()}"),
            ("trained", self._trained()),
            (
                "batch",
                f"{batch}{p.config.training.local_batch_size} on each worker, {p.config.training.seq_len} tokens",
            ),
            ("memory", self._memory()),
            ("exchange", self._exchange(workers)),
        ]
        return [(label, text) for label, text in lines if text]

    def faults(self) -> list[str]:
        """A line if the device has less memory than a worker needs, and what would help."""
        fault = None if self.available is None else too_little(self.plan, self.device_type, self.available)
        return [fault] if fault else []

    @functools.cached_property
    def tables(self) -> str:
        """Who holds what, how every kind of weight travels, and every item of memory."""
        plan = self.plan
        parts = [mesh_picture(*plan.mesh, plan.num_adapters if plan.method.folds else None)]
        parts.append("nothing is folded" if self.updates is None else self.updates.table())
        parts += [line] if (line := refresh_line(plan)) else []
        parts.append(self.estimate.table())
        if self.available is not None and (gathers := gathering(plan, self.device_type, self.available)):
            parts.append(gathers)
        return "\n".join(parts)

    def write(self, folder: Path, more: Sequence[tuple[str, str]] = (), rows: Sequence[Statistics] = ()) -> None:
        """plan.txt. more: further lines of the screen; rows: of the data. A disk that does not take it is warned of."""
        table = [statistics_table(list(rows))] if rows else []
        text = "\n\n".join([screen([*self.lines, *more], None), self.tables, *table]) + "\n"
        try:
            replace_file(folder / PLAN_FILE, lambda partial: partial.write_text(text, encoding="utf-8"))
        except OSError as error:
            logger.warning("%s: cannot be written (%s); the run goes on without it", PLAN_FILE, error.strerror)

    def _devices(self) -> str:
        return f"{math.prod(self.plan.mesh)} x {self.device}"

    def _model(self) -> str:
        c, d = self.plan.config, self.plan.decoder
        count = sum(shape.numel() for shape in parameter_shapes(d).values())
        family = c.model.name or d.hf.get("model_type", "model")
        source = f"{c.model.flavor}, random weights" if c.model.flavor else c.model.hf_assets_path
        sizes = f"{d.num_hidden_layers} blocks of width {d.hidden_size}, vocabulary {d.vocab_size:,}"
        return f"{family} of {count:,} parameters, {sizes}: {source}"

    def _trained(self) -> str:
        """Parameters of all adapters together, and what the optimizer keeps of a worker's own."""
        plan = self.plan
        parameters, layers = trained_size(plan.method, plan.decoder, plan.config.adapter.target_modules)
        moments = self.estimate.held["optimizer's moments"]
        kept = f"{shown_size(moments)} of moments on each worker" if moments else "moments on the host"
        if not state_tensors(plan.config.optimizer.name):
            kept = "the optimizer keeps nothing"
        return f"{parameters:,} parameters in {layers} layers; {kept}"

    def _memory(self) -> str:
        needed = f"about {self.estimate.total / GB:.2f} GB"
        if self.available is None:
            return f"{needed} on each worker"
        return f"{needed} of {self.available / GB:.2f} GB on each worker"

    def _exchange(self, workers: int) -> str:
        if self.updates is not None:
            return self.updates.summary()
        if workers == 1:
            return "nothing travels: there is one worker"
        return f"gradients are summed over {workers} workers"


def _adapters(plan: RunPlan, workers: int) -> str:
    """K and its mapping onto workers; "" for a method without logical adapters."""
    k, rank = plan.num_adapters, plan.config.adapter.rank
    if not plan.method.folds:
        return ""
    if k > workers:
        mapping = f"{k // workers} on each worker"
    else:
        mapping = "one on each worker" if k == workers else f"each on {workers // k} workers, which share it"
    unit = "; A and B orthonormal, times one number (hdpissa.factor_scale = unit)"
    return f"K = {k} of rank {rank}, {mapping}{unit * (plan.config.hdpissa.factor_scale == 'unit')}"


def data_lines(data: RunData, config: JobConfig, batch: int) -> Lines:
    """A line for each data set, of a mixture for all of its sources together, and one for the steps."""
    lines = [("data", _data_set(dataset)) for dataset in (data.dataset, *(one.dataset for one in data.sets))]
    steps, kind = f"{data.total_steps:,} of {batch:,}", "packs" if config.data.pack else "records"
    if data.order.records_per_epoch:
        epoch = data.order.positions(1.0)
        steps += f" {kind}, {data.total_steps * batch / epoch:.2f} epochs of {epoch:,}"
    else:
        steps += f" {kind} of a stream"
    return [*lines, ("steps", f"{steps}; how long they will take is told after the first ones")]


def _data_set(dataset: Dataset) -> str:
    if not isinstance(dataset, FiniteDataset):
        return f"data.train: {dataset.summary()}"
    s, sources = dataset.statistics, len(dataset.rows) - 1
    left_out = {"cut": s.truncated, "without a label (left out)": s.unlabelled, "bad (left out)": s.bad}
    more = "".join(f", {count:,} {what}" for what, count in left_out.items() if count)
    form = f"from {sources} sources" if sources > 0 else f"of format {s.format}"
    return f"{s.name}: {s.records:,} records {form}, {s.tokens:,} tokens, {s.trained:,} of them trained{more}"


def version_line() -> str:
    """The versions of titan_hd and of torch, with which the screen begins."""
    return f"titan_hd {__version__}, torch {torch.__version__}"
