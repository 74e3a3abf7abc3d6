"""Principal factors kept between runs: one safetensors file per weight, named by what it depends on.

The name is a hash of the weight's content and the settings, so a stale file is never read: it has another name. Files
are written beside and renamed, so a reader never sees half a file, and concurrent writers of one name write the same.
"""

from __future__ import annotations

import hashlib
import logging
import time
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from titan_hd.adapters.svd import (
    SvdSettings,
    captured_energy,
    orthogonality_error,
    principal_factors,
    zero_directions,
)
from titan_hd.files import replace_file
from titan_hd.seeding import stable_seed

logger = logging.getLogger("titan_hd")
_VERSION = 1  # raised when the same settings would give other factors


def cache_key(weight: torch.Tensor, count: int, settings: SvdSettings) -> str:
    """Hash of W's fp32 content and everything else that decides its factors."""
    algorithm = settings.resolve(weight.shape, count)
    niter = settings.niter if algorithm == "randomized" else 0
    header = f"{_VERSION}/{list(weight.shape)}/{count}/{algorithm}/{niter}/" + "smallest/" * settings.smallest
    digest = hashlib.sha256(header.encode())
    digest.update(weight.detach().float().cpu().contiguous().numpy().data.cast("B"))
    return digest.hexdigest()


def cached_factors(
    weight: torch.Tensor, count: int, settings: SvdSettings, name: str, folder: str = ""
) -> tuple[torch.Tensor, torch.Tensor, dict[str, object]]:
    """`principal_factors` of W [out, in], from the cache where it is there and into it where not.

    folder: "" for no cache. Returns A [count, in], B [out, count] on W's device, and a report: layer, shape, algorithm,
    cached, seconds, captured_energy, orthogonality_error, directions, zero_directions.
    """
    start = time.perf_counter()
    path = Path(folder) / f"{cache_key(weight, count, settings)}.safetensors" if folder else None
    factors = _read(path, weight, count) if path else None
    cached = factors is not None
    if factors is None:
        # The start of the subspace iteration belongs to the layer, not to the run.
        factors = principal_factors(weight, count, settings, stable_seed("svd", name))
        if path:
            _write(path, *factors)
    if weight.is_cuda:
        torch.cuda.synchronize(weight.device)
    a, b = factors
    report: dict[str, object] = {
        "layer": name,
        "shape": list(weight.shape),
        "algorithm": settings.resolve(weight.shape, count),
        "cached": cached,
        "seconds": time.perf_counter() - start,
        "captured_energy": captured_energy(weight, a),
        "orthogonality_error": orthogonality_error(a, b),
        "directions": count,
        "zero_directions": zero_directions(a),
    }
    return a, b, report


def _read(path: Path, weight: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    if not path.exists():
        return None
    try:
        tensors = load_file(path, device=str(weight.device))
    except (SafetensorError, OSError, KeyError) as error:
        logger.warning("%s cannot be read (%s): its factors are computed anew", path, error)
        return None
    a, b = tensors.get("A"), tensors.get("B")
    out_features, in_features = weight.shape
    if a is None or b is None or a.shape != (count, in_features) or b.shape != (out_features, count):
        logger.warning("%s holds something else: its factors are computed anew", path)
        return None
    return a, b


def _write(path: Path, a: torch.Tensor, b: torch.Tensor) -> None:
    """A full disk or a read-only folder costs the cache, not the run."""
    tensors = {"A": a.cpu().contiguous(), "B": b.cpu().contiguous()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, lambda partial: save_file(tensors, partial))
    except (OSError, SafetensorError) as error:
        logger.warning("adapter.svd_cache: cannot write %s: %s", path, error)
