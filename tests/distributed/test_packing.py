"""Packed training is training on the same documents unpacked: losses and weights, against that and against float64."""

from __future__ import annotations

import json
from unittest import mock

import numpy as np
import pytest

from tests.kit import oracle, runs
from titan_hd.components.flops import flops_per_token
from titan_hd.data.loader import Batch, GlobalBatches, collate
from titan_hd.data.order.sample_order import PackOrder
from titan_hd.models.registry import parse_hf_config

# Sums of the same fp32 numbers in another order; relative.
LOSS_TOLERANCE = 1e-5
# Of a weight's change, relative; SGD, so that it is the gradients'. fp32 weights of size 1 change by 1e-2.
DELTA_TOLERANCE = 1e-4
SEQ_LEN, STEPS = 32, 3


@pytest.fixture
def setup(tmp_path):
    runs.write_model(tmp_path / "model")
    runs.write_records(tmp_path / "records.jsonl", count=40)

    def argv(dump: str, method: str = "hdpissa", **overrides):
        values = {
            "data__pack": "true",
            "data__shuffle": "true",
            "training__seq_len": SEQ_LEN,
            "training__global_batch_size": 8,
            "training__steps": STEPS,
            "optimizer__name": "SGD",
            "optimizer__lr": 1.0 if method == "hdpissa" else 0.1,
            **({"hdpissa__num_adapters": 4} if method == "hdpissa" else {"adapter__method": "full"}),
        } | overrides
        return runs.options(tmp_path / "model", tmp_path / "records.jsonl", tmp_path / dump, **values)

    return argv


def train_unpacked(argv: list[str]) -> list[float]:
    """The same run, but that every document of a micro-batch's packs is a row of its own."""

    def unpacked(self: GlobalBatches, part: tuple[int, range]) -> Batch:
        step, places = part
        packs = [self.order.sample(step * self.global_batch_size + place) for place in places]
        assert any(len(pack) > 1 for pack in packs)
        return collate([self.examples[int(record)] for pack in packs for record in pack], self.pad_to)

    with mock.patch.object(GlobalBatches, "__getitem__", unpacked):
        return runs.train(argv)


@pytest.mark.parametrize("method", ["hdpissa", "full"])
def test_packed_equals_unpacked(method: str, workers, setup, tmp_path):
    """Four adapters: the documents of a pack belong to the pack's."""
    (plain,) = workers.run(1, train_unpacked, setup("plain", method))
    start, want = runs.load_file(tmp_path / "model" / "model.safetensors"), runs.exported(tmp_path / "plain")
    for world_size in (1, 2):
        packed = workers.run(world_size, runs.train, setup(f"packed-{world_size}", method))[0]
        assert packed == pytest.approx(plain, rel=LOSS_TOLERANCE)
        errors = runs.delta_error(runs.exported(tmp_path / f"packed-{world_size}"), want, start)
        assert errors
        assert max(errors.values()) < DELTA_TOLERANCE, errors


def test_one_step_equals_the_dense_gradient_in_float64(workers, setup, tmp_path):
    config, weights = runs.write_model(tmp_path / "model")
    records = runs.write_records(tmp_path / "records.jsonl", count=40)
    losses = workers.run(2, runs.train, setup("full", "full", training__steps=1, data__shuffle="false"))[0]
    order = PackOrder(np.array([len(r["input_ids"]) for r in records]), SEQ_LEN, False, 0, len(records))
    documents = [records[i] for position in range(8) for i in order.sample(position)]
    assert 8 < len(documents) < 40
    doubles = {name: w.double() for name, w in weights.items()}
    gradients, total, labels = oracle.token_mean_gradients(doubles, config, documents, list(weights))
    assert losses == pytest.approx([total / labels], rel=LOSS_TOLERANCE)
    want = {name: doubles[name] - 0.1 * gradients[name] for name in weights}
    errors = runs.delta_error(runs.exported(tmp_path / "full"), want, weights)
    assert errors.keys() == weights.keys()
    assert max(errors.values()) < DELTA_TOLERANCE, errors


@pytest.mark.parametrize("method", ["hdpissa", pytest.param("full", marks=pytest.mark.slow)])
def test_with_tensor_parallelism(method: str, workers, setup, tmp_path):
    """The sequence is split between the ranks, in the midst of documents."""
    _, start = runs.write_model(tmp_path / "model", num_key_value_heads=2, intermediate_size=38)
    (plain,) = workers.run(1, runs.train, setup("plain", method))
    split = workers.run(2, runs.train, setup("split", method, parallelism__tensor_parallel_degree=2))[0]
    assert split == pytest.approx(plain, rel=LOSS_TOLERANCE)
    errors = runs.delta_error(runs.exported(tmp_path / "split"), runs.exported(tmp_path / "plain"), start)
    assert max(errors.values()) < DELTA_TOLERANCE, errors


def test_a_mixture_is_packed_anew_for_every_epoch(workers, setup, tmp_path):
    """Several epochs, resumed in their midst on another number of workers."""
    runs.write_records(tmp_path / "other.jsonl", count=30, seed=1)
    sources = [{"path": str(tmp_path / "records.jsonl"), "weight": 0.5}, {"path": str(tmp_path / "other.jsonl")}]
    changes = {"data__train": json.dumps(sources), "training__steps": 8, "checkpoint__enable": "true"}
    whole = workers.run(1, runs.train, setup("whole", **changes))[0]
    first = workers.run(2, runs.train, setup("resumed", **changes), stop_after=5)[0]
    rest = workers.run(1, runs.train, setup("resumed", **changes))[0]
    assert first + rest == pytest.approx(whole, rel=LOSS_TOLERANCE)


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "full"},
        {"mode": "selective"},
        pytest.param({"mode": "selective", "compile": "true"}, marks=pytest.mark.slow),
    ],
)
def test_checkpointing_and_compilation_change_nothing(changes: dict[str, str], workers, setup, tmp_path):
    (plain,) = workers.run(1, runs.train, setup("plain"))
    wrapped = {"activation_checkpoint__mode": changes["mode"], "compile__enable": changes.get("compile", "false")}
    (losses,) = workers.run(1, runs.train, setup("wrapped", **wrapped))
    assert losses == pytest.approx(plain, rel=LOSS_TOLERANCE)
    start, want = runs.load_file(tmp_path / "model" / "model.safetensors"), runs.exported(tmp_path / "plain")
    assert max(runs.delta_error(runs.exported(tmp_path / "wrapped"), want, start).values()) < DELTA_TOLERANCE


def test_resumed_twice_and_tokens_are_real_ones(workers, setup, tmp_path):
    """On two workers, on one, on four; the rates count tokens, not padding: as many as the records have. Attention's
    FLOPs go by the length of records, not of rows."""
    changes = {"training__steps": 6, "checkpoint__enable": "true"}
    whole = workers.run(2, runs.train, setup("whole", **changes))[0]
    first = workers.run(2, runs.train, setup("r", **changes), stop_after=2)[0]
    second = workers.run(1, runs.train, setup("r", **changes), stop_after=2)[0]
    third = workers.run(4, runs.train, setup("r", **changes))[0]
    assert first + second + third == pytest.approx(whole, rel=LOSS_TOLERANCE)
    for change in ({"data__pack": "false"}, {"training__seq_len": 40}):
        with pytest.raises(RuntimeError, match=r"the checkpoint has .* packs of 32 tokens.*, this run"):
            workers.run(2, runs.train, setup("r", **changes | change))
    logged = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    records = runs.write_records(tmp_path / "records.jsonl", count=40)
    order = PackOrder(np.array([len(r["input_ids"]) for r in records]), SEQ_LEN, True, 42, 40)
    decoder = parse_hf_config(runs.ODD, "tests")
    work = 4 * decoder.num_hidden_layers * sum(map(sum, decoder.linear_shapes().values()))  # of rank 1
    for step, line in enumerate(logged):
        documents = [records[i] for place in range(8) for i in order.sample(step * 8 + place)]
        tokens = sum(len(d["input_ids"]) for d in documents)
        assert line["tokens_per_second"] * line["step_seconds"] == pytest.approx(tokens)
        seen = sum(len(d["input_ids"]) ** 2 for d in documents) / tokens
        flops = flops_per_token(decoder, seen, 0, work)
        assert line["tflops_per_worker"] == pytest.approx(line["tokens_per_second"] * flops / 1e12 / 2)
