"""How many directions a training has changed: effective ranks of dW, read from an exported model and its base."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from titan_hd.models.decoder import parameter_shapes
from titan_hd.models.hf_files import open_model_weights
from titan_hd.models.registry import DecoderConfig


class DeltaRank(NamedTuple):
    """above: singular values of dW above `threshold` times the largest; entropy: exp of the entropy of the singular
    values divided by their sum (Roy and Vetterli, 2007); relative_norm: ||dW|| / ||W||. Means over layers."""

    above: float
    entropy: float
    relative_norm: float


def delta_rank(base: torch.Tensor, trained: torch.Tensor, threshold: float) -> DeltaRank:
    """Of one weight [out, in]; all zero if nothing has changed."""
    delta = trained.double() - base.double()
    values = torch.linalg.svdvals(delta)
    if not values.any():
        return DeltaRank(0.0, 0.0, 0.0)
    share = values / values.sum()
    entropy = -(share * share.clamp(min=1e-300).log()).sum()
    above = (values > threshold * values[0]).sum()
    return DeltaRank(above.item(), entropy.exp().item(), (delta.norm() / base.double().norm()).item())


def delta_ranks(base: Path, trained: Path, config: DecoderConfig, threshold: float) -> dict[str, DeltaRank]:
    """Means over the blocks for each kind of linear layer (q_proj, ...), and over all of them under "all".

    base, trained: HF directories of the model that `config` describes; trained should be in fp32, or its rounding is
    what is measured.

    Raises:
        UserError: a directory that does not hold this model.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kinds: dict[str, list[DeltaRank]] = defaultdict(list)
    for name, before, after in _pairs(base, trained, config):
        kinds[name.split(".")[-2]].append(delta_rank(before.to(device), after.to(device), threshold))
    kinds["all"] = [rank for ranks in kinds.values() for rank in ranks]
    return {kind: DeltaRank(*(sum(column) / len(ranks) for column in zip(*ranks))) for kind, ranks in kinds.items()}


def _pairs(base: Path, trained: Path, config: DecoderConfig) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    files = [open_model_weights(folder, config) for folder in (base, trained)]
    for name, shape in parameter_shapes(config).items():
        if name.endswith(tuple(f"{layer}.weight" for layer in config.linear_shapes())):
            before, after = (file.read_rows(name, 0, shape[0]) for file in files)
            yield name, before, after
