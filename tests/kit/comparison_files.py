"""A comparison's folder with made-up runs: what tools/compare reports on, without training anything.

python -m tests.kit.comparison_files FOLDER     writes one, to look at its figures
"""

from __future__ import annotations

import csv
import json
import math
import random
import sys
from pathlib import Path

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
# Name -> the rate it likes best, its validation loss there, its trained parameters and moments.
ARMS = {
    "lora": (6e-3, 0.030, 97_280, 194_560),
    "lora+rank=64": (6e-3, 0.0085, 778_240, 1_556_480),
    "pissa": (5e-3, 0.018, 97_280, 194_560),
    "pissa+rank=64": (3e-3, 0.011, 778_240, 1_556_480),
    "hdpissa": (3e-3, 0.040, 778_240, 194_560),
    "hdpissa+slices=top": (3e-3, 0.047, 778_240, 194_560),
    "hdpissa+slices=random": (4e-3, 0.080, 778_240, 194_560),
    "hdpissa+num_adapters=1+rank=64": (4e-3, 0.012, 778_240, 194_560),
    "dora": (5e-3, 0.028, 101_000, 202_000),
    "mora": (6e-3, 0.026, 95_240, 190_480),
    "hira": (2e-2, 0.110, 97_280, 194_560),
    "bone": (2e-3, 0.021, 96_000, 192_000),
    "bat": (2e-3, 0.019, 102_400, 204_800),
    "full": (1e-3, 0.0126, 1_049_984, 2_099_968),
    "hdpissa+samples=all": (4e-3, 0.013, 778_240, 194_560),
    "lora+rslora=true+rank=64": (3e-3, 0.0088, 778_240, 1_556_480),
}
FAILING = {("full", 1e-2): "out_of_memory", ("dora", 3e-4): "failed"}


def write_comparison(folder: Path, arms: int = len(ARMS), seeds: int = 3, steps: int = 60) -> None:
    """The first `arms` of ARMS, at every rate with seed 1, at the best rate and its neighbours with all seeds.

    Rates far above the best diverge. The same arguments give the same bytes.
    """
    draw = random.Random(1)
    grid: list[dict] = []
    losses: list[dict] = []
    for number, (arm, (likes, best, parameters, moments)) in enumerate(list(ARMS.items())[:arms]):
        distances = [abs(math.log10(rate / likes)) for rate in RATES]
        near = distances.index(min(distances))
        for place, rate in enumerate(RATES):
            for seed in range(1, 1 + (seeds if abs(place - near) <= 1 else 1)):
                run = {"arm": arm, "optimizer.lr": f"{rate:g}", "seed": seed, "status": "complete", "rank": 8}
                run |= {"num_adapters": 8 if arm.startswith("hdpissa") else "", "trained_parameters": parameters}
                run |= {"moments_per_worker": moments, "exchange_gb": parameters * 4e-9}
                grid.append(run)
                if (arm, rate) in FAILING or rate > 9 * likes:
                    run["status"] = FAILING.get((arm, rate), "diverged")
                    continue
                end = min(1.9, best * 10 ** (1.3 * distances[place] ** 2 + draw.gauss(0, 0.04) + 0.03 * seed))
                run |= _metrics(draw, end, number)
                losses += _losses(draw, run, end, steps)
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / "grid.csv", grid)
    write_csv(folder / "losses.csv", losses)
    said = {"grid": ["optimizer.lr"], "rank_by": "validation_loss", "better": "min", "baseline": "lora"}
    said |= {
        "title": "Made-up runs",
        "edges": {"hira": "its best value lies on the upper edge of what was tried"},
    }
    (folder / "comparison.json").write_text(json.dumps(said), encoding="utf-8")


def write_csv(path: Path, rows: list[dict]) -> None:
    """The columns are those of all rows together; what a row has not is empty."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def _metrics(draw: random.Random, end: float, number: int) -> dict[str, float]:
    seconds = 0.2 + 0.01 * number + draw.uniform(0, 0.01)
    return {
        "loss": end * 1.1,
        "validation_loss": end,
        "validation_exact_match": math.exp(-10 * end),
        "validation_loss/simple": 0.05 + 0.02 * number + draw.gauss(0, 0.005),
        "before:validation_loss": 1.9,
        "before:validation_loss/simple": 0.04,
        "step_seconds": seconds,
        "seconds": seconds * 60,
        "tokens_per_second": 20_000 / seconds,
        "peak_memory_gib": 0.4 + 0.01 * number,
        "dw_above": 8 + number,
        "dw_entropy": 5 + 3.0 * number,
        "dw_stable": 2 + number / 4,
        "dw_relative_norm": 0.1,
    }


def _losses(draw: random.Random, run: dict, end: float, steps: int) -> list[dict]:
    rows = []
    for step in range(1, steps + 1):
        loss = end + 1.9 * math.exp(-6 * step / steps)
        row = {key: run[key] for key in ("arm", "optimizer.lr", "seed")} | {"step": step}
        row |= {"seconds": (step - 1) * run["step_seconds"], "loss": loss * math.exp(draw.gauss(0, 0.15))}
        rows.append(row | {"validation_loss": loss if step % (steps // 6) == 0 else ""})
    return rows


if __name__ == "__main__":
    write_comparison(Path(sys.argv[1]))
