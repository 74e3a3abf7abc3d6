"""The update in plain dense loops: what every route must equal. Used by tests; slow on purpose."""

from __future__ import annotations

import torch


def reference_update(
    a: torch.Tensor, b: torch.Tensor, da: torch.Tensor, db: torch.Tensor, aggregate: str
) -> torch.Tensor:
    """c * sum_i [(B_i + dB_i)(A_i + dA_i) - B_i A_i] as a dense [out, in].

    a, da: [K, r, in]; b, db: [K, out, r]; c is 1/K for aggregate = "mean", 1 for "sum". Give float64: the difference
    of the two products cancels in fp32.
    """
    update = torch.zeros(b.shape[1], a.shape[2], dtype=a.dtype)
    for i in range(a.shape[0]):
        update += (b[i] + db[i]) @ (a[i] + da[i]) - b[i] @ a[i]
    return update / a.shape[0] if aggregate == "mean" else update
