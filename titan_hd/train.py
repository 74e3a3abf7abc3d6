"""The story of a run: set-up in named phases, `train_step`, `train`.

torchrun --nproc_per_node N -m titan_hd.train --config FILE [--section.key value ...]
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from titan_hd.adapters.methods import ignored_keys
from titan_hd.checkpoint.checkpointer import Checkpointer
from titan_hd.checkpoint.object_store import checkpoint_folder
from titan_hd.checkpoint.resume_check import check_resume
from titan_hd.components.assembly import assemble
from titan_hd.components.best_validation import BestValidation
from titan_hd.components.lr_scheduler import lr_factor
from titan_hd.components.metrics import MetricsLogger, NoMetrics, peak_memory_gib, write_svd_report
from titan_hd.components.phases import Phases
from titan_hd.components.profiling import Profiling
from titan_hd.components.rates import Rates, StepResult, TokenCounts
from titan_hd.components.run_data import read_data
from titan_hd.components.trackers.registry import saved_run_ids
from titan_hd.components.update import UNFOLDED
from titan_hd.components.validation import Validator
from titan_hd.components.weight_changes import WeightChanges, ranges
from titan_hd.config import manager
from titan_hd.config.job_config import JobConfig
from titan_hd.console import Progress, use_bars
from titan_hd.data.loader import Batch, GlobalBatches, ReadAhead, TrainLoader, length_buckets
from titan_hd.distributed.collectives import check_equal_on_all_ranks, on_rank_zero, raise_on_all
from titan_hd.distributed.parallel_dims import AdapterPlacement, ParallelDims
from titan_hd.distributed.shards import init_weights, load_weights, materialize
from titan_hd.distributed.watch import enter_phase, waiting
from titan_hd.distributed.weight_gathers import WeightGathers, gathered_bytes, sums_gradients_once
from titan_hd.errors import UserError
from titan_hd.export.hf import export_hf
from titan_hd.export.peft import export_peft
from titan_hd.files import disk_faults
from titan_hd.fitting import traffic_gb
from titan_hd.overview import Overview, data_lines, screen
from titan_hd.preflight import RunPlan, run_identity_of
from titan_hd.process.environment import record_environment
from titan_hd.process.run_lock import run_locks
from titan_hd.process.signals import INTERRUPTED, REQUEUE, StopSignals
from titan_hd.process.worker import run_worker, set_timeout, show_start
from titan_hd.seeding import stable_seed

logger = logging.getLogger("titan_hd")


class Trainer:
    """One run on one worker. Construct after the process group is there; then `train`, or `train_step` as often as you
    like; then `close`. In a notebook `titan_hd.open_trainer` does what comes before and after (docs/python.md).

    signals: those of this process; left out, none is listened to. overview: what rank 0 knows of the run, for plan.txt.
    """

    def __init__(
        self,
        config: JobConfig,
        plan: RunPlan,
        device: torch.device,
        signals: StopSignals | None = None,
        overview: Overview | None = None,
    ):
        config = plan.config  # with what "auto" stands for
        use_bars(config.metrics.progress_bar)
        self.config, self.plan, self.device, self.overview = config, plan, device, overview
        self.signals = signals or StopSignals()
        self.stop_status = 0  # all workers' agreement on `signals.status`
        timeout = config.comm.init_timeout_seconds
        self.dims = ParallelDims(plan.dp_replicate, plan.dp_shard, device.type, plan.tp, timeout)
        self.placement = AdapterPlacement(
            plan.method.shares,
            self.dims.dp_size,
            self.dims.dp_rank,
            plan.global_batch_size,
            config.training.local_batch_size,
        )
        folder = Path(config.job.dump_folder)
        # What is made is let go of where a later part cannot be made: another run of this process may want the folder.
        with contextlib.ExitStack() as self._closing:
            with raise_on_all("locking the folder"), disk_faults(folder):
                if self.dims.rank == 0:
                    for lock in run_locks(config):
                        self._closing.callback(lock.release)
                    record_environment(folder, self.dims.world_size, config)
            self.profiling = Profiling(config, self.dims.rank, device)
            self._closing.callback(self.profiling.close)
            with self.profiling.watching_memory(lambda: 0):
                self._log_start()
                self._build_model()
                self._build_data()
                self._load_or_resume()
                self._build_metrics()
            self._closing = self._closing.pop_all()

    # ------------------------------------------------------------------------------------------------------ set-up

    def _log_start(self) -> None:
        if self.config.job.print_config:
            logger.info("configuration:\n%s", manager.to_toml(self.config))
        for line in (*ignored_keys(self.config), *self.plan.warnings):
            logger.warning("%s", line)
        if self.overview:  # rank 0's, which has the lock
            self.overview.write(Path(self.config.job.dump_folder))

    def _build_model(self) -> None:
        """The model with its method and its wrappers, then memory. Values come later, in `_load_or_resume`."""
        c, plan = self.config, self.plan
        assembled = assemble(c, plan.decoder, plan.method, self.dims, plan.untouched)
        self.model, self.update, self.trained_layers = assembled[:3]
        materialize(self.model, self.device, torch.device("cpu") if c.training.enable_cpu_offload else None)
        gathered = [p for p in self.model.parameters() if p not in assembled.ignored]
        learned, micro_batches = sum(p.numel() for p in gathered if p.requires_grad), self.placement.micro_batches
        self.gathers = WeightGathers(
            self.model,
            c.parallelism.fsdp_reshard_after_forward,
            micro_batches,
            sums_gradients_once(learned, sum(p.numel() for p in gathered), self.dims.dp_shard, micro_batches),
            gathered_bytes(self.model, self.dims, assembled.ignored, assembled.param_dtype),
            c.training.seq_len,
            self.device,
        )
        self.update.build_optimizer(self.device)

    def _build_data(self) -> None:
        c, seq_len, batch = self.config, self.config.training.seq_len, self.plan.global_batch_size
        with raise_on_all("reading the data"):
            data = read_data(c, self.plan.decoder.vocab_size, batch)
        self.answering, self.data_summary, self.total_steps = data.answering, data.summary, data.total_steps
        # A node with a file of its own that differs would end its steps, or its validation, at another time.
        check_equal_on_all_ranks("data.train", data.summary)
        for one in data.sets:
            check_equal_on_all_ranks(one.dataset.statistics.name, one.dataset.summary())
        # Compiled blocks want few shapes, and attention to packs on a GPU, which is always compiled, wants one; else
        # padding to the longest row of a micro-batch is enough.
        one_length = c.data.pack and (c.compile.enable or self.device.type == "cuda")
        pad_to = (seq_len,) if one_length else length_buckets(seq_len) if c.compile.enable else ()
        labels, sets = self.plan.decoder.num_labels, data.sets
        self.validator = Validator(c, self.dims, self.device, sets, data.tokenizer, labels) if sets else None
        micro_batches = [self.placement.samples(m) for m in range(self.placement.micro_batches)]
        batches = GlobalBatches(data.dataset, data.order, batch, pad_to, c.data.pack or not self.plan.decoder.causal)
        loader = TrainLoader(batches, micro_batches, c.data.num_workers)
        self.loader = ReadAhead(loader, self.total_steps, pin=self.device.type == "cuda")
        self._closing.callback(self.loader.close)
        lines = data_lines(data, c, batch)
        logger.info("the data:\n%s", screen(lines, sys.stderr), extra={"painted": True})
        if self.overview:
            self.overview.write(Path(c.job.dump_folder), lines, data.rows)

    def _load_or_resume(self) -> None:
        """Weights and what is trained: from the chosen checkpoint, or from the model directory and the SVD."""
        c = self.config
        self.checkpointer = Checkpointer(
            checkpoint_folder(c), c.checkpoint.async_mode == "async", c.comm.save_timeout_seconds
        )
        self._closing.callback(self.checkpointer.close)
        self.best = BestValidation(c, self.validator.measured_on() if self.validator else {})
        self.step = (self.checkpointer.choose(c.checkpoint.load_step) or 0) if c.checkpoint.enable else 0
        self.identity = on_rank_zero("identifying the run", lambda: run_identity_of(self.plan, self.data_summary))
        self.changes = WeightChanges(self.model, self.update, self.dims, c, self.device, self.total_steps)
        if self.step:
            self._resume()
        else:
            self.tracker_runs: dict[str, str] = {}
            self._load_base()
            self.changes.remember_base()
            self._set_first_values()
            self.changes.remember_directions()
        self.update.start(self.total_steps)

    def _resume(self) -> None:
        c, step = self.config, self.step
        state = on_rank_zero("reading the checkpoint's state", lambda: self.checkpointer.train_state(step))
        self.tracker_runs = saved_run_ids(state)
        self.best.go_on_from(state.get("best"))
        self.changes.go_on_from(state)
        reader = self.checkpointer.reader(step)
        metadata = reader.read_metadata()
        stored, allowed = metadata.state_dict_metadata, c.checkpoint.allow_mismatch
        stale = check_resume(state, self.identity, stored, allowed, self.total_steps, self.best.exhausted)
        if state["base"] == "delta" or self.changes.every:
            self._load_base()
        self.changes.remember_base()
        self.update.allocate(metadata)
        tensors = self.update.state(changed_only=state["base"] == "delta")
        if stale:
            tensors = {key: t for key, t in tensors.items() if not key.startswith(UNFOLDED)}
        if self.changes.every and self.changes.directions:  # first, while the base model's weights are there
            self.checkpointer.load(reader, {key: tensors.pop(key) for key in [*tensors] if key.startswith("factors.")})
            self.changes.remember_directions()
        self.checkpointer.load(reader, tensors)
        logger.info("resumed from %s", reader.folder)

    def _load_base(self) -> None:
        """The weights of the base model, or random ones."""
        c = self.config
        if c.model.flavor:
            logger.info("random weights: model.flavor is set")
            init_weights(self.model, self.dims, c.training.seed)
        else:
            loaded = load_weights(self.model, self.dims, c.model.hf_assets_path)
            self._warn_of_zeros(loaded.zeros)
            if loaded.missing:
                logger.info("new, with random values: %s", ", ".join(loaded.missing))
                init_weights(self.model, self.dims, c.training.seed, names=loaded.missing)

    def _warn_of_zeros(self, weights: list[str]) -> None:
        """Of weights of zeros that the method can never move; what an SVD shows `write_svd_report` tells."""
        still = [name for name in weights if name.removesuffix(".weight") in self.trained_layers]
        if still and self.plan.method.scales_weight:
            method = self.plan.method.name
            logger.warning("adapter.method: %s can never move weights that are zero: %s", method, ", ".join(still))

    def _set_first_values(self) -> None:
        """First values of what is trained, with a report of every SVD in svd.jsonl."""
        enter_phase("computing the adapters' first values")
        layers, reports = self.update.layers_to_start(), []
        start = time.perf_counter()
        with Progress("first values of the adapters", layers, "layers", shown=self.dims.rank == 0) as progress:
            for wave in self.update.first_values():
                reports += wave
                progress.update(len(wave))
        if layers:
            logger.info("first values of %d adapted layers in %.1f s", layers, time.perf_counter() - start)
        if reports and self.dims.rank == 0:
            write_svd_report(Path(self.config.job.dump_folder) / "svd.jsonl", reports)

    def _build_metrics(self) -> None:
        c = self.config
        if c.checkpoint.enable:
            self.checkpointer.leave_behind(self.step, self.best.to_keep)
        with raise_on_all("opening metrics.jsonl"), disk_faults(Path(c.job.dump_folder)):
            self.metrics: NoMetrics = NoMetrics()
            if self.dims.rank == 0:
                self.metrics = MetricsLogger(c, self.total_steps, self.step, self.tracker_runs)
                self._closing.push(self._close_metrics)
            self.profiling.start(self.step, self.total_steps)
        # By whether W stays gathered for a whole step, which may be decided after the first one.
        self.traffic = {kept: traffic_gb(self.plan, self.placement.micro_batches, kept) for kept in (False, True)}
        passes = self.placement.micro_batches * self.dims.dp_size
        self.rates = Rates(self.model, c, self.device, self.dims.world_size, passes)
        self.phases = Phases(self.device)
        self.hooks: list[tuple[int, Callable[[StepResult], object]]] = []
        self.add_hook(1, lambda result: self.metrics.advance(self.step, result.loss))
        for profile in self.profiling.after_each_step:
            self.add_hook(1, lambda _, profile=profile: profile(self.step))
        self.add_hook(c.metrics.log_freq, self._log)
        if self.changes.every:
            self.add_hook(self.changes.every, self._log_changes)
        self.add_hook(1, lambda _: self._look_after_saves())
        self.add_hook(c.training.gc_freq, lambda _: gc.collect(1))
        if self.validator:
            self.add_hook(c.validation.freq, lambda _: self.validate())
        if c.checkpoint.enable:
            self.add_hook(c.checkpoint.interval, lambda _: self.save())

    def add_hook(self, every: int, hook: Callable[[StepResult], object]) -> None:
        """Call `hook` after every so many steps, and after the last one, behind the hooks that are there already."""
        self.hooks.append((every, hook))

    # ---------------------------------------------------------------------------------------------------- training

    def train_step(self) -> StepResult:
        """One optimizer step over the global batch; the result is the same on every worker."""
        enter_phase(f"step {self.step + 1}")
        self.phases.begin_step("data")
        batches = self._read_batches()
        counts = self._count_tokens(batches)
        with waiting():
            on_device = [batch.on(self.device) for batch in batches]
        self.phases.begin("optimizer")
        lr = self.config.optimizer.lr * lr_factor(self.config.lr_scheduler, self.step, self.total_steps)
        self.update.begin_step(lr, self.step)
        with waiting():
            loss, norm = self._compute(on_device, counts, lr)
            self.gathers.after_step(max(batch.input_ids.shape[1] for batch in batches))
        self.step += 1
        return StepResult(loss / max(1, sum(counts.trained)), norm, lr, *counts[1:])

    def _compute(self, batches: list[Batch], counts: TokenCounts, lr: float) -> tuple[float, float]:
        """The step's work on the device. batches: there. Returns the sum of all workers' losses, and the gradients'
        norm."""
        self.phases.begin("forward_backward")
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        for m, batch in enumerate(batches):
            self.gathers.before_micro_batch(m)
            loss_sum += self._forward_backward(m, batch, counts.trained[self.placement.adapter(m)])
        self.phases.begin("optimizer")
        grad_norm = self.update.finish_gradients()
        loss, norm = self._read_results(loss_sum, grad_norm, self.update.propose(grad_norm))
        self.phases.begin(self.update.apply_phase)
        self.update.apply(lr, self.step)
        self.phases.end()
        return loss, norm

    def _read_batches(self) -> list[Batch]:
        if not self.config.data.streaming:
            return self.loader.step(self.step)
        with raise_on_all(f"step {self.step + 1}"):  # a stream's bad record is seen only by those who need it
            return self.loader.step(self.step)

    def _count_tokens(self, batches: list[Batch]) -> TokenCounts:
        """Of all workers' batches. Counted on the host: a device would have to be waited for."""
        counts = torch.zeros(self.plan.method.shares + 3, dtype=torch.long)
        for m, batch in enumerate(batches):
            counts[self.placement.adapter(m)] += batch.trained_tokens
            counts[-3:] += torch.tensor((batch.input_ids.numel(), batch.tokens, batch.squares))
        if self.dims.tp_rank:  # the ranks of a tensor-parallel group read the same
            counts.zero_()
        dist.all_reduce(counts)
        *trained, positions, tokens, squares = counts.tolist()
        return TokenCounts(trained, positions, tokens, squares)

    def _read_results(
        self, loss_sum: torch.Tensor, grad_norm: torch.Tensor, proposal: torch.Tensor
    ) -> tuple[float, float]:
        """The sum of all workers' losses, and the gradients' norm. The one time in a step that the host waits for its
        device; what changes the weights is launched after it, and runs while the host logs and reads the next batches.

        What signals ask for travels along: all ranks must agree where to stop.

        Raises:
            FloatingPointError: the gradients or the update's proposal are not finite; on every rank, and before a
                weight is touched.
        """
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        if self.dims.tp_rank == 0:  # the ranks of a tensor-parallel group have the same loss
            sums[0] = loss_sum
        sums[1].fill_(self.signals.status == REQUEUE)
        sums[2].fill_(self.signals.status == INTERRUPTED)
        sums[3] = proposal
        dist.all_reduce(sums)
        loss, requeue, interrupted, proposed, norm = torch.cat((sums, grad_norm.to(sums).view(1))).tolist()
        self.update.refuse_non_finite(self.step, norm, proposed)
        self.stop_status = INTERRUPTED if interrupted else REQUEUE if requeue else 0
        return loss, norm

    def _forward_backward(self, micro_batch: int, batch: Batch, trained_tokens: int) -> torch.Tensor:
        """Accumulate gradients of (sum of token losses / trained_tokens); returns the sum, detached."""
        self.update.bind(self.placement.slot(micro_batch), last=micro_batch + 1 == self.placement.micro_batches)
        if self.config.adapter.dropout or self.plan.decoder.draws:
            # Masks are a function of the samples, not of the worker that happens to compute them.
            first = self.step * self.plan.global_batch_size + self.placement.samples(micro_batch).start
            torch.manual_seed(stable_seed("dropout", self.config.training.seed, first))
        loss = self.model(batch.input_ids, documents=batch.documents, targets=batch.labelled)
        (loss / max(1, trained_tokens)).backward()
        return loss.detach()

    def train(self) -> int:
        """All remaining steps, with validation before and after, checkpoints, logs and the export.

        Returns:
            the exit status: 0, or what a signal asked for that stopped the run after one of its steps.

        Raises:
            UserError: the last checkpoint could not be saved; the model has been exported.
        """
        if self.config.validation.enable and self.step == 0:
            with self.profiling.watching_memory(lambda: self.step):
                self.validate()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # of what the SVD took: neither the training's peak, nor kept from nccl
            torch.cuda.reset_peak_memory_stats(self.device)
        gc.disable()  # collected by a hook instead: workers that pause at different times wait for each other
        first_step = self.step
        with self.signals.deferred(), self.profiling.watching_memory(lambda: self.step):
            try:
                self._train_steps(first_step)
            except (FloatingPointError, UserError):  # of all workers alike; what is being saved is from before
                self.checkpointer.wait()
                raise
            if self.config.checkpoint.enable and self.step > first_step:
                self.save()
            enter_phase("finishing", timed=False)
            failure = self.checkpointer.wait()
        gc.enable()
        stopped = self.step < self.total_steps and not self.best.exhausted
        if stopped:
            resumes = "the same command goes on" if self.config.checkpoint.enable else "checkpoint.enable is not set"
            logger.warning("stopped after step %d of %d; %s", self.step, self.total_steps, resumes)
        else:
            self.best.tell_of_early_stop(self.step, self.total_steps, resumed=self.step == first_step)
            if self.best.to_keep:
                self.checkpointer.tell_of_best(self.step)
        if self.config.export.enable and not stopped:
            self.update.settle()
            set_timeout(self.config.comm.export_timeout_seconds, but_not=self.checkpointer.groups)
            export = export_peft if self.config.export.format == "peft" else export_hf
            export(self.model, self.dims, self.config, self.answering)
        if failure:
            raise UserError(failure)
        return self.stop_status if stopped else 0

    def _train_steps(self, first_step: int) -> None:
        """Until the last step, the end of validation.patience, or the first step after a signal."""
        while self.step < self.total_steps and not self.best.exhausted and not self.stop_status:
            if self.changes.due(self.step + 1):
                self.changes.begin()
            start = time.perf_counter()
            with self._first_step() if self.step == first_step else contextlib.nullcontext():
                result = self.train_step()
            self.rates.add(result, time.perf_counter() - start)
            for every, hook in self.hooks:
                if self.step % every == 0 or self.step == self.total_steps:
                    hook(result)
            if self.step == first_step + 1:
                self.rates.forget()  # warm-up and compilation
                self.phases.forget()
                set_timeout(self.config.comm.train_timeout_seconds, but_not=self.checkpointer.groups)

    def _first_step(self) -> Progress:
        compiles = ", which compiles the blocks" if self.config.compile.enable else ""
        return Progress(f"the first step{compiles}", shown=self.dims.rank == 0)

    # --------------------------------------------------------------------------------------------------- periodic

    def _log(self, last: StepResult) -> None:
        """The last step's loss, norm and rate, and the speed of all steps since the last call."""
        values = {"loss": last.loss, "grad_norm": last.grad_norm, "lr": last.lr, **self.rates.take()}
        values |= self.phases.take()
        values |= self.update.take_seconds() | self.traffic[self.gathers.kept]
        values["peak_memory_gib"] = peak_memory_gib(self.device)
        self.metrics.log(self.step, values)

    def _log_changes(self, last: StepResult) -> None:
        """What the last step, and all of them, have done to the weights; on the console only from where to where the
        values go."""
        enter_phase(f"measuring step {self.step}")
        with waiting():
            values = self.changes.measure(last.grad_norm)
        self.metrics.log_detail(self.step, values)
        logger.info("step %d  %s", self.step, ranges(values))

    def validate(self) -> None:
        """Validation loss and, if asked for, exact match of generated answers, logged under this step; the best is
        saved."""
        enter_phase(f"validation after step {self.step}")
        assert self.validator is not None
        what, batches = f"validation after step {self.step}", self.validator.batches()
        with waiting(), Progress(what, batches, "batches", shown=self.dims.rank == 0) as progress:
            values = self.validator.run(self.model, progress.update)
        self.metrics.log(self.step, values)
        for name, rows in self.validator.shown.items():
            self.metrics.log_samples(self.step, name, rows)
        if self.best.add(self.step, values):
            self.save()

    def _look_after_saves(self) -> None:
        """Of an earlier save; a failure of the last step's is no warning. One that a disk holds up ends the run, as any
        other wait that is too long: all ranks stop after the same step."""
        self.checkpointer.warn_of_failure()
        if self.checkpointer.late:
            self.signals.status = self.signals.status or REQUEUE

    def save(self) -> None:
        """Save a checkpoint of this step, if there is none yet."""
        if self.checkpointer.last_step == self.step:
            return
        enter_phase(f"saving after step {self.step}", timeout=self.config.comm.save_timeout_seconds)
        base = self.config.checkpoint.base
        state = {
            "step": self.step,
            "base": base,
            "trackers": self.metrics.tracker_runs,
            "identity": self.identity,
            "best": self.best.state(),
            "refreshed": self.changes.refreshed,
            "answering": dataclasses.asdict(self.answering),
            "config": manager.to_toml(self.config),
        }
        self.metrics.sync()
        self.checkpointer.save(self.step, self.update.state(changed_only=base == "delta"), state, self.best.to_keep)

    def _close_metrics(self, error: type[BaseException] | None, *_: object) -> None:
        self.metrics.close(failed=error is not None)

    def close(self) -> None:
        """Release what this worker holds: data and checkpoint threads, files, trackers, the folder. Not collective."""
        self._closing.close()


def run(config: JobConfig, plan: RunPlan, device: torch.device, signals: StopSignals) -> int:
    """A whole run of this worker; its exit status."""
    trainer = Trainer(config, plan, device, signals, show_start(plan, device))
    status = trainer.train()
    # Only after success: a rank that fails alone would wait here for others, which wait for it in a collective.
    dist.barrier()
    dist.destroy_process_group()
    trainer.close()
    return status


def main() -> None:
    run_worker(run)


if __name__ == "__main__":
    main()
