"""The arms of a comparison: which method each is, what it changes, and over which values it is tuned."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field

from titan_hd.adapters.methods import METHODS
from titan_hd.config.job_config import Adapter, HDPissa, JobConfig
from titan_hd.errors import UserError

# HD-PiSSA's own variants: the slices, how the updates are combined, the scalar of the paper, K.
ABLATIONS = (
    "hdpissa",
    "hdpissa+slices=top",
    "hdpissa+slices=random",
    "hdpissa+aggregate=sum",
    "hdpissa+mute_scalar=1e-2",
    "hdpissa+mute_scalar=1e-8",
    "hdpissa+mute_scalar=1e-16",
    "hdpissa+mute_scalar=1e-32",
    "hdpissa+num_adapters=1",
    "hdpissa+num_adapters=2",
    "hdpissa+num_adapters=4",
)


# What the comparison gives every run; no arm and no grid can change it.
OF_EVERY_RUN = {
    "checkpoint.enable": "true",
    "checkpoint.folder": "checkpoint",
    "checkpoint.keep_latest_k": "1",
    "export.enable": "true",
    "export.format": "hf",
    "export.folder": "hf",
    "export.dtype": "float32",
    "metrics.log_freq": "1",
}
_GIVEN_BY = {
    "adapter.method": "--methods names the methods",
    "training.seed": "the first seed is the configuration's, --seeds says how many there are",
    "job.dump_folder": "--folder has a folder for each run",
    "metrics.wandb_group": "it is the name of --folder",
    "metrics.wandb_name": "it is the run's name",
    **{key: f"every run has {value}" for key, value in OF_EVERY_RUN.items()},
}


@dataclass(frozen=True)
class Axis:
    """The values that are tried of one key, in order.

    ratio: of neighbours, where the values are spaced evenly in the logarithm; such an axis can be widened and refined.
    None: a list, which stays as it is. whole: the key takes whole numbers.
    """

    values: tuple[str, ...]
    ratio: float | None = None
    whole: bool = False

    def value(self, number: float) -> str | None:
        """As it is written in an option; None for a whole number below 1."""
        if self.whole:
            return str(round(number)) if round(number) >= 1 else None
        return f"{number:.4g}"

    def beyond(self, value: str, upwards: bool) -> str | None:
        """The next value outside of an edge; None where there is none."""
        if self.ratio is None:
            return None
        found = self.value(float(value) * (self.ratio if upwards else 1 / self.ratio))
        return None if found == value else found

    def between(self, value: str, other: str) -> str | None:
        """Their geometric mean; None where it is one of them."""
        found = None if self.ratio is None else self.value(math.sqrt(float(value) * float(other)))
        return None if found in (value, other) else found


@dataclass(frozen=True)
class Arm:
    """changes: keys of this arm. axes: its own values of keys that the grid has, or of others."""

    name: str
    changes: Mapping[str, str]
    axes: Mapping[str, Axis] = field(default_factory=dict)


def parse_methods(text: str) -> dict[str, dict[str, str]]:
    """Name of each arm -> keys that it changes, from "lora,hdpissa+slices=top,...", "all" or "ablations".

    Raises:
        UserError: a method or a key that there is not.
    """
    return {arm.name: dict(arm.changes) for arm in parse_arms(text, {})}


def parse_arms(text: str, grid: Mapping[str, Axis]) -> list[Arm]:
    """The arms of "lora,pissa+optimizer.lr=1e-4:1.6e-3:5,...": a value of the form low:high:n is the arm's own range in
    place of the grid's.

    Raises:
        UserError: a method or a key that there is not; a key that is both changed and tuned; one arm twice.
    """
    groups = {"all": METHODS, "ablations": ABLATIONS}
    names = [name for part in text.split(",") if part for name in groups.get(part, (part,))]
    if not names:
        raise UserError("--methods: names no method")
    arms = [_arm(name, grid) for name in names]
    twice = [arm.name for i, arm in enumerate(arms) if arm.name in {other.name for other in arms[:i]}]
    if twice:
        raise UserError(f"--methods: {twice[0]} is there twice")
    return arms


def _arm(text: str, grid: Mapping[str, Axis]) -> Arm:
    method, *settings = text.split("+")
    if method not in METHODS:
        raise UserError(f"--methods: {method!r} is none; there are {', '.join(METHODS)}, all, ablations")
    changes, axes, name = {"adapter.method": method}, dict(grid), [method]
    if "adapter.dropout" not in METHODS[method].keys:  # what the others may have
        changes |= {"adapter.dropout": "0"}
    for setting in settings:
        key, equals, value = setting.partition("=")
        sections = [s for s, keys in (("adapter", Adapter), ("hdpissa", HDPissa)) if key in keys.__annotations__]
        if not equals or not (sections or "." in key):
            raise UserError(f"--methods: {text}: {setting!r} must be key=value with a key of [adapter] or [hdpissa]")
        full = key if "." in key else f"{sections[0]}.{key}"
        _refuse_given(full, f"--methods: {text}")
        if value.count(":") == 2:
            axes[full] = parse_axis(full, value, f"--methods: {text}")
        else:
            if full in grid:
                raise UserError(f"--methods: {text}: {full} is tuned by --grid; give the arm a range, low:high:number")
            changes[full] = value
            name.append(setting)
    return Arm("+".join(name), changes, axes)


def parse_grid(texts: list[str]) -> dict[str, Axis]:
    """Axis of each key, from "optimizer.lr=1e-4:3.2e-3:6" (spaced evenly in the logarithm) or "key=a,b,c".

    Raises:
        UserError: a text that is neither, or a key given twice.
    """
    axes: dict[str, Axis] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or "." not in key or not value:
            raise UserError(f"--grid: {text!r} must be section.key=low:high:number or section.key=value,value,...")
        if key in axes:
            raise UserError(f"--grid: {key} is given twice")
        _refuse_given(key, "--grid")
        axes[key] = parse_axis(key, value, "--grid")
    return axes


def _refuse_given(key: str, where: str) -> None:
    if key in _GIVEN_BY:
        raise UserError(f"{where}: {key} cannot be changed here: {_GIVEN_BY[key]}")


def parse_axis(key: str, text: str, where: str) -> Axis:
    """One axis of "low:high:number" or "value,value,...".

    Raises:
        UserError: `where` and what is wrong.
    """
    parts = text.split(":")
    if len(parts) != 3:
        values = tuple(text.split(","))
        if len({_as_read(value) for value in values}) < len(values):
            raise UserError(f"{where}: {key}={text} has a value twice")
        return Axis(values)
    try:
        low, high, count = float(parts[0]), float(parts[1]), int(parts[2])
    except ValueError:
        raise UserError(f"{where}: {key}={text} must be low:high:number, such as 1e-4:3.2e-3:6") from None
    if not 0 < low < high or count < 2:
        raise UserError(f"{where}: {key}={text} needs 0 < low < high, and two values or more")
    ratio = (high / low) ** (1 / (count - 1))
    axis = Axis((), ratio, _is_whole(key))
    values = [axis.value(low * ratio**i) for i in range(count)]
    return dataclasses.replace(axis, values=tuple(dict.fromkeys(value for value in values if value)))


def _as_read(value: str) -> float | str:
    """As grid.csv has it: 1e-3 and 0.001 are one point."""
    try:
        return float(value)
    except ValueError:
        return value


def _is_whole(key: str) -> bool:
    section, _, name = key.partition(".")
    kind = typing.get_type_hints(JobConfig).get(section)
    return kind is not None and typing.get_type_hints(kind).get(name) in (int, int | None)
