"""The factors exchange: low-rank factors travel, each worker multiplies out only the rows of W that it owns.

In words, for one weight W [out, in] whose rows are sharded over the workers, and K adapters dealt to n holders:

1. every holder sends its dA_i [r, in] to all holders (all-gather);
2. every holder sends to worker s the rows of its dB_i that s owns, rows_s (all-to-all; uneven and empty rows are
   ordinary);
3. worker s adds  c * [dB | B + dB] [A ; dA]  to its rows: one product of inner size 2*K*r.

A of all adapters and rows_s of every B never change, so they travelled once, at the start, by the same two functions.
Where workers share an adapter (K < W), the holders are the workers of one place in their groups; each such set of
holders runs the exchange among itself.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from titan_hd.distributed.collectives import all_gather_single, exchange_lists


def gather_a(local: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """A or dA of the hosted adapters, [k, r, in], to that of all adapters, [K*r, in]."""
    k, r, width = local.shape
    holders = dist.get_world_size(group)
    out = local.new_empty(holders * k * r, width)
    all_gather_single(out, local.reshape(k * r, width), group=group)
    return out


def exchange_b(local: torch.Tensor, rows: list[tuple[int, int]], group: dist.ProcessGroup) -> torch.Tensor:
    """B or dB of the hosted adapters, [k, out, r], to this worker's rows of all adapters, [rows, K*r].

    rows[m] is the row range of W that holder m of the group owns.
    """
    k, _, r = local.shape
    start, stop = rows[dist.get_rank(group)]
    send = [local[:, lo:hi].contiguous() for lo, hi in rows]
    parts = exchange_lists(send, [(k, stop - start, r)] * len(rows), group)
    return torch.cat(parts).transpose(0, 1).reshape(stop - start, len(rows) * k * r)


def apply_factors(
    w_rows: torch.Tensor,
    a: torch.Tensor,
    b_rows: torch.Tensor,
    da: torch.Tensor,
    db_rows: torch.Tensor,
    coefficient: float,
    decay: float,
) -> None:
    """W_rows <- (1 - decay) W_rows + c * sum_i [dB_i A_i + (B_i + dB_i) dA_i], in place.

    w_rows: [rows, in]; a, da: [K*r, in]; b_rows, db_rows: [rows, K*r]. No collectives.
    """
    left = torch.cat((db_rows, b_rows + db_rows), dim=1)
    right = torch.cat((a, da), dim=0)
    w_rows.addmm_(left, right, beta=1.0 - decay, alpha=coefficient)
