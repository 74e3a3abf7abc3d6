"""Trains one configuration by several methods, each tuned alike much, and lays the results side by side.

    python tools/compare_methods.py --methods full,lora,pissa,hdpissa --grid optimizer.lr=1e-4:3.2e-3:6 --seeds 3 \\
        --folder outputs/comparison --config train_configs/quickstart.toml [--section.key value ...]

A method is a value of adapter.method; "+key=value" changes keys of [adapter] and [hdpissa] ("+optimizer.lr=1e-3" any
other key) for this arm alone, "+optimizer.lr=1e-4:1.6e-3:6" gives it a range of its own in place of the grid's. All
runs of a seed have the same records in the same order. A run that is complete is not repeated, one that was interrupted
resumes: give the same command again. The folder gets grid.csv, losses.csv, comparison.json, and the report made of
them: table.md, table.csv, figures, comparison.html. docs/comparison.md has more.

    python tools/compare_methods.py --report FOLDER [--output DIR]     makes the report again, from these files alone
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from compare import report, results
from compare.arms import OF_EVERY_RUN, Arm, Axis, parse_arms, parse_grid
from compare.durations import Durations
from compare.running import COMPLETE, PlannedRun, Runner, Stopped, check_started
from compare.schedule import Run, best_point, edges, rounds
from compare.sizes import match_rank
from compare.wandb_sweep import SWEEP_METHODS, SweepSettings, write_sweep

from titan_hd.config import manager
from titan_hd.config.checks import CLASSIFIER_METRICS
from titan_hd.config.command_line import ToolParser
from titan_hd.config.job_config import JobConfig
from titan_hd.errors import UserError
from titan_hd.files import replace_file, user_path
from titan_hd.preflight import decoder_config, plan_run
from titan_hd.process.streams import keep_streams

_RESUME = 75  # the exit status of a run that was stopped, too: the same command goes on


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """The tool's options, and those of the runs."""
    parser = ToolParser(__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("--methods", default="all", help='arms with commas between them; "all" methods (default) or "ablations"')
    add("--grid", action="append", default=[], metavar="KEY=VALUES", help="low:high:number or a,b,c; repeatable")
    add("--seeds", type=int, default=1, metavar="N", help="for each arm's best value and its neighbours; default: 1")
    add("--repeat", choices=["neighbours", "best"], default="neighbours", help="best: no seeds for the neighbours")
    add("--budget", choices=["equal", "needed"], default="equal", help="equal: as many runs for every arm; default")
    add("--widen", type=int, default=4, metavar="N", help="rounds of further values at most; default: 4")
    add("--rank-by", metavar="METRIC", help="default: validation_loss with validation.enable, else loss")
    add("--baseline", metavar="ARM", help="the arm to which differences are taken; default: the first")
    add(
        "--match", choices=["rank", "parameters"], default="rank", help="what is alike: adapter.rank (default), or size"
    )
    add("--folder", type=user_path, default=user_path("outputs/comparison"), help="default: outputs/comparison")
    add("--workers", type=int, metavar="N", help="processes of each run; default: as run_train.sh")
    add("--parallel", type=int, metavar="N", help="runs at a time; default: as many as there are GPUs for, else 1")
    add("--keep-weights", choices=["none", "best", "all"], default="best", help="of which complete runs; default: best")
    add("--threshold", type=float, default=1e-3, help="singular values of dW that count, of the largest; default: 1e-3")
    add("--retry-failed", action="store_true", help="make runs again that ran out of memory or failed otherwise")
    add("--dry-run", action="store_true", help="list the runs and how long they may take")
    add("--wandb-sweep", choices=SWEEP_METHODS, help="no runs: write sweeps of wandb, one for each arm, that choose so")
    add("--title", default="Methods compared", help="of the report")
    add("--report", type=user_path, metavar="FOLDER", help="no runs: the report of an earlier comparison")
    add("--output", type=user_path, metavar="DIR", help="where to write it; default: FOLDER")
    return parser.parse_with_run_options()


def main() -> None:
    keep_streams()  # the tables are in files, too, and a comparison takes hours
    args, argv = parse_arguments()
    try:
        if args.report:
            print(report.write(args.report, args.output))
            return
        status = Comparison(args, argv).run()
    except UserError as error:
        manager.exit_with(str(error).splitlines())
    except Stopped:
        print("titan_hd: stopped; the same command goes on", file=sys.stderr)
        status = _RESUME
    raise SystemExit(status)


def metric_of(rank_by: str | None, config: JobConfig) -> str:
    """The metric that ranks the runs.

    Raises:
        UserError: runs of this configuration do not log it. The name of a validation set is looked at when a run has
            ended.
    """
    if rank_by is None:
        return "validation_loss" if config.validation.enable else "loss"
    kinds = ["loss"]
    if config.validation.enable:
        kinds += ["validation_loss"] + ["validation_exact_match"] * (config.validation.exact_match_samples > 0)
        if config.data.format in ("auto", "classification"):  # of a model with a classification head
            kinds += [f"validation_{name}" for name in CLASSIFIER_METRICS]
    if rank_by.partition("/")[0] not in kinds:
        known = f"{', '.join(kinds)} (or that of a named set, .../NAME)"
        raise UserError(f"--rank-by: must be one of {known}, not {rank_by!r}")
    return rank_by


class Comparison:
    """All runs of one comparison.

    argv: options of every run.
    """

    def __init__(self, args: argparse.Namespace, argv: list[str]):
        self.args, self.folder = args, args.folder
        for name in ("seeds", "workers", "parallel"):
            value = getattr(args, name)
            if value is not None and value < 1:
                raise UserError(f"--{name}: must be a whole number above 0, not {value}")
        config = manager.load(argv)
        if config.model.flavor:
            raise UserError("model.flavor: random weights are no base to compare changes of; give hf_assets_path")
        self.argv, self.first_seed = argv, config.training.seed
        self.metric = metric_of(args.rank_by, config)
        # A score is for less to be better.
        self.sign = 1 if self.metric == "loss" or self.metric.startswith("validation_loss") else -1
        self.workers = args.workers or _workers_here()
        self.parallel = args.parallel or max(1, torch.cuda.device_count() // self.workers)
        if torch.cuda.is_available() and self.parallel * self.workers > torch.cuda.device_count():
            raise UserError(f"--parallel: {self.parallel} runs of {self.workers} workers need more GPUs than there are")
        grid = parse_grid(args.grid)
        self.arms = parse_arms(args.methods, grid)
        sizes = {arm.name: math.prod(len(axis.values) for axis in arm.axes.values()) for arm in self.arms}
        if args.budget == "equal" and len(set(sizes.values())) > 1:
            said = ", ".join(f"{name} has {size}" for name, size in sizes.items())
            raise UserError(f"--budget equal: every arm needs as many points of its grid ({said}); or --budget needed")
        self.keys = list(dict.fromkeys([*grid, *(key for arm in self.arms for key in arm.axes)]))
        self.baseline = args.baseline or self.arms[0].name
        if self.baseline not in {arm.name for arm in self.arms}:
            raise UserError(f"--baseline: {self.baseline!r} is none of {', '.join(arm.name for arm in self.arms)}")
        self.seeds = [self.first_seed + i for i in range(args.seeds)]
        self.rows: dict[Run, results.Row] = {}
        self.refused: set[Run] = set()
        self.planned = self._plan_grid()
        self.durations = Durations(self.workers)

    # ------------------------------------------------------------------------------------------------ what to run

    def _plan_grid(self) -> dict[Run, PlannedRun]:
        """The runs of the grid; UserError with one line for every fault of any of them."""
        runs, errors = {}, []
        grid = next(rounds(self.arms, self.seeds, lambda run: 0.0, 0)).runs
        for run in grid:
            try:
                runs[run] = self._plan(run)
            except UserError as error:
                errors += [f"{line} (method {run.arm})" for line in str(error).splitlines()]
        if errors:
            raise UserError("\n".join(dict.fromkeys(errors)))
        return runs

    def _plan(self, run: Run) -> PlannedRun:
        """A run with its whole command line.

        Raises:
            UserError: what the configuration comes to cannot be trained.
        """
        arm = next(arm for arm in self.arms if arm.name == run.arm)
        folder = self.folder / run.name
        options = [
            *self.argv,
            *(f"--{key}={value}" for key, value in {**arm.changes, **dict(run.point)}.items()),
            f"--training.seed={run.seed}",
            f"--job.dump_folder={folder}",
            *(f"--{key}={value}" for key, value in OF_EVERY_RUN.items()),
            f"--metrics.wandb_group={self.folder.name}",
            f"--metrics.wandb_name={run.name}",
        ]
        config = manager.load(options)
        if self.args.match == "parameters":
            options.append(f"--adapter.rank={match_rank(config, decoder_config(config))}")
            config = manager.load(options)
        return PlannedRun(run.name, folder, options, config, plan_run(config, self.workers))

    # ---------------------------------------------------------------------------------------------------- running

    def run(self) -> int:
        """Make what is missing and report; the exit status: 1 where an arm has no complete run."""
        if self.args.dry_run:
            print(self._dry_run())
            return 0
        if self.args.wandb_sweep:
            print("\n".join(f"wandb sweep {shlex.quote(str(path))}" for path in self._write_sweeps()))
            return 0
        runner = Runner(self.workers, self.parallel)
        how = self.args.widen, self.args.budget == "equal", self._allowed, self.args.repeat == "neighbours"
        for reason, runs in rounds(self.arms, self.seeds, self._score, *how):
            self._make(runner, reason, runs)
            places = {run: self.planned[run].folder for run in self.rows}
            results.write_losses(self.folder, self._ordered(), self.keys, places)
        print(report.write(self.folder))
        failed = [arm.name for arm in self.arms if not self._complete(arm)]
        if failed:
            print(f"titan_hd: no run was completed of {', '.join(failed)}", file=sys.stderr)
        return 1 if failed else 0

    def _allowed(self, run: Run) -> bool:
        """Whether a run beyond the grid can be made; says why one cannot."""
        if run not in self.planned and run not in self.refused:
            try:
                self.planned[run] = self._plan(run)
            except UserError as error:
                self.refused.add(run)
                print(f"== not tried: {run.name}: {'; '.join(str(error).splitlines())}", flush=True)
        return run in self.planned

    def _write_sweeps(self) -> list[Path]:
        """A sweep of wandb for each arm; each is as large as the arm's grid."""
        metrics, goal = manager.load(self.argv).metrics, "maximize" if self.sign < 0 else "minimize"
        names = metrics.wandb_project, metrics.wandb_entity
        how = self.folder, self.args.wandb_sweep, self.metric, goal
        settings = SweepSettings(*how, *names, self.seeds, self.args.workers)
        paths = []
        for arm in self.arms:
            options = [*self.argv, *(f"--{key}={value}" for key, value in arm.changes.items())]
            if self.args.match == "parameters":
                rank = next(p.config.adapter.rank for run, p in self.planned.items() if run.arm == arm.name)
                options.append(f"--adapter.rank={rank}")
            group = f"--metrics.wandb_group={self.folder.name}"
            paths.append(write_sweep(arm, [*options, group], settings))
        return paths

    def _make(self, runner: Runner, reason: str, runs: Sequence[Run]) -> None:
        """The runs of one round that are not there yet."""
        missing: dict[str, Run] = {}
        for run in runs:
            planned = self.planned.get(run) or self._plan(run)
            self.planned[run] = planned
            check_started(planned, {"workers": self.workers, "threshold": self.args.threshold})
            row = results.read_row(planned.folder)
            if row is None or (self.args.retry_failed and row["status"] in ("out_of_memory", "failed")):
                missing[planned.name] = run
            else:
                self._note(run, row)
        self._write()
        print(f"== {reason}: {len(runs)} runs, {len(missing)} of them to make", flush=True)
        start = time.monotonic()

        def done(planned: PlannedRun, status: str) -> None:
            run = missing[planned.name]
            self._note(run, results.write_row(planned, status, self.args.threshold))
            self._remove_weights(run.arm, [other for other in missing.values() if other not in self.rows])
            self._write()
            made = sum(other in self.rows for other in missing.values())
            left = (time.monotonic() - start) / made * (len(missing) - made) / 60
            print(f"{made}/{len(missing)} {run.name}: {self._said(run)}; {left:.0f} min left", flush=True)

        runner.make([self.planned[run] for run in missing.values()], done)

    def _note(self, run: Run, row: results.Row) -> None:
        """Keep a row."""
        if row["status"] == COMPLETE and self.metric not in row:
            known = ", ".join(key for key in row if key == "loss" or key.startswith("validation_"))
            raise UserError(f"--rank-by: no metric {self.metric!r} in {run.name}; there are {known}")
        self.rows[run] = row
        self.durations.add(run.arm, row)

    def _remove_weights(self, arm: str, coming: Sequence[Run]) -> None:
        """Of an arm's complete runs but those of its best point.

        coming: what is to be made yet in this round. Where points of this arm are repeated with other seeds, its best
        point is known at the end.
        """
        if self.args.keep_weights == "all" or any(run.arm == arm and run.seed != self.first_seed for run in coming):
            return
        mine = [run for run, row in self._ordered().items() if run.arm == arm and row["status"] == COMPLETE]
        best = best_point(mine, self._score) if self.args.keep_weights == "best" else None
        for run in mine:
            if run.point != best:
                results.remove_weights(self.planned[run].folder)

    def _score(self, run: Run) -> float:
        """The metric, so that less is better; infinity for a run that failed, and for one whose metric is no number."""
        value = self.rows[run].get(self.metric)
        return float("inf") if value is None or value != value else self.sign * value

    def _said(self, run: Run) -> str:
        row = self.rows[run]
        return f"{self.metric} {row[self.metric]:.4g}" if row["status"] == COMPLETE else row["status"]

    def _complete(self, arm: Arm) -> list[Run]:
        return [run for run, row in self._ordered().items() if run.arm == arm.name and row["status"] == COMPLETE]

    # ---------------------------------------------------------------------------------------------------- results

    def _write(self) -> None:
        """grid.csv and comparison.json, of all runs so far."""
        rows = self._ordered()
        results.write_grid(self.folder, rows, self.keys, self.metric)
        complete = {arm.name: self._complete(arm) for arm in self.arms}
        best = {name: best_point(runs, self._score) for name, runs in complete.items() if runs}
        facts = {
            "title": self.args.title,
            "grid": self.keys,
            "rank_by": self.metric,
            "better": "max" if self.sign < 0 else "min",
            "baseline": self.baseline,
            "edges": edges(self.arms, [*rows], best),
        }
        text = json.dumps(facts, indent=1)
        replace_file(self.folder / "comparison.json", lambda partial: partial.write_text(text, encoding="utf-8"))

    def _ordered(self) -> dict[Run, results.Row]:
        """The rows by arm, as they were given, then by their points."""
        order = {arm.name: place for place, arm in enumerate(self.arms)}
        return dict(sorted(self.rows.items(), key=lambda item: (order[item[0].arm], *self._place(item[0]))))

    def _place(self, run: Run) -> tuple:
        """For sorting: numbers by size, other values as they are written; then the seed."""
        values = (dict(run.point).get(key, "") for key in self.keys)
        return (*((0, float(value), "") if _is_number(value) else (1, 0.0, value) for value in values), run.seed)

    def _dry_run(self) -> str:
        """The runs of the grid with their estimated times, and what may follow."""
        for run, planned in self.planned.items():
            row = results.read_row(planned.folder)
            if row is not None:
                self.rows[run] = row
                self.durations.add(run.arm, row)
        seconds = {run: self.durations.of(run.arm, planned.plan) for run, planned in self.planned.items()}
        lines = []
        for run, (long, how) in seconds.items():
            said = how if long is None else f"{long:.0f} s, {how}"
            lines.append(f"{run.name}: {self.rows[run]['status'] if run in self.rows else said}")
        tuned = [arm for arm in self.arms if any(axis.ratio for axis in arm.axes.values())]
        more = self.args.widen * len(self.arms) if tuned else 0
        points = sum(map(_around, self.arms)) if self.args.repeat == "neighbours" else len(self.arms)
        again = points * (len(self.seeds) - 1)
        known = [long for long, _ in seconds.values() if long is not None]
        if len(known) == len(seconds):
            left = sum(long for run, (long, _) in seconds.items() if long is not None and run not in self.rows)
            most = left + sum(known) / len(known) * (more + again)
            minutes = left / self.parallel / 60, most / self.parallel / 60
            time_left = f"{minutes[0]:.0f} min for the grid, at most {minutes[1]:.0f} min for all"
        else:
            time_left = "how long they take is known when a run of every method has been made"
        lines.append(
            f"{len(self.planned)} runs of the grid, {len(self.rows)} of them made, at most {more} more where the best "
            f"lies on an edge, {again} with other seeds; {time_left}"
        )
        return "\n".join(lines)


def _workers_here() -> int:
    """As run_train.sh has it."""
    given = os.environ.get("NGPU") or str(torch.cuda.device_count() or 2)
    if not given.isdecimal() or int(given) < 1:
        raise UserError(f"NGPU: must be a whole number above 0, not {given!r}")
    return int(given)


def _around(arm: Arm) -> int:
    """Points that are repeated with other seeds."""
    return 1 + 2 * sum(isinstance(axis, Axis) and axis.ratio is not None for axis in arm.axes.values())


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


if __name__ == "__main__":
    main()
