"""Trains one configuration by several methods and lays the results side by side.

    python tools/compare_methods.py --methods full,lora,hdpissa+slices=top --folder outputs/comparison \
        --config train_configs/quickstart.toml [--section.key value ...]

A method is a value of adapter.method; "+key=value" changes keys of [adapter] and [hdpissa] ("+optimizer.lr=1e-3" any
other key) for this run alone. `--methods all` is every method, `--methods ablations` HD-PiSSA's own variants. All runs
have the same records in the same order. Options:

    --match rank          adapter.rank for all (for bone and bat the size of a block); the default
    --match parameters    the rank or block whose number of trained parameters is nearest to that of lora at
                          adapter.rank (hdpissa: of one logical adapter)
    --workers N           worker processes (default: as run_train.sh)
    --threshold T         singular values of dW that count, relative to the largest (default 1e-3)

A run that is complete is not repeated, one that was interrupted resumes. The folder gets table.md, table.csv,
losses.csv and, with matplotlib (the extra `plots`), losses.png and bars.png.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from compare.comparison import match_rank, parse_methods, plot, read_result, write_tables

from titan_hd.config import manager
from titan_hd.config.job_config import JobConfig
from titan_hd.errors import UserError
from titan_hd.files import user_path
from titan_hd.preflight import RunPlan, decoder_config, plan_run
from titan_hd.process.streams import keep_streams

_RUN_TRAIN = Path(__file__).resolve().parent.parent / "run_train.sh"
_OPTIONS = {
    "--methods": "all",
    "--match": "rank",
    "--folder": "outputs/comparison",
    "--workers": "",
    "--threshold": "1e-3",
}


class ComparedRun(NamedTuple):
    """One run: options of run_train.sh, and what they come to."""

    name: str
    folder: Path
    options: list[str]
    config: JobConfig
    plan: RunPlan


def plan(methods: str, match: str, folder: Path, argv: list[str], workers: int) -> list[ComparedRun]:
    """Every run with its whole command line; UserError with one line for every fault of any of them."""
    runs, errors = [], []
    for name, changes in parse_methods(methods).items():
        options = [
            *argv,
            *(f"--{key}={value}" for key, value in changes.items()),
            f"--job.dump_folder={folder / name}",
            "--checkpoint.enable=true",
            "--checkpoint.keep_latest_k=1",
            "--export.enable=true",
            "--export.format=hf",
            "--export.folder=hf",
            "--export.dtype=float32",
            "--metrics.log_freq=1",
            f"--metrics.wandb_group={folder.name}",
            f"--metrics.wandb_name={name}",
        ]
        try:
            config = manager.load(options)
            if config.model.flavor:
                raise UserError("model.flavor: random weights are no base to compare changes of; give hf_assets_path")
            if match == "parameters":
                options.append(f"--adapter.rank={match_rank(config, decoder_config(config))}")
                config = manager.load(options)
            runs.append(ComparedRun(name, folder / name, options, config, plan_run(config, workers)))
        except UserError as error:
            errors += [f"{line} (method {name})" for line in str(error).splitlines()]
    if errors:
        raise UserError("\n".join(errors))
    return runs


def finish(run: ComparedRun, workers: int) -> int:
    """Run, resume or pass over; the exit status."""
    marker, said = run.folder / "complete", manager.to_toml(run.config)
    started = run.folder / "comparison.toml"
    if started.exists() and started.read_text(encoding="utf-8") != said:
        raise UserError(f"--folder: {run.folder} holds a run with other settings; name another folder, or remove it")
    if marker.exists():
        return 0
    run.folder.mkdir(parents=True, exist_ok=True)
    started.write_text(said, encoding="utf-8")
    print(f"== {run.name}", flush=True)
    status = subprocess.run(
        [str(_RUN_TRAIN), *run.options], env={**os.environ, "NGPU": str(workers)}, check=False
    ).returncode
    if status == 0:
        marker.touch()
    return status


def default_workers() -> int:
    import torch

    return int(os.environ.get("NGPU") or torch.cuda.device_count() or 2)


def main() -> None:
    keep_streams()  # the tables are in files, too, and a comparison takes hours
    options, argv = dict(_OPTIONS), sys.argv[1:]
    while argv and argv[0].partition("=")[0] in options:
        key, equals, value = argv[0].partition("=")
        options[key], argv = (value, argv[1:]) if equals else (argv[1] if len(argv) > 1 else "", argv[2:])
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return
    try:
        if options["--match"] not in ("rank", "parameters"):
            raise UserError(f"--match: must be rank or parameters, not {options['--match']!r}")
        folder, workers = user_path(options["--folder"]), int(options["--workers"] or default_workers())
        runs = plan(options["--methods"], options["--match"], folder, argv, workers)
        failed = [run.name for run in runs if finish(run, workers)]
        threshold, results = float(options["--threshold"]), []
        for run in runs:
            if run.name not in failed:
                p = run.plan
                results.append(read_result(run.name, run.folder, run.config, p.decoder, p.num_adapters, threshold))
        if results:
            print(write_tables(folder, results, threshold))
            plot(folder, results)
    except UserError as error:
        manager.exit_with(str(error).splitlines())
    if failed:
        print(f"titan_hd: failed: {', '.join(failed)}", file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
