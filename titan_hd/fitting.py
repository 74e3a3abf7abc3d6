"""Whether a run will fit into the memory of its device, and which change would make it fit."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Iterator

import torch

from titan_hd.adapters.methods import method_of
from titan_hd.components.memory import GB, Estimate, Sizes, estimate_memory, received_bytes
from titan_hd.preflight import RunPlan, update_plan

logger = logging.getLogger("titan_hd")

_MOST_SHARDS = 64


def estimate_run(plan: RunPlan, device_type: str) -> Estimate:
    """What each worker of a run on devices of this type will need."""
    return estimate_memory(_sizes(plan, device_type))


def traffic_gb(plan: RunPlan, micro_batches: int, kept: bool) -> dict[str, float]:
    """GB that a worker receives in a step, by name of the metric. kept: the weights are gathered once for all of it."""
    gathered, exchanged = received_bytes(_sizes(plan, "cuda"), micro_batches, kept)
    return {"gather_gb": gathered / GB, "exchange_gb": exchanged / GB}


def _sizes(plan: RunPlan, device_type: str) -> Sizes:
    updates = update_plan(plan.config, plan) if plan.method.folds else None
    return Sizes(plan.config, plan.decoder, plan.mesh, updates, device_type)


def device_memory(device: torch.device) -> int:
    """Bytes that one worker may take: what is free on its GPU, or its share of the host's available memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="utf-8") as file:
            fields = dict(line.split(":", 1) for line in file)
    except OSError:  # not Linux
        return 2**63
    return 1024 * int(fields["MemAvailable"].split()[0]) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def log_memory(plan: RunPlan, device: torch.device) -> None:
    """Say what a run will need, and warn if its device has less. Before anything is loaded."""
    logger.info("%s", estimate_run(plan, device.type).table())
    warning = too_little(plan, device.type, device_memory(device))
    if warning:
        logger.warning("%s", warning)


def too_little(plan: RunPlan, device_type: str, available: int) -> str | None:
    """One line, if a worker needs more than `available` bytes: how much, and what would help. None: it fits."""
    needed = estimate_run(plan, device_type).total
    if needed <= available:
        return None
    return (
        f"memory: each worker will need about {needed / GB:.1f} GB and has {available / GB:.1f} GB; "
        f"{remedy(plan, device_type, available)}"
    )


def remedy(plan: RunPlan, device_type: str, available: int) -> str:
    """Every change that by itself makes a run fit on its workers, else the first ones, by what they cost, that do it
    together; and the smallest number of workers on which it fits as it is."""

    def fits(changed: RunPlan) -> bool:
        return estimate_run(changed, device_type).total <= available

    ways = [text for text, changed in _changes(plan) if fits(changed)] or _together(plan, fits)
    more = next((changed for changed in _more_shards(plan) if fits(changed)), None)
    if more is not None:
        ways.append(f"{more.dp_shard * more.dp_replicate * more.tp} workers")
    return "it would fit with " + ", or ".join(ways) if ways else "no smaller setting would be enough"


def _together(plan: RunPlan, fits: Callable[[RunPlan], bool]) -> list[str]:
    """The first changes that make a run fit together, as one text; none if all of them do not."""
    taken = []
    while (change := next(_changes(plan), None)) is not None:
        text, plan = change
        taken.append(text)
        if fits(plan):
            last = {part.split(" = ")[0]: part for part in taken}  # a batch size is halved several times
            return [" and ".join(last.values())]
    return []


def _changes(plan: RunPlan) -> Iterator[tuple[str, RunPlan]]:
    """Changes that save memory on the same workers, cheap ones first: words for each, and the plan with it alone."""
    c = plan.config
    if c.parallelism.fsdp_reshard_after_forward == "never":
        yield _set(plan, "parallelism.fsdp_reshard_after_forward", "default")
    batch = c.training.local_batch_size
    for size in (batch // 2**i for i in range(1, batch.bit_length())):
        yield _set(plan, "training.local_batch_size", size)
    modes = ("none", "selective", "full")
    for mode in modes[modes.index(c.activation_checkpoint.mode) + 1 :]:
        yield _set(plan, "activation_checkpoint.mode", mode)
    if c.training.mixed_precision_param != "bfloat16":
        yield _set(plan, "training.mixed_precision_param", "bfloat16")
    if c.training.master_dtype == "float32" and "bfloat16" in method_of(c).master_dtypes:
        yield _set(plan, "training.master_dtype", "bfloat16")
    if plan.method.folds and c.hdpissa.factor_cache_gb != 0.0:
        yield _set(plan, "hdpissa.factor_cache_gb", 0.0)


def _set(plan: RunPlan, key: str, value: object) -> tuple[str, RunPlan]:
    section, _, name = key.partition(".")
    changed = dataclasses.replace(getattr(plan.config, section), **{name: value})
    config = dataclasses.replace(plan.config, **{section: changed})
    return f"{key} = {value}", dataclasses.replace(plan, config=config)


def _more_shards(plan: RunPlan) -> Iterator[RunPlan]:
    """The plan on twice the shards and so on, with the same adapters where they can be dealt to so many workers."""
    shards, k = plan.dp_shard, plan.num_adapters
    while (shards := 2 * shards) <= _MOST_SHARDS:
        workers = shards * plan.dp_replicate
        if max(k, workers) % min(k, workers) == 0:
            yield dataclasses.replace(plan, dp_shard=shards)
