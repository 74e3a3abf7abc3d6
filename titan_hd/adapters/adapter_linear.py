"""A frozen linear layer with trainable tensors beside it: what LoRA and the methods compared with it have in common.

A method is one subclass of `AdapterLinear` and one line in `adapters.methods`. FSDP2 shards the tensors like any other
parameter and gathers them in the compute dtype; who computes their first values, and how the merged weight is written,
is decided in `distributed.adapter_weights`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from titan_hd.adapters.inject import replace_linears
from titan_hd.config.job_config import LINEAR_LAYERS


class AdapterLinear(nn.Linear):
    """Base class. weight [out, in] and bias [out] are those of the layer that it replaces, frozen, under their names.

    reads_weight: `initial` needs W; whoever computes it then holds the whole weight.
    changes_weight: `initial` returns a new base weight, too.
    tp_splits: dimension of W that tensor parallelism splits (0: column-wise, 1: row-wise) -> name -> dimension in which
        that tensor is split with it. The others stay whole, and their gradients are summed over tp. None: the method
        has no tensor parallelism.
    """

    reads_weight: ClassVar[bool] = False
    changes_weight: ClassVar[bool] = False
    tp_splits: ClassVar[dict[int, dict[str, int]] | None] = None

    def __init__(self, linear: nn.Linear, tensors: dict[str, tuple[int, ...]], dropout: float = 0.0):
        """tensors: name -> shape of what is trained; fp32, on the layer's device (meta), without values."""
        nn.Module.__init__(self)  # nn.Linear's own would allocate a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        self.dropout = dropout
        self.adapter_names = tuple(tensors)
        for name, shape in tensors.items():
            value = torch.empty(shape, dtype=torch.float32, device=linear.weight.device)
            self.register_parameter(name, nn.Parameter(value))
        self.name = ""  # full name in the model, set by AdapterMethod.apply
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

    def flops(self, tokens: float) -> float:
        """Operations per token of one training step beside the frozen layer's own 4 in out.

        tokens: of one forward pass, over which work that does not depend on their number is spread.
        """
        raise NotImplementedError

    def parameters_for_compute(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias of a forward pass; tensor parallelism puts its rank's part in their place."""
        return self.weight, self.bias

    def tensor(self, name: str) -> torch.Tensor:
        """An adapter's tensor for a forward pass; tensor parallelism puts its rank's part in its place."""
        return getattr(self, name)

    def sum_over_tp(self, value: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks that split W's columns; tensor parallelism puts its collective in place of this."""
        return value

    def dropped(self, x: torch.Tensor) -> torch.Tensor:
        """The adapter's input: x after dropout; tensor parallelism draws the mask of the whole input."""
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class AdapterMethod:
    """A method that puts one class of `AdapterLinear` in the place of every targeted layer and trains nothing else.

    settings: arguments of the class beside the layer. lr_ratios: last part of a tensor's name -> factor on
    optimizer.lr, for those where it is not 1.
    """

    num_adapters = 1
    direct_update = False

    def __init__(self, layer: type[AdapterLinear], settings: dict[str, Any], lr_ratios: dict[str, float] | None = None):
        self.layer, self.settings, self.lr_ratios = layer, settings, lr_ratios or {}
        self.tensor_parallel = layer.tp_splits is not None

    def shape_error(self, name: str, shape: tuple[int, int]) -> str | None:
        """One line on why the layer `name` with a weight [out, in] cannot have this adapter, or None."""
        error = self.layer.shape_error(shape, **self.settings)
        return error and f"{error}; {name} has shape {list(shape)}"

    def apply(self, model: nn.Module, target_modules: list[str] | None) -> list[str]:
        """Replace the targeted layers (default: all linear layers of the blocks) and freeze everything else."""
        model.requires_grad_(False)
        targets = target_modules or LINEAR_LAYERS
        layers = replace_linears(model, targets, lambda linear: self.layer(linear, **self.settings))
        for name, layer in layers.items():
            layer.name = name
        return list(layers)


def adapter_layers(model: nn.Module) -> dict[str, AdapterLinear]:
    """The adapted layers of a model by full name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdapterLinear)}
