"""A run of Weights & Biases that never stops the work that it records."""

from __future__ import annotations

import logging
from typing import Any, Literal

from titan_hd.components.source_code import repository

logger = logging.getLogger("titan_hd")

START_SECONDS = 30


class WandbRun:
    """wandb that never stops its caller: without its server it goes offline, and a failure ends it with a warning.

    folder: gets wandb's files. run_id: of a run that goes on. words: project, entity, name, group, notes and config, as
    wandb.init takes them; empty texts are left out.
    """

    def __init__(self, folder: str, run_id: str | None = None, **words: Any):
        self.run, self.run_id = None, run_id
        for mode in (None, "offline"):  # None: what WANDB_MODE says, online by default
            try:
                self.run = self._start(folder, run_id, mode, words)
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
            resume="allow" if run_id else None,
            dir=folder,
            mode=mode,
            settings=wandb.Settings(init_timeout=START_SECONDS, **git),
        )

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        if self.run is None:
            return
        try:
            self.run.log(values, step=step)
        except Exception as error:
            self._give_up(error)

    def finish(self) -> None:
        if self.run is None:
            return
        try:
            self.run.finish()
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self.run = None
        logger.warning("wandb failed (%s); going on without it", " ".join(str(error).split()))
