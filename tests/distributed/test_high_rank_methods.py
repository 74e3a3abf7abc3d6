"""Whole runs of HiRA, Bone, Bat and MoRA: against the peft library where it has the method, else in plain float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from tests.kit import dense_reference, oracle, runs
from titan_hd.adapters.mora import square_size
from titan_hd.seeding import stable_seed

STEPS, BATCH, RATE = 20, 8, 3e-3
# Adam divides by the size of the gradient, so that rounding in fp32 grows from step to step.
LOSS_TOLERANCE = 1e-4
WEIGHT_TOLERANCE = 1e-4
# Logits with the adapters beside W, and with the exported fp32 weights.
MERGE_TOLERANCE = 1e-5

# 24, 6 and 40 features: bone's blocks of 5 leave a rest, two workers share 3 row blocks of k_proj's 6 rows.
SHAPES = {"hidden_size": 24, "intermediate_size": 40}
METHODS = {
    "bone": {"adapter__method": "bone", "adapter__rank": 5},
    "bat": {"adapter__method": "bat", "adapter__rank": 2},
    "hira": {"adapter__method": "hira", "adapter__rank": 3},
    "bat-row": {"adapter__method": "bat", "adapter__rank": 2, "adapter__bat_form": "row"},
    "mora-1": {"adapter__method": "mora", "adapter__rank": 2, "adapter__mora_type": 1},
    "mora-6": {"adapter__method": "mora", "adapter__rank": 2, "adapter__mora_type": 6},
}


@pytest.fixture
def setup(tmp_path):
    config, weights = runs.write_model(tmp_path / "model", **SHAPES)
    records = runs.write_records(tmp_path / "records.jsonl", count=24)

    def run(workers, method: str, **changes) -> tuple[list[float], torch.Tensor]:
        values = METHODS[method] | {"training__steps": STEPS, "training__global_batch_size": BATCH} | changes
        argv = runs.options(
            tmp_path / "model", tmp_path / "records.jsonl", tmp_path / method, optimizer__lr=RATE, **values
        )
        return workers.run(2, train_and_ask, argv)[0]

    return config, weights, records, run


def train_and_ask(argv: list[str]) -> tuple[list[float], torch.Tensor]:
    """A whole run, and then the logits of the model as it was trained, its adapters beside its weights."""
    import torch.distributed as dist

    from titan_hd.config import manager
    from titan_hd.preflight import plan_run
    from titan_hd.train import Trainer

    trainer = Trainer(manager.load(argv), plan_run(manager.load(argv), dist.get_world_size()), torch.device("cpu"))
    losses = []
    trainer.add_hook(1, lambda result: losses.append(result.loss))
    trainer.train()
    trainer.close()
    with torch.no_grad():
        return losses, trainer.model.eval()(question()).clone()


def question() -> torch.Tensor:
    return torch.arange(40).view(2, 20)


def ask(folder) -> torch.Tensor:
    """Logits of an exported model, by our decoder."""
    from titan_hd.models.decoder import Decoder
    from titan_hd.models.registry import read_hf_config

    model = Decoder(read_hf_config(folder))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    with torch.no_grad():
        return model(question())


def batches(records: list[dict]) -> list[list[dict]]:
    return [[records[(s * BATCH + j) % len(records)] for j in range(BATCH)] for s in range(STEPS)]


def relative_errors(got: dict, want: dict, start: dict) -> dict[str, float]:
    """Of the changed weights, relative to the weights' largest element; and all of them must have changed."""
    changed = [n for n in got if n.split(".")[-2] in oracle.LINEARS]
    assert all(not torch.equal(got[n], start[n]) for n in changed)
    return {n: ((got[n].double() - want[n].double()).abs().max() / start[n].abs().max()).item() for n in changed}


# ---------------------------------------------------------------------------------------------------------------------
# peft, transformers and torch's AdamW in one process


def peft_config(method: str):
    import peft

    targets = list(oracle.LINEARS)
    return {
        "bone": lambda: peft.MissConfig(r=5, target_modules=targets),
        "bat": lambda: peft.MissConfig(r=2, target_modules=targets, init_weights="bat"),
        "hira": lambda: peft.HiraConfig(r=3, target_modules=targets),
    }[method]()


def peft_run(folder, method: str, records: list[dict]) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and merged weights of the library's own implementation, started from our first values."""
    import peft
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = peft.get_peft_model(base, peft_config(method))
    for name, parameter in model.named_parameters():
        if "hira_A" in name:
            layer = name.removeprefix("base_model.model.").removesuffix(".hira_A.default")
            generator = torch.Generator().manual_seed(stable_seed("adapter", 42, layer))
            bound = parameter.shape[1] ** -0.5
            parameter.data.uniform_(-bound, bound, generator=generator)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    losses = []
    for batch in batches(records):
        total, count = 0.0, 0
        for record in batch:
            logits = model(torch.tensor([record["input_ids"]])).logits[0]
            labels = torch.tensor(record["labels"][1:])
            total = total + F.cross_entropy(logits[:-1], labels, ignore_index=-100, reduction="sum")
            count += int((labels != -100).sum())
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
        losses.append((total / count).item())
    return losses, model.merge_and_unload().state_dict()


@pytest.mark.parametrize("method", ["bone", "bat", pytest.param("hira", marks=pytest.mark.slow)])
def test_twenty_steps_equal_pefts(method: str, workers, setup, tmp_path):
    pytest.importorskip("peft")
    _, start, records, run = setup
    losses, logits = run(workers, method)
    theirs, merged = peft_run(tmp_path / "model", method, records)
    assert losses == pytest.approx(theirs, rel=LOSS_TOLERANCE)
    assert len(set(losses)) == STEPS
    exported = runs.exported(tmp_path / method)
    assert max(relative_errors(exported, merged, start).values()) < WEIGHT_TOLERANCE
    assert (ask(tmp_path / method / "hf") - logits).abs().max() < MERGE_TOLERANCE


# ---------------------------------------------------------------------------------------------------------------------
# MoRA and Bat's row form, which peft does not have: dense dW in float64, by index arithmetic


def mora_change(weight: torch.Tensor, m: torch.Tensor, mora_type: int) -> torch.Tensor:
    """dW [out, in]: columns of M meet positions of the circularly continued input, rows repeat over the output."""
    (out, inner), q = weight.shape, len(m)
    blocks = -(-inner // q)
    positions = torch.arange(blocks * q)
    if mora_type == 1:
        rows = m[:, positions % q]
    else:
        turns = torch.zeros(blocks, q, q, dtype=m.dtype)
        for j in range(blocks):
            angle = j * 10000.0 ** (-torch.arange(0, q, 2, dtype=m.dtype) / q)
            cos, sin = torch.diag(angle.cos()), torch.diag(angle.sin())
            turns[j] = torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)])
        rows = torch.block_diag(*(m @ turn for turn in turns))
    dense = torch.zeros(len(rows), inner, dtype=m.dtype).index_add(1, positions % inner, rows)
    return dense[torch.arange(out) % len(rows)]


def plain_run(method: str, weights: dict, config: dict, records: list[dict]) -> tuple[list[float], dict]:
    """The same training with dense weights W + dW, no titan_hd code but the size of M."""
    names = [n for n in weights if n.split(".")[-2] in oracle.LINEARS]
    kind = METHODS[method].get("adapter__mora_type")

    def start(w):
        q = square_size(w.shape[1], w.shape[0], 2, kind) if kind else 0
        return torch.zeros((q, q) if kind else (w.shape[1] // 2, 2, 2))

    def change(weight, tensor):
        return mora_change(weight, tensor, kind) if kind else dense_reference.bat_row_change(weight, tensor)

    starts = {n: start(weights[n]) for n in names}
    return dense_reference.train(weights, config, batches(records), RATE, starts, change)


@pytest.mark.parametrize("method", ["bat-row", "mora-6", pytest.param("mora-1", marks=pytest.mark.slow)])
def test_twenty_steps_equal_the_dense_reference(method: str, workers, setup, tmp_path):
    config, start, records, run = setup
    losses, logits = run(workers, method)
    theirs, merged = plain_run(method, start, config, records)
    assert losses == pytest.approx(theirs, rel=LOSS_TOLERANCE)
    exported = runs.exported(tmp_path / method)
    assert max(relative_errors(exported, merged, start).values()) < WEIGHT_TOLERANCE
    assert (ask(tmp_path / method / "hf") - logits).abs().max() < MERGE_TOLERANCE


@pytest.mark.parametrize("method", ["bone", "bat", "hira", "mora-6"])
def test_checkpointing_changes_nothing(method: str, workers, setup):
    _, _, _, run = setup
    plain, _ = run(workers, method, training__steps=3)
    for mode in ("selective", "full"):
        again, _ = run(workers, method, training__steps=3, activation_checkpoint__mode=mode)
        assert again == pytest.approx(plain, rel=1e-5)


@pytest.mark.slow  # the compiler alone; tests/unit/adapters compile each layer as one graph
@pytest.mark.parametrize("method", ["bone", "bat", "hira", "mora-6"])
def test_compile_changes_nothing(method: str, workers, setup):
    _, _, _, run = setup
    plain, _ = run(workers, method, training__steps=3)
    changes = {"activation_checkpoint__mode": "selective", "compile__enable": "true"}
    again, _ = run(workers, method, training__steps=3, **changes)
    assert again == pytest.approx(plain, rel=1e-5)
