"""What can be told of a matrix D [out, in] from its products with a few random vectors, D Omega.

The columns w of Omega are independent and standard normal. With M = D^T D, for two of them

    E[w^T M w] = tr M = ||D||^2,    E[(w^T M v)^2] = tr M^2,    E[(w^T M w) (v^T M v)] = (tr M)^2

so that the Gram matrix of D Omega has unbiased estimates of ||D||^2 and of both sides of (tr M)^2 / tr M^2, the number
of directions that D amounts to: the sum of its squared singular values, squared, over the sum of their squares. It is n
for n equal singular values and 1 for one; and it is not limited by the number of vectors, as a rank of D Omega is.

Products are linear: those of D = W - W0 are the difference of W's and W0's, and neither D nor W0 need be there.
"""

from __future__ import annotations

import functools

import torch

from titan_hd.seeding import stable_seed

# Elements of a matrix that are held in float64 at a time: 32 MiB.
_CHUNK_ELEMENTS = 2**22


@functools.lru_cache(maxsize=16)  # the widths of a model's layers are few
def random_vectors(size: int, count: int, seed: int) -> torch.Tensor:
    """Omega [size, count], float64, on the host: a function of its arguments alone."""
    generator = torch.Generator().manual_seed(stable_seed("sketch", seed, size, count))
    return torch.randn(size, count, generator=generator, dtype=torch.float64)


def product(matrix: torch.Tensor, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """matrix [m, n], of any floating dtype and on any device, times vectors [n, q] float64: [m, q] in float64 on the
    device of the vectors, and the matrix's squared norm, 0-dim."""
    width = matrix.shape[1]
    parts, squares = [], vectors.new_zeros(())
    for chunk in matrix.split(max(1, _CHUNK_ELEMENTS // max(1, width))):
        exact = chunk.to(vectors.device, torch.float64)
        parts.append(exact @ vectors)
        squares = squares + exact.square().sum()
    return torch.cat(parts) if parts else vectors.new_zeros(0, vectors.shape[1]), squares


def square_norm(gram: torch.Tensor) -> torch.Tensor:
    """Estimate of ||D||^2 from the Gram matrix [..., p, p] of D Omega."""
    return gram.diagonal(dim1=-2, dim2=-1).mean(-1)


def effective_rank(gram: torch.Tensor) -> torch.Tensor:
    """Estimate of (sum of D's squared singular values)^2 / sum of their squares, from the Gram matrix [..., p, p] of
    D Omega; at least 1, and 0 where D is zero."""
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    squared_trace = diagonal.sum(-1).square() - diagonal.square().sum(-1)  # sums over pairs of different vectors
    trace_of_square = gram.square().sum((-2, -1)) - diagonal.square().sum(-1)
    return torch.where(trace_of_square > 0, squared_trace / trace_of_square, 0.0)
