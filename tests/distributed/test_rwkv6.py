"""Whole runs of an RWKV-6: every method, the float64 reference, documents in one row, and what its memory will be."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from tests.kit import dense_reference, oracle, runs, rwkv
from titan_hd.adapters.methods import METHODS
from titan_hd.components.flops import flops_per_token
from titan_hd.config.manager import ConfigError, load
from titan_hd.fitting import estimate_run
from titan_hd.models.registry import build_model, flavor_config, read_hf_config
from titan_hd.preflight import plan_run, update_plan

# Other orders of the same fp32 sums, which Adam divides by their own size; the decoder's tests have the same.
LOSS_TOLERANCE = 1e-5
DELTA_TOLERANCE = 1e-3
KINDS = {"receptance", "key", "value", "gate", "output"}
STEPS = 2
QUICK = ("hdpissa", "bat")


@pytest.fixture
def argv(tmp_path: Path):
    """Options of a run of two steps of a method."""
    rwkv.write_model(tmp_path / "model")
    runs.write_records(tmp_path / "records.jsonl", count=20)

    def options(name: str, dump: str, **overrides):
        values = {"adapter__method": name, "training__global_batch_size": 8, "training__steps": STEPS} | overrides
        return runs.options(tmp_path / "model", tmp_path / "records.jsonl", tmp_path / dump, **values)

    return options


FORMS = [(name, {}) for name in METHODS] + [("bat", {"adapter__bat_form": "row"})]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        pytest.param(
            *form, id="-".join([form[0], *form[1].values()]), marks=[pytest.mark.slow] * (form[0] not in QUICK)
        )
        for form in FORMS
    ],
)
def test_every_method_trains_resumes_and_exports(name: str, changes: dict, argv, workers, tmp_path: Path):
    """Two workers, of whom one has the whole of a vector's single row; W moves, and nothing but what is targeted."""
    losses = workers.run(2, runs.train, argv(name, "whole", **changes))[0]
    whole, start = runs.exported(tmp_path / "whole"), load_file(tmp_path / "model" / "model.safetensors")
    moved = {key for key in start if not torch.equal(start[key], whole[key])}
    linear = {f"rwkv.blocks.{i}.{part}.weight" for i in range(2) for part in PATHS}
    assert moved == set(start) if METHODS[name].base == "trained" else moved == linear
    saved = {"checkpoint__enable": "true", "hdpissa__num_adapters": 2 if METHODS[name].folds else 0, **changes}
    first = workers.run(2, runs.train, argv(name, "stopped", **saved), stop_after=1)[0]
    second = workers.run(1, runs.train, argv(name, "stopped", **saved))[0]
    assert first + second == pytest.approx(losses, rel=LOSS_TOLERANCE)


PATHS = list(flavor_config("rwkv6", "3B").linear_shapes())


def test_hdpissa_is_the_reference(argv, workers, tmp_path: Path):
    """Two workers against the equations of RWKV-6 and of HD-PiSSA in float64."""
    config, start = rwkv.write_model(tmp_path / "model")
    records = runs.write_records(tmp_path / "records.jsonl", count=20)
    losses = workers.run(2, runs.train, argv("hdpissa", "dump", hdpissa__num_adapters=2))[0]
    settings = oracle.Settings(2, 1, 8, lrs=[1e-2] * STEPS, targets=tuple(KINDS))
    with mock.patch.object(oracle, "forward", rwkv.forward):
        want, want_losses = oracle.train(start, config, records, settings)
    errors = runs.delta_error(runs.exported(tmp_path / "dump"), want, start)
    assert len(errors) == len(PATHS) * config["num_hidden_layers"]
    assert max(errors.values()) < DELTA_TOLERANCE, errors
    assert losses == pytest.approx(want_losses, rel=LOSS_TOLERANCE)


def test_bats_row_form_is_the_reference(argv, workers, tmp_path: Path):
    """peft has the column form alone; blocks of 2, so that the channel mix has an even number of channels here."""
    config, start = rwkv.write_model(tmp_path / "model", intermediate_size=38)
    records = runs.write_records(tmp_path / "records.jsonl", count=20)
    losses = workers.run(2, runs.train, argv("bat", "dump", adapter__bat_form="row", adapter__rank=2))[0]
    batches = [records[:8], records[8:16]]
    starts = {n: torch.zeros(w.shape[1] // 2, 2, 2) for n, w in start.items() if n.split(".")[-2] in KINDS}
    with mock.patch.object(oracle, "forward", rwkv.forward):
        want_losses, want = dense_reference.train(start, config, batches, 1e-2, starts, dense_reference.bat_row_change)
    errors = runs.delta_error(runs.exported(tmp_path / "dump"), want, start)
    assert len(errors) == len(PATHS) * config["num_hidden_layers"]
    assert max(errors.values()) < DELTA_TOLERANCE, errors
    assert losses == pytest.approx(want_losses, rel=LOSS_TOLERANCE)


@pytest.mark.parametrize("method", ["hdpissa", pytest.param("bone", marks=pytest.mark.slow)])
def test_packed_compiled_and_recomputed(method: str, argv, workers):
    """Documents in one row, traced blocks and selective checkpointing change no loss."""
    packed = {
        "data__pack": "true",
        "training__seq_len": 40,
        "training__global_batch_size": 2,
        "export__enable": "false",
    }
    plain = workers.run(1, runs.train, argv(method, "plain", **packed))[0]
    wrapped = {"compile__enable": "true", "activation_checkpoint__mode": "selective"}
    assert workers.run(1, runs.train_traced, argv(method, "wrapped", **packed, **wrapped))[0] == pytest.approx(
        plain, rel=LOSS_TOLERANCE
    )


def answers(argv: list[str], question: torch.Tensor) -> torch.Tensor:
    """Trains, and then the logits of the model as it was trained."""
    run = runs.trainer(argv)
    run.train()
    run.close()
    with torch.no_grad():
        return run.model.eval()(question).clone()


@pytest.mark.parametrize(
    "method", ["lora", *(pytest.param(m, marks=pytest.mark.slow) for m in ("pissa", "bone", "bat"))]
)
def test_peft_puts_the_adapter_onto_the_layers(method: str, argv, workers, tmp_path: Path):
    """Onto the plain modules of the base model, whose names are the Hub's; `key` is in both mixes."""
    peft = pytest.importorskip("peft")
    question = torch.arange(40).view(2, 20)
    rank = 1 if method == "bat" else 2  # of 37 rows bat cuts no blocks of 2
    settings = {"export__format": "peft", "adapter__target_modules": "key,attention.output", "adapter__rank": rank}
    ours = workers.run(2, answers, argv(method, "run", **settings), question)[0]
    base = build_model(read_hf_config(tmp_path / "model"))
    base.load_state_dict(load_file(tmp_path / "model" / "model.safetensors"))
    folder = str(tmp_path / "run" / "hf")
    model = peft.inject_adapter_in_model(peft.PeftConfig.from_pretrained(folder), base).eval()
    untrained = model(question).detach()
    result = peft.set_peft_model_state_dict(model, peft.utils.load_peft_weights(folder, device="cpu"))
    assert not result.unexpected_keys
    with torch.no_grad():
        theirs = model(question)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    assert not torch.allclose(theirs, untrained, rtol=0, atol=1e-3)


def published(*more: str):
    fixed = ("--data.train=none.jsonl", "--adapter.rank=64", "--training.steps=1")
    return load(["--model.name=rwkv6", "--model.flavor=3B", *fixed, *more])


@pytest.mark.parametrize("method", ["bone", "hdpissa"])
def test_what_a_run_will_need_is_known_before(method: str):
    """Of the published 3B: memory, the plan of the update, operations; the state does not grow with the length."""
    plan = plan_run(published(f"--adapter.method={method}"), 8, needs_files=False, device_type="cuda")
    estimate = estimate_run(plan, "cuda")
    assert 3.0e9 < 8 * estimate.held["weights"] / plan.untouched.itemsize < 13e9
    assert estimate.total < 80e9
    if method == "hdpissa":
        names = [weight.name for weight in update_plan(plan.config, plan).weights]
        assert names == list(plan.decoder.linear_layers())
    assert flops_per_token(plan.decoder, 4096, 0, 0) == flops_per_token(plan.decoder, 1, 0, 0)


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--parallelism.tensor_parallel_degree=2", "rwkv6 models have no tensor parallelism; set it to 1"),
        ('--adapter.target_modules=["q_proj"]', "'q_proj' is no linear layer; there are attention.receptance, "),
    ],
)
def test_what_it_has_not_is_refused_by_name(option: str, says: str):
    with pytest.raises(ConfigError) as caught:
        plan_run(published(option), 2, needs_files=False, device_type="cpu")
    assert says in str(caught.value)


def test_targets_are_ends_of_names():
    plan = plan_run(published('--adapter.target_modules=["key", "attention.value"]'), 1, False, "cpu")
    names = [weight.name for weight in update_plan(plan.config, plan).weights]
    assert names[:3] == [f"rwkv.blocks.0.{path}" for path in ("attention.key", "attention.value", "feed_forward.key")]
    assert len(names) == 3 * 32
