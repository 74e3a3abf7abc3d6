"""Packed training is training on the same documents unpacked: losses and weights, against that and against float64."""

from __future__ import annotations

import json
from unittest import mock

import numpy as np
import pytest

from tests import oracle, runs
from titan_hd.data.loader import Batch, GlobalBatches, collate
from titan_hd.data.order import PackOrder

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
        return collate([self.records[int(record)] for pack in packs for record in pack], self.pad_to)

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


@pytest.mark.parametrize("changes", [{"mode": "full"}, {"mode": "selective"}, {"mode": "selective", "compile": "true"}])
def test_checkpointing_and_compilation_change_nothing(changes: dict[str, str], workers, setup, tmp_path):
    (plain,) = workers.run(1, runs.train, setup("plain"))
    wrapped = {"activation_checkpoint__mode": changes["mode"], "compile__enable": changes.get("compile", "false")}
    (losses,) = workers.run(1, runs.train, setup("wrapped", **wrapped))
    assert losses == pytest.approx(plain, rel=LOSS_TOLERANCE)
    start, want = runs.load_file(tmp_path / "model" / "model.safetensors"), runs.exported(tmp_path / "plain")
    assert max(runs.delta_error(runs.exported(tmp_path / "wrapped"), want, start).values()) < DELTA_TOLERANCE


def test_resumed_twice_and_tokens_are_real_ones(workers, setup, tmp_path):
    """On two workers, on one, on four; the rates count tokens, not padding: as many as the records have."""
    changes = {"training__steps": 6, "checkpoint__enable": "true"}
    whole = workers.run(2, runs.train, setup("whole", **changes))[0]
    first = workers.run(2, runs.train, setup("r", **changes), stop_after=2)[0]
    second = workers.run(1, runs.train, setup("r", **changes), stop_after=2)[0]
    third = workers.run(4, runs.train, setup("r", **changes))[0]
    assert first + second + third == pytest.approx(whole, rel=LOSS_TOLERANCE)
    for change in ({"data__pack": "false"}, {"training__seq_len": 40}):
        with pytest.raises(RuntimeError, match=r"(data\.pack|training\.seq_len): the checkpoint has"):
            workers.run(2, runs.train, setup("r", **changes | change))
    logged = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    records = runs.write_records(tmp_path / "records.jsonl", count=40)
    order = PackOrder(np.array([len(r["input_ids"]) for r in records]), SEQ_LEN, True, 42, 40)
    for step, line in enumerate(logged):
        documents = [records[i] for place in range(8) for i in order.sample(step * 8 + place)]
        tokens = sum(len(d["input_ids"]) for d in documents)
        assert line["tokens_per_second"] * line["step_seconds"] == pytest.approx(tokens)
