"""Whole optimizer steps of every method, and where their time goes.

    python -m benchmarks.bench_step                                    # SmolLM2-135M, 2 micro-batches of 256 tokens
    torchrun --nproc_per_node 2 -m benchmarks.bench_step --methods hdpissa,lora
    python -m benchmarks.bench_step --flavor llama3/8B --tokens 2048 --rows 2 --methods hdpissa,lora \\
        --activation_checkpoint.mode selective                         # one GPU; options of a run may follow

Each method trains in titan_hd's own trainer, one after the other: a step to warm up, then --steps that are timed. The
shares are of the time of a step, on rank 0, by CUDA events on a GPU and by the clock on a CPU:

    data         waiting for the next step's batches; counting their tokens
    forward      with FSDP2's gathers
    backward     with FSDP2's gathers and, of what FSDP2 shards, the sum of gradients
    gradients    their sum where the adapters are not sharded, the norm, clipping
    optimizer    its step
    fold         HD-PiSSA's exchange and update of W; check of finiteness
    rest         loss, logging's numbers, the copy to the device

"idle" is the share of a step in which the device waits for the host: on a GPU what its kernels leave of the time of a
step, by one more step under torch.profiler; on a CPU what is not processor time (waiting for other workers). Memory is
the peak of a step; on a CPU the process's, less what it held before it had a model. GB are what a worker receives in a
step, by calculation.
"""

from __future__ import annotations

import argparse
import collections
import functools
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import common
from benchmarks.trained import build_trainer, init_workers
from titan_hd.adapters.methods import METHODS
from titan_hd.config.command_line import ToolParser
from titan_hd.train import Trainer

PHASES = ["data", "forward", "backward", "gradients", "optimizer", "fold", "rest"]


class Phases:
    """When each part of a step begins, in turn. On a GPU as events on its stream, which nobody waits for."""

    def __init__(self, trainer: Trainer):
        self.device = trainer.device
        self.marks: list[tuple[str, Any]] = []
        trainer.model.register_forward_pre_hook(lambda *_: self.mark("forward"))
        trainer.model.register_forward_hook(lambda *_: self.mark("backward"))
        self._wrap(trainer, "_read_batches", "data", "data")
        self._wrap(trainer, "_count_tokens", "data", "rest")
        self._wrap(trainer.update, "finish_gradients", "gradients", "rest")
        self._wrap(trainer.update, "apply", "fold", "rest")
        self._wrap(trainer.update.optimizer, "step", "optimizer", "fold")

    def mark(self, begins: str) -> None:
        moment: Any = time.perf_counter()
        if self.device.type == "cuda":
            moment = torch.cuda.Event(enable_timing=True)
            moment.record()
        self.marks.append((begins, moment))

    def _wrap(self, owner: object, name: str, phase: str, after: str) -> None:
        function: Callable = getattr(owner, name)

        @functools.wraps(function)
        def marked(*args: Any, **kwargs: Any) -> Any:
            self.mark(phase)
            result = function(*args, **kwargs)
            self.mark(after)
            return result

        setattr(owner, name, marked)

    def take(self) -> dict[str, float]:
        """Seconds of every phase since the first mark; the device has been waited for."""
        seconds: dict[str, float] = collections.defaultdict(float)
        for (phase, start), (_, end) in zip(self.marks, self.marks[1:]):
            seconds[phase] += start.elapsed_time(end) / 1e3 if self.device.type == "cuda" else end - start
        self.marks.clear()
        return dict(seconds)


def timed_steps(trainer: Trainer, phases: Phases, count: int) -> dict[str, Any]:
    """Medians over `count` steps."""
    device, steps = trainer.device, []
    for _ in range(count):
        common.synchronize(device)
        wall, cpu = time.perf_counter(), time.process_time()
        result = trainer.train_step()
        phases.mark("end")
        common.synchronize(device)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        steps.append({"seconds": wall, "cpu": cpu, "tokens": result.tokens, **phases.take()})
    keys = {key for step in steps for key in step}
    median = {key: statistics.median(step.get(key, 0.0) for step in steps) for key in keys}
    total = sum(median.get(phase, 0.0) for phase in PHASES)
    shares = {phase: median.get(phase, 0.0) / total for phase in PHASES}
    return {**{key: median[key] for key in ("seconds", "cpu", "tokens")}, "shares": shares}


def idle_share(trainer: Trainer, seconds: float, cpu: float) -> float:
    """Share of a step in which the device has nothing to do. seconds, cpu: of a step without a profiler."""
    if trainer.device.type == "cpu":
        return max(0.0, 1 - cpu / seconds)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        trainer.train_step()
        common.synchronize(trainer.device)
    events = [e for e in profiler.events() or [] if e.device_type.name == "CUDA"]
    spans = sorted((e.time_range.start, e.time_range.end) for e in events)
    busy, end = 0.0, 0.0
    for first, last in spans:  # kernels of several streams overlap
        busy += max(0.0, last - max(first, end))
        end = max(end, last)
    return max(0.0, 1 - busy / 1e6 / seconds)


def measure(method: str, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    gc.collect()  # the trainer before this one refers to itself
    common.trim_heap()
    before = common.held_bytes(device)
    options = {"adapter.method": method, "adapter.rank": args.rank, "adapter.svd": "randomized", "adapter.svd_niter": 1}
    if method == "hdpissa":
        options["hdpissa.num_adapters"] = args.micro_batches * dist.get_world_size()
    argv = [f"--{key}={value}" for key, value in options.items()] + args.more
    steps = args.steps + 2
    trainer = build_trainer(args.flavor, args.tokens, args.rows, args.micro_batches, args.labelled, steps, argv)
    phases = Phases(trainer)
    trainer.train_step()
    phases.take()
    common.reset_peak(device)
    result = timed_steps(trainer, phases, args.steps)
    peak = common.peak_bytes(device)
    result["peak_mib"] = None if peak is None or before is None else (peak - before) / 2**20
    result["idle"] = idle_share(trainer, result["seconds"], result["cpu"])
    result |= trainer.traffic[trainer.gathers.kept]
    result["tokens_per_second"] = result["tokens"] / result["seconds"]
    trainer.close()
    return result


def report(results: dict[str, dict[str, Any]]) -> None:
    columns = ["method", "tokens/s", "step s", "CPU s", *(f"{phase} %" for phase in PHASES), "idle %", "peak MiB"]
    rows = []
    for method, r in results.items():
        shares = [f"{100 * r['shares'][phase]:.1f}" for phase in PHASES]
        peak = r["peak_mib"] and f"{r['peak_mib']:.0f}"
        speed = [f"{r['tokens_per_second']:.0f}", f"{r['seconds']:.2f}", f"{r['cpu']:.2f}"]
        traffic = [f"{r['gather_gb']:.2f}", f"{r['exchange_gb']:.3f}"]
        rows.append([method, *speed, *shares, f"{100 * r['idle']:.1f}", peak, *traffic])
    common.print_table([*columns, "gather GB", "exchange GB"], rows)


def parse_args() -> argparse.Namespace:
    parser = ToolParser(__doc__)
    parser.add_argument("--flavor", default="smollm2/135M", help="a family and size, with random weights")
    parser.add_argument("--methods", type=lambda text: text.split(","), default=[*METHODS], help="comma-separated")
    sizes = {"tokens": 256, "rows": 1, "micro-batches": 2, "rank": 16, "steps": 3, "threads": 1}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--labelled", type=float, default=1.0, help="share of the tokens that are trained")
    args, args.more = parser.parse_with_run_options()
    unknown = [name for name in args.methods if name not in METHODS]
    if unknown:
        parser.error(f"--methods: {unknown[0]!r} is none of {', '.join(METHODS)}")
    return args


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    device = init_workers()
    env = common.environment(device, args.threads) | {"workers": dist.get_world_size()}
    if dist.get_rank() == 0:
        common.print_header("bench_step", env)
    results = {}
    for method in args.methods:
        results[method] = measure(method, args, device)
    if dist.get_rank() == 0:
        size = f"{args.micro_batches} micro-batches of {args.rows} x {args.tokens} tokens per worker"
        print(f"\n{args.flavor}, {size}, {args.labelled:.0%} labelled, r = {args.rank}, {' '.join(args.more)}\n")
        report(results)
        common.print_json("step", env, {"settings": vars(args), "methods": results})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
