"""What a fine-tuning method tells the trainer. A method says what changes; it knows no process group."""

from __future__ import annotations

from typing import Protocol

from torch import nn


class Method(Protocol):
    """A fine-tuning method.

    num_adapters: K, the number of logical adapters; each has its own share of the global batch. 1 for every method in
        which all workers train the same parameters.
    direct_update: the trainable tensors are zero when a step begins; what the optimizer adds to them is folded into W
        after the step. Otherwise the trainable tensors are the model's parameters and the optimizer's step is all.
    tensor_parallel: whether tensor parallelism knows how to split it.
    lr_ratios: last part of a parameter's name -> factor on optimizer.lr, where that is not 1.
    """

    num_adapters: int
    direct_update: bool
    tensor_parallel: bool
    lr_ratios: dict[str, float]

    def shape_error(self, name: str, shape: tuple[int, int]) -> str | None:
        """One line on why the layer `name` with a weight [out, in] cannot be trained so, or None."""
        ...

    def apply(self, model: nn.Module, target_modules: list[str] | None) -> list[str]:
        """Change a model in place: replace the targeted linear layers, set `requires_grad` of every parameter.

        Returns the names of the trained layers. ValueError if a target matches no layer.
        """
        ...
