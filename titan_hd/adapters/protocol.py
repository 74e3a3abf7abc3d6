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
    """

    num_adapters: int
    direct_update: bool

    def apply(self, model: nn.Module, target_modules: list[str] | None) -> list[str]:
        """Change a model in place: replace the targeted linear layers, set `requires_grad` of every parameter.

        Returns the names of the trained layers. ValueError if a target matches no layer.
        """
        ...
