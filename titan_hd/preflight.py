"""Everything about a run that can be known, or be wrong, before any process group starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from titan_hd.adapters.methods import build_method
from titan_hd.checkpoint.folder import CheckpointFolder
from titan_hd.checkpoint.resume_check import allow_mismatch_errors
from titan_hd.components.optimizer import optimizer_class
from titan_hd.config.job_config import LINEAR_LAYERS, JobConfig
from titan_hd.config.manager import ConfigError
from titan_hd.data.dataset import check_data
from titan_hd.distributed.parallel_dims import placement_error, resolve_shard_degree
from titan_hd.distributed.tp.tensor_parallel import ROW_WISE, tensor_parallel_errors
from titan_hd.distributed.update.plan import Topology, UpdatePlan, plan_update
from titan_hd.export.hf import check_folder, export_folder
from titan_hd.models.hf_files import open_model_weights
from titan_hd.models.registry import DecoderConfig, flavor_config, read_hf_config


@dataclass(frozen=True)
class RunPlan:
    """What the configuration comes to for a number of workers: every default resolved."""

    decoder: DecoderConfig
    dp_replicate: int
    dp_shard: int
    tp: int
    num_adapters: int  # K; 1 for methods without logical adapters
    global_batch_size: int

    @property
    def mesh(self) -> tuple[int, int, int]:
        """Degrees of replicas, shards and tensor parallelism."""
        return self.dp_replicate, self.dp_shard, self.tp


def plan_run(config: JobConfig, world_size: int, needs_files: bool = True) -> RunPlan:
    """Resolve a configuration for `world_size` workers; needs_files: the data must be there.

    Raises:
        ConfigError: one line for every fault that needs the model's shapes, the files or the number of workers.
    """
    errors: list[str] = []

    def attempt(function, *args):
        try:
            return function(*args)
        except ValueError as error:
            errors.extend(str(error).splitlines())
            return None

    parallelism, training = config.parallelism, config.training
    replicate, tp = parallelism.data_parallel_replicate_degree, parallelism.tensor_parallel_degree
    shard = attempt(resolve_shard_degree, replicate, parallelism.data_parallel_shard_degree, tp, world_size)
    workers = max(1, world_size // tp)
    decoder = attempt(decoder_config, config)
    attempt(optimizer_class, config.optimizer.name)
    if needs_files:
        attempt(check_data, config.data)
    if config.export.enable and needs_files:
        attempt(check_folder, export_folder(config), config.model.hf_assets_path)
    if decoder and needs_files:
        attempt(_check_start, config, decoder)
    errors += allow_mismatch_errors(config.checkpoint.allow_mismatch)
    hdpissa = config.adapter.method == "hdpissa"
    num_adapters = (config.hdpissa.num_adapters or workers) if hdpissa else 1
    global_batch = training.global_batch_size
    if global_batch == -1:
        global_batch = training.local_batch_size * max(num_adapters, workers)
    if config.data.streaming and config.data.shuffle_window < global_batch:
        errors.append(f"data.shuffle_window: must be at least the global batch, {global_batch} records")
    error = placement_error(num_adapters, workers, global_batch, training.local_batch_size)
    if error:
        errors.append(error)
    if decoder is not None:
        sizes = {name: getattr(decoder, name) for name in ("num_key_value_heads", "intermediate_size")}
        if parallelism.loss_parallel:
            sizes["vocab_size"] = decoder.vocab_size
        errors += tensor_parallel_errors(sizes, tp)
        errors += _method_errors(config, decoder, num_adapters)
    if errors:
        raise ConfigError(errors)
    return RunPlan(decoder, replicate, shard, tp, num_adapters, global_batch)


def update_plan(config: JobConfig, plan: RunPlan, shapes: dict[str, tuple[int, int]] | None = None) -> UpdatePlan:
    """How the update of every adapted weight will travel; shapes default to those of the whole model."""
    if shapes is None:
        targets, linears = config.adapter.target_modules or LINEAR_LAYERS, plan.decoder.linear_shapes()
        shapes = {
            f"model.layers.{i}.{name}": _tp_local(name, shape, plan.tp)
            for i in range(plan.decoder.num_hidden_layers)
            for name, shape in linears.items()
            if name in targets
        }
    h, wire_bytes = config.hdpissa, {"float32": 4, "bfloat16": 2}[config.hdpissa.exchange_dtype]
    topology = Topology(plan.num_adapters, config.adapter.rank, plan.dp_replicate, plan.dp_shard, wire_bytes)
    return plan_update(shapes, topology, h.exchange, h.factor_cache_gb)


def _tp_local(name: str, shape: tuple[int, int], tp: int) -> tuple[int, int]:
    return (shape[0], shape[1] // tp) if name in ROW_WISE else (shape[0] // tp, shape[1])


def _check_start(config: JobConfig, decoder: DecoderConfig) -> None:
    """What the run starts from is there: the checkpoint, or weight files whose headers have the model's shapes.

    Before any memory is allocated for a model whose sizes somebody else's config.json says.
    """
    c = config.checkpoint
    checkpoints = CheckpointFolder(Path(config.job.dump_folder) / c.folder, c.keep_latest_k)
    resumes = c.enable and checkpoints.candidates(c.load_step)
    if (resumes and c.base == "full" and not _export_reads_base(config)) or config.model.flavor:
        return
    open_model_weights(config.model.hf_assets_path, decoder)


def _export_reads_base(config: JobConfig) -> bool:
    """Whether the export needs the weights that the run started from: an adapter over a base that was changed."""
    changes_weight = config.adapter.method == "pissa" or config.adapter.init != "default"
    return changes_weight and config.export.enable and config.export.format == "peft"


def decoder_config(config: JobConfig) -> DecoderConfig:
    """The model's sizes: of the flavor if one is named, else from config.json. ValueError names the key or the file."""
    if config.model.flavor:
        return flavor_config(config.model.name, config.model.flavor)
    return read_hf_config(config.model.hf_assets_path, config.model.name)


def _method_errors(config: JobConfig, decoder: DecoderConfig, num_adapters: int) -> list[str]:
    errors, shapes = [], decoder.linear_shapes()
    targets = config.adapter.target_modules or LINEAR_LAYERS
    for target in targets:
        if target not in shapes:
            errors.append(f"adapter.target_modules: {target!r} is no linear layer; there are {', '.join(shapes)}")
    method = build_method(config, num_adapters)
    if config.parallelism.tensor_parallel_degree > 1 and not method.tensor_parallel:
        errors.append(
            f"parallelism.tensor_parallel_degree: method {config.adapter.method} has no tensor parallelism; set it to 1"
        )
    faults = (method.shape_error(target, shapes[target]) for target in targets if target in shapes)
    return errors + [fault for fault in faults if fault][:1]  # the other layers' lines would say the same
