"""What is measured of the weights on shards, against float64 on whole weights: any method, mesh and number of workers.

Estimates are compared twice: with the same formula on whole matrices and the same random vectors, to rounding; and with
a full decomposition, as far as so few vectors go.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest

from tests.kit import oracle, runs
from titan_hd.components.sketch import random_vectors

KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONFIG = {"num_key_value_heads": 2, "intermediate_size": 38}  # which tensor parallelism needs
K, STEPS, VECTORS = 4, 3, 64
# Between meshes dW differs by the rounding of fp32, which Adam makes larger in a first step: where a gradient is next
# to zero, its step is as long as any other and has the rounding's sign. (test_trajectory.py allows 1e-3 of a weight's
# change, which here is taken twice, of dW and of the step.)
TOLERANCE = 2e-3
# Of shares of energy that are zero but for rounding, such as all of them where dW is: squares of 1e-3.
NOTHING = 1e-6
# 64 vectors, two layers of a kind: the estimate of a norm is off by sqrt(2 / (64 * 2 * rank)) / 2, rank 1 to 8. A norm
# may be off by three of these for rank 1, a share of energy, whose two parts go up and down together, by two. A rank
# is off by 0.16 / sqrt(2) where the spectrum decays (docs/metrics.md): three to four of these.
OF_THE_NORM, OF_THE_RANK, OF_THE_ENERGY = 0.2, 0.4, 0.12
# Sums of fp32 products over a backward pass, against float64; nothing is divided by a small number.
OF_A_GRADIENT = 1e-4

MESHES = {
    "one": (1, {}),
    "two": (2, {}),
    "four": (4, {}),
    "replicas": (4, {"parallelism__data_parallel_replicate_degree": 2}),
    "tp": (2, {"parallelism__tensor_parallel_degree": 2}),
    "tp-shards": (4, {"parallelism__tensor_parallel_degree": 2}),
}
METHODS = {
    "hdpissa": {"hdpissa__num_adapters": K, "training__max_norm": 0.05},
    "shared": {"hdpissa__num_adapters": 2},  # on four workers two share an adapter
    "all": {"hdpissa__num_adapters": K, "hdpissa__samples": "all"},
    "top": {"hdpissa__num_adapters": K, "hdpissa__slices": "top"},
    "lora": {"adapter__method": "lora", "adapter__rank": 2},
    "pissa": {"adapter__method": "pissa", "adapter__rank": 2},
    "full": {"adapter__method": "full"},
}
CASES = [("hdpissa", "tp-shards"), ("shared", "replicas"), ("lora", "two")]
SLOW = [
    *(("hdpissa", mesh) for mesh in MESHES if mesh != "tp-shards"),
    *(("shared", "four"), ("shared", "tp-shards"), ("all", "two"), ("top", "two"), ("top", "one")),
    *(("lora", "tp"), ("pissa", "two"), ("full", "two"), ("full", "tp-shards")),
]
ALL = [pytest.param(*case, id="-".join(case)) for case in CASES] + [
    pytest.param(*case, id="-".join(case), marks=pytest.mark.slow) for case in SLOW
]


def argv(folder: Path, name: str, steps: int, **changes) -> list[str]:
    if not (folder / "records.jsonl").exists():
        runs.write_records(folder / "records.jsonl")
        runs.write_model(folder / "model", **CONFIG)
    base = {"training__global_batch_size": 8, "training__steps": steps, "metrics__update_vectors": VECTORS}
    return runs.options(folder / "model", folder / "records.jsonl", folder / name, **{**base, **changes})


def measured(dump: Path) -> dict[int, dict[str, float]]:
    """The records of changes by step."""
    records = map(json.loads, (dump / "metrics.jsonl").read_text().splitlines())
    records = [record for record in records if "update_size/q_proj" in record]
    assert all(record.pop("measure_seconds") > 0 for record in records)
    return {record.pop("step"): record for record in records}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("changes")


@pytest.fixture(scope="module")
def whole_weights(folder: Path, workers):
    """weights(method) -> W at the start, before the last step, and after it: by name, float64, of one worker."""

    @functools.cache
    def weights(method: str) -> list[dict[str, np.ndarray]]:
        found = []
        for steps in (STEPS - 1, STEPS):
            name = f"{method}-{steps}"
            workers.run(1, runs.train, argv(folder, name, steps, **METHODS[method]))
            found.append(runs.exported(folder / name))
        start = runs.load_file(folder / "model" / "model.safetensors")
        return [{name: w.double().numpy() for name, w in part.items()} for part in (start, *found)]

    return weights


def expected(kind: str, start: dict, before: dict, after: dict, directions: int, exactly: bool) -> dict[str, float]:
    """The metrics of a kind of layer. exactly: by norms and singular values, else by the estimates' formulas."""
    sums, ranks = np.zeros(6), []
    for name in (name for name in start if name.endswith(f"{kind}.weight")):
        delta, step = after[name] - start[name], after[name] - before[name]
        u, _, vh = np.linalg.svd(start[name])
        left, right = u[:, :directions] @ u[:, :directions].T, vh[:directions].T @ vh[:directions]
        omega = np.eye(delta.shape[1]) if exactly else random_vectors(delta.shape[1], VECTORS, 42).numpy()
        count = 1 if exactly else VECTORS
        square = lambda x, omega=omega, count=count: np.sum((x @ omega) ** 2) / count  # noqa: E731
        in_right, beside = delta @ right, delta - delta @ right
        sums += (
            *(square(step), square(delta), np.sum(after[name] ** 2)),
            *(square(left @ in_right), square(in_right) + square(left @ beside), square(in_right) + square(beside)),
        )
        if exactly:
            energies = np.linalg.svd(delta, compute_uv=False) ** 2
            ranks.append(energies.sum() ** 2 / np.sum(energies**2))
        else:
            gram = (delta @ omega).T @ (delta @ omega)
            diagonal = np.diag(gram)
            pairs = diagonal.sum() ** 2 - np.sum(diagonal**2)
            ranks.append(pairs / (np.sum(gram**2) - np.sum(diagonal**2)))
    step, change, weight, core, inside, energy = sums
    values = {
        f"update_size/{kind}": (step / weight) ** 0.5,
        f"weight_change/{kind}": (change / weight) ** 0.5,
        f"effective_rank/{kind}": np.mean(ranks),
    }
    if directions:
        values |= {f"energy_core/{kind}": core / energy, f"energy_inside/{kind}": inside / energy}
    return values


@pytest.mark.parametrize(("method", "mesh"), ALL)
def test_against_whole_weights(method: str, mesh: str, workers, whole_weights, folder: Path):
    size, changes = MESHES[mesh]
    name = f"{method}-{mesh}"
    changes = {**changes, **METHODS[method], "metrics__update_freq": 1, "export__enable": "false"}
    workers.run(size, runs.train, argv(folder, name, STEPS, **changes))
    records = measured(folder / name)
    if "hdpissa__num_adapters" in METHODS[method]:
        check_slices(records[1], method, folder)
    directions = {"hdpissa": K, "shared": 2, "all": K, "top": 1}.get(method, 0)
    found = {key: value for key, value in records[3].items() if not key.startswith("slice_grad_norm")}
    for kind in KINDS:
        same = expected(kind, *whole_weights(method), directions, exactly=False)
        assert {key: found.pop(key) for key in same} == pytest.approx(same, rel=TOLERANCE, abs=NOTHING)
        true = expected(kind, *whole_weights(method), directions, exactly=True)
        for key, value in true.items():
            quantity = key.partition("/")[0]
            if quantity.startswith("energy"):
                assert abs(same[key] - value) < OF_THE_ENERGY, (key, same[key], value)
            else:
                allowed = OF_THE_RANK if quantity == "effective_rank" else OF_THE_NORM
                assert abs(same[key] / value - 1) < allowed, (key, same[key], value)
    assert found == {}, "there is nothing else"


def check_slices(found: dict[str, float], method: str, folder: Path) -> None:
    """The gradients' norms of a first step, before clipping, are those of the equations."""
    adapters = METHODS[method]["hdpissa__num_adapters"]
    weights = {n: w.double() for n, w in runs.load_file(folder / "model" / "model.safetensors").items()}
    records = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()][:8]
    names = [n for n in weights if n.split(".")[-2] in oracle.LINEARS]
    factors = oracle.fixed_factors(weights, names, oracle.Settings(adapters, 1, 8, [0.0], slices=slices_of(method)))
    for i in range(adapters):
        share = records if method == "all" else records[i * 8 // adapters : (i + 1) * 8 // adapters]
        gradients, _, _ = oracle.token_mean_gradients(weights, {**runs.ODD, **CONFIG}, share, names)
        squares = 0.0
        for n in names:
            a, b = factors[n, i]
            squares += (gradients[n] @ a.T).square().sum().item() + (b.T @ gradients[n]).square().sum().item()
        assert found[f"slice_grad_norm/{i}"] == pytest.approx(squares**0.5, rel=OF_A_GRADIENT)
    assert sum(key.startswith("slice_grad_norm") for key in found) == adapters


def slices_of(method: str) -> str:
    return METHODS[method].get("hdpissa__slices", "orthogonal")


@pytest.mark.parametrize("method", ["hdpissa", pytest.param("pissa", marks=pytest.mark.slow)])
def test_a_resumed_run_measures_the_same(method: str, workers, folder: Path):
    """Bit for bit, though the base model's products are made anew; and changes count from the start of the run. Every
    third step is measured, and the last one."""
    both = {"metrics__update_freq": 3, "checkpoint__enable": "true", "export__enable": "false"}
    whole = argv(folder, f"whole-{method}", 4, **METHODS[method], **both)
    workers.run(2, runs.train, whole)
    parts = argv(folder, f"parts-{method}", 4, **METHODS[method], **both)
    workers.run(2, runs.train, [*parts, "--checkpoint.interval=2"], stop_after=2)
    workers.run(2, runs.train, parts)
    one, other = measured(folder / f"whole-{method}"), measured(folder / f"parts-{method}")
    assert list(one) == [3, 4]
    assert one == other


@pytest.mark.slow
def test_without_directions_of_the_start(workers, folder: Path):
    """Slices that are taken anew, and random ones: there is no energy inside of them to speak of."""
    for changes in ({"hdpissa__refresh_steps": 2}, {"hdpissa__slices": "random"}):
        changes = {**METHODS["hdpissa"], **changes, "metrics__update_freq": 3, "export__enable": "false"}
        name = f"without-{len(list(folder.iterdir()))}"
        workers.run(1, runs.train, argv(folder, name, STEPS, **changes))
        found = measured(folder / name)[3]
        assert {key.partition("/")[0] for key in found} == {
            *("update_size", "weight_change", "effective_rank", "slice_grad_norm")
        }


def test_slices_that_were_taken_anew_are_not_those_of_the_start(workers, folder: Path):
    """Nor for the run that goes on from the one that went on with them."""
    changes = {**METHODS["hdpissa"], "metrics__update_freq": 1, "export__enable": "false", "checkpoint__enable": "true"}
    workers.run(1, runs.train, argv(folder, "anew", 6, **changes, hdpissa__refresh_steps=2), stop_after=3)
    kept = argv(folder, "anew", 6, **changes, checkpoint__allow_mismatch='["hdpissa.refresh_steps"]')
    for steps in (1, None):
        workers.run(1, runs.train, kept, stop_after=steps)
    found = measured(folder / "anew")
    assert found.keys() == {5, 6}
    assert not any(key.startswith("energy") for record in found.values() for key in record)
