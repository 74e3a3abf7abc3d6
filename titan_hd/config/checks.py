"""What a configuration must fulfil that single types do not say: ranges, and combinations of keys.

What depends on the method is the method's own (`adapters.methods.method_errors`); what needs files, shapes or the
number of workers is `titan_hd.preflight`'s.
"""

from __future__ import annotations

import os
import re
from typing import Any

from titan_hd.config.job_config import DataSource, JobConfig

# What the validation of a classification head logs: of classes, and of scores.
CLASSIFIER_METRICS = ("accuracy", "f1", "matthews", "pearson", "spearman")
_AT_LEAST = {
    "job.gpu_gib": 1,
    "data.max_skipped": 0,
    "data.num_workers": 0,
    "data.num_proc": 0,
    "data.shuffle_window": 1,
    "training.steps": 1,
    "training.seq_len": 2,
    "training.local_batch_size": 1,
    "training.max_norm": 0,
    "training.gc_freq": 1,
    "training.seed": 0,
    "optimizer.lr": 0,
    "optimizer.eps": 0,
    "optimizer.weight_decay": 0,
    "lr_scheduler.warmup_steps": 0,
    "adapter.rank": 1,
    "adapter.svd_niter": 0,
    "hdpissa.num_adapters": 0,
    "hdpissa.refresh_steps": 0,
    "hdpissa.local_steps": 1,
    "hdpissa.mute_scalar": 0,
    "hdpissa.factor_cache_gb": 0,
    "hdpissa.exchange_in_flight": 1,
    "parallelism.data_parallel_replicate_degree": 1,
    "parallelism.tensor_parallel_degree": 1,
    "profiling.profile_freq": 1,
    "comm.init_timeout_seconds": 1,
    "comm.train_timeout_seconds": 1,
    "comm.save_timeout_seconds": 1,
    "comm.export_timeout_seconds": 1,
    "checkpoint.interval": 1,
    "checkpoint.keep_latest_k": 0,
    "checkpoint.load_step": -1,
    "metrics.log_freq": 1,
    "metrics.update_freq": 0,
    "metrics.update_vectors": 2,
    "validation.freq": 1,
    "validation.patience": 0,
    "validation.exact_match_samples": 0,
    "validation.batch_size": 0,
    "validation.max_new_tokens": 1,
}


def _get(config: JobConfig, key: str) -> Any:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def check_presence(config: JobConfig) -> list[str]:
    """Keys that must be given and are not, one line each."""
    c = config
    no_model = not c.model.hf_assets_path and not (c.model.name and c.model.flavor)
    faults = {
        "training.steps: give either training.steps or training.epochs": (c.training.steps is None)
        == (c.training.epochs is None),
        "data.train: is missing; give the training records": not c.data.train,
        "model.hf_assets_path: is missing; give a HF directory, or model.name and model.flavor": no_model,
        "data.validation: is missing; validation.enable needs it": c.validation.enable and not c.data.validation,
    }
    return [line for line, fault in faults.items() if fault]


def check_combinations(config: JobConfig) -> list[str]:
    """Faults of single values and of combinations of keys, one line each."""
    errors = []

    def require(condition: bool, line: str) -> None:
        if not condition:
            errors.append(line)

    for key, least in _AT_LEAST.items():
        value = _get(config, key)
        require(value is None or value >= least, f"{key}: must be at least {least}, not {value}")
    c = config
    asked = c.job.print_plan or c.job.dry_run
    require(c.job.gpu_gib is None or asked, "job.gpu_gib: needs job.print_plan or job.dry_run")
    require(c.training.epochs is None or c.training.epochs > 0, "training.epochs: must be above 0")
    gbs = c.training.global_batch_size
    require(gbs == -1 or gbs >= 1, f"training.global_batch_size: must be -1 or at least 1, not {gbs}")
    shard = c.parallelism.data_parallel_shard_degree
    require(shard == -1 or shard >= 1, f"parallelism.data_parallel_shard_degree: must be -1 or at least 1, not {shard}")
    context = c.parallelism.context_parallel_degree
    require(
        context == 1,
        f"parallelism.context_parallel_degree: must be 1, not {context}; for long sequences use "
        'parallelism.tensor_parallel_degree and activation_checkpoint.mode = "full"',
    )
    steps = c.validation.steps
    require(steps == -1 or steps >= 1, f"validation.steps: must be -1 or at least 1, not {steps}")
    require(c.validation.samples >= -1, f"validation.samples: must be at least -1, not {c.validation.samples}")
    require(
        c.lr_scheduler.warmup_steps is None or c.lr_scheduler.warmup_ratio is None,
        "lr_scheduler.warmup_ratio: give either warmup_steps or warmup_ratio",
    )
    for key in ("lr_scheduler.warmup_ratio", "lr_scheduler.min_lr_factor"):
        value = _get(config, key)
        require(value is None or 0 <= value <= 1, f"{key}: must be between 0 and 1, not {value}")
    for key in ("optimizer.beta1", "optimizer.beta2", "adapter.dropout"):
        value = _get(config, key)
        require(0 <= value < 1, f"{key}: must be at least 0 and below 1, not {value}")
    p = c.profiling
    for key, least in (("profile_ranks", 0), ("profile_steps", 1), ("memory_snapshot_steps", 1)):
        low = [number for number in getattr(p, key) if number < least]
        require(not low, f"profiling.{key}: must be at least {least}, not {', '.join(map(str, low))}")
    switches = {
        "profile_steps": "enable_profiling",
        "with_stack": "enable_profiling",
        "memory_snapshot_steps": "enable_memory_snapshot",
    }
    traced = p.enable_profiling or p.memory_snapshot_steps
    require(bool(p.profile_ranks) or not traced, "profiling.profile_ranks: names no worker that would write")
    for key, switch in switches.items():
        require(not getattr(p, key) or getattr(p, switch), f"profiling.{key}: needs profiling.{switch}")
    require(c.adapter.loraplus_lr_ratio > 0, "adapter.loraplus_lr_ratio: must be above 0")
    require(c.adapter.alpha is None or c.adapter.alpha > 0, f"adapter.alpha: must be above 0, not {c.adapter.alpha}")
    if c.export.enable and c.export.format == "peft":
        require(not c.model.flavor, "export.format: peft's adapter needs a base model; model.flavor has random weights")
    labels = c.data.labels
    require(len(set(labels)) == len(labels) and all(labels), "data.labels: must be names that differ")
    size = c.export.max_shard_size_gb
    require(size > 0, f"export.max_shard_size_gb: must be above 0, not {size}")
    require(c.adapter.target_modules != [], "adapter.target_modules: names no layer; leave it out for all")
    for key, folder in (("checkpoint.folder", c.checkpoint.folder), ("export.folder", c.export.folder)):
        require(
            os.path.normpath(folder) not in ("", ".", "..") and not os.path.normpath(folder).endswith("/.."),
            f"{key}: must name a folder of its own, not {folder!r}",
        )
    require(
        c.checkpoint.base != "delta" or (c.model.hf_assets_path != "" and not c.model.flavor),
        "checkpoint.base: delta needs a base model in model.hf_assets_path (and no model.flavor), and a method that "
        "leaves some of its weights alone",
    )
    return errors + _check_sources(config) + _check_best(config)


def _check_best(config: JobConfig) -> list[str]:
    """Faults of checkpoint.keep_best and validation.patience: the metric must be one that the validation logs."""
    best, validation, errors = config.checkpoint.keep_best, config.validation, []
    if best and not (validation.enable and config.checkpoint.enable):
        errors.append("checkpoint.keep_best: needs validation.enable and checkpoint.enable")
    elif best and best not in _validation_metrics(config, config.data.format in ("auto", "classification")):
        known = " or ".join(_validation_metrics(config, config.data.format == "classification"))
        errors.append(f"checkpoint.keep_best: must be {known} (what the validation logs), not {best!r}")
    if validation.patience > 0 and not validation.enable:
        errors.append("validation.patience: needs validation.enable")
    return errors


def _validation_metrics(config: JobConfig, classifies: bool) -> list[str]:
    """Names of the metrics that the validation can log: the first set's, then those of the others under their names.
    classifies: the model may have a classification head; that it has none the run's plan says, which knows it."""
    others = config.data.validation[1:] if isinstance(config.data.validation, list) else []
    suffixes = ["", *(f"/{entry.name}" for entry in others if entry.name)]
    kinds = ["validation_loss"] + ["validation_exact_match"] * (config.validation.exact_match_samples > 0)
    if classifies:
        kinds += [f"validation_{name}" for name in CLASSIFIER_METRICS]
    return [kind + suffix for suffix in suffixes for kind in kinds]


def _check_sources(config: JobConfig) -> list[str]:
    """Faults of the tables in data.train and data.validation, and of keys that streaming excludes."""
    errors, streaming = [], config.data.streaming
    for key in ("train", "validation"):
        value = getattr(config.data, key)
        for place, source in enumerate(value if isinstance(value, list) else []):
            name, weight, samples = f"data.{key}[{place}]", source.weight, source.samples
            reason = (
                "validation reads every record once" if key == "validation" else "data.streaming reads all in order"
            )
            if key == "validation" or streaming:
                errors += [f"{name}.weight: {reason}; leave it out"] * (weight is not None)
                errors += [f"{name}.samples: {reason}; leave it out"] * (samples is not None)
            elif weight is not None and samples is not None:
                errors.append(f"{name}.samples: give either weight or samples")
            if weight is not None and weight <= 0:
                errors.append(f"{name}.weight: must be above 0, not {weight}")
            if samples is not None and samples < 1:
                errors.append(f"{name}.samples: must be at least 1, not {samples}")
            if key == "train" and source.name is not None:
                errors.append(f"{name}.name: only validation sets have names; leave it out")
    if streaming and config.data.pack:
        errors.append("data.pack: needs the lengths of all records, which data.streaming does not know; unset one")
    if streaming and config.training.epochs is not None:
        errors.append("training.epochs: data.streaming knows no length of an epoch; give training.steps")
    return errors + _check_names(config.data.validation)


def _check_names(validation: str | list[DataSource]) -> list[str]:
    """Faults of the names of validation sets."""
    names = [entry.name for entry in validation] if isinstance(validation, list) else []
    errors = []
    for place, name in enumerate(names if any(name is not None for name in names) else []):
        key = f"data.validation[{place}].name"
        if name is None:
            errors.append(f"{key}: is missing; give every entry a name, or none")
        elif not re.fullmatch("[A-Za-z0-9_-]+", name):
            errors.append(f"{key}: must be of letters, digits, _ and -, not {name!r}")
        elif name in names[:place]:
            errors.append(f"{key}: {name!r} is the name of data.validation[{names.index(name)}] already")
    return errors
