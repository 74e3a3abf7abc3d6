"""What a run needs on each GPU, from its configuration alone: no weights, no GPU, no process group.

Three parts. What is held all the time is counted from shapes. What comes and goes in a step is the largest of its
phases; the activations in it are found by running a block without memory (`live_bytes`). On top comes what no
allocation of ours explains, as a stated assumption. tests/distributed/test_memory.py compares with what a run's
allocator counts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from titan_hd.adapters.adapter_linear import AdapterLinear, untouched_parameters
from titan_hd.adapters.inject import targeted
from titan_hd.adapters.methods import build_method
from titan_hd.adapters.svd import SvdSettings, working_bytes
from titan_hd.components.host_moments import PART_ELEMENTS
from titan_hd.components.live_bytes import BlockMemory, HeadMemory, block_memory, head_memory
from titan_hd.components.optimizer import optimizer_class
from titan_hd.components.weight_changes import measured_layers, products_bytes
from titan_hd.config.job_config import JobConfig
from titan_hd.distributed.parallelize import fsdp_groups
from titan_hd.distributed.row_shards import chunk_rows
from titan_hd.distributed.update.gradients import bound_elements
from titan_hd.distributed.update.plan import UpdatePlan, block_of
from titan_hd.distributed.update.routes import ROUTES
from titan_hd.distributed.weight_gathers import sums_gradients_once
from titan_hd.models.decoder_config import DecoderConfig
from titan_hd.models.model import Model
from titan_hd.models.model_config import ModelConfig
from titan_hd.models.registry import build_model

GB = 1e9
# Of the device's memory, beside what the allocator hands out: the CUDA context with the libraries' workspaces, nccl's
# buffers where there are several workers, and the share of the allocations that fragmentation costs.
CONTEXT_BYTES = 1_000_000_000
NCCL_BYTES = 500_000_000
FRAGMENTATION = 0.05
PROCESS_BYTES = 400_000_000  # of Python and torch on a CPU


@dataclass(frozen=True)
class Sizes:
    """What the estimate depends on. mesh: degrees of replicas, shards, tensor parallelism; updates: how the update of
    every weight travels, for a method that folds; untouched: dtype of the shards of what a method leaves alone. The
    configuration's dtypes are resolved."""

    config: JobConfig
    decoder: ModelConfig
    mesh: tuple[int, int, int]
    updates: UpdatePlan | None
    device_type: str = "cuda"
    untouched: torch.dtype = torch.float32

    @property
    def compute(self) -> torch.dtype:
        """dtype of the gathered weights and the activations."""
        return getattr(torch, self.config.training.mixed_precision_param)

    @property
    def shards_on_host(self) -> bool:
        """The shards of the weights take none of the device's memory, nor do gradients and moments of trained ones."""
        return self.config.training.enable_cpu_offload and self.device_type == "cuda"

    @property
    def moments_on_host(self) -> bool:
        """So do the moments of a method that folds."""
        return self.config.hdpissa.offload_moments and self.device_type == "cuda"

    @property
    def master(self) -> torch.dtype:
        """dtype of the shards of W that the optimizer does not work on, and that are not left as they are."""
        return getattr(torch, self.config.training.master_dtype)

    def shard_bytes(self, group: Group) -> int:
        """Of the shards of a group on one worker."""
        changed = group.base - group.untouched
        return self.master.itemsize * changed + self.untouched.itemsize * group.untouched + 4 * group.trained


@dataclass(frozen=True)
class Estimate:
    """Bytes per worker. held: by name, all the time; passing: by name, the parts of the phase of a step that needs the
    most; phase: its name; beside: context and fragmentation."""

    held: dict[str, int]
    passing: dict[str, int]
    phase: str
    beside: int

    @property
    def allocated(self) -> int:
        """The peak of what is allocated."""
        return sum(self.held.values()) + sum(self.passing.values())

    @property
    def total(self) -> int:
        return self.allocated + self.beside

    def table(self) -> str:
        """One line per item, in GB."""
        lines = [f"memory of each worker, estimated (GB = 10^9 bytes): {self.total / GB:.2f} GB"]
        lines += [f"  {name:<44}{size / GB:>10.3f}" for name, size in self.held.items() if size]
        lines += [f"  {self.phase + ': ' + name:<44}{size / GB:>10.3f}" for name, size in self.passing.items() if size]
        return "\n".join([*lines, f"  {'context, fragmentation (assumed)':<44}{self.beside / GB:>10.3f}"])


def estimate_memory(sizes: Sizes) -> Estimate:
    """The peak of a training step after the first one (the optimizer's moments are there)."""
    model = _model_of(sizes)
    groups = model.groups(sizes.mesh[1])
    held = _held(sizes, model, groups)
    phases = _phases(sizes, model.local, groups)
    phase = max(phases, key=lambda name: sum(phases[name].values()))
    allocated = sum(held.values()) + sum(phases[phase].values())
    beside = PROCESS_BYTES
    if sizes.device_type == "cuda":
        beside = CONTEXT_BYTES + NCCL_BYTES * (sizes.mesh != (1, 1, 1)) + int(FRAGMENTATION * allocated)
    return Estimate(held, phases[phase], phase, beside)


# ---------------------------------------------------------------------------------------------------------------------
# The model


@dataclass(frozen=True)
class Group:
    """One FSDP2 group.

    kind: block, embedding, head, root. base, trained: elements of a (padded) shard of what the optimizer does not work
    on, and of what it trains; untouched: those of base that nothing changes. whole: elements as gathered;
    whole_trained: those of them that get a gradient.
    """

    kind: str
    base: int
    trained: int
    whole: int
    whole_trained: int
    untouched: int = 0

    @property
    def shard(self) -> int:
        """Elements of a shard."""
        return self.base + self.trained

    def gathers(self, trains_embedding: bool) -> int:
        """How often a micro-batch gathers it: a block in the forward and in the backward pass."""
        return 2 if self.kind == "block" or (self.kind == "embedding" and trains_embedding) else 1


def shard_elements(parameter: torch.Tensor, shards: int) -> int:
    """Elements of the largest shard of a parameter."""
    return chunk_rows(parameter.shape[0], shards) * parameter[0].numel()


def tp_local(decoder: ModelConfig, tp: int, loss_parallel: bool) -> ModelConfig:
    """The decoder whose weights are a tensor-parallel rank's parts. (With sequence parallelism norms and residuals are
    smaller still.)"""
    if tp == 1:
        return decoder
    assert isinstance(decoder, DecoderConfig), "the family that can be split"
    return decoder.changed(
        num_attention_heads=decoder.num_attention_heads // tp,
        num_key_value_heads=decoder.num_key_value_heads // tp,
        intermediate_size=decoder.intermediate_size // tp,
        vocab_size=decoder.vocab_size // tp if loss_parallel else decoder.vocab_size,
    )


class _MetaModel:
    """The tp-local model with its method, without memory. decoder: to be read alone; local: its sizes; adapts: trained
    tensors stand beside W."""

    def __init__(self, config: JobConfig, local: ModelConfig):
        self.local = local
        with torch.device("meta"):
            self.decoder = build_model(local)
            build_method(config).apply(self.decoder, config.adapter.target_modules)
        self.adapts = any(isinstance(layer, AdapterLinear) for layer in self.decoder.modules())
        self._groups: dict[int, list[Group]] = {}

    def groups(self, shards: int) -> list[Group]:
        """FSDP2's groups on so many shards."""
        if shards not in self._groups:
            self._groups[shards] = list(fsdp_group_sizes(self.decoder, shards))
        return self._groups[shards]


_MODEL: dict[str, _MetaModel] = {}  # the last one


def _model_of(sizes: Sizes) -> _MetaModel:
    """Remembered until another is asked for: looking for what fits changes anything but the model, and that of 80
    layers takes longer than the rest of an estimate."""
    c = sizes.config
    local = tp_local(sizes.decoder, sizes.mesh[2], c.parallelism.loss_parallel)
    key = repr((local, c.adapter, c.hdpissa, c.training.mixed_precision_param))  # what the method is built from
    if key not in _MODEL:
        _MODEL.clear()
        _MODEL[key] = _MetaModel(c, local)
    return _MODEL[key]


def fsdp_group_sizes(model: Model, shards: int) -> Iterator[Group]:
    """Of a model on the meta device that is not sharded yet."""
    seen: set[nn.Parameter] = set()
    left_alone = set(untouched_parameters(model))
    for modules, _ in fsdp_groups(model):
        mine = {p for module in modules for p in module.parameters()} - seen
        seen |= mine
        if not mine:
            continue
        kind = "block"
        if model.embedding() in modules:
            kind = "embedding"
        elif model.output_head() in modules:
            kind = "head"
        elif modules[0] is model:
            kind = "root"
        trained = {p for p in mine if p.requires_grad}
        yield Group(
            kind,
            sum(shard_elements(p, shards) for p in mine - trained),
            sum(shard_elements(p, shards) for p in trained),
            sum(p.numel() for p in mine),
            sum(p.numel() for p in trained),
            sum(shard_elements(p, shards) for p in mine & left_alone),
        )


# ---------------------------------------------------------------------------------------------------------------------
# All the time


def _held(sizes: Sizes, model: _MetaModel, groups: list[Group]) -> dict[str, int]:
    trained = sum(g.trained for g in groups)
    here = not sizes.shards_on_host
    held = {"weights": here * (sum(map(sizes.shard_bytes, groups)) - 4 * trained)}
    held["adapters beside W" if model.adapts else "trained weights (fp32)"] = here * 4 * trained
    cache, factors = 0, 0
    copied = sizes.compute != torch.float32 and sizes.config.hdpissa.mute_scalar == 0.0
    copies = together = 0
    if sizes.updates is not None:
        topology, shapes = sizes.updates.topology, [w.shape for w in sizes.updates.weights]
        factors = 4 * topology.hosted * topology.rank * sum(map(sum, shapes))
        copies = factors * sizes.compute.itemsize // 4 if copied else 0
        if topology.samples == "all":
            together = bound_elements(shapes, topology)
            copies = together * sizes.compute.itemsize
            together += topology.directions * max(map(max, shapes))  # the zeros that stand for all of them
        cache = sum(_cached(w.cache_bytes, w.shape, sizes.updates) for w in sizes.updates.weights if w.cached)
    learned = factors + here * 4 * trained  # of a method that folds: with a head beside it, whose moments stay
    moments = learned - (factors if sizes.moments_on_host else 0)
    return held | {
        "fixed factors A, B": factors,
        "their copies in the compute dtype": copies,
        "deltas dA, dB": factors,
        "gradients": learned,
        "gradients of all adapters": 4 * together,
        "optimizer's moments": state_tensors(sizes.config.optimizer.name) * moments,
        "cache of all workers' factors": cache,
        "products of the weights, for metrics.update_freq": _products(sizes, model.decoder),
    }


def _products(sizes: Sizes, model: Model) -> int:
    metrics = sizes.config.metrics
    if not metrics.update_freq:
        return 0
    layers = measured_layers(model).values()
    rows = sum(chunk_rows(layer.weight.shape[0], sizes.mesh[1]) for layer in layers)
    return products_bytes(rows, metrics.update_vectors, sizes.updates is not None)


def _cached(planned: int, shape: tuple[int, int], updates: UpdatePlan) -> int:
    """Bytes of the cached factors of one weight: those of a single holder are its own A, B, but for the copy in which
    the rows of several adapters' B stand side by side."""
    topology = updates.topology
    if topology.holders > 1:
        return planned
    return 0 if topology.num_adapters == 1 else 4 * topology.num_adapters * topology.rank * topology.chunk(shape[0])


def state_tensors(optimizer: str) -> int:
    """Tensors as large as a parameter that an optimizer keeps of it: 2 for Adam."""
    cls: Callable[..., torch.optim.Optimizer] = optimizer_class(optimizer)
    parameter = nn.Parameter(torch.zeros(2, 3))
    parameter.grad = torch.ones(2, 3)
    extra = {"foreach": True} if "foreach" in inspect.signature(cls).parameters else {}
    built = cls([parameter], lr=1e-3, **extra)
    built.step()
    state = built.state[parameter].values()
    return sum(isinstance(value, torch.Tensor) and value.shape == parameter.shape for value in state)


# ---------------------------------------------------------------------------------------------------------------------
# The phases of a step


def _phases(sizes: Sizes, local: ModelConfig, groups: list[Group]) -> dict[str, dict[str, int]]:
    """Bytes by name of each phase, beside what is held all the time."""
    c, element = sizes.config, sizes.compute.itemsize
    tokens = (c.training.local_batch_size, c.training.seq_len)
    num_adapters = 1 if sizes.updates is None else sizes.updates.topology.num_adapters
    block = _block_memory(c, num_adapters, local, tokens, sizes.compute)
    head_trained = c.adapter.method == "full" and c.adapter.target_modules is None
    head = _head_memory(local, tokens, sizes.compute, head_trained)
    layers = local.num_hidden_layers
    blocks = [g for g in groups if g.kind == "block"]
    gathered = element * max(g.whole for g in blocks)
    incoming = gathered if sizes.mesh[1] > 1 else 0
    head_and_root = (element * sum(g.whole for g in groups if g.kind == kind) for kind in ("head", "root"))
    gathered_head, root = head_and_root
    kept = {"activations": layers * block.kept, "gathered root": root}  # the root's group stays for the whole step
    weights = {"gathered block": gathered, "next block on its way": incoming}
    arriving = {"shards from the host": 0}
    if sizes.shards_on_host:  # before they are cast and gathered
        weights["shards from the host"] = max(map(sizes.shard_bytes, blocks))
        of_head = (g for g in groups if g.kind in ("head", "root"))
        arriving["shards from the host"] = max(map(sizes.shard_bytes, of_head))
    if c.parallelism.fsdp_reshard_after_forward == "never":
        kept = {"activations": layers * block.kept, "gathered weights": element * sum(g.whole for g in groups)}
        weights, gathered_head = {}, 0
    whole = sum(g.whole_trained for g in groups)
    shards, micro_batches = sizes.mesh[1], _micro_batches(c, sizes.mesh)
    if shards > 1 and sums_gradients_once(whole, sum(g.whole for g in groups), shards, micro_batches):
        kept["gradients not summed yet"] = 4 * whole
    phases = {
        "forward": {**kept, **weights, "block at work": block.forward},
        "head": {**kept, "gathered head": gathered_head, **arriving},
        "loss": {**kept, "gathered head": gathered_head, "loss and its gradient": head.peak},
        "backward": {**kept, **weights, "block at work": block.backward},
        "optimizer": {"its temporaries": _optimizer_temporaries(sizes, groups)},
    }
    reduced = max((4 + element) * g.whole_trained + 4 * g.trained for g in blocks)
    if reduced:
        below = {**kept, "activations": (layers - 1) * block.kept}
        phases["reduction"] = {**below, **weights, "gradients of a block": reduced}
    if sizes.updates is not None:
        phases["backward"]["gradients to their holders"] = travelling_gradients(
            sizes.updates, c.hdpissa.exchange_in_flight, sizes.device_type
        )
        phases["fold"] = {"buckets on their way": fold_bytes(sizes.updates, c.hdpissa.exchange_in_flight)}
        if c.training.enable_cpu_offload:
            rows = (shard_elements(torch.empty(w.shape, device="meta"), sizes.mesh[1]) for w in sizes.updates.weights)
            phases["fold"]["a weight's rows from the host"] = sizes.master.itemsize * max(rows)
        if c.hdpissa.refresh_steps:
            phases["refresh"] = {"a weight and its decomposition": _refresh_bytes(sizes, sizes.updates)}
    return phases


def _refresh_bytes(sizes: Sizes, updates: UpdatePlan) -> int:
    """The most that taking a slice anew needs: one whole weight on each worker, as it arrives in parts or as it is
    decomposed. (The moments are given back before; the estimate counts them all the same.)"""
    c, method = sizes.config, build_method(sizes.config, updates.topology.num_adapters)
    if not method.directions:  # nothing is decomposed
        return 0
    svd, linears = SvdSettings(c.adapter.svd, c.adapter.svd_niter, method.smallest), sizes.decoder.linear_shapes()
    shapes = [linears[kind] for kind in targeted(linears, c.adapter.target_modules)]
    weights = [(sizes.master.itemsize * out * width, (out, width)) for out, width in shapes]
    return max(size + max(size, working_bytes(shape, method.directions, svd)) for size, shape in weights)


def _micro_batches(c: JobConfig, mesh: tuple[int, int, int]) -> int:
    """Of a worker in a step, for a method without logical adapters."""
    return max(1, c.training.global_batch_size // (c.training.local_batch_size * mesh[0] * mesh[1]))


def _block_memory(
    c: JobConfig, num_adapters: int, local: ModelConfig, tokens: tuple[int, int], compute: torch.dtype
) -> BlockMemory:
    """`block_memory`, remembered: looking for what would make a run fit asks for the same block many times."""
    h = c.hdpissa
    forward = h.mute_scalar, h.samples, h.local_steps > 1
    key = repr((local, c.adapter, *forward, num_adapters, tokens, compute, c.activation_checkpoint))
    if key not in _BLOCKS:
        method, dropout = build_method(c, num_adapters), c.adapter.dropout > 0
        _BLOCKS[key] = block_memory(
            local, method, c.adapter.target_modules, tokens, compute, c.activation_checkpoint, dropout
        )
    return _BLOCKS[key]


_BLOCKS: dict[str, BlockMemory] = {}


def _head_memory(local: ModelConfig, tokens: tuple[int, int], compute: torch.dtype, trained: bool) -> HeadMemory:
    """`head_memory`, remembered likewise: a long batch has many chunks of logits."""
    key = repr((local, tokens, compute, trained))
    if key not in _HEADS:
        _HEADS[key] = head_memory(local, tokens, compute, trained)
    return _HEADS[key]


_HEADS: dict[str, HeadMemory] = {}


def _optimizer_temporaries(sizes: Sizes, groups: list[Group]) -> int:
    """The foreach implementation of Adam makes one list as large as all parameters; the fused one, of flat tensors on
    GPUs, makes nothing. Moments on the host: those of a part, and what the optimizer needs for it."""
    name = sizes.config.optimizer.name
    if sizes.updates is None:
        return 0 if sizes.shards_on_host else 4 * sum(g.trained for g in groups)
    fused = sizes.device_type == "cuda" and "fused" in inspect.signature(optimizer_class(name)).parameters
    topology = sizes.updates.topology
    elements = topology.hosted * topology.rank * sum(sum(w.shape) for w in sizes.updates.weights)
    if not sizes.config.hdpissa.offload_moments:
        return 0 if fused else 4 * elements
    return 4 * min(elements, PART_ELEMENTS) * (state_tensors(name) + (not fused))


def received_bytes(sizes: Sizes, micro_batches: int, kept: bool = False) -> tuple[int, float]:
    """What a worker receives in a step: all-gathers of the weights; and the exchange of the updates of a method that
    folds (on average over the steps from fold to fold), the gradients of its adapters, and those that FSDP2 sums over
    the workers. kept: the weights are gathered once for the step."""
    replicas, shards = sizes.mesh[:2]
    model = _model_of(sizes)
    embeds = any(p.requires_grad for p in model.decoder.embedding().parameters())
    groups = model.groups(shards)
    elements = sum((1 if kept else micro_batches * group.gathers(embeds)) * group.shard for group in groups)
    exchanged = 0.0 if sizes.updates is None else sizes.updates.received_per_step
    once = sums_gradients_once(
        sum(g.whole_trained for g in groups), sum(g.whole for g in groups), shards, micro_batches
    )
    # In fp32: a reduce-scatter over the shards, then an all-reduce of a shard over the replicas.
    sums = 4 * sum(g.trained for g in groups) * (1 if once else micro_batches)
    exchanged += sums * (shards - 1 + 2 * (replicas - 1) / replicas)
    return (shards - 1) * elements * sizes.compute.itemsize, exchanged


def travelling_gradients(updates: UpdatePlan, in_flight: int, device_type: str) -> int:
    """The most that gradients need on their way to the adapters' holders: of the largest buckets what is sent, over
    gloo as much that is received, and the holder's sum. 0 where adapters learn from samples of their own."""
    t = updates.topology
    if t.samples == "own" or t.holders == 1:
        return 0
    blocks: dict[str, list[tuple[int, int]]] = {}
    for w in updates.weights:
        blocks.setdefault(block_of(w.name) or w.name, []).append(w.shape)
    sent = sorted(4 * bound_elements(shapes, t) for shapes in blocks.values())[-in_flight:]
    return sum(size * (1 + (device_type == "cpu")) + size // t.holders for size in sent)


def fold_bytes(updates: UpdatePlan, in_flight: int) -> int:
    """The most that a fold needs at a time, beside the cache."""
    buckets = [ROUTES[b.route].memory([*b.shapes.values()], updates.topology, b.cached) for b in updates.buckets]
    return min(in_flight, len(buckets)) * max(b.held for b in buckets) + max(b.computing for b in buckets)
