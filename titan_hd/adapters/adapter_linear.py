"""A frozen linear layer with trainable tensors beside it: what LoRA and the methods compared with it have in common.

Such a method is one subclass of `AdapterLinear`, its layer, and one of `AdapterMethod`, its facts. FSDP2 shards the
tensors like any other parameter and gathers them in the compute dtype; who computes their first values, and how the
merged weight is written, is decided in `distributed.adapter_init`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from titan_hd.adapters.frozen_linear import FoldingLinear, FrozenLinear
from titan_hd.adapters.inject import replace_linears
from titan_hd.adapters.method import Method
from titan_hd.config.job_config import JobConfig


class AdapterLinear(FrozenLinear):
    """Base class of the layers.

    reads_weight: `initial` needs W; whoever computes it then holds the whole weight.
    changes_weight: `initial` returns a new base weight, too.
    tp_splits: tp_splits[d][name] is the dimension in which tensor `name` is sharded where tensor parallelism shards W
        in dimension d (0: column-wise, 1: row-wise). Tensors that are not listed are replicated, and their gradients
        are summed over tp. None: the method has no tensor parallelism.
    """

    reads_weight: ClassVar[bool] = False
    changes_weight: ClassVar[bool] = False
    tp_splits: ClassVar[dict[int, dict[str, int]] | None] = None

    def __init__(self, linear: nn.Linear, tensors: dict[str, tuple[int, ...]], dropout: float = 0.0):
        """tensors: name -> shape of what is trained; fp32, on the layer's device (meta), without values."""
        super().__init__(linear, dropout)
        self.adapter_names = tuple(tensors)
        for name, shape in tensors.items():
            value = torch.empty(shape, dtype=torch.float32, device=linear.weight.device)
            self.register_parameter(name, nn.Parameter(value))
        self.report: dict[str, Any] = {}  # what `initial` has to say of its work, for svd.jsonl

    @classmethod
    def shape_error(cls, shape: tuple[int, int], **settings: Any) -> str | None:
        """Why a weight [out, in] cannot have this adapter: "key: reason", or None. settings: those of __init__."""
        return None

    def initial(self, weight: torch.Tensor | None, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Whole first values of the adapter's tensors, fp32, by name, and the new base weight under "weight" if
        `changes_weight`. weight: W [out, in] in fp32 if `reads_weight`, else None. generator: on the host, seeded by
        (training.seed, layer), so that the values do not depend on who computes them."""
        raise NotImplementedError

    def merged(self, weight: torch.Tensor, **tensors: torch.Tensor) -> torch.Tensor:
        """The weight [out, in] in fp32 with which a plain linear layer computes the same. Arguments: W and the
        adapter's tensors, whole, fp32."""
        raise NotImplementedError

    def tensor(self, name: str) -> torch.Tensor:
        """An adapter's tensor for a forward pass; tensor parallelism puts its rank's part in its place."""
        return getattr(self, name)

    def sum_over_tp(self, value: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks that split W's columns; tensor parallelism puts its collective in place of this."""
        return value


class AdapterMethod(Method):
    """A method that puts an `AdapterLinear` in the place of every targeted layer and trains nothing else.

    layer: the class of its layers. settings: its arguments beside the layer that it replaces.
    """

    how = "merged into the weights"
    layer: type[AdapterLinear]

    def __init__(self, layer: type[AdapterLinear] | None = None, **settings: Any):
        """layer: a variant of the class's own."""
        super().__init__()
        self.layer, self.settings = layer or self.layer, settings
        self.changes_base = self.layer.changes_weight

    @classmethod
    def from_config(cls, config: JobConfig, num_adapters: int = 1) -> AdapterMethod:
        return cls(**cls.layer_settings(config))

    @classmethod
    def tensor_parallel(cls) -> bool:
        return cls.layer.tp_splits is not None

    @classmethod
    def layer_settings(cls, config: JobConfig) -> dict[str, Any]:
        """The layer's arguments, out of a configuration."""
        raise NotImplementedError

    def shape_error(self, name: str, shape: tuple[int, int]) -> str | None:
        error = self.layer.shape_error(shape, **self.settings)
        return error and f"{error}; {name} has shape {list(shape)}"

    def change(self, model: nn.Module, target_modules: list[str] | None) -> list[str]:
        model.requires_grad_(False)
        return list(replace_linears(model, target_modules, lambda linear: self.layer(linear, **self.settings)))


def untouched_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Those of a model, to which a method was applied, that stay as the model directory has them: neither trained, nor
    the weight that a method folds into, nor one that first values replace."""
    changed = {
        layer.weight
        for layer in model.modules()
        if isinstance(layer, FoldingLinear) or (isinstance(layer, AdapterLinear) and layer.changes_weight)
    }
    return [p for p in model.parameters() if not p.requires_grad and p not in changed]


def adapter_layers(model: nn.Module) -> dict[str, AdapterLinear]:
    """The adapted layers of a model by full name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdapterLinear)}
