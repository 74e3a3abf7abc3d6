"""Full fine-tuning: the optimizer works on the sharded fp32 weights themselves."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from titan_hd.adapters.inject import find_linears


class FullFineTuning:
    """Trains every parameter, or only the weights of the targeted linear layers."""

    num_adapters = 1
    direct_update = False
    tensor_parallel = True
    lr_ratios: ClassVar[dict[str, float]] = {}

    def shape_error(self, name: str, shape: tuple[int, int]) -> None:
        """Any shape will do."""

    def apply(self, model: nn.Module, target_modules: list[str] | None) -> list[str]:
        if target_modules is None:
            model.requires_grad_(True)
            return [name for name, _ in model.named_parameters()]
        model.requires_grad_(False)
        names = find_linears(model, target_modules)
        for name in names:
            model.get_submodule(name).weight.requires_grad_(True)
        return names
