"""tools/evaluate.py and Weights & Biases: its options, and what it is given."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from titan_hd.components.wandb_run import WandbRun
from titan_hd.errors import UserError

_SHOWN = 50  # samples of each task in the table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("Weights & Biases", "scores, and a table of some samples").add_argument
    add("--wandb-project", metavar="NAME", default="", help="where they go; without it nothing does")
    add("--wandb-entity", metavar="NAME", default="", help="the user or team; default: yours")
    add("--wandb-name", metavar="NAME", default="", help="of the run")
    add("--wandb-group", metavar="NAME", default="", help="of runs that belong together")


def check(args: argparse.Namespace) -> None:
    """Raises:
    UserError: a name without a project.
    """
    for key in ("wandb_entity", "wandb_name", "wandb_group"):
        if getattr(args, key) and not args.wandb_project:
            raise UserError(f"--{key.replace('_', '-')}: needs --wandb-project")


def log(
    args: argparse.Namespace,
    summary: Mapping[str, Mapping[str, Any]],
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
) -> None:
    """Record the scores as task/name, and a table of the first samples of each task. A fault of wandb is a warning."""
    if not args.wandb_project:
        return
    names = {key: getattr(args, f"wandb_{key}") for key in ("project", "entity", "name", "group")}
    config = {key: str(value) for key, value in vars(args).items() if value not in (None, "", [], False)}
    run = WandbRun(str(args.output), **names, job_type="evaluation", config=config)
    if run.run is not None:
        run.log(dict(_numbers(summary)) | {"samples": _table(rows)})
    run.finish()


def _numbers(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{key}", value


def _table(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> Any:
    import wandb

    columns: list[str | int] = ["task", "id", "sample", "prompt", "output", "extracted", "reference", "right"]
    shown = [row for own in rows.values() for row in own[:_SHOWN]]
    return wandb.Table(columns=columns, data=[[row.get(str(name)) for name in columns] for row in shown])
