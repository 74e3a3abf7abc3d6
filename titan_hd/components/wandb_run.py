"""A run of Weights & Biases that never stops the work that it records."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

from titan_hd.components.source_code import repository

logger = logging.getLogger("titan_hd")

START_SECONDS = 30


class WandbRun:
    """wandb that never stops its caller: without its server it goes offline, and a failure ends it with a warning.

    folder: gets wandb's files. run_id: of a run that goes on. anew: it goes on with an empty history; what it has
    logged is replaced. words: project, entity, name, group, notes and config, as wandb.init takes them; empty texts
    are left out.
    """

    def __init__(self, folder: str, run_id: str | None = None, anew: bool = False, **words: Any):
        self.run, self.run_id = None, run_id
        for mode in (None, "offline"):  # None: what WANDB_MODE says, online by default
            try:
                self.run = self._start(folder, run_id, mode, {"resume": _resume(run_id, anew, mode), **words})
                self.run_id = self.run.id
                return
            except Exception as error:
                reason = " ".join(str(error).split())
                outcome = "logging offline, `wandb sync` uploads later" if mode is None else "going on without it"
                logger.warning("wandb cannot start (%s); %s", reason, outcome)

    def _start(self, folder: str, run_id: str | None, mode: Literal["offline"] | None, words: dict[str, Any]):
        import wandb

        source = repository()
        # Not of the folder that the run was started in: its repository is somebody's project, and not what runs.
        git: dict[str, Any] = {"disable_git": True} if source is None else {"git_root": str(source)}
        return wandb.init(
            **{key: value or None for key, value in words.items()},
            id=run_id,
            dir=folder,
            mode=mode,
            settings=wandb.Settings(init_timeout=START_SECONDS, **git),
        )

    @property
    def next_step(self) -> int:
        """The first step that its history, as far as it is known here, can still take."""
        return 0 if self.run is None else self.run.step

    @property
    def folder(self) -> Path | None:
        """Of what it writes itself; `dir` is that of the files that it uploads."""
        return None if self.run is None else Path(self.run.dir).parent

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        if self.run is None:
            return
        try:
            self.run.log(values, step=step)
        except Exception as error:
            self._give_up(error)

    def finish(self, exit_code: int | None = None) -> None:
        """exit_code: of a run that failed."""
        if self.run is None:
            return
        try:
            self.run.finish(exit_code=exit_code)
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self.run = None
        logger.warning("wandb failed (%s); going on without it", " ".join(str(error).split()))


def _resume(run_id: str | None, anew: bool, mode: str | None) -> str:
    """What wandb.init is to do with a run that it knows. Left out, it empties the run; offline it can do no other."""
    return "allow" if run_id and not anew and mode is None else ""
