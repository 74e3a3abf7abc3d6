"""The log's line for a logged step: a few columns, aligned from line to line. metrics.jsonl has the whole record."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from titan_hd.console import clock, painted

# Metric -> its name in the line, its width, and how it is written; in the order of the columns.
_COLUMNS: dict[str, tuple[str, int, Callable[[float], str]]] = {
    "loss": ("loss", 8, lambda value: f"{value:.4f}"),
    "grad_norm": ("grad_norm", 8, lambda value: f"{value:.3g}"),
    "lr": ("lr", 8, lambda value: f"{value:.2e}"),
    "tokens_per_second": ("tokens/s", 9, lambda value: f"{value:,.0f}"),
    "mfu": ("mfu", 5, lambda value: f"{value:.1%}"),
    "peak_memory_gib": ("memory", 10, lambda value: f"{value:.2f} GiB"),
}
_MEASURED = 3  # steps after which the rest of a run can be told, the first one of the process aside


class StepLines:
    """Lines of a run from the step after `first_step` to `total_steps`; knows how fast it goes."""

    def __init__(self, first_step: int, total_steps: int, now: Callable[[], float] = time.monotonic):
        self.step, self.total_steps, self._now = first_step, total_steps, now
        self._first: tuple[int, float] | None = None  # the first step of the process, which compiles, and its end
        self._told = False

    def advance(self, step: int) -> str | None:
        """So many steps are done. What is to be expected of the run, once, as soon as that can be told."""
        self.step = step
        if self._first is None:
            self._first = step, self._now()
        left = self.seconds_left()
        if self._told or step - self._first[0] < _MEASURED or not left:
            return None
        self._told, steps = True, self.total_steps - step
        each = f"{left / steps:.3g} s a step, with what came between the steps"
        return f"{each}: the other {steps} of {self.total_steps} will take about {clock(left)}"

    def seconds_left(self) -> float | None:
        """As long as all steps but the first one took on average, with what came between them; None: not known yet."""
        if self._first is None or self.step == self._first[0]:
            return None
        step, ended = self._first
        return (self._now() - ended) / (self.step - step) * (self.total_steps - self.step)

    def line(self, step: int, values: Mapping[str, float]) -> str:
        """A training record in columns, with the time that is left; any other record with all that it has."""
        parts = [f"step {step:>{len(str(self.total_steps))}}/{self.total_steps}"]
        if "loss" not in values:
            return "  ".join(parts + [f"{painted(name, 'dim')} {_short(value)}" for name, value in values.items()])
        for metric, (name, width, written) in _COLUMNS.items():
            if metric in values:
                text = f"{written(values[metric]):>{width}}"
                parts.append(f"{painted(name, 'dim')} {painted(text, 'bold') if metric == 'loss' else text}")
        left = self.seconds_left()
        return "  ".join([*parts, f"{painted('ETA', 'dim')} {'-' if left is None else clock(left):>8}"])


def _short(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"
