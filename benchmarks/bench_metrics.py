"""How near the estimates of `metrics.update_freq` come: one layer's norm and effective rank against the true ones.

    python -m benchmarks.bench_metrics
    python -m benchmarks.bench_metrics --vectors 8 128 --draws 100

For changes dW with known singular values: mean +- standard deviation over independent draws of the random vectors, over
the true value. The vectors' distribution is the same in every orthonormal basis, so dW may be diagonal.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks import common
from titan_hd.components.sketch import effective_rank, product, random_vectors, square_norm
from titan_hd.config.command_line import ToolParser

SIZE = 256
_K = torch.arange(1, SIZE + 1, dtype=torch.float64)
SPECTRA = {
    "1": (_K <= 1).double(),
    "8 equal": (_K <= 8).double(),
    f"{SIZE} equal": torch.ones_like(_K),
    f"k^-1/2, k = 1 to {SIZE}": _K**-0.5,
    f"1/k, k = 1 to {SIZE}": 1 / _K,
}


def relative(spectrum: torch.Tensor, vectors: int, draws: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Estimates over true values, [draws] each: of the effective rank, and of the norm."""
    energies = spectrum.square()
    rank = energies.sum().square() / energies.square().sum()
    ranks, norms = [], []
    for seed in range(draws):
        products, _ = product(torch.diag(spectrum), random_vectors(SIZE, vectors, seed))
        gram = products.T @ products
        ranks.append(effective_rank(gram) / rank)
        norms.append((square_norm(gram) / energies.sum()).sqrt())
    return torch.stack(ranks), torch.stack(norms)


def main() -> None:
    args = parse_args()
    env = common.environment(torch.device("cpu"), torch.get_num_threads())
    common.print_header(f"estimates of effective rank and norm over the true ones, {args.draws} draws", env)
    rows, results = [], {}
    for name, spectrum in SPECTRA.items():
        energies = spectrum.square()
        row = [name, f"{(energies.sum().square() / energies.square().sum()).item():.3g}"]
        for vectors in args.vectors:
            pairs = [(e.mean().item(), e.std().item()) for e in relative(spectrum, vectors, args.draws)]
            row.append(", ".join(f"{mean:.2f} +- {deviation:.2f}" for mean, deviation in pairs))
            results[f"{name}, p = {vectors}"] = dict(zip(("rank", "norm"), pairs))
        rows.append(row)
    columns = ["singular values of dW", "its effective rank"]
    common.print_table([*columns, *(f"p = {vectors}: rank, norm" for vectors in args.vectors)], rows)
    common.print_json("metrics", env, results)


def parse_args() -> argparse.Namespace:
    parser = ToolParser(__doc__)
    parser.add_argument("--vectors", type=int, nargs="+", default=[16, 32, 64], help="metrics.update_vectors, p")
    parser.add_argument("--draws", type=int, default=1000)
    return parser.parse_args()


if __name__ == "__main__":
    main()
