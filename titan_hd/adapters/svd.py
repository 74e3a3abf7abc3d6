"""Slices of a weight's singular directions: the fixed factors A_i, B_i of HD-PiSSA's logical adapters.

Pure functions of one whole weight on one device; who computes them and who receives them is decided in
`distributed.factor_init`, whether they are read from an earlier run in `svd_cache`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from titan_hd.adapters.lora import kaiming_uniform
from titan_hd.seeding import stable_seed

# The Gram matrix squares the condition number: below this share of the largest singular value its float64 eigenvectors
# lose digits that matter in fp32, and a float64 SVD is taken instead.
_GRAM_LIMIT = 1e-5
# "auto" takes the randomized algorithm where it needs this many times fewer operations; see docs/svd.md.
_RANDOMIZED_GAIN = 4.0


@dataclass(frozen=True)
class SvdSettings:
    """algorithm: "exact", "randomized" or "auto"; niter: power iterations of the randomized one. smallest: directions
    of the smallest singular values are wanted, not of the largest; the randomized algorithm cannot find them."""

    algorithm: str = "exact"
    niter: int = 16
    smallest: bool = False

    def resolve(self, shape: Sequence[int], count: int) -> str:
        """The algorithm for `count` directions of a weight [out, in]: a function of the sizes alone."""
        if self.smallest:
            return "exact"
        if self.algorithm != "auto":
            return self.algorithm
        gain = exact_cost(shape) / randomized_cost(shape, count, self.niter)
        return "randomized" if gain > _RANDOMIZED_GAIN else "exact"

    def cost(self, shape: Sequence[int], count: int) -> float:
        """Operations of the algorithm that `resolve` takes."""
        exact = self.resolve(shape, count) == "exact"
        return exact_cost(shape) if exact else randomized_cost(shape, count, self.niter)


def exact_cost(shape: Sequence[int]) -> float:
    """Operations of the exact algorithm on a weight [out, in]: a Gram matrix and all eigenvectors of it."""
    large, small = max(shape), min(shape)
    return 2.0 * large * small**2 + 22.0 * small**3


def randomized_cost(shape: Sequence[int], count: int, niter: int) -> float:
    """Operations of the randomized algorithm: two products with W per iteration."""
    return 4.0 * (niter + 1) * shape[0] * shape[1] * _sketch_width(shape, count)


def working_bytes(shape: Sequence[int], count: int, settings: SvdSettings) -> int:
    """Memory that the decomposition of a weight [out, in] takes beside it, at most: of the exact algorithm a float64
    copy, the Gram matrix, its eigenvectors and what eigh works in (as much as both); of the randomized one its sketches
    and their factors. No less than what `captured_energy` takes: a float64 copy and its squares."""
    large, small = max(shape), min(shape)
    if settings.resolve(shape, count) == "exact":
        work = 8 * (large * small + 4 * small**2)
    else:
        work = 16 * _sketch_width(shape, count) * (large + small)
    return max(work, 16 * large * small) + 4 * count * (large + small)


def principal_factors(
    weight: torch.Tensor, count: int, settings: SvdSettings = SvdSettings(), seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `count` singular directions of W [out, in], each side scaled by the root of its singular value.

    Returns A = S^1/2 V^T [count, in] and B = U S^1/2 [out, count] in fp32, so that B A is the best approximation of
    rank `count` (nearly so for the randomized algorithm). The sign of each pair, which a decomposition leaves open, is
    fixed: the largest element of each row of A is positive.

    With `settings.smallest` the last `count` directions, the smallest singular value first. Where it is below fp32's
    resolution of the largest, W has no such direction: A and B are zero there.
    """
    if settings.resolve(weight.shape, count) == "randomized":
        u, s, vh = _randomized_svd(weight.float(), count, settings.niter, seed)
    else:
        u, s, vh = _gram_svd(weight.double(), count, settings.smallest)
    largest = vh.gather(1, vh.abs().argmax(dim=1, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0)
    root = s.sqrt()[:, None]
    return (vh * sign * root).float(), (u * (sign * root).T).float()


def _gram_svd(w: torch.Tensor, count: int, smallest: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Leading (or smallest) singular triplets of a float64 W from the eigenvectors of W^T W or W W^T, whichever is
    smaller.

    Measured against torch.linalg.svd in fp32 (`benchmarks/bench_svd.py`): no slower, and closer to the float64 SVD.
    """
    tall = w.shape[0] >= w.shape[1]
    gram = w.T @ w if tall else w @ w.T
    values, vectors = torch.linalg.eigh(gram)
    largest = values[-1].clamp(min=0).sqrt()
    if smallest:
        values, near = values[:count], vectors[:, :count]
    else:
        values, near = values[-count:].flip(0), vectors[:, -count:].flip(1)
    s = values.clamp(min=0).sqrt()
    if s.min() <= _GRAM_LIMIT * largest:
        u, s, vh = torch.linalg.svd(w, full_matrices=False)  # descending
        if not smallest:
            return u[:, :count], s[:count], vh[:count]
        s = torch.where(s <= torch.finfo(torch.float32).eps * s[0], 0.0, s)
        return u[:, -count:].flip(1), s[-count:].flip(0), vh[-count:].flip(0)
    far = (w @ near if tall else w.T @ near) / s
    return (far, s, near.T) if tall else (near, s, far.T)


def _sketch_width(shape: Sequence[int], count: int) -> int:
    """Oversampling by as many directions again, at least 16: flat spectra need it."""
    return min(count + max(count, 16), *shape)


def _randomized_svd(
    w: torch.Tensor, count: int, niter: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Subspace iteration with oversampling (Halko, Martinsson and Tropp, 2011, algorithm 4.4), fp32.

    The start is drawn on the host from `seed`, so every device and every run takes the same.
    """
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(w.shape[1], _sketch_width(w.shape, count), generator=generator)
    q = torch.linalg.qr(w @ start.to(w.device))[0]
    for _ in range(niter):
        q = torch.linalg.qr(w.T @ q)[0]
        q = torch.linalg.qr(w @ q)[0]
    u, s, vh = torch.linalg.svd(q.T @ w, full_matrices=False)
    return q @ u[:, :count], s[:count], vh[:count]


def captured_energy(weight: torch.Tensor, a: torch.Tensor) -> float:
    """Share of ||W||^2 in the directions of A [count, in]: sum of their squared singular values over the whole; 1 for
    W = 0, of which nothing is left out."""
    whole = weight.double().square().sum().item()
    return a.double().square().sum(1).square().sum().item() / whole if whole else 1.0


def zero_directions(a: torch.Tensor) -> int:
    """How many rows of A [count, in] have no singular value (below fp32's resolution of the largest): W has a lower
    rank than `count`, and these directions' A and B are zero, so that nothing that is trained through them moves."""
    values = a.double().square().sum(1)
    return int((values <= torch.finfo(torch.float32).eps * values.max()).sum())


def orthogonality_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest cosine between two different directions, over the rows of A [count, in] and the columns of B."""
    worst = 0.0
    for rows in (a.double(), b.double().T):
        unit = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-30)
        gram = unit @ unit.T
        worst = max(worst, (gram - torch.diag(gram.diag())).abs().max().item())
    return worst


def random_factors(
    shape: tuple[int, int], adapters: range, rank: int, seed: int, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """LoRA's initialisation for k adapters on the host: A [k, r, in] kaiming_uniform(a = sqrt 5), B [k, out, r] zero.

    Adapter i of layer `name` draws from a generator of its own, so its A does not depend on who computes it.
    """
    out_features, in_features = shape
    generators = [torch.Generator().manual_seed(stable_seed("adapter", seed, name, i)) for i in adapters]
    a = torch.stack([kaiming_uniform(rank, in_features, generator) for generator in generators])
    return a, torch.zeros(len(adapters), out_features, rank)


def cut_slices(
    a: torch.Tensor, b: torch.Tensor, num_adapters: int, rank: int, slices: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of all K adapters, A [K, r, in] and B [K, out, r], from a [count, in] and b [out, count] of a weight.

    slices = "orthogonal": adapter i has directions i*r to (i+1)*r - 1 (HD-PiSSA; count = K*r);
    slices = "minor": the same of the smallest directions, counted from the smallest one;
    slices = "top": every adapter has the first r (the ablation without orthogonal slices; count = r).
    """
    if slices == "top":
        return a.expand(num_adapters, -1, -1), b.expand(num_adapters, -1, -1)
    return a.unflatten(0, (num_adapters, rank)), b.unflatten(1, (num_adapters, rank)).transpose(0, 1)


def unit_factors(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal directions times one number: from a = S^1/2 V^T [count, in] and b = U S^1/2 [out, count], the mean of
    S^1/2 over the count directions (those that the slices of all adapters take) times V^T, and times U. Directions
    without a singular value stay zero, and count as zero in the mean."""
    root = a.double().norm(dim=1)
    ratio = torch.where(root > 0, root.mean() / root, 0.0)
    return (a * ratio[:, None]).float(), (b * ratio).float()


# hdpissa.factor_scale: what becomes of a [count, in] and b [out, count], each with the root of the singular values.
FACTOR_SCALES: dict[str, Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]] = {
    "root": lambda a, b: (a, b),
    "unit": unit_factors,
}
