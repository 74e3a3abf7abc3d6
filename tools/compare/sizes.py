"""How much the methods train, and at which rank they train alike much."""

from __future__ import annotations

import dataclasses
from typing import Any

from titan_hd.adapters.inject import targeted
from titan_hd.adapters.methods import build_method, method_of
from titan_hd.config.job_config import JobConfig
from titan_hd.errors import UserError
from titan_hd.fitting import trained_size
from titan_hd.models.model_config import ModelConfig


def trained_parameters(config: JobConfig, decoder: ModelConfig, num_adapters: int) -> int:
    """Number of trained parameters; for HD-PiSSA of all logical adapters together."""
    return trained_size(build_method(config, num_adapters), decoder, config.adapter.target_modules)[0]


def match_rank(config: JobConfig, decoder: ModelConfig) -> int:
    """The rank (block) at which the configuration's method has the number of parameters nearest to that of lora at
    adapter.rank. full has no rank, one logical adapter of hdpissa is as large as lora: both keep adapter.rank.

    Raises:
        UserError: the method fits the model at no rank.
    """
    if method_of(config).folds or "adapter.rank" not in method_of(config).keys:
        return config.adapter.rank
    block = decoder.with_blocks(1)
    shapes = decoder.linear_shapes()
    shapes = {kind: shapes[kind] for kind in targeted(shapes, config.adapter.target_modules)}

    def at(rank: int, **changes: Any) -> JobConfig:
        return dataclasses.replace(config, adapter=dataclasses.replace(config.adapter, rank=rank, **changes))

    plain = {"init": "default", "rslora": False}
    budget = trained_parameters(at(config.adapter.rank, method="lora", **plain), block, 1)
    found: dict[int, int] = {}
    for rank in range(1, min(min(shape) for shape in shapes.values()) + 1):
        if not any(build_method(at(rank)).shape_error(name, shape) for name, shape in shapes.items()):
            found[rank] = trained_parameters(at(rank), block, 1)
            if found[rank] > budget:
                break
    if not found:
        raise UserError(f"adapter.rank: method {config.adapter.method} fits the shapes of this model at no rank")
    return min(found, key=lambda rank: abs(found[rank] - budget))
