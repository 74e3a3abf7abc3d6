"""The frozen linear layer that every adapter method puts in the place of a model's own."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn


class FrozenLinear(nn.Linear):
    """weight [out, in] and bias [out] are those of the layer that it replaces, frozen, under their names.

    Tensor parallelism replaces `parameters_for_compute` and `dropped` of an instance by its rank's part.

    dropout: of the adapter's input. name: the layer's full name in the model, set by `replace_linears`.
    """

    def __init__(self, linear: nn.Linear, dropout: float = 0.0):
        nn.Module.__init__(self)  # nn.Linear's own would allocate a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        for parameter in self.parameters():
            parameter.requires_grad_(False)
        self.dropout = dropout
        self.name = ""

    def parameters_for_compute(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias of a forward pass."""
        return self.weight, self.bias

    @property
    def drops(self) -> bool:
        """Whether dropout draws masks now."""
        return bool(self.dropout) and self.training

    def dropped(self, x: torch.Tensor) -> torch.Tensor:
        """The adapter's input: x [..., in] after dropout."""
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

    def flops(self, tokens: float) -> float:
        """Operations per token of one training step beside the frozen layer's own 4 in out.

        tokens: of one forward pass, over which work that does not depend on their number is spread.
        """
        raise NotImplementedError


class Operands(NamedTuple):
    """What one folding layer computes with: weight [out, in], bias [out] or None, and the bound adapter's
    a, da [r, in] and b, db [out, r]; da and db in fp32, a and b in fp32 or in the dtype of the computation."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    a: torch.Tensor
    b: torch.Tensor
    da: torch.Tensor
    db: torch.Tensor


class FoldingLinear(FrozenLinear):
    """A frozen layer whose trained tensors are folded into its weight, after every step or after several.

    `delta_A` [K, r, in] and `delta_B` [K, out, r] hold those of all K logical adapters. The adapter registry makes
    them, and binds the slice of the adapter whose micro-batch comes next.
    """

    delta_A: nn.Parameter
    delta_B: nn.Parameter

    def __init__(self, linear: nn.Linear, dropout: float = 0.0):
        super().__init__(linear, dropout)
        self.register_parameter("delta_A", None)
        self.register_parameter("delta_B", None)
        self.bound: tuple[torch.Tensor, ...] | None = None

    def bind(self, a: torch.Tensor, b: torch.Tensor, da: torch.Tensor, db: torch.Tensor) -> None:
        """Make one adapter the active one: a, da [r, in]; b, db [out, r]; da and db are leaves that take gradients."""
        self.bound = (a, b, da, db)

    def operands(self) -> Operands:
        """What the next forward pass computes with."""
        assert self.bound is not None, "no adapter is bound; AdapterRegistry.activate comes first"
        return Operands(*self.parameters_for_compute(), *self.bound)
