"""Everything about a run that can be known, or be wrong, before anything is allocated.

The launcher asks before it starts a process, and rank 0 of the workers asks again: they may have been started by
something else, on another node with other files.
"""

from __future__ import annotations

import dataclasses
import math
import os.path
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from titan_hd.adapters.inject import targeted
from titan_hd.adapters.method import Method
from titan_hd.adapters.methods import build_method, method_errors, method_of
from titan_hd.adapters.svd import SvdSettings
from titan_hd.checkpoint.folder import incomplete, read_train_state
from titan_hd.checkpoint.object_store import checkpoint_folder
from titan_hd.checkpoint.resume_check import allow_mismatch_errors, run_identity, weights_fingerprint
from titan_hd.components.classification import metric_names, missing_library
from titan_hd.components.dtypes import dtype_warnings, resolve_dtypes, untouched_dtype
from titan_hd.components.optimizer import optimizer_class
from titan_hd.components.trackers.registry import tracker_errors
from titan_hd.components.update import fold_plan
from titan_hd.config.checks import CLASSIFIER_METRICS
from titan_hd.config.job_config import Data, JobConfig
from titan_hd.config.manager import ConfigError
from titan_hd.data.build import check_data
from titan_hd.distributed.parallel_dims import holders_error, placement_error, resolve_shard_degree
from titan_hd.distributed.tp.tensor_parallel import local_shape, tensor_parallel_errors
from titan_hd.distributed.update.plan import UpdatePlan
from titan_hd.errors import Faults, UserError
from titan_hd.export.hf import check_assets, check_folder, check_place, export_folder
from titan_hd.files import shown_size
from titan_hd.models.hf_files import open_model_weights, read_model_config
from titan_hd.models.model_config import ModelConfig
from titan_hd.models.registry import flavor_config, parameter_shapes
from titan_hd.models.roberta import RobertaConfig, with_labels


@dataclass(frozen=True)
class RunPlan:
    """What the configuration comes to for a number of workers: every default resolved.

    config: with the dtypes and checkpoint.base that "auto" stands for. warnings: lines for the log. untouched: dtype of
    the shards of what the method leaves as the files have it.
    """

    config: JobConfig
    decoder: ModelConfig
    dp_replicate: int
    dp_shard: int
    tp: int
    method: Method
    global_batch_size: int
    warnings: tuple[str, ...] = ()
    untouched: torch.dtype = torch.float32

    @property
    def num_adapters(self) -> int:
        """K; 1 for methods without logical adapters."""
        return self.method.num_adapters

    @property
    def mesh(self) -> tuple[int, int, int]:
        """Degrees of replicas, shards and tensor parallelism."""
        return self.dp_replicate, self.dp_shard, self.tp


def plan_run(
    config: JobConfig,
    world_size: int,
    needs_files: bool = True,
    device_type: str | None = None,
    unseen_files: torch.dtype | None = None,
) -> RunPlan:
    """Resolve a configuration for `world_size` workers; needs_files: the data must be there; device_type: "cuda" or
    "cpu", by default what this machine has; unseen_files: the dtype to assume of a model's files that are not there.

    Raises:
        ConfigError: one line for every fault that needs the model's shapes, the files or the number of workers.
    """
    errors = Faults(method_errors(config))
    device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    warnings = dtype_warnings(config, device_type) + _profiling_warnings(config, device_type)
    absent = [rank for rank in config.profiling.profile_ranks if rank >= world_size]
    if absent and (config.profiling.enable_profiling or config.profiling.memory_snapshot_steps):
        errors.append(f"profiling.profile_ranks: {', '.join(map(str, absent))}: the ranks are 0 to {world_size - 1}")

    parallelism, training = config.parallelism, config.training
    replicate, tp = parallelism.data_parallel_replicate_degree, parallelism.tensor_parallel_degree
    shard = errors.attempt(resolve_shard_degree, replicate, parallelism.data_parallel_shard_degree, tp, world_size)
    workers = max(1, world_size // tp)
    decoder = errors.attempt(decoder_config, config)
    given, files = config, files_dtype(config, decoder) or unseen_files
    if decoder:
        config = dataclasses.replace(config, data=_as_the_model_reads(config.data, decoder))
    config = resolve_dtypes(config, device_type, files, _saved_state(config))
    errors.attempt(optimizer_class, config.optimizer.name)
    errors += tracker_errors(config)
    if needs_files:
        errors.attempt(check_data, config.data)
    if config.export.enable and needs_files:
        errors.attempt(_check_export, config)
    warnings += _period_warnings(config, method_of(config))
    errors += allow_mismatch_errors(config.checkpoint.allow_mismatch)
    method = build_method(config, method_of(config).adapters_for(config, workers))
    if decoder and needs_files:
        warnings += errors.attempt(_check_start, config, decoder, method) or []
    global_batch = training.global_batch_size
    if global_batch == -1:
        global_batch = training.local_batch_size * max(method.shares, workers)
    if config.data.streaming and config.data.shuffle_window < global_batch:
        errors.append(f"data.shuffle_window: must be at least the global batch, {global_batch} records")
    error = holders_error(method.num_adapters, workers)
    error = error or placement_error(method.shares, workers, global_batch, training.local_batch_size)
    if error:
        errors.append(error)
    if decoder is not None:
        errors += _kind_errors(given, decoder, method, needs_files)
        if config.data.pack and not decoder.packs:
            kind = decoder.hf["model_type"]
            errors.append(f"data.pack: documents in one row would see each other in {kind} models; unset it")
        warnings += _length_warnings(config, decoder) if decoder.endless else []
        if config.export.enable and needs_files:
            warnings += _space_warnings(config, decoder)
        errors += _split_errors(config, decoder)
        errors += _target_errors(config, decoder, method)
    if errors:
        raise ConfigError(errors)
    assert decoder is not None
    assert shard is not None
    return RunPlan(
        config,
        decoder,
        replicate,
        shard,
        tp,
        method,
        global_batch,
        tuple(warnings),
        untouched_dtype(given, config, files),
    )


def run_identity_of(plan: RunPlan, data: str) -> dict[str, Any]:
    """What a checkpoint must have in common with this run. data: `RunData.summary`."""
    c = plan.config
    weights = "" if c.model.flavor else weights_fingerprint(c.model.hf_assets_path)
    return run_identity(c, plan.decoder, plan.num_adapters, plan.global_batch_size, data, weights)


def update_plan(config: JobConfig, plan: RunPlan) -> UpdatePlan:
    """How the update of every adapted weight will travel, without a model."""
    linears, paths = plan.decoder.linear_shapes(), plan.decoder.linear_paths()
    kinds = targeted(linears, config.adapter.target_modules)
    shapes = {
        name: local_shape(paths[kind], linears[kind], plan.tp) if plan.tp > 1 else linears[kind]
        for name, kind in plan.decoder.linear_layers().items()
        if kind in kinds
    }
    return fold_plan(config, plan.num_adapters, (plan.dp_replicate, plan.dp_shard), shapes)


def refresh_line(plan: RunPlan) -> str | None:
    """What `hdpissa.refresh_steps` makes of a run, on one line. None: its slices stay."""
    a, every, method = plan.config.adapter, plan.config.hdpissa.refresh_steps, plan.method
    if not plan.method.folds or not every:
        return None
    if not method.directions:
        return f"slices are drawn anew every {every} steps"
    linears, workers = plan.decoder.linear_shapes(), math.prod(plan.mesh)
    svd, blocks = SvdSettings(a.svd, a.svd_niter, method.smallest), plan.decoder.num_hidden_layers
    costs = [svd.cost(linears[kind], method.directions) for kind in targeted(linears, a.target_modules)]
    return (
        f"slices of the current weights every {every} steps: {blocks * len(costs)} decompositions on {workers} "
        f"worker(s), about {blocks * sum(costs) / workers:.1e} operations on each; training waits for them"
    )


def _check_start(config: JobConfig, decoder: ModelConfig, method: Method) -> list[str]:
    """What the run starts from is there: the checkpoint, or weight files whose headers have the model's shapes. Returns
    warnings.

    Before any memory is allocated for a model whose sizes somebody else's config.json says.
    """
    c = config.checkpoint
    resumes = c.enable and checkpoint_folder(config).candidates(c.load_step)
    # The export of an adapter over a base that the method has changed reads the weights that the run started from.
    export_reads_base = method.changes_base and config.export.enable and config.export.format == "peft"
    measures_changes = config.metrics.update_freq > 0
    if (resumes and c.base == "full" and not export_reads_base and not measures_changes) or config.model.flavor:
        return []
    try:
        open_model_weights(config.model.hf_assets_path, decoder)
    except UserError as error:
        if not (resumes and measures_changes):
            raise
        need = "metrics.update_freq: changes are measured from the base model on; 0 goes on without its files"
        raise UserError(f"{error}\n{need}") from None
    return _head_warnings(config.model.hf_assets_path, decoder) if not resumes else []


def _head_warnings(directory: str, model: ModelConfig) -> list[str]:
    """What becomes of a trained classification head in a directory under other labels than its own.

    Raises:
        UserError: the labels are its own in another order: it would be loaded with the classes exchanged.
    """
    if not isinstance(model, RobertaConfig) or model.head_names == model.label_names:
        return []
    if open_model_weights(directory, with_labels(model, model.head_names)).missing:
        return []
    own, labels = ([name.casefold() for name in names] for names in (model.head_names, model.label_names))
    line = f"data.labels: the classification head in {directory} was trained for {', '.join(model.head_names)}"
    if len(own) != len(labels):
        return [f"{line}: a new one is drawn for the {len(labels)} label(s)"]
    if own == labels or own == [*map(str, range(len(own)))]:
        return []
    if sorted(own) == sorted(labels):
        order = ", ".join(model.label_names[labels.index(name)] for name in own)
        raise UserError(f"{line}; name them in this order: {order}")
    return [f"{line}, not for {', '.join(model.label_names)}: training begins with its outputs as they are"]


def _check_export(config: JobConfig) -> None:
    """What would keep the export from being written, or would make it delete something, when the training is done."""
    folder, assets = export_folder(config), config.model.hf_assets_path
    check_folder(folder, assets)
    check_place(folder, _other_paths(config))
    if config.export.format == "hf":
        check_assets(assets)


def _other_paths(config: JobConfig) -> dict[str, Path]:
    """What a run reads and writes beside its export, by the key or the file that stands for it."""
    c, dump = config, Path(config.job.dump_folder)
    lines = ("metrics.jsonl", "validation_samples.jsonl", "svd.jsonl", "environment.jsonl")
    paths = {name: dump / name for name in (*lines, "plan.txt", "tb", "wandb")}
    if dump.resolve().is_relative_to(export_folder(config).resolve()):
        return {"job.dump_folder": dump}  # and with it all that is in it
    if c.checkpoint.enable:
        paths["checkpoint.folder"] = dump / c.checkpoint.folder
    if c.profiling.enable_profiling:
        paths["profiling.save_traces_folder"] = dump / c.profiling.save_traces_folder
    if c.profiling.enable_memory_snapshot:
        paths["profiling.save_memory_snapshot_folder"] = dump / c.profiling.save_memory_snapshot_folder
    given = {"adapter.svd_cache": c.adapter.svd_cache, "data.cache_dir": c.data.cache_dir}
    if not c.model.flavor:
        given["model.hf_assets_path"] = c.model.hf_assets_path
    for key, value in (("data.train", c.data.train), ("data.validation", c.data.validation)):
        sources = value if isinstance(value, list) else [value]
        for place, source in enumerate(sources):
            given[f"{key}[{place}]" if value is sources else key] = source if isinstance(source, str) else source.path
    return paths | {key: Path(path) for key, path in given.items() if path not in ("", "auto")}


def _profiling_warnings(config: JobConfig, device_type: str) -> list[str]:
    """What of [profiling] is for a GPU alone."""
    asked = [key for key in ("enable_memory_snapshot", "enable_nvtx") if getattr(config.profiling, key)]
    return [f"profiling.{key}: there is no GPU; it is left out" for key in asked if device_type != "cuda"]


def _period_warnings(config: JobConfig, method: type[Method]) -> list[str]:
    """What happens between two folds of `hdpissa.local_steps`, when W is behind what has been learned."""
    c, every = config, config.hdpissa.local_steps
    periods = {"validation.freq": (c.validation.enable, c.validation.freq)}
    periods["checkpoint.interval"] = (c.checkpoint.enable, c.checkpoint.interval)
    between = [key for key, (enabled, period) in periods.items() if enabled and period % every]
    no_multiple, warnings = f"no multiple of hdpissa.local_steps = {every}", []
    if between:
        warnings.append(
            f"{', '.join(between)}: {no_multiple}: between two folds validation sees, and a checkpoint's weights are, "
            "W of the last fold (a resumed run goes on from all of it)"
        )
    if c.metrics.update_freq % every:
        warnings.append(f"metrics.update_freq: {no_multiple}: update_size of a step between two folds is 0")
    return warnings if method.folds else []


def _length_warnings(config: JobConfig, decoder: ModelConfig) -> list[str]:
    """Positions that the model has never seen; transformers warns too, and vLLM refuses them."""
    length, most = config.training.seq_len, decoder.max_position_embeddings
    if length <= most or decoder.attention_free:
        return []
    line = f"training.seq_len: {length} is beyond the model's max_position_embeddings, {most}"
    return [f"{line}: longer records train at positions that it may not know; {most} cuts them there"]


def _space_warnings(config: JobConfig, decoder: ModelConfig) -> list[str]:
    """A disk that has no room for the export now; it may have when the training is done."""
    if config.export.format != "hf":
        return []
    folder = export_folder(config).absolute()
    disk = next((path for path in folder.parents if os.path.isdir(path)), Path("/"))
    needed = sum(shape.numel() for shape in parameter_shapes(decoder).values())
    needed *= getattr(torch, config.export.dtype).itemsize
    free = shutil.disk_usage(disk).free
    if needed <= free:
        return []
    return [f"export.folder: {folder}: the weights will need {shown_size(needed)}, {shown_size(free)} are free"]


def files_dtype(config: JobConfig, decoder: ModelConfig | None) -> torch.dtype | None:
    """The one dtype of all weights of the base model; where its files are not there, what its config.json says. None:
    several, or not to be known."""
    if decoder is None or config.model.flavor:
        return None
    try:
        files = open_model_weights(config.model.hf_assets_path, decoder)
    except UserError:  # `_check_start` reports it
        said = decoder.hf.get("dtype", decoder.hf.get("torch_dtype"))
        return {name: getattr(torch, name) for name in ("float16", "bfloat16", "float32")}.get(str(said))
    dtypes = {files.dtype(name) for name in parameter_shapes(decoder) if name not in files.missing}
    return dtypes.pop() if len(dtypes) == 1 else None


def _saved_state(config: JobConfig) -> dict[str, Any] | None:
    """The state of the checkpoint that a run will go on from, as far as that can be told without reading all of it."""
    c = config.checkpoint
    if not c.enable:
        return None
    try:
        folder = checkpoint_folder(config)
        paths = map(folder.path, folder.candidates(c.load_step))
        return next((read_train_state(path) for path in paths if not incomplete(path)), None)
    except UserError:  # the checkpointer reports it
        return None


def decoder_config(config: JobConfig) -> ModelConfig:
    """The model's sizes: of the flavor if one is named, else of the directory. UserError names the key or the file."""
    if config.model.flavor:
        model = flavor_config(config.model.name, config.model.flavor)
    else:
        model = read_model_config(config.model.hf_assets_path, config.model.name)
    return with_labels(model, config.data.labels) if isinstance(model, RobertaConfig) and config.data.labels else model


def _as_the_model_reads(data: Data, model: ModelConfig) -> Data:
    """The [data] section for a classifier: its one format, for the entries of lists too, and its classes."""
    if not isinstance(model, RobertaConfig):
        return data
    train, validation = (
        [dataclasses.replace(entry, format=None) for entry in sources] if isinstance(sources, list) else sources
        for sources in (data.train, data.validation)
    )
    labels = [*model.label_names]
    return dataclasses.replace(data, train=train, validation=validation, format="classification", labels=labels)


def _kind_errors(config: JobConfig, model: ModelConfig, method: Method, needs_files: bool) -> list[str]:
    """What a kind of model cannot do, one line each. config: as the user gave it. needs_files: the run is to start, and
    needs packages too."""
    c, family = config, model.hf.get("model_type")
    lists = (source for source in (c.data.train, c.data.validation) if isinstance(source, list))
    formats = {c.data.format, *(entry.format for sources in lists for entry in sources if entry.format)}
    best = c.checkpoint.keep_best.partition("/")[0].removeprefix("validation_")
    if not isinstance(model, RobertaConfig):
        of_classifiers = {
            "data.format:": "classification" in formats,
            "data.labels:": c.data.labels,
            f"checkpoint.keep_best: {c.checkpoint.keep_best}": best in CLASSIFIER_METRICS,
        }
        return [
            f"{key} is for a model with a classification head (roberta), not for {family}"
            for key, given in of_classifiers.items()
            if given
        ]
    others = formats - {"auto", "classification"}
    length, most, known = c.training.seq_len, model.max_position_embeddings, metric_names(model.num_labels)
    library = missing_library(model.num_labels) if c.validation.enable and needs_files else None
    faults = {
        f"data.format: {', '.join(sorted(others))} is for models that write text; {family} classifies": others,
        f"training.seq_len: {length} is more than the positions that the model has, {most}": length > most,
        "validation.exact_match_samples: a classifier writes no answers; set it to 0": c.validation.exact_match_samples,
        "validation.samples: a classifier writes no answers; set it to 0": c.validation.samples > 0,
        f"validation.enable: the metrics need {library}: pip install {library}, or titan_hd[classification]": library,
        f"checkpoint.keep_best: must be validation_loss or validation_{' or validation_'.join(known)} for "
        f"{model.num_labels} label(s), not {c.checkpoint.keep_best!r}": best and best not in ("loss", *known),
        f"training.enable_cpu_offload: method {method.name} cannot train a classification head on the host; unset it": (
            c.training.enable_cpu_offload and method.folds
        ),
    }
    return [line for line, fault in faults.items() if fault]


def _split_errors(config: JobConfig, decoder: ModelConfig) -> list[str]:
    """Why tensor parallelism cannot split the model."""
    p = config.parallelism
    if p.tensor_parallel_degree == 1:
        return []
    if not decoder.tensor_parallel:
        kind = decoder.hf["model_type"]
        return [f"parallelism.tensor_parallel_degree: {kind} models have no tensor parallelism; set it to 1"]
    sizes = {name: getattr(decoder, name) for name in ("num_key_value_heads", "intermediate_size")}
    if p.loss_parallel:
        sizes["vocab_size"] = decoder.vocab_size
    return tensor_parallel_errors(sizes, p.tensor_parallel_degree)


def _target_errors(config: JobConfig, decoder: ModelConfig, method: Method) -> list[str]:
    """Targets that the model has not, or of whose shapes the method can make nothing."""
    errors, shapes = [], decoder.linear_shapes()
    for target in config.adapter.target_modules or []:
        if not targeted(shapes, [target]):
            errors.append(f"adapter.target_modules: {target!r} is no linear layer; there are {', '.join(shapes)}")
    if config.parallelism.tensor_parallel_degree > 1 and not method.tensor_parallel():
        errors.append(
            f"parallelism.tensor_parallel_degree: method {config.adapter.method} has no tensor parallelism; set it to 1"
        )
    kinds = targeted(shapes, config.adapter.target_modules)
    faults = (method.shape_error(kind, shapes[kind]) for kind in kinds)
    return errors + [fault for fault in faults if fault][:1]  # the other layers' lines would say the same
