"""Which trackers a configuration names, and how a run holds them: what fails is left behind with a warning."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from titan_hd.components.trackers.tensorboard import TensorBoardTracker
from titan_hd.components.trackers.tracker import TrackedRun, Tracker
from titan_hd.components.trackers.weights_and_biases import WandbTracker
from titan_hd.config.job_config import JobConfig, Metrics
from titan_hd.errors import UserError

logger = logging.getLogger("titan_hd")

# The values of metrics.trackers, beside the path of a class.
TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoardTracker, "wandb": WandbTracker}


def tracker_names(metrics: Metrics) -> dict[str, str]:
    """The trackers that are asked for, each with the key that does."""
    names = {
        "wandb": "metrics.enable_wandb" if metrics.enable_wandb else "",
        "tensorboard": "metrics.enable_tensorboard" if metrics.enable_tensorboard else "",
    }
    asked = {name: key for name, key in names.items() if key}
    return asked | {name: "metrics.trackers" for name in metrics.trackers if name not in asked}


def tracker_class(name: str) -> type[Tracker]:
    """A tracker by its name in TRACKERS or as package.module:Class.

    Raises:
        UserError: there is none, it is no tracker, or its package is not installed.
    """
    cls = TRACKERS.get(name) or _imported(name)
    if cls.package and not _installed(cls.package):
        raise UserError(f"needs the package {cls.package}: pip install {cls.package}")
    return cls


def _installed(package: str) -> bool:
    """Whether there is such a package; to look for a.b imports a."""
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:
        return False
    except Exception as error:
        raise UserError(f"the package {package} cannot be imported: {type(error).__name__}: {error}") from None


def _imported(name: str) -> type[Tracker]:
    module, colon, attribute = name.partition(":")
    if not colon:
        raise UserError(f"{name!r} is no tracker; there are {', '.join(TRACKERS)}, and package.module:Class")
    try:
        cls = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # of the user's module, whatever it does
        raise UserError(f"{name!r} cannot be imported: {type(error).__name__}: {error}") from None
    if not (isinstance(cls, type) and issubclass(cls, Tracker)):
        raise UserError(f"{name!r} is no subclass of titan_hd.components.trackers.tracker.Tracker")
    return cls


def tracker_errors(config: JobConfig) -> list[str]:
    """A line for each tracker that cannot be."""
    errors = []
    for name, key in tracker_names(config.metrics).items():
        try:
            tracker_class(name)
        except UserError as error:
            errors.append(f"{key}: {error}")
    return errors


def saved_run_ids(state: dict[str, Any]) -> dict[str, str]:
    """Out of a checkpoint's train_state.json, by tracker; older ones know of wandb alone."""
    before = {"wandb": state["wandb_id"]} if state.get("wandb_id") else {}
    return state.get("trackers", before)


class Trackers:
    """Those of a run. run_ids: by name, what a checkpoint has of them; went_back: as in `TrackedRun`."""

    def __init__(self, config: JobConfig, first_step: int, run_ids: dict[str, str], went_back: bool):
        self._running: dict[str, Tracker] = {}
        self._known = run_ids
        _LIVING.append(self)  # first: one that hangs may be interrupted when others have started
        for name, key in tracker_names(config.metrics).items():
            run = TrackedRun(config, first_step, run_ids.get(name), went_back)
            self._call(name, f"{key}: {{}} cannot start", lambda name=name, run=run: self._start(name, run))

    @property
    def run_ids(self) -> dict[str, str]:
        """For a checkpoint: also of trackers that run no more, or not in this part of the run."""
        return self._known | {name: t.run_id for name, t in self._running.items() if t.run_id}

    def each(self, what: Callable[[Tracker], object]) -> None:
        """Call every tracker."""
        for name, tracker in list(self._running.items()):
            self._call(name, "{} failed", lambda tracker=tracker: what(tracker))

    def finish(self, failed: bool = False) -> None:
        """End every tracker; called again, nothing. failed: the run ends by an error."""
        self.each(lambda tracker: tracker.finish(failed))
        self._running.clear()
        if self in _LIVING:
            _LIVING.remove(self)

    def _start(self, name: str, run: TrackedRun) -> None:
        self._running[name] = tracker = tracker_class(name)()
        tracker.start(run)

    def _call(self, name: str, trouble: str, function: Callable[[], object]) -> None:
        """What a tracker raises ends it, and nothing else. trouble: for the warning, with {} for the tracker."""
        try:
            function()
        except Exception as error:
            tracker = self._running.pop(name, None)  # None: there is none, for it could not be made
            if tracker and tracker.run_id:
                self._known = self._known | {name: tracker.run_id}
            reason = " ".join(str(error).split()) or type(error).__name__
            title = tracker.title if tracker else ""
            logger.warning("%s (%s); going on without it", trouble.format(title or name), reason)


_LIVING: list[Trackers] = []  # of this process


def finish_failed_run() -> None:
    """Tell the trackers that the run failed: the process will not end in the way that they wait for."""
    for trackers in list(_LIVING):
        trackers.finish(failed=True)
