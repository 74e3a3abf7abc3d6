"""Whether a run will fit into the memory of its device, and which change would make it fit."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator

import torch

from titan_hd.adapters.method import Method
from titan_hd.adapters.methods import method_of
from titan_hd.components.memory import GB, Estimate, Sizes, estimate_memory, received_bytes
from titan_hd.distributed.weight_gathers import CPU_SHARE, CUDA_MARGIN
from titan_hd.models.model_config import ModelConfig
from titan_hd.models.registry import build_model
from titan_hd.preflight import RunPlan, update_plan

_MOST_SHARDS = 64
_USABLE = 0.985  # of the GiB that a card is sold with, what cudaMemGetInfo shows as free before a process takes some
Change = tuple[str, object]  # a key and its value


def estimate_run(plan: RunPlan, device_type: str) -> Estimate:
    """What each worker of a run on devices of this type will need."""
    return estimate_memory(_sizes(plan, device_type))


def trained_size(method: Method, decoder: ModelConfig, target_modules: list[str] | None) -> tuple[int, int]:
    """Parameters that a method trains, those of all logical adapters together, and the layers that they are in."""
    with torch.device("meta"):
        model = build_model(decoder)
    layers = method.apply(model, target_modules)
    return method.trained_parameters(model), len(layers)


def traffic_gb(plan: RunPlan, micro_batches: int, kept: bool) -> dict[str, float]:
    """GB that a worker receives in a step, by name of the metric. kept: the weights are gathered once for all of it."""
    gathered, exchanged = received_bytes(_sizes(plan, "cuda"), micro_batches, kept)
    return {"gather_gb": gathered / GB, "exchange_gb": exchanged / GB}


def _sizes(plan: RunPlan, device_type: str) -> Sizes:
    updates = update_plan(plan.config, plan) if plan.method.folds else None
    return Sizes(plan.config, plan.decoder, plan.mesh, updates, device_type, plan.untouched)


def usable_bytes(card: float) -> int:
    """Of a GPU that is sold with so many GiB, what a process finds free."""
    return int(_USABLE * card * 2**30)


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


def gathering(plan: RunPlan, device_type: str, available: int) -> str | None:
    """One line on what parallelism.fsdp_reshard_after_forward = "default" will come to, which the estimate counts as
    "always"; the run decides after its first step. None: there is nothing to decide."""
    batch = plan.config.training.local_batch_size * plan.dp_replicate * plan.dp_shard
    if plan.config.parallelism.fsdp_reshard_after_forward != "default" or plan.global_batch_size <= batch:
        return None
    needed = estimate_run(_with(plan, [("parallelism.fsdp_reshard_after_forward", "never")]), device_type).total
    if device_type == "cuda":
        stays = needed <= available * (1 - CUDA_MARGIN)
    else:
        stays = needed - estimate_run(plan, device_type).total <= available // CPU_SHARE
    kept = "W will stay gathered" if stays else "W will be gathered for every micro-batch: kept"
    return f"memory: {kept} over the micro-batches of a step, that takes about {needed / GB:.1f} GB in all"


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

    ways = [_words(way) for way in _changes(plan) if fits(_with(plan, [way]))] or _together(plan, fits)
    more = next((changed for changed in _more_shards(plan) if fits(changed)), None)
    if more is not None:
        ways.append(f"{more.dp_shard * more.dp_replicate * more.tp} workers")
    return "it would fit with " + ", or ".join(ways) if ways else "no smaller setting would be enough"


def _together(plan: RunPlan, fits: Callable[[RunPlan], bool]) -> list[str]:
    """As one text, changes that make a run fit together and of which none may be left out; the cheap ones are tried
    first. Nothing if all of them are not enough."""
    taken: dict[str, Change] = {}  # by key: a batch size is halved several times
    while not fits(_with(plan, taken.values())):
        change = next(_changes(_with(plan, taken.values())), None)
        if change is None:
            return []
        taken[change[0]] = change
    for key in reversed(list(taken)):
        others = {k: change for k, change in taken.items() if k != key}
        if fits(_with(plan, others.values())):
            taken = others
    return [" and ".join(_words(change) for change in taken.values())]


def _changes(plan: RunPlan) -> Iterator[Change]:
    """Changes that save memory on the same workers, cheap ones first, and those that change numbers late."""
    c = plan.config
    if c.parallelism.fsdp_reshard_after_forward == "never":
        yield "parallelism.fsdp_reshard_after_forward", "default"
    batch = c.training.local_batch_size
    for size in (batch // 2**i for i in range(1, batch.bit_length())):
        yield "training.local_batch_size", size
    modes = ("none", "selective", "full")
    for mode in modes[modes.index(c.activation_checkpoint.mode) + 1 :]:
        yield "activation_checkpoint.mode", mode
    if plan.method.folds and c.hdpissa.factor_cache_gb != 0.0:
        yield "hdpissa.factor_cache_gb", 0.0
    if plan.method.folds and not c.hdpissa.offload_moments:
        yield "hdpissa.offload_moments", True
    if c.training.mixed_precision_param != "bfloat16":
        yield "training.mixed_precision_param", "bfloat16"
    if c.training.master_dtype == "float32" and "bfloat16" in method_of(c).master_dtypes:
        yield "training.master_dtype", "bfloat16"
    if not c.training.enable_cpu_offload:
        yield "training.enable_cpu_offload", True


def _words(change: Change) -> str:
    key, value = change
    return f"{key} = {str(value).lower() if isinstance(value, bool) else value}"


def _with(plan: RunPlan, changes: Iterable[Change]) -> RunPlan:
    """The plan with other values of some keys."""
    config = plan.config
    for key, value in changes:
        section, _, name = key.partition(".")
        changed = dataclasses.replace(getattr(config, section), **{name: value})
        config = dataclasses.replace(config, **{section: changed})
    return dataclasses.replace(plan, config=config)


def _more_shards(plan: RunPlan) -> Iterator[RunPlan]:
    """The plan on twice the shards and so on, with the same adapters where they can be dealt to so many workers."""
    shards, k = plan.dp_shard, plan.num_adapters
    while (shards := 2 * shards) <= _MOST_SHARDS:
        workers = shards * plan.dp_replicate
        if max(k, workers) % min(k, workers) == 0:
            yield dataclasses.replace(plan, dp_shard=shards)
