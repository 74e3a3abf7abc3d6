"""Fills adapter.svd_cache for a configuration, offline and without a process group.

    python tools/precompute_svd.py --config train_configs/llama31_8b_hdpissa.toml --adapter.svd_cache DIR
    python tools/precompute_svd.py --share 2/8 --config ...      every 8th weight, starting with the third

Uses a GPU if there is one. A training run with the same settings then reads every weight's factors from the cache.
Shares may run at the same time, on any machines that see the folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from titan_hd.adapters.methods import build_method, method_of
from titan_hd.adapters.svd import SvdSettings
from titan_hd.adapters.svd_cache import cached_factors
from titan_hd.config import manager
from titan_hd.config.command_line import ToolParser
from titan_hd.config.job_config import JobConfig
from titan_hd.console import Progress, tell
from titan_hd.errors import UserError
from titan_hd.models.hf_files import open_model_weights
from titan_hd.models.registry import build_model, parameter_shapes
from titan_hd.preflight import decoder_config
from titan_hd.process.streams import keep_streams


def precompute(config: JobConfig, share: int, shares: int) -> None:
    """Decompose every targeted weight of the share that is not in the cache; one JSON line each on stdout."""
    a = config.adapter
    decoder = decoder_config(config)
    files, shapes = open_model_weights(config.model.hf_assets_path, decoder), parameter_shapes(decoder)
    with torch.device("meta"):
        model = build_model(decoder)
    method = build_method(config, method_of(config).adapters_for(config, workers=1))
    names = method.apply(model, a.target_modules)[share::shares]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # What the run decomposes is the master; one that is chosen automatically is exact.
    said = config.training.master_dtype
    master = torch.float32 if said == "auto" else getattr(torch, said)
    settings = SvdSettings(a.svd, a.svd_niter, method.smallest)
    with Progress("decomposing", len(names), "weights", said=tell, always=True) as progress:
        for name in names:
            rows = files.read_rows(f"{name}.weight", 0, shapes[f"{name}.weight"][0])
            weight = rows.to(device, master).float()
            *_, report = cached_factors(weight, method.directions, settings, name, a.svd_cache)
            print(json.dumps(report))
            progress.update()


def parse_share(text: str) -> tuple[int, int]:
    """(i, n) of "i/n"; leaves with one line and status 2 if it is anything else."""
    share, slash, shares = text.partition("/")
    if not (slash and share.isdigit() and shares.isdigit() and int(share) < int(shares)):
        manager.exit_with([f"--share: must be i/n with i from 0 to n - 1, not {text!r}"])
    return int(share), int(shares)


def main() -> None:
    keep_streams()  # what counts is in the cache, and filling it takes hours
    parser = ToolParser(__doc__)
    parser.add_argument("--share", type=parse_share, default=(0, 1), metavar="I/N", help="part I, from 0 on, of N")
    args, argv = parser.parse_with_run_options()
    config = manager.load_or_exit(argv)
    method = method_of(config)
    decomposes = "adapter.svd" in method.keys
    faults = {
        "adapter.svd_cache: is missing; name the folder to fill": not config.adapter.svd_cache,
        "hdpissa.num_adapters: is missing; the factors depend on it": method.folds and not config.hdpissa.num_adapters,
        f"adapter.method: {config.adapter.method} needs no SVD": not decomposes,
        "hdpissa.slices: random slices need no SVD": decomposes and not build_method(config).directions,
        "model.hf_assets_path: is missing; random weights are not worth a cache": bool(config.model.flavor),
    }
    errors = [line for line, fault in faults.items() if fault]
    if errors:
        manager.exit_with(errors)
    try:
        precompute(config, *args.share)
    except UserError as error:
        manager.exit_with(str(error).splitlines())


if __name__ == "__main__":
    main()
