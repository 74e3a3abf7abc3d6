"""A run inside the Python process that asks for it, as its only worker: for notebooks, scripts and tests.

No launcher, no signals, no exit status: what goes wrong is an exception. Everything else is as in a launched run of one
worker, with the same losses.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from titan_hd.bundle import RECIPES, recipe
from titan_hd.components.records import read_records
from titan_hd.components.trackers.registry import finish_failed_run
from titan_hd.config import manager
from titan_hd.config.job_config import JobConfig
from titan_hd.console import init_logging, kept
from titan_hd.errors import UserError
from titan_hd.export.hf import export_folder
from titan_hd.preflight import plan_run
from titan_hd.process.worker import init_process, show_start, stand_alone
from titan_hd.train import Trainer


@dataclass(frozen=True)
class RunResult:
    """What a run has come to.

    folder: job.dump_folder. steps: optimizer steps done, those before a resume included. metrics: the last value of
    each metric (docs/metrics.md), by its name. model: the folder of the export, or None without one.
    """

    folder: Path
    steps: int
    metrics: dict[str, Any]
    model: Path | None

    @property
    def records(self) -> list[dict[str, Any]]:
        """All records of metrics.jsonl, in their order."""
        return read_records(self.folder / "metrics.jsonl")


def train(
    config: str | os.PathLike | None = None, overrides: Mapping[str, Any] | None = None, **keywords: Any
) -> RunResult:
    """Train in this process, as its only worker, and return when the run has ended.

    Args:
        config: a TOML file, or the name of a bundled recipe. Left out, and with no overrides either: the quick start.
        overrides: values by "section.key", as {"optimizer.lr": 1e-3}.
        keywords: the same as section__key=value: optimizer__lr=1e-3.

    Raises:
        UserError: something that the caller can mend; one line for each fault.
        FloatingPointError: the loss or the gradients are not finite.
    """
    with open_trainer(config, overrides, **keywords) as trainer:
        trainer.train()
        c = trainer.config
        folder, steps = Path(c.job.dump_folder), trainer.step
        model = export_folder(c) if c.export.enable else None
    records = read_records(folder / "metrics.jsonl")
    last = {name: value for record in records for name, value in record.items() if name != "step"}
    return RunResult(folder, steps, last, model)


@contextlib.contextmanager
def open_trainer(
    config: str | os.PathLike | None = None, overrides: Mapping[str, Any] | None = None, **keywords: Any
) -> Iterator[Trainer]:
    """A `Trainer` that is ready for its first step, and is closed when the block ends; the arguments and what is raised
    are those of `train`. Inside, this process is a process group of one.

        with open_trainer("run.toml", training__steps=100) as trainer:
            trainer.add_hook(10, lambda result: print(trainer.step, result.loss))
            trainer.train()
    """
    settings = load_config(config, overrides, **keywords)
    with _only_worker(settings) as device, contextlib.ExitStack() as closing:
        plan = plan_run(settings, dist.get_world_size())
        try:
            trainer = Trainer(settings, plan, device, overview=show_start(plan, device))
            closing.callback(trainer.close)
            yield trainer
        except BaseException:  # of the constructor, too
            finish_failed_run()
            raise


def load_config(
    config: str | os.PathLike | None = None, overrides: Mapping[str, Any] | None = None, **keywords: Any
) -> JobConfig:
    """The configuration that these arguments, those of `train`, come to. ConfigError has one line for each fault."""
    values = {**(overrides or {}), **{key.replace("__", ".", 1): value for key, value in keywords.items()}}
    if config is None and not values:
        config = RECIPES / "quickstart.toml"
    return manager.load_file(None if config is None else recipe(os.fspath(config)), values)


@contextlib.contextmanager
def _only_worker(config: JobConfig) -> Iterator[torch.device]:
    """Be a process group of one; what that changes in this process is put back."""
    if dist.is_initialized():
        raise UserError("a process group is there already: end it by torch.distributed.destroy_process_group()")
    for name, alone in (("WORLD_SIZE", "1"), ("RANK", "0")):
        if (value := os.environ.get(name, alone)) != alone:
            raise UserError(
                f"{name}: is {value} in the environment, but titan_hd.train is the only worker of its run; unset it, "
                "or start the workers by ./run_train.sh"
            )
    variables, precision, collects = dict(os.environ), torch.get_float32_matmul_precision(), gc.isenabled()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    with kept():
        try:
            stand_alone()
            init_logging(int(os.environ["RANK"]))
            yield init_process(config, signals=None)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            torch.set_float32_matmul_precision(precision)
            torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
            if collects:
                gc.enable()
            os.environ.clear()
            os.environ.update(variables)
