"""The best validation so far: which checkpoint is worth keeping, and when more steps gain nothing."""

from __future__ import annotations

import logging
import math
from typing import Any, NamedTuple

from titan_hd.config.job_config import JobConfig

logger = logging.getLogger("titan_hd")


class Best(NamedTuple):
    """The best validation: after which step, and its metric."""

    step: int
    metric: str
    value: float


class BestValidation:
    """Compares the validations of a run by one metric, the same on every worker. The validation before the first step
    is none of them: there is no checkpoint of it.

    measured_on: what each metric is measured on, by `Validator.measured_on`: only values of equal texts compare.

    Attributes:
        metric: checkpoint.keep_best, or validation_loss: of a loss the least is best, of all else the most.
        best: None as long as there is none.
        without_gain: how many validations in a row have not been better since.
    """

    def __init__(self, config: JobConfig, measured_on: dict[str, str]):
        self.metric = config.checkpoint.keep_best or "validation_loss"
        self._measured_on = measured_on.get(self.metric, "")  # "": this run does not validate
        self._keep, self._patience = config.checkpoint.keep_best != "", config.validation.patience
        self.best: Best | None = None
        self.without_gain = 0

    def add(self, step: int, values: dict[str, float]) -> bool:
        """Count the validation after `step`, whose metrics are `values`; whether it is the best and its checkpoint to
        be kept. An equal one is no better, nor is one that is not finite."""
        if step == 0:
            return False
        value = values[self.metric]
        gain = math.isfinite(value) and (self.best is None or self._better(value, self.best.value))
        if gain:
            self.best = Best(step, self.metric, value)
        self.without_gain = 0 if gain else self.without_gain + 1
        return gain and self._keep

    def _better(self, value: float, than: float) -> bool:
        return value < than if self.metric.startswith("validation_loss") else value > than

    @property
    def to_keep(self) -> Best | None:
        """The best, if its checkpoint is to be kept."""
        return self.best if self._keep else None

    @property
    def exhausted(self) -> bool:
        """Whether validation.patience ends the run."""
        return 0 < self._patience <= self.without_gain

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        measure = {"metric": self.metric, "measured_on": self._measured_on}
        return {**measure, "best": self.best, "without_gain": self.without_gain}

    def go_on_from(self, state: dict[str, Any] | None) -> None:
        """Take over the `state` in a checkpoint; None: it has none, being older than this."""
        if state is None:
            return
        if not self._measured_on:  # for a later run
            self.metric, self._measured_on = state["metric"], state["measured_on"]
        if state["metric"] == self.metric and state["measured_on"] == self._measured_on:
            self.best, self.without_gain = Best(*state["best"]) if state["best"] else None, state["without_gain"]
        elif state["best"]:
            other = f"by {state['metric']}" if state["metric"] != self.metric else "on other records or settings"
            line = "the checkpoint's best validation is %s; the best by %s, and validation.patience, count from here on"
            logger.warning(line, other, self.metric)

    def tell_of_early_stop(self, step: int, total_steps: int, resumed: bool) -> None:
        """Log why the run ends after `step`, if it is not the last one. resumed: it had ended there before."""
        if step == total_steps:
            return
        begin = "this run has stopped early" if resumed else "stopped early"
        best = f"the best, {self.best.value:.4g}, is of step {self.best.step}" if self.best else "none was finite"
        advice = "; to train on, raise validation.patience or set it to 0" if resumed else ""
        line = "%s after step %d of %d: %d validation(s) in a row without gain of %s (%s)%s"
        logger.info(line, begin, step, total_steps, self.without_gain, self.metric, best, advice)
