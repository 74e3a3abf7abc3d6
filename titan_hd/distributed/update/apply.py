"""The arithmetic on one worker's rows of W. No collectives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from titan_hd.distributed.update.rounding import add_rounded, row_hashes

# Elements of the update that are held in fp32 at a time where the master is bf16: 16 MiB, and a few times that on CPUs.
_CHUNK_ELEMENTS = 2**22


@dataclass(frozen=True)
class Rounding:
    """Where a block of rows stands in the logical weight, and the key of this step: what stochastic rounding needs."""

    key: int
    first_row: int
    first_column: int = 0


def factored_update(
    a: torch.Tensor, b: torch.Tensor, da: torch.Tensor, db: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """left [rows, 2m], right [2m, in] with left @ right = sum_i dB_i A_i + (B_i + dB_i) dA_i.

    a, da: [m, in], b, db: [rows, m], where m = K*r stacks the adapters.
    """
    return torch.cat((db, b + db), dim=1), torch.cat((a, da), dim=0)


@dataclass(frozen=True)
class FactoredUpdate:
    """coefficient * sum_i [dB_i A_i + (B_i + dB_i) dA_i] on the rows of one worker, not multiplied out.

    a, da [m, in], b, db [rows, m], fp32, where m = K*r.
    """

    a: torch.Tensor
    b: torch.Tensor
    da: torch.Tensor
    db: torch.Tensor
    coefficient: float

    def add_to(self, w: torch.Tensor, decay: float, rounding: Rounding | None) -> None:
        """w <- (1 - decay) w + the update, in place, by one product; w [rows, in] is fp32, or bf16 and rounded."""
        left, right = factored_update(self.a, self.b, self.da, self.db)
        if rounding is None:
            w.addmm_(left, right, beta=1.0 - decay, alpha=self.coefficient)
        else:
            left.mul_(self.coefficient)
            _add_in_chunks(w, decay, rounding, lambda chunk: left[chunk] @ right)


@dataclass(frozen=True)
class RowsUpdate:
    """The update of one worker's rows as a matrix [chunk, in], fp32; rows beyond the worker's are padding."""

    chunk: torch.Tensor

    def add_to(self, w: torch.Tensor, decay: float, rounding: Rounding | None) -> None:
        """w <- (1 - decay) w + the update, in place; w [rows, in] is fp32, or bf16 and rounded."""
        update = self.chunk[: len(w)]
        if rounding is None:
            torch.add(update, w, alpha=1.0 - decay, out=w)
        else:
            _add_in_chunks(w, decay, rounding, lambda chunk: update[chunk].float())


def _add_in_chunks(w: torch.Tensor, decay: float, rounding: Rounding, update: Callable[[slice], torch.Tensor]) -> None:
    """w <- (1 - decay) w + the update in place, rounded; w [rows, in] is bf16. update: its rows, fp32."""
    count, width = w.shape
    row, column = rounding.first_row, rounding.first_column
    hashes = row_hashes(rounding.key, torch.arange(row, row + count, device=w.device))
    columns = torch.arange(column, column + width, device=w.device, dtype=torch.int32)
    keep = torch.full((), 1.0 - decay, device=w.device)
    step = max(1, _CHUNK_ELEMENTS // max(1, width))
    for start in range(0, count, step):
        chunk = slice(start, start + step)
        add_rounded(w[chunk], update(chunk), keep, hashes[chunk], columns)
