"""Many tensors in one flat one: work on all of them is a few kernels, and each is a view."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

# Elements whose norm is taken at a time: a CPU makes a float64 copy of them first.
_CHUNK_ELEMENTS = 2**20


class Piece(NamedTuple):
    """Where one tensor lies in the flat one: from which element on, and in which shape."""

    start: int
    shape: tuple[int, ...]

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """The view of a flat tensor, of any dtype."""
        return flat[self.start : self.start + math.prod(self.shape)].view(self.shape)


def lay_out(shapes: Iterable[tuple[int, ...]], start: int = 0) -> Iterator[Piece]:
    """Pieces of these shapes, one behind the other."""
    for shape in shapes:
        yield Piece(start, shape)
        start += math.prod(shape)


@torch.no_grad()
def square_sum(flat: torch.Tensor) -> torch.Tensor:
    """Sum of the squares, float64 and 0-dim, on the device.

    Squares of fp32 do not overflow in float64: the sum is infinite or NaN exactly where an element is. And they are
    added up so exactly that their order, which depends on the mesh, is not seen in fp32.
    """
    if not flat.numel():
        return torch.zeros((), dtype=torch.float64, device=flat.device)
    norms = torch._foreach_norm(flat.split(_CHUNK_ELEMENTS), 2, dtype=torch.float64)
    return torch.stack(norms).square_().sum()
