"""The arithmetic on one worker's rows of W. No collectives."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from titan_hd.distributed.update.rounding import random_bits, stochastic_round

# Elements of W that are held in fp32 at a time where the master is bf16: 16 MiB, plus twice that for random bits.
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

    def add_to(self, w: torch.Tensor, decay: float, rounding: Rounding) -> None:
        """w <- (1 - decay) w + the update, in place, by one product; w [rows, in] is fp32, or bf16 and rounded."""
        left, right = factored_update(self.a, self.b, self.da, self.db)
        scales = {"beta": 1.0 - decay, "alpha": self.coefficient}
        if w.dtype == torch.float32:
            w.addmm_(left, right, **scales)
            return
        for start, part in _row_chunks(w):
            new = torch.addmm(part.float(), left[start : start + len(part)], right, **scales)
            _round_into(part, new, start, rounding)


@dataclass(frozen=True)
class RowsUpdate:
    """The update of one worker's rows as a matrix [chunk, in], fp32; rows beyond the worker's are padding."""

    chunk: torch.Tensor

    def add_to(self, w: torch.Tensor, decay: float, rounding: Rounding) -> None:
        """w <- (1 - decay) w + the update, in place; w [rows, in] is fp32, or bf16 and rounded."""
        update = self.chunk[: len(w)]
        if w.dtype == torch.float32:
            torch.add(update, w, alpha=1.0 - decay, out=w)
            return
        for start, part in _row_chunks(w):
            _round_into(part, part.float() * (1.0 - decay) + update[start : start + len(part)], start, rounding)


def _row_chunks(w: torch.Tensor):
    step = max(1, _CHUNK_ELEMENTS // max(1, w.shape[1]))
    for start in range(0, w.shape[0], step):
        yield start, w[start : start + step]


def _round_into(part: torch.Tensor, value: torch.Tensor, start: int, rounding: Rounding) -> None:
    first = rounding.first_row + start
    rows = torch.arange(first, first + part.shape[0], device=part.device)
    columns = torch.arange(rounding.first_column, rounding.first_column + part.shape[1], device=part.device)
    part.copy_(stochastic_round(value, random_bits(rounding.key, rows, columns)))
