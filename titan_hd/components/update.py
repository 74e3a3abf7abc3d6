"""How what a step has trained becomes W: by the optimizer's step alone, or by a fold of what it added.

`train.py` talks to an `Update` and does not ask which one it is. In the order of a run:

1. It is built over the meta model that the method was applied to. `ignored_parameters` are those that FSDP2 must leave
   alone. When the model has memory, `build_optimizer`.
2. Values come from `first_values`, or from a checkpoint into what `allocate` made room for and `state` names. Then
   `start`.
3. In every step: `begin_step`; `bind` before each micro-batch; `finish_gradients`; `propose`. When the host knows that
   all is finite (`refuse_non_finite`), `apply`. The others make no host wait for its device.
"""

from __future__ import annotations

import logging
import math
import re
import time
from array import array
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from titan_hd.adapters.adapter_linear import adapter_layers
from titan_hd.adapters.method import FoldingMethod, Method
from titan_hd.adapters.svd import SvdSettings
from titan_hd.components.host_moments import HostMoments
from titan_hd.components.optimizer import build_optimizer, clip_flat, clip_gradients, held_parts, step_if_finite
from titan_hd.config.job_config import JobConfig
from titan_hd.console import Progress
from titan_hd.distributed.adapter_init import initialize_adapters
from titan_hd.distributed.adapter_registry import AdapterRegistry
from titan_hd.distributed.adapter_samples import SAMPLES, Samples
from titan_hd.distributed.factor_init import SliceSettings, compute_factors
from titan_hd.distributed.flat import square_sum
from titan_hd.distributed.named_ranges import named
from titan_hd.distributed.parallel_dims import ParallelDims
from titan_hd.distributed.shards import adapter_parameters, base_parameters
from titan_hd.distributed.update.fold import Fold, FoldSettings, refuse_non_finite
from titan_hd.distributed.update.plan import UpdatePlan, plan_update
from titan_hd.distributed.update.topology import WIRE_BYTES, Topology
from titan_hd.distributed.watch import enter_phase, waiting
from titan_hd.models.model import Model
from titan_hd.seeding import stable_seed

logger = logging.getLogger("titan_hd")

Reports = list[dict[str, Any]]
_OF_HEAD = "head:"  # in front of the keys of numbers of the head's optimizer
UNFOLDED = ("residuals.", "unfolded.")  # first words of the keys of dA and dB, and of what else waits for a fold


class Update:
    """What every update does alike: the optimizer, the gradients' norm, the state of a checkpoint.

    apply_phase: which of `phases.PHASES` `apply` is.
    """

    apply_phase = "optimizer"

    def __init__(self, model: Model, method: Method, dims: ParallelDims, config: JobConfig):
        self.model, self.method, self.dims, self.config = model, method, dims, config
        self.trainable: dict[nn.Parameter, str] = {}
        self.optimizer: torch.optim.Optimizer | HostMoments
        self.device: torch.device

    def ignored_parameters(self) -> set[nn.Parameter]:
        """Parameters that FSDP2 neither gathers nor reduces."""
        return set()

    def build_optimizer(self, device: torch.device) -> None:
        """Of the trained parameters, when they have memory. device: the one that computes."""
        self.device = device
        self.trainable = {p: name for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = self._new_optimizer()

    def layers_to_start(self) -> int:
        """Number of layers that `first_values` sets."""
        raise NotImplementedError

    def first_values(self) -> Iterator[Reports]:
        """Set what is trained, from the weights and the seed, in waves of layers. Collective.

        Yields what there is to say of each wave's decompositions, on rank 0.
        """
        raise NotImplementedError

    def allocate(self, metadata: Metadata) -> None:
        """Make the tensors that a checkpoint fills and that a run has only after its start: optimizers create their
        state in the first step."""
        parameters = {name: parameter for parameter, name in self.trainable.items()}
        for entry, stored in metadata.state_dict_metadata.items():
            match = re.fullmatch(r"optimizer\.(?:(.+)\.)?([^.]+)", entry)
            if not match or not isinstance(stored, TensorStorageMetadata):
                continue
            name, key = match.groups()
            if name is None:
                self._allocate_number(key, stored.properties.dtype)
            elif name in parameters:
                self._allocate_moment(parameters[name], key, stored.properties.dtype)

    def state(self, changed_only: bool) -> dict[str, Any]:
        """What a checkpoint holds, as DTensors by name: weights, adapters, fixed factors, the optimizer's moments. And
        its numbers, such as the count of steps, once for all parameters.

        changed_only: without the weights that are as the base model has them.
        """
        changed = {f"{name}.weight" for name in self._changed_layers()}
        state: dict[str, Any] = {
            f"model.{name}": p.detach()
            for name, p in base_parameters(self.model)
            if not changed_only or p.requires_grad or name in changed
        }
        state |= {f"adapters.{name}": p.detach() for name, p in adapter_parameters(self.model)}
        state |= {f"optimizer.{name}.{key}": value for name, key, value in self._moments()}
        for key, copies in self._numbers().items():
            assert all(torch.equal(copies[0], other) for other in copies[1:]), f"a step has left a parameter out: {key}"
            state[f"optimizer.{key}"] = copies[0]
        self.settle()
        return state

    def settle(self) -> None:
        """Wait until what lies on the host, of weights and moments, is what the last step made of it."""
        if self.device.type == "cuda":
            with waiting():
                torch.cuda.synchronize(self.device)

    def start(self, total_steps: int) -> None:
        """All values are there; the first step may come. Collective. total_steps: of the whole run."""
        self._spread_numbers()

    def begin_step(self, lr: float, step: int) -> None:
        """Gradients are zero, and step `step` (0-based) will be taken at the learning rate lr. Collective."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_ratio"]
        self._zero_gradients()

    def take_seconds(self) -> dict[str, float]:
        """Seconds that the steps since the last call spent on other things than training, by the names of
        docs/metrics.md; only of what there was."""
        return {}

    def bind(self, slot: int, last: bool) -> None:
        """The next forward and backward pass trains slot `slot` of this worker. last: it is the step's last one."""

    def finish_gradients(self) -> torch.Tensor:
        """After the last backward pass of a step: sum what workers have in parts, and clip. Collective.

        Returns:
            the gradients' norm over all parameters, before clipping; 0-dim, on the device.
        """
        raise NotImplementedError

    def propose(self, norm: torch.Tensor) -> torch.Tensor:
        """All of the step that can be done before a weight changes; nothing if norm, of `finish_gradients`, is not
        finite.

        Returns:
            0-dim, on the device: this rank's part of a sum that is finite exactly where the proposal is.
        """
        raise NotImplementedError

    def refuse_non_finite(self, step: int, norm: float, proposal: float) -> None:
        """Stop a step that would spoil the weights: they are as they were before it. Collective if it raises.

        step: 0-based, for the message. norm: of `finish_gradients`. proposal: of `propose`, summed over all ranks.

        Raises:
            FloatingPointError: one of them is not finite; on every rank.
        """
        raise NotImplementedError

    def apply(self, lr: float, step: int) -> None:
        """Change the weights. Collective."""
        raise NotImplementedError

    def _new_optimizer(self) -> torch.optim.Optimizer | HostMoments:
        return self._optimizer_over(self.trainable)

    def _optimizer_over(self, parameters: Mapping[nn.Parameter, str]) -> torch.optim.Optimizer:
        decay = self._optimizer_weight_decay()
        return build_optimizer(self.config.optimizer, parameters, decay, self.method.lr_ratios)

    def _allocate_moment(self, parameter: nn.Parameter, key: str, dtype: torch.dtype) -> None:
        """Make the tensor `key`, like the parameter, of the optimizer's state of a trainable parameter."""
        raise NotImplementedError

    def _allocate_number(self, key: str, dtype: torch.dtype) -> None:
        """Make the number `key` of the optimizer's state of all trainable parameters."""
        raise NotImplementedError

    def _moments(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        """The optimizer's tensors: name of the trainable parameter, key, what is like the parameter."""
        raise NotImplementedError

    def _numbers(self) -> dict[str, list[torch.Tensor]]:
        """The optimizer's numbers: key, and what every parameter has, 0-dim and all equal."""
        return _numbers_of(self.optimizer)

    def _spread_numbers(self) -> None:
        """Give every parameter the numbers that a checkpoint has once."""
        for first, *others in self._numbers().values():
            for other in others:
                other.copy_(first)

    def _optimizer_weight_decay(self) -> float:
        return self.config.optimizer.weight_decay

    def _changed_layers(self) -> set[str]:
        """Layers whose weight is not the base model's, though it has no gradient."""
        return set()

    def _zero_gradients(self) -> None:
        for parameter in self.trainable:
            parameter.grad = None


class OptimizerUpdate(Update):
    """The trained tensors are parameters of the model, and the optimizer's step is all."""

    def layers_to_start(self) -> int:
        return len(adapter_layers(self.model))

    def first_values(self) -> Iterator[Reports]:
        return initialize_adapters(self.model, self.dims, self.config.training.seed)

    def finish_gradients(self) -> torch.Tensor:
        return clip_gradients(self.trainable, self.config.training.max_norm)

    def propose(self, norm: torch.Tensor) -> torch.Tensor:
        """Nothing: the optimizer changes the weights themselves."""
        return torch.zeros((), device=self.device)

    def refuse_non_finite(self, step: int, norm: float, proposal: float) -> None:
        if not math.isfinite(norm):
            raise FloatingPointError(f"step {step + 1}: the gradient norm is {norm}; W is as before the step")

    def apply(self, lr: float, step: int) -> None:
        assert isinstance(self.optimizer, torch.optim.Optimizer)
        self.optimizer.step()

    def _allocate_moment(self, parameter: nn.Parameter, key: str, dtype: torch.dtype) -> None:
        self.optimizer.state[parameter][key] = torch.zeros_like(parameter, dtype=dtype)

    def _allocate_number(self, key: str, dtype: torch.dtype) -> None:
        for parameter in self.trainable:
            self.optimizer.state[parameter][key] = torch.zeros((), dtype=dtype)

    def _moments(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        assert isinstance(self.optimizer, torch.optim.Optimizer)
        return _moments_of(self.optimizer, self.trainable)

    def _changed_layers(self) -> set[str]:
        return {name for name, layer in adapter_layers(self.model).items() if layer.changes_weight}


class FoldUpdate(Update):
    """The trained tensors are zero when a step begins; what the optimizer adds to them is folded into W, and they are
    zero again, but for what int8 on the way could not hold (`update.outgoing`). The adapter registry holds them,
    outside of FSDP2.

    With local_steps = L, a fold comes after every L steps, counted from the first of the run, and after its last one.
    In between the layers compute with what is not folded (`adapters.local_model`), and a checkpoint has it: by logical
    adapter, as the moments, so that any number of workers may go on.

    The optimizer gets the registry's flat tensor alone, and its moments are flat too; a checkpoint has them by layer.

    A head that is trained beside any method is one for all logical adapters, with an optimizer of its own: it learns
    from the mean of their losses, in every step, also between two folds.
    """

    apply_phase = "exchange"

    def __init__(self, model: Model, method: FoldingMethod, dims: ParallelDims, config: JobConfig):
        super().__init__(model, method, dims, config)
        assert not method.lr_ratios, "the optimizer has one flat tensor, and one learning rate for all of it"
        self.registry = AdapterRegistry(model, method, dims.adapter_mesh(method.num_adapters))
        self.samples: Samples
        self.fold: Fold
        self.head: dict[nn.Parameter, str] = {}
        self.head_optimizer: torch.optim.Optimizer | None = None
        self._refresh_seconds = 0.0
        # First words of what a checkpoint has until a fold: of the one that is read, then of those that are saved.
        self._unfolded: tuple[str, ...] = ()
        self._rates = array("d", [0.0])  # sum of the learning rates since the last fold, the host's own
        self._last_step: int

    def ignored_parameters(self) -> set[nn.Parameter]:
        return self.registry.parameters()

    def build_optimizer(self, device: torch.device) -> None:
        self.registry.materialize(device)
        super().build_optimizer(device)
        adapters = self.registry.parameters()
        self.head = {p: name for p, name in self.trainable.items() if p not in adapters}
        if self.head:
            self.head_optimizer = build_optimizer(self.config.optimizer, self.head, self.config.optimizer.weight_decay)

    def layers_to_start(self) -> int:
        return len(self.registry.entries)

    def first_values(self) -> Iterator[Reports]:
        return compute_factors(self.registry, self.dims, self._slice_settings(self.config.training.seed))

    def allocate(self, metadata: Metadata) -> None:
        super().allocate(metadata)
        there = metadata.state_dict_metadata
        self._unfolded = tuple(first for first in UNFOLDED if any(key.startswith(first) for key in there))

    def state(self, changed_only: bool) -> dict[str, Any]:
        factors = {}
        for name, entry in self.registry.entries.items():
            factors |= {f"factors.{name}.A": entry.a, f"factors.{name}.B": entry.b}
        views = self.registry.named_views(self.registry.deltas.detach())
        unfolded = {f"residuals.{name}": view for name, view in views} | {"unfolded.rates": _tensor_of(self._rates)}
        unfolded = {key: value for key, value in unfolded.items() if key.startswith(self._unfolded)}
        return {**super().state(changed_only), **factors, **unfolded}

    def start(self, total_steps: int) -> None:
        """As `Update.start`: binds the adapters, plans the exchange, and sends the fixed factors that are cached."""
        self._spread_numbers()
        c, h = self.config, self.config.hdpissa
        self.registry.start()
        compute = getattr(torch, c.training.mixed_precision_param)
        self.samples = SAMPLES[self.registry.method.samples](self.registry, compute, h.exchange_in_flight)
        shapes = {name: entry.local_shape for name, entry in self.registry.entries.items()}
        plan = fold_plan(c, self.method.num_adapters, (self.dims.dp_replicate, self.dims.dp_shard), shapes)
        wire, decay = getattr(torch, h.exchange_dtype), c.optimizer.weight_decay
        offloaded = c.training.enable_cpu_offload
        settings = FoldSettings(h.aggregate, decay, c.training.seed, wire, h.exchange_in_flight, offloaded)
        self.fold = Fold(self.registry, self.dims, plan, settings)
        self.fold.prepare()
        self._last_step = total_steps - 1
        if h.local_steps > total_steps:
            line = "hdpissa.local_steps: %d is more than the run's %d steps: there is one fold, after the last"
            logger.warning(line, h.local_steps, total_steps)
        if h.refresh_steps >= total_steps:
            logger.warning(
                "hdpissa.refresh_steps: %d is not below the run's %d steps: no slice is taken anew",
                h.refresh_steps,
                total_steps,
            )

    def begin_step(self, lr: float, step: int) -> None:
        """With refresh_steps, a period begins with slices from W as it is, and moments as in a first step. Which step
        that is depends on nothing else, and what a run in the middle of a period goes on with is in its checkpoint."""
        every = self.config.hdpissa.refresh_steps
        if every and step and step % every == 0:
            enter_phase(f"taking the slices of step {step + 1}")
            with named("refresh"):
                self._refresh(step // every)
            enter_phase(f"step {step + 1}")
        for group in self.head_optimizer.param_groups if self.head_optimizer else ():
            group["lr"] = lr
        super().begin_step(lr, step)

    def take_seconds(self) -> dict[str, float]:
        seconds, self._refresh_seconds = self._refresh_seconds, 0.0
        return {"refresh_seconds": seconds} if seconds else {}

    def bind(self, slot: int, last: bool) -> None:
        self.samples.activate(slot, last)

    def finish_gradients(self) -> torch.Tensor:
        self.samples.finish()
        self.registry.finish_gradients()
        gradients = [p.grad for p in self.head if p.grad is not None]
        if gradients and self.method.shares > 1:  # each adapter's loss is a mean of its own
            torch._foreach_div_(gradients, self.method.shares)
        parts = [*self.registry.gradient_parts(), *held_parts(gradients)]
        return clip_flat(parts, self.config.training.max_norm)

    def propose(self, norm: torch.Tensor) -> torch.Tensor:
        """The optimizer's step, which changes dA, dB and the moments alone."""
        if isinstance(self.optimizer, HostMoments):
            self.optimizer.step(norm)
        else:
            step_if_finite(self.optimizer, norm)
        return square_sum(self.registry.deltas)

    def refuse_non_finite(self, step: int, norm: float, proposal: float) -> None:
        refuse_non_finite(self.registry, step, norm, proposal)

    def apply(self, lr: float, step: int) -> None:
        """Fold, if it is time to. A run that goes on behind its last step, because it is given more steps, folds next
        where any other does."""
        h = self.config.hdpissa
        if self.head_optimizer:
            self.head_optimizer.step()
        self._rates[0] += lr
        self._unfolded = UNFOLDED
        if (step + 1) % h.local_steps == 0 or step == self._last_step:
            self.fold(self._rates[0], step)
            self._rates[0] = 0.0
            self._unfolded = UNFOLDED[:1] if h.exchange_dtype == "int8" else ()

    def _refresh(self, period: int) -> None:
        """Slices of the current W for all layers, and an optimizer without memory. The cache of decompositions stays
        out: no other run will meet this W. Random slices are drawn from a seed of the period. Collective."""
        self.settle()
        start = time.perf_counter()
        self.optimizer = self._new_optimizer()
        seed = stable_seed("refresh", self.config.training.seed, period)
        waves = compute_factors(self.registry, self.dims, self._slice_settings(seed, cached=False))
        with Progress("taking new slices", self.layers_to_start(), "layers", shown=self.dims.rank == 0) as progress:
            for wave in waves:
                progress.update(len(wave))
        self.registry.zero_deltas()  # the residuals that int8 has left belong to the directions from before
        self.samples.factors_changed()
        self.fold.send_factors()
        self.settle()
        self._refresh_seconds += time.perf_counter() - start

    def _slice_settings(self, seed: int, cached: bool = True) -> SliceSettings:
        a, h = self.config.adapter, self.config.hdpissa
        svd = SvdSettings(a.svd, a.svd_niter, self.method.smallest)
        return SliceSettings(h.slices, h.factor_scale, seed, svd, a.svd_cache if cached else "")

    def _new_optimizer(self) -> torch.optim.Optimizer | HostMoments:
        if self.config.hdpissa.offload_moments:
            return HostMoments(self.registry.deltas, self._optimizer_over)
        return self._optimizer_over({self.registry.deltas: "deltas"})

    def _allocate_moment(self, parameter: nn.Parameter, key: str, dtype: torch.dtype) -> None:
        if parameter in self.head:
            assert self.head_optimizer is not None
            self.head_optimizer.state[parameter][key] = torch.zeros_like(parameter, dtype=dtype)
            return
        deltas, optimizer = self.registry.deltas, self.optimizer
        if key not in optimizer.state[deltas]:  # another layer may have come first
            on_host = isinstance(optimizer, HostMoments)
            moment = optimizer.allocate(dtype) if on_host else torch.zeros_like(deltas, dtype=dtype)
            optimizer.state[deltas][key] = moment

    def _allocate_number(self, key: str, dtype: torch.dtype) -> None:
        if key.startswith(_OF_HEAD):
            assert self.head_optimizer is not None
            for parameter in self.head:
                self.head_optimizer.state[parameter][key.removeprefix(_OF_HEAD)] = torch.zeros((), dtype=dtype)
            return
        deltas, fused = self.registry.deltas, self.optimizer.param_groups[0].get("fused")
        # The fused implementations want it on the device.
        self.optimizer.state[deltas][key] = torch.zeros((), dtype=dtype, device=deltas.device if fused else None)

    def _moments(self) -> Iterator[tuple[str, str, torch.Tensor]]:
        for key, value in self.optimizer.state.get(self.registry.deltas, {}).items():
            if value.dim():
                yield from ((name, key, view) for name, view in self.registry.named_views(value))
        if self.head_optimizer:
            yield from _moments_of(self.head_optimizer, self.head)

    def _numbers(self) -> dict[str, list[torch.Tensor]]:
        """As `Update._numbers`, and the head's by names of their own: new slices begin with an optimizer without
        memory, and the head goes on."""
        head = _numbers_of(self.head_optimizer) if self.head_optimizer else {}
        return super()._numbers() | {f"{_OF_HEAD}{key}": copies for key, copies in head.items()}

    def _optimizer_weight_decay(self) -> float:
        return 0.0  # what the optimizer trains is zero when a step begins: decay belongs to the fold, on W

    def _changed_layers(self) -> set[str]:
        return set(self.registry.entries)

    def _zero_gradients(self) -> None:
        self.samples.zero_grad()
        for parameter in self.head:
            parameter.grad = None


def _moments_of(
    optimizer: torch.optim.Optimizer, parameters: Mapping[nn.Parameter, str]
) -> Iterator[tuple[str, str, torch.Tensor]]:
    """The tensors of an optimizer of many parameters, as of `Update._moments`."""
    for parameter, name in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if value.dim():
                yield name, key, value


def _numbers_of(optimizer: torch.optim.Optimizer | HostMoments) -> dict[str, list[torch.Tensor]]:
    """As of `Update._numbers`."""
    found: dict[str, list[torch.Tensor]] = {}
    for state in optimizer.state.values():
        for key, value in state.items():
            if not value.dim():
                found.setdefault(key, []).append(value)
    return found


def _tensor_of(number: array[float]) -> torch.Tensor:
    """0-dim, float64, of the same memory: a checkpoint is read into it."""
    return torch.frombuffer(number, dtype=torch.float64).view(())


def build_update(model: Model, method: Method, dims: ParallelDims, config: JobConfig) -> Update:
    """The update of a method that was applied to a meta model."""
    if isinstance(method, FoldingMethod):
        return FoldUpdate(model, method, dims, config)
    return OptimizerUpdate(model, method, dims, config)


def fold_plan(
    config: JobConfig, num_adapters: int, mesh: tuple[int, int], shapes: dict[str, tuple[int, int]]
) -> UpdatePlan:
    """How the update of every adapted weight travels.

    num_adapters: K. mesh: degrees of replicas and shards. shapes: layer -> (out, in) of the tp-local weight, in the
    model's order.
    """
    h = config.hdpissa
    topology = Topology(
        num_adapters, config.adapter.rank, *mesh, WIRE_BYTES[h.exchange_dtype], h.samples, h.local_steps
    )
    return plan_update(shapes, topology, h.exchange, h.factor_cache_gb)
