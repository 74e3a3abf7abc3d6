"""Full fine-tuning: the optimizer works on the sharded fp32 weights themselves."""

from __future__ import annotations

from torch import nn

from titan_hd.adapters.inject import find_linears
from titan_hd.adapters.method import Method
from titan_hd.config.job_config import JobConfig


class FullFineTuning(Method):
    """Trains every parameter, or only the weights of the targeted linear layers."""

    name, title = "full", "full fine-tuning"
    idea = "the weights themselves are trained"
    trains, size, base = "W (everything, or the targets' weights)", "in out", "trained"
    keys = resume_keys = ()
    master_dtypes = ("float32",)  # small updates would vanish in others
    no_peft = "it has no adapters"

    @classmethod
    def from_config(cls, config: JobConfig, num_adapters: int = 1) -> FullFineTuning:
        return cls()

    @classmethod
    def config_errors(cls, config: JobConfig) -> list[str]:
        errors = []
        if config.adapter.dropout:
            errors.append("adapter.dropout: method full has no adapters; set it to 0")
        if config.checkpoint.base == "delta" and config.adapter.target_modules is None:
            errors.append(
                "checkpoint.base: delta needs a base model in model.hf_assets_path (and no model.flavor), and a method "
                "that leaves some of its weights alone"
            )
        return errors

    @classmethod
    def tensor_parallel(cls) -> bool:
        return True

    def shape_error(self, name: str, shape: tuple[int, int]) -> None:
        """Any shape will do."""

    def change(self, model: nn.Module, target_modules: list[str] | None) -> list[str]:
        if target_modules is None:
            model.requires_grad_(True)
            return [name for name, _ in model.named_parameters()]
        model.requires_grad_(False)
        names = find_linears(model, target_modules)
        for name in names:
            model.get_submodule(name).weight.requires_grad_(True)
        return names
