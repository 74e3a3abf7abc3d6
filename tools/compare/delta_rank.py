"""The change that a training made to each weight, dW: its singular values, how many directions they amount to, and how
much of them the rounding of the files alone could be. One weight is in memory at a time."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import torch

from titan_hd.errors import UserError
from titan_hd.models.hf_files import open_model_weights
from titan_hd.models.model_config import ModelConfig

# Relative to the largest, singular values from the Gram matrix in float64 are off by about 1e-16 / (2 s^2): 1e-8 of a
# value at s = 1e-4. Where a smaller one is among them, the weight is decomposed itself.
_GRAM_IS_EXACT_ABOVE = 1e-4
_GRAM_FROM = 512  # rows and columns; below that a decomposition takes milliseconds


class DeltaRank(NamedTuple):
    """above: singular values of dW above `threshold` times the largest; entropy: exp of the entropy of the singular
    values divided by their sum (Roy and Vetterli, 2007); relative_norm: ||dW|| / ||W||; stable: (||dW|| / the largest
    singular value)^2. Norms are Frobenius'. Of one weight, or means over several."""

    above: float
    entropy: float
    relative_norm: float
    stable: float = 0.0


class WeightDelta(NamedTuple):
    """The dW of one weight. values: all its singular values, the largest first, float64 on the host. floor: the largest
    singular value that rounding W to the trained file's dtype can be expected to make by itself."""

    name: str
    layer: int
    kind: str
    values: torch.Tensor
    rank: DeltaRank
    floor: float

    @property
    def above_floor(self) -> int:
        """Singular values that no rounding explains."""
        return int((self.values > self.floor).sum())


class Weights(Protocol):
    """What reads a model by HF names: the files of a directory, or a checkpoint with its adapters merged in."""

    def read_into(self, name: str, out: torch.Tensor, /) -> None: ...

    def dtype(self, name: str) -> torch.dtype: ...


def singular_values(delta: torch.Tensor) -> torch.Tensor:
    """Of a matrix in float64, all of them, the largest first, on the host. Each is accurate to about 1e-8 of itself, or
    to float64's rounding of the largest.

    The eigenvalues of the smaller Gram matrix take a quarter of the time (14336 x 4096 on two cores: 25 s against 97 s)
    and are as good, as long as no value is much smaller than the largest. Full-rank changes are like that; one of low
    rank ends in rounding noise, and is decomposed itself.
    """
    if min(delta.shape) >= _GRAM_FROM:
        gram = delta.T @ delta if delta.shape[0] > delta.shape[1] else delta @ delta.T
        values = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).sqrt()
        if values[-1] > _GRAM_IS_EXACT_ABOVE * values[0]:
            return values.cpu()
    return torch.linalg.svdvals(delta).cpu()


def effective_ranks(values: torch.Tensor, base_norm: float, threshold: float) -> DeltaRank:
    """Of all singular values, the largest first, of a change to a weight of that Frobenius norm; all zero if nothing
    has changed."""
    if not values.any():
        return DeltaRank(0.0, 0.0, 0.0, 0.0)
    share = values / values.sum()
    entropy = -(share * share.clamp(min=1e-300).log()).sum()
    norm = values.norm().item()
    return DeltaRank(
        count_above(values, threshold), entropy.exp().item(), norm / base_norm, (norm / values[0].item()) ** 2
    )


def count_above(values: torch.Tensor, threshold: float) -> float:
    """Singular values, the largest first, above that share of the largest; 0 if all are zero."""
    return float((values > threshold * values[0]).sum())


def delta_rank(base: torch.Tensor, trained: torch.Tensor, threshold: float) -> DeltaRank:
    """Of one weight [out, in]; all zero if nothing has changed."""
    base = base.double()
    return effective_ranks(singular_values(trained.double() - base), base.norm().item(), threshold)


def rounding_floor(weight: torch.Tensor, dtype: torch.dtype) -> float:
    """An upper estimate of the largest singular value of (weight [out, in] rounded to `dtype`) - weight.

    The error of an element is spread evenly over one unit in its last place, so its standard deviation is that unit /
    sqrt(12). For independent elements the largest singular value is at most about the largest norm of a row of these
    deviations and the largest of a column together (arXiv 1408.6185).
    """
    unit = torch.finfo(dtype).eps * torch.exp2(torch.frexp(weight).exponent.double() - 1)
    variance = torch.where(weight == 0, 0.0, unit * unit / 12)
    return (variance.sum(0).max().sqrt() + variance.sum(1).max().sqrt()).item()


def linear_weights(config: ModelConfig, kinds: Collection[str] = (), layers: Collection[int] = ()) -> list[str]:
    """HF names of the linear layers of the blocks, in the model's order; of these kinds (q_proj, ...) and blocks alone,
    if any are given."""
    wanted = set(layers or range(config.num_hidden_layers))
    return [
        f"{name}.weight"
        for name, kind in config.linear_layers().items()
        if (not kinds or kind in kinds) and _layer(name) in wanted
    ]


def _layer(name: str) -> int:
    return int(next(part for part in name.split(".") if part.isdecimal()))


@torch.no_grad()
def weight_deltas(
    base: Weights,
    trained: Weights,
    config: ModelConfig,
    names: Collection[str],
    threshold: float,
    device: torch.device,
) -> Iterator[WeightDelta]:
    """dW of one weight after the other, in float64 on `device`.

    Raises:
        UserError: a weight cannot be read, or holds a value that is NaN or infinite.
    """
    kinds = config.linear_layers()
    for name in names:
        kind = kinds[name.removesuffix(".weight")]
        before, after = (_read(weights, name, config.linear_shapes()[kind]).to(device) for weights in (base, trained))
        base_norm, floor = before.norm().item(), rounding_floor(after, trained.dtype(name))
        values = singular_values(after.sub_(before))
        yield WeightDelta(name, _layer(name), kind, values, effective_ranks(values, base_norm, threshold), floor)


def _read(weights: Weights, name: str, shape: tuple[int, int]) -> torch.Tensor:
    out = torch.empty(shape, dtype=torch.float64)
    with warnings.catch_warnings():  # of a checkpoint: that this is one process
        warnings.simplefilter("ignore")
        weights.read_into(name, out)
    if not out.isfinite().all():
        raise UserError(f"{name}: holds a value that is NaN or infinite")
    return out


def mean_ranks(deltas: Collection[WeightDelta]) -> dict[str, DeltaRank]:
    """Means over the blocks for each kind of linear layer (q_proj, ...), and over all of them under "all"."""
    kinds: dict[str, list[DeltaRank]] = defaultdict(list)
    for delta in deltas:
        kinds[delta.kind].append(delta.rank)
    kinds["all"] = [delta.rank for delta in deltas]
    return {kind: DeltaRank(*(sum(column) / len(ranks) for column in zip(*ranks))) for kind, ranks in kinds.items()}


def delta_ranks(
    base: Path, trained: Path, config: ModelConfig, threshold: float, kinds: Collection[str] = ()
) -> dict[str, DeltaRank]:
    """`mean_ranks` of the linear layers; of these kinds (q_proj, ...) alone, if any are given.

    base, trained: HF directories of the model that `config` describes; trained should be in fp32, or its rounding is
    what is measured.

    Raises:
        UserError: a directory that does not hold this model.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    before, after = (open_model_weights(folder, config) for folder in (base, trained))
    deltas = weight_deltas(before, after, config, linear_weights(config, kinds), threshold, device)
    return mean_ranks([delta._replace(values=delta.values[:0]) for delta in deltas])
