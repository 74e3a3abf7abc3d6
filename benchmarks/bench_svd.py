"""Principal factors of a weight: seconds and accuracy of the algorithms, against a float64 SVD.

    python -m benchmarks.bench_svd                                   # CPU: five sizes, n = 128 directions
    python -m benchmarks.bench_svd --hf-dir DIR --count 16           # real weights, one of each shape
    python -m benchmarks.bench_svd --true-8b --repetitions 1         # the four shapes of Llama-3.1-8B (meant for a GPU)

Algorithms: torch.linalg.svd in fp32; titan_hd's "exact" (eigenvectors of the Gram matrix in float64); titan_hd's
"randomized" with 2, 4, 8 and 16 power iterations. `auto` marks what titan_hd chooses by itself.

Synthetic weights: W = U diag(s) V^T with U, V Haar-distributed (QR of Gaussian matrices) and, for m = min(out, in),
s_i = (1 - i / m) + 8 (i + 1)^-0.6 for i = 0 .. m - 1: the straight slope is the bulk that a random initialisation
leaves, the power law the few strong directions that training adds. No gap anywhere near n, as in trained weights; a
gap would flatter the randomized algorithm.

Reported per algorithm: median seconds over interleaved repetitions and the ratio to the fp32 SVD, elapsed and in
processor time (which other programs on a busy machine disturb least); captured energy, the
share of ||W||^2 in the n directions; `product error`, ||B A - best rank-n product|| / ||best||, both in Frobenius norm
and the best from a float64 SVD; `orthogonality`, the largest cosine between two directions. Expected: exact no slower
than the fp32 SVD and closer to float64; randomized much cheaper where n is far below min(out, in), its product error
falling with niter, its captured energy right to a few digits long before.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open

from benchmarks import common
from titan_hd.adapters.svd import SvdSettings, captured_energy, orthogonality_error, principal_factors
from titan_hd.config.command_line import ToolParser

NITERS = (2, 4, 8, 16)
SIZES = ["512x512", "1024x1024", "2048x1024", "1024x2048", "2048x2048"]
TRUE_8B = ["4096x4096", "1024x4096", "14336x4096", "4096x14336"]  # [out, in] of q/o, k/v, gate/up, down

Factors = tuple[torch.Tensor, torch.Tensor]


def synthetic_weight(out: int, width: int, device: torch.device) -> torch.Tensor:
    """[out, width] fp32 with the spectrum that the head of this file states."""
    generator = torch.Generator().manual_seed(out * 100003 + width)
    m = min(out, width)
    i = torch.arange(m, dtype=torch.float64)
    s = (1 - i / m) + 8 * (i + 1) ** -0.6
    u, v = (
        torch.linalg.qr(torch.randn(rows, m, generator=generator, dtype=torch.float64).to(device))[0]
        for rows in (out, width)
    )
    return ((u * s.to(device)) @ v.T).float()


def real_weights(directory: Path, device: torch.device, limit: int) -> dict[str, torch.Tensor]:
    """The first linear layer of each shape, by name; embeddings are left out."""
    found: dict[tuple[int, ...], tuple[str, torch.Tensor]] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys()):
                shape = tuple(file.get_slice(name).get_shape())
                linear = len(shape) == 2 and "embed" not in name and "lm_head" not in name
                if linear and shape not in found and len(found) < limit:
                    found[shape] = name, file.get_tensor(name).float().to(device)
    if not found:
        raise SystemExit(f"--hf-dir: no linear weight in {directory}/*.safetensors")
    return {f"{name} {'x'.join(map(str, shape))}": weight for shape, (name, weight) in found.items()}


def full_svd(w: torch.Tensor, count: int) -> Factors:
    """The first directions from torch.linalg.svd in w's dtype, as A = S^1/2 V^T, B = U S^1/2."""
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    root = s[:count].sqrt()
    return vh[:count] * root[:, None], u[:, :count] * root


def reference(w: torch.Tensor, count: int) -> Factors:
    """From a float64 SVD; a QR decomposition first makes it affordable where one side is much the longer."""
    if w.shape[0] < w.shape[1]:
        a, b = reference(w.T, count)
        return b.T, a.T
    q, r = torch.linalg.qr(w.double())
    a, b = full_svd(r, count)
    return a, q @ b


def product_error(got: Factors, best: Factors) -> float:
    """||B A - B* A*|| / ||B* A*|| (Frobenius), in float64."""
    want = best[1] @ best[0]
    return ((got[1].double() @ got[0].double() - want).norm() / want.norm()).item()


def algorithms(w: torch.Tensor, count: int) -> dict[str, Callable[[], Factors]]:
    settings = {"exact": SvdSettings("exact")}
    settings |= {f"randomized {niter}": SvdSettings("randomized", niter) for niter in NITERS}
    ours = {name: (lambda s=s: principal_factors(w, count, s)) for name, s in settings.items()}
    return {"svd fp32": lambda: full_svd(w, count), **ours}


def measure(w: torch.Tensor, count: int, repetitions: int) -> dict[str, dict]:
    count = min(count, *w.shape)
    best, runs = reference(w, count), algorithms(w, count)
    results: dict[str, dict] = {}
    for name, run in runs.items():  # the warm-up, too
        a, b = run()
        results[name] = {
            "energy": captured_energy(w, a),
            "product_error": product_error((a, b), best),
            "orthogonality": orthogonality_error(a, b),
        }
    timing = common.interleave(runs, w.device, repetitions, warmup=0)
    for name, result in results.items():
        result["seconds"] = common.medians(timing.wall)[name]
        result["ratio"] = common.median_ratio(timing.wall, name, "svd fp32")
        result["ratio_cpu"] = common.median_ratio(timing.cpu, name, "svd fp32")
    return results


def report(label: str, shape: torch.Size, count: int, results: dict[str, dict]) -> None:
    count = min(count, *shape)
    defaults = SvdSettings("auto")
    chosen = defaults.resolve(shape, count)
    chosen += f" {defaults.niter}" if chosen == "randomized" else ""
    print(f"\n{label}, n = {count}; auto takes {chosen}\n")
    rows = [
        [
            name,
            f"{r['seconds']:.3f}",
            f"{r['ratio']:.2f}",
            f"{r['ratio_cpu']:.2f}",
            f"{r['energy']:.6f}",
            f"{r['product_error']:.1e}",
            f"{r['orthogonality']:.0e}",
        ]
        for name, r in results.items()
    ]
    columns = ["algorithm", "seconds", "x svd fp32", "CPU time", "captured energy", "product error", "orthogonality"]
    common.print_table(columns, rows)


def weights(args: argparse.Namespace, device: torch.device) -> dict[str, Callable[[], torch.Tensor]]:
    """Label -> how to get the weight: one at a time is held."""
    if args.hf_dir:
        real = real_weights(args.hf_dir, device, args.limit)
        return {name: (lambda w=w: w) for name, w in real.items()}
    sizes = [tuple(map(int, label.split("x"))) for label in (TRUE_8B if args.true_8b else args.sizes)]
    return {f"{out}x{width}": (lambda s=(out, width): synthetic_weight(*s, device)) for out, width in sizes}


def parse_args() -> argparse.Namespace:
    parser = ToolParser(__doc__)
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="OUTxIN ...")
    parser.add_argument("--count", type=int, default=128, help="n = K * r directions")
    parser.add_argument("--hf-dir", type=Path, help="a directory with *.safetensors")
    parser.add_argument("--limit", type=int, default=8, help="weights to take from --hf-dir, one of each shape")
    parser.add_argument("--true-8b", action="store_true", help="the shapes of Llama-3.1-8B")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=3)
    return parser.parse_args()


def main() -> None:
    args, device = parse_args(), common.pick_device()
    torch.set_num_threads(args.threads)
    env = common.environment(device, args.threads)
    common.print_header("bench_svd", env)
    everything = {}
    for label, make in weights(args, device).items():
        weight = make()
        everything[label] = measure(weight, args.count, args.repetitions)
        report(label, weight.shape, args.count, everything[label])
    common.print_json("svd", env, {"settings": {**vars(args), "hf_dir": str(args.hf_dir)}, "weights": everything})


if __name__ == "__main__":
    main()
