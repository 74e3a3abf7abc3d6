"""Principal slices of a weight: the fixed factors A_i, B_i of HD-PiSSA's logical adapters.

Pure functions of one whole weight on one device; who computes them and who receives them is decided in
`distributed.slices`.
"""

from __future__ import annotations

import hashlib
import math

import torch


def principal_factors(weight: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `count` singular directions of W [out, in], each side scaled by the root of its singular value.

    Returns A = S^1/2 V^T [count, in] and B = U S^1/2 [out, count] in fp32, so that B A is the best approximation of
    rank `count`. LAPACK leaves the sign of each pair open; it is fixed here: the largest element of each row of A is
    positive.
    """
    u, s, vh = torch.linalg.svd(weight.float(), full_matrices=False)
    u, s, vh = u[:, :count], s[:count], vh[:count]
    largest = vh.gather(1, vh.abs().argmax(dim=1, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0)
    root = s.sqrt()[:, None]
    return vh * sign * root, u * (sign * root).T


def random_factors(
    shape: tuple[int, int], adapters: range, rank: int, seed: int, name: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """LoRA's initialisation for k adapters on the host: A [k, r, in] kaiming_uniform(a = sqrt 5), B [k, out, r] zero.

    Adapter i of layer `name` draws from a generator of its own, so its A does not depend on who computes it.
    """
    out_features, in_features = shape
    bound = 1.0 / math.sqrt(in_features)
    a = torch.empty(len(adapters), rank, in_features)
    for row, i in enumerate(adapters):
        digest = hashlib.sha256(f"{seed}/{name}/{i}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
        a[row].uniform_(-bound, bound, generator=generator)
    return a, torch.zeros(len(adapters), out_features, rank)


def slice_factors(weight: torch.Tensor, num_adapters: int, rank: int, slices: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of all K adapters from the SVD of W [out, in]: A [K, r, in], B [K, out, r], fp32.

    slices = "orthogonal": adapter i has directions i*r to (i+1)*r - 1 (HD-PiSSA, DESIGN section 1);
    slices = "top": every adapter has the first r (the ablation without orthogonal slices).
    """
    if slices == "top":
        a, b = principal_factors(weight, rank)
        return a.expand(num_adapters, -1, -1), b.expand(num_adapters, -1, -1)
    a, b = principal_factors(weight, num_adapters * rank)
    return a.unflatten(0, (num_adapters, rank)), b.unflatten(1, (num_adapters, rank)).transpose(0, 1)
