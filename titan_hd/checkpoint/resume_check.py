"""What a checkpoint and the run that resumes from it must have in common."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from titan_hd.adapters.methods import method_of
from titan_hd.config.job_config import JobConfig
from titan_hd.errors import UserError
from titan_hd.models.model_config import ModelConfig

logger = logging.getLogger("titan_hd")

# May differ where checkpoint.allow_mismatch names it; everything else of an identity never may.
MAY_DIFFER = (
    "adapter.alpha",
    "adapter.dropout",
    "hdpissa.aggregate",
    "hdpissa.mute_scalar",
    "hdpissa.samples",
    "hdpissa.refresh_steps",
    "hdpissa.local_steps",
    "training.global_batch_size",
    "training.seed",
    "training.master_dtype",
    "data.shuffle",
    "data.train",
    "weights",
)
_WHY = {
    "hdpissa.num_adapters": "each adapter has its own slice and its own moments, so K stays; with "
    "hdpissa.num_adapters = 0, K is the number of data-parallel workers",
}
# What a checkpoint means that was saved before there was a key.
_BEFORE = {
    "hdpissa.factor_scale": "root",
    "hdpissa.samples": "own",
    "hdpissa.refresh_steps": 0,
    "hdpissa.local_steps": 1,
}
# How what waits in dA and dB is folded, and whether the forward pass sees it until then.
_FOLDED_BY = ("hdpissa.aggregate", "hdpissa.samples", "hdpissa.mute_scalar")
_SAMPLES, _SAMPLE_BYTES = 64, 4096


def run_identity(
    config: JobConfig, decoder: ModelConfig, num_adapters: int, batch: int, data: str, weights: str
) -> dict[str, Any]:
    """By the key that a user would change. num_adapters, batch: the resolved K and global batch size; data: what the
    samples are made of; weights: the fingerprint of the base model, "" if it is not at hand. Of the method's settings
    only those that it reads."""
    c, method = config, method_of(config)
    return {
        "model": repr(decoder),
        "weights": weights,
        "adapter.method": method.name,
        "adapter.target_modules": c.adapter.target_modules,
        "hdpissa.num_adapters": num_adapters,
        "training.global_batch_size": batch,
        "training.seed": c.training.seed,
        "training.master_dtype": c.training.master_dtype,
        "optimizer.name": c.optimizer.name,
        "data.shuffle": c.data.shuffle,
        "data.train": data,
        **method.identity(c),
    }


def check_resume(
    state: dict[str, Any],
    current: dict[str, Any],
    stored: Iterable[str],
    allowed: list[str],
    total_steps: int,
    exhausted: bool = False,
) -> bool:
    """Whether a run can go on from a checkpoint: by its length, its identity, and what waits in dA and dB. What differs
    and is accepted is warned of.

    state, current: the checkpoint's state, and this run's identity. stored: names of the checkpoint's tensors. allowed:
    checkpoint.allow_mismatch. exhausted: validation.patience ends the run before another step.

    Returns:
        whether what int8 has left in dA and dB is to be dropped.

    Raises:
        UserError: a line for each key that keeps it from going on.
    """
    step = state["step"]
    check_length(step, total_steps)
    for line in check_resumable(state, current, allowed):
        logger.warning("%s; checkpoint.allow_mismatch accepts it", line)
    ends = "validation.patience" if exhausted else ""
    stale = check_unfolded(state, current, stored, "training.steps, training.epochs" if step == total_steps else ends)
    if stale:
        logger.warning("%s", stale)
    return bool(stale)


def check_resumable(state: dict[str, Any], current: dict[str, Any], allowed: list[str]) -> list[str]:
    """Compare a checkpoint's identity with this run's. Returns a line for each difference that `allowed` names.

    Raises:
        UserError: one line for each other one.
    """
    saved, errors, accepted = _BEFORE | state["identity"], [], []
    if state["base"] == "delta":  # half of the model is the base model's
        allowed = [key for key in allowed if key != "weights"]
    for key, value in current.items():
        if _same(key, saved.get(key), value) or (key == "weights" and not value):
            continue
        line = f"{key}: the checkpoint has {saved.get(key)!r}, this run {value!r}"
        if key in allowed:
            accepted.append(line)
            continue
        reason = f" ({_WHY[key]})" if key in _WHY else ""
        allow = f', or checkpoint.allow_mismatch = ["{key}"]' if key in MAY_DIFFER else ""
        errors.append(f"{line}{reason}; set it back{allow}, or start anew with checkpoint.load_step = 0")
    if errors:
        raise UserError("\n".join(errors))
    return accepted


def check_length(step: int, total_steps: int) -> None:
    """UserError if a run of so many steps cannot go on after `step`."""
    if step > total_steps:
        raise UserError(
            f"training.steps, training.epochs: {total_steps} steps, but the checkpoint to resume from has {step}; name "
            "more, or checkpoint.load_step, or another job.dump_folder"
        )


def check_unfolded(state: dict[str, Any], current: dict[str, Any], stored: Iterable[str], ends: str = "") -> str | None:
    """Whether this run can fold what waits in a checkpoint's dA and dB: steps of `hdpissa.local_steps` since the last
    fold, and what int8 has left.

    stored: names of the checkpoint's tensors. ends: the key by which this run has no step left to take; "" if it has.

    Returns:
        a line if the checkpoint lies at a fold, and what int8 has left is to be dropped. None: all is to be read.

    Raises:
        UserError: a line for each key by which steps between two folds would be lost, or folded as other ones.
    """
    saved, stored = _BEFORE | state["identity"], set(stored)
    keys = ("hdpissa.local_steps", *_FOLDED_BY)
    changed = [key for key in keys if key in current and saved.get(key) != current[key]]
    if "unfolded.rates" in stored:
        step, every = state["step"], saved["hdpissa.local_steps"]
        fold = (step - 1) // every * every
        at, between = f"the checkpoint of step {step}", f"lies between two folds of hdpissa.local_steps = {every}"
        take = f"or {'resume from a fold' if fold else 'start anew'} with checkpoint.load_step = {fold}"
        lines = [
            f"{key}: {at} {between}: what waits is for {saved.get(key)!r}, not {current[key]!r}; set it back, {take}"
            for key in changed
        ]
        if ends:
            lines.append(
                f"{ends}: {at}, with which the run ends, {between}: W would lack those steps; raise it, {take}"
            )
        if lines:
            raise UserError("\n".join(lines))
    dropped = [key for key in changed if key in _FOLDED_BY]
    if dropped and any(key.startswith("residuals.") for key in stored):
        return f"{', '.join(dropped)}: changed; what int8 has left in dA and dB was for the old value, and is dropped"
    return None


def _same(key: str, saved: Any, current: Any) -> bool:
    """Which layers are trained does not depend on the order in which they are named, or on how often; nor a model on
    the order of the keys of its config.json."""
    if key == "adapter.target_modules" and saved and current:
        return set(saved) == set(current)
    if key == "model":
        return same_model(saved, current)
    return saved == current


def same_model(saved: Any, current: Any) -> bool:
    """Whether two texts of a ModelConfig, whose rope_scaling is as config.json orders it, are of one model."""
    return _ordered(str(saved)) == _ordered(str(current))


def _ordered(text: str) -> str:
    return re.sub(r"\{(.*?)\}", lambda table: ", ".join(sorted(table[1].split(", "))), text)


def allow_mismatch_errors(keys: list[str]) -> list[str]:
    """A line for each key that checkpoint.allow_mismatch cannot name."""
    return [
        f"checkpoint.allow_mismatch: {key!r} cannot differ; only {', '.join(MAY_DIFFER)} can"
        for key in keys
        if key not in MAY_DIFFER
    ]


def weights_fingerprint(directory: str) -> str:
    """Tells base models apart without reading them: a hash of the names and sizes of the safetensors files and of 64
    samples of each, the header among them. "" where there are none."""
    digest, paths = hashlib.blake2b(digest_size=16), sorted(Path(directory).glob("*.safetensors")) if directory else []
    try:
        for path in paths:
            size = path.stat().st_size
            digest.update(f"{path.name}/{size}/".encode())
            with open(path, "rb") as file:
                for offset in sorted({size * i // _SAMPLES for i in range(_SAMPLES)}):
                    file.seek(offset)
                    digest.update(file.read(_SAMPLE_BYTES))
    except OSError as error:
        raise UserError(f"{error.filename or directory}: cannot be read: {error.strerror}") from None
    return digest.hexdigest() if paths else ""
