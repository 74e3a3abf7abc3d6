"""How training changes the weights, measured every `metrics.update_freq` steps on the shards.

For each adapted (or trained) linear layer of the blocks, W is multiplied with `metrics.update_vectors` random vectors
(`components.sketch`): before and after a step, for the size of the step's update, and against what the base weights
gave, for the size and the effective rank of all change since the start. A worker multiplies the rows that it holds. Of
methods with adapters beside W, W is the merged weight, dealt out as for an export.

HD-PiSSA's change is also split by its K*r initial directions, U on the left and V on the right of W: of the parts

    U U^T dW V V^T      U U^T dW (1 - V V^T)      (1 - U U^T) dW V V^T      (1 - U U^T) dW (1 - V V^T)

the first is the core, the last is outside. V V^T Omega, which takes the right side, is summed over the holders of the
adapters; on the left, the holders get the products of all rows.

What the base weights gave is not in a checkpoint: a run that is resumed reads the base model again.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from titan_hd.adapters.adapter_linear import adapter_layers
from titan_hd.adapters.frozen_linear import FoldingLinear
from titan_hd.components.optimizer import clip_factor
from titan_hd.components.sketch import effective_rank, product, random_vectors, square_norm
from titan_hd.components.update import FoldUpdate, Update
from titan_hd.config.job_config import JobConfig
from titan_hd.distributed.adapter_init import merged_weights
from titan_hd.distributed.adapter_registry import DELTAS
from titan_hd.distributed.collectives import all_gather, sum_in_place
from titan_hd.distributed.directions import Directions
from titan_hd.distributed.parallel_dims import ParallelDims, local_part, owned_block
from titan_hd.distributed.regroup import tp_split
from titan_hd.distributed.row_shards import chunk_rows
from titan_hd.models.model import Model

logger = logging.getLogger("titan_hd")

# Between two folds, or of a layer without a gradient, W is as it was, but for the rounding of its products: a change of
# these that is no larger than this share of them is none. Since the base weights, whose products are kept in fp32 and
# are off by up to half a unit in the last place; and in a step, where sums in float64 may come in another order, while
# one element of a matrix of 10^8 that moves by one unit of fp32 makes more.
_ROUNDING, _STEP_ROUNDING = 2.0**-24, 2.0**-44


@dataclass(frozen=True)
class _Layer:
    """shape (out, in) and tp split of the whole weight, and its kind (q_proj, ...)."""

    module: nn.Linear
    shape: tuple[int, int]
    split: int | None
    kind: str

    def rows(self) -> torch.Tensor:
        """This rank's part of the weight, [rows, columns], without an adapter beside it."""
        return local_part(self.module.weight)


class WeightChanges:
    """Life: `remember_base` while the model has the base weights, before an adapter gets its first values;
    `remember_directions` while it has them still, and the fixed factors of a method that folds; around a measured step
    `begin` and `measure`. Collective. Memory: `products_bytes`.

    device: the one that computes. total_steps: the last of them is measured, too.
    """

    def __init__(
        self,
        model: Model,
        update: Update,
        dims: ParallelDims,
        config: JobConfig,
        device: torch.device,
        total_steps: int,
    ):
        self.model, self.update, self.dims, self.device = model, update, dims, device
        self.every, self.count = config.metrics.update_freq, config.metrics.update_vectors
        self.seed, self.max_norm, self.total_steps = config.training.seed, config.training.max_norm, total_steps
        self.registry = update.registry if isinstance(update, FoldUpdate) else None
        self.directions: Directions | None = None
        self.refreshed = False  # in a run before this one
        # With refresh_steps the registry has the initial directions for one period alone.
        if self.registry and self.registry.method.directions and not config.hdpissa.refresh_steps:
            self.directions = Directions(self.registry)
        kinds = model.config.linear_layers()
        self.layers = {
            name: _Layer(layer, (layer.out_features, layer.in_features), tp_split(layer.weight), kinds[name])
            for name, layer in measured_layers(model).items()
        }
        self._base: dict[str, torch.Tensor] = {}
        self._before: dict[str, torch.Tensor] = {}
        self._seconds = 0.0

    def go_on_from(self, state: dict[str, Any]) -> None:
        """state: of the checkpoint, as train_state.json has it. Directions that were taken anew before it are not the
        initial ones, for this run and for those that go on from it."""
        period = state["identity"].get("hdpissa.refresh_steps", 0)
        self.refreshed = state.get("refreshed", False) or 0 < period < state["step"]
        if self.refreshed and self.every and self.directions:
            logger.warning("metrics.update_freq: no energies: the slices of the checkpoint are not those of the start")
            self.directions = None

    def due(self, step: int) -> bool:
        """Whether step `step` (1-based) is measured."""
        return self.every > 0 and (step % self.every == 0 or step == self.total_steps)

    @torch.no_grad()
    def remember_base(self) -> None:
        """The products of the base weights; nothing where nothing will be measured."""
        if self.every:
            for name, layer in self.layers.items():
                self._base[name] = self._product(layer, layer.rows(), self._vectors(layer))[0].float()

    @torch.no_grad()
    def remember_directions(self) -> None:
        """The same on the initial directions; nothing for methods without."""
        if self.every and self.directions:
            for name, layer in self.layers.items():
                right = self._product(layer, layer.rows(), self.directions.project(name, self._vectors(layer)))[0]
                self._base[name] = torch.cat((self._base[name], right.float()), dim=1)

    @torch.no_grad()
    def begin(self) -> None:
        """A step that is measured comes next."""
        start = time.perf_counter()
        for name, rows in self._weights():
            self._before[name] = self._product(self.layers[name], rows, self._vectors(self.layers[name]))[0]
        self.update.settle()  # the step's time is its own
        self._seconds = time.perf_counter() - start

    @torch.no_grad()
    def measure(self, grad_norm: float) -> dict[str, float]:
        """What the step and all steps have changed, by the names of docs/metrics.md; the same on every rank. The host
        waits for the device. grad_norm: the step's, before clipping."""
        self.update.settle()
        start = time.perf_counter()
        parts = {name: self._parts(name, rows) for name, rows in self._weights()}
        self._before = {}
        slices = self._slice_squares()
        flat = torch.cat([slices, *(parts[name] for name in self.layers)])
        dist.all_reduce(flat)
        norms = (flat[: len(slices)].sqrt() / clip_factor(flat.new_tensor(grad_norm), self.max_norm)).tolist()
        values = self._by_kind(flat[len(slices) :].view(len(self.layers), -1))
        values |= {f"slice_grad_norm/{i}": norm for i, norm in enumerate(norms)}
        return values | {"measure_seconds": self._seconds + time.perf_counter() - start}

    # ----------------------------------------------------------------------------------------------------- products

    def _weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """This rank's part of every weight as an export would have it, [rows, columns]."""
        if not adapter_layers(self.model):
            yield from ((name, layer.rows()) for name, layer in self.layers.items())
            return
        for wave in merged_weights(self.model, self.dims):
            yield from ((name.removesuffix(".weight"), rows) for name, rows in wave)

    def _vectors(self, layer: _Layer) -> torch.Tensor:
        """Omega's rows for this rank's columns of W, [columns, p]."""
        vectors = random_vectors(layer.shape[1], self.count, self.seed)
        if layer.split == 1:
            block = owned_block(layer.shape, layer.split, self.dims.place(self.dims.rank), self.dims)
            vectors = vectors[block.column : block.column + block.columns]
        return vectors.to(self.device)

    def _product(self, layer: _Layer, rows: torch.Tensor, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """W vectors on this rank's rows, float64 [rows, q], and the squared norm of its part of W."""
        result, squares = product(rows, vectors)
        if layer.split == 1:
            sum_in_place(result, self.dims.world["tp"].get_group())
        return result, squares

    def _sketch(self, name: str, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`_product` with Omega and, beside it, V V^T Omega: [rows, p or 2 p]."""
        layer = self.layers[name]
        vectors = self._vectors(layer)
        if self.directions:
            vectors = torch.cat((vectors, self.directions.project(name, vectors)), dim=1)
        return self._product(layer, rows, vectors)

    def _parts(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """This rank's terms of the sums over ranks that `_by_kind` takes, float64 [p p + 7]."""
        layer, p, rank, dims = self.layers[name], self.count, self.dims.rank, self.dims
        now, weight = self._sketch(name, rows)
        change = now - self._base[name]
        step = (now[:, :p] - self._before[name]).square().sum()
        right = change[:, p:]
        beside = change[:, :p] - right if self.directions else right
        left = [right.new_zeros(())] * 2
        if self.directions:
            everywhere = self._all_rows(change, layer)
            parts = [everywhere[:, p:], everywhere[:, :p] - everywhere[:, p:]]
            left = self.directions.left_energies(name, parts)
        # Where columns are split over tp, the products are whole sums on every tp rank, and parts of W are not.
        rows_counted = dims.first_copy(rank, None if layer.split == 1 else layer.split)
        gram = change[:, :p].T @ change[:, :p]
        remembered = self._base[name][:, :p].double().square().sum()
        right_and_beside = torch.stack((right.square().sum(), beside.square().sum())) * rows_counted
        others = torch.stack((step * rows_counted, weight * dims.first_copy(rank, layer.split)))
        ends = (right_and_beside, torch.stack(left), others, remembered.view(1) * rows_counted)
        return torch.cat((gram.flatten() * rows_counted, *ends))

    def _all_rows(self, sketch: torch.Tensor, layer: _Layer) -> torch.Tensor:
        """Products [rows, q] of this rank's rows -> of all rows of the tp-local matrix [out, q]."""
        out = layer.shape[0] // (self.dims.tp if layer.split == 0 else 1)
        if self.dims.dp_shard == 1:
            return sketch
        padded = sketch.new_zeros(chunk_rows(out, self.dims.dp_shard), sketch.shape[1])
        padded[: len(sketch)] = sketch
        lines, work = all_gather(padded.flatten(), self.dims.dp_shard, self.dims.world["dp_shard"].get_group())
        work.wait()
        return lines.view(-1, sketch.shape[1])[:out]

    # ------------------------------------------------------------------------------------------------------ results

    def _by_kind(self, sums: torch.Tensor) -> dict[str, float]:
        """From the sums over ranks of `_parts`, [layers, p p + 7]."""
        p = self.count
        gram, (*of_change, step, weight, remembered) = sums[:, : p * p].view(-1, p, p), sums[:, p * p :].unbind(1)
        of_change = torch.stack((square_norm(gram), effective_rank(gram), *of_change), 1)
        of_change[gram.diagonal(dim1=-2, dim2=-1).sum(-1) <= _ROUNDING**2 * remembered] = 0.0
        step = step.where(step > _STEP_ROUNDING**2 * remembered, 0.0)
        columns = torch.cat((of_change, step[:, None], weight[:, None]), 1)
        kinds: defaultdict[str, list[list[float]]] = defaultdict(list)
        for layer, row in zip(self.layers.values(), columns.tolist()):
            kinds[layer.kind].append(row)
        values = {}
        for kind, rows in kinds.items():
            change, rank, right, beside, core, left, step, weight = (float(sum(column)) for column in zip(*rows))
            values[f"update_size/{kind}"] = _ratio(step / p, weight) ** 0.5
            values[f"weight_change/{kind}"] = _ratio(change, weight) ** 0.5
            values[f"effective_rank/{kind}"] = rank / len(rows)
            if self.directions:
                values[f"energy_core/{kind}"] = _ratio(core, right + beside)
                values[f"energy_inside/{kind}"] = min(1.0, _ratio(right + left, right + beside))
        return values

    def _slice_squares(self) -> torch.Tensor:
        """This rank's terms of the squared norms of the logical adapters' gradients, float64 [K], as they were left by
        the step; none of methods that do not fold."""
        registry = self.registry
        if registry is None:
            return torch.zeros(0, dtype=torch.float64, device=self.device)
        squares = torch.zeros(registry.num_adapters, dtype=torch.float64, device=self.device)
        sharing, tp = registry.mesh.size(1), registry.mesh.size(2)
        first = registry.mesh.get_local_rank("adapter") * registry.hosted
        for entry in registry.entries.values():
            for key, over_tp in zip(DELTAS, (entry.split == 1, entry.split == 0)):
                gradients = entry.pieces[key].of(registry.gradients).flatten(1)
                norms = torch.linalg.vector_norm(gradients, dim=1, dtype=torch.float64)
                squares[first : first + registry.hosted] += norms.square() / (sharing if over_tp else sharing * tp)
        return squares


def measured_layers(model: Model) -> dict[str, nn.Linear]:
    """The linear layers of the blocks that are trained or have an adapter, by name."""
    adapted, inside = adapter_layers(model), {module for block in model.blocks() for module in block.modules()}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module in inside
        and (name in adapted or module.weight.requires_grad or isinstance(module, FoldingLinear))
    }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def products_bytes(rows: int, vectors: int, directions: bool) -> int:
    """Of the products that are held: the base weights', fp32, and during a measured step those before it, float64.
    rows: of all measured weights on a worker; directions: with energies."""
    return rows * vectors * (4 * (1 + directions) + 8)


def ranges(values: dict[str, float]) -> str:
    """From where to where the values of each kind of metric go, on one line."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    for name, value in values.items():
        found[name.partition("/")[0]].append(value)
    spans = {name: (f"{min(part):.3g}", f"{max(part):.3g}") for name, part in found.items()}
    return "  ".join(f"{name} {low}" + (f" to {high}" if high != low else "") for name, (low, high) in spans.items())
