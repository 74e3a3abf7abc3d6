"""Compiled blocks: a handful of graphs of static shapes, whatever else a run does."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch._dynamo.utils import counters

from tests.kit import runs

LENGTHS = [60, 20, 100, 130, 64, 65, 190, 30]  # rows of 64, 128 and 192 positions


def graphs_and_shapes(argv: list[str]) -> tuple[int, set[tuple], list[float]]:
    """Number of graphs that a run compiles, the shapes of their floating-point inputs, and the losses."""
    shapes = set()

    def record(graph, inputs):
        shapes.update(tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor) and x.dim() == 3)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    counters.clear()
    with mock.patch.object(torch, "compile", functools.partial(torch.compile, backend=record)):
        losses = runs.train(argv)
    return counters["stats"]["unique_graphs"], shapes, losses


def test_one_graph_for_each_length_and_none_for_validation(workers, tmp_path: Path):
    """The first block, whose input needs no gradient, has graphs of its own: 3 lengths x 2. Before the first step the
    validation runs on rows of another number and other lengths; then it runs between steps."""
    runs.write_model(tmp_path / "model", num_hidden_layers=3, max_position_embeddings=256)
    records = [{"input_ids": ids, "labels": ids} for n in LENGTHS for ids in [[i * 7 % 50 for i in range(n)]]]
    for name, kept in (("train", records), ("validation", records[2:7])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))
    changes = {"training__seq_len": 200, "training__steps": 9, "training__global_batch_size": 1}
    changes |= {"validation__enable": "true", "validation__freq": 2, "validation__batch_size": 3}
    changes |= {"data__validation": tmp_path / "validation.jsonl", "hdpissa__num_adapters": 1}
    options = functools.partial(runs.options, tmp_path / "model", tmp_path / "train.jsonl", **changes)
    plain = workers.run(1, runs.train, options(tmp_path / "plain"))[0]
    graphs, shapes, losses = workers.run(1, graphs_and_shapes, options(tmp_path / "compiled", compile__enable="true"))[
        0
    ]
    assert graphs == 6
    assert {shape[1] for shape in shapes if shape[0] == 1 and shape[2] == 22} == {64, 128, 192}
    assert all(isinstance(size, int) for shape in shapes for size in shape), "a size is symbolic"
    assert losses == pytest.approx(plain, rel=1e-4)
    lines = map(json.loads, (tmp_path / "compiled" / "metrics.jsonl").read_text().splitlines())
    shares = [line["padding_share"] for line in lines if "padding_share" in line]
    rows = [next(n for n in (64, 128, 192, 200) if n >= length) for length in [*LENGTHS, LENGTHS[0]]]
    assert shares == pytest.approx([1 - n / row for n, row in zip([*LENGTHS, LENGTHS[0]], rows)])
