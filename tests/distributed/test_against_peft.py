"""The methods that PEFT has, too: 20 steps on two workers against peft, transformers and torch's AdamW on one process.

Same model, records and first values of the adapters; fp32. What is compared are the losses and the merged weights: A
and B of a decomposition are free in their signs.
"""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM

from tests.kit import runs
from tests.kit.runs import LINEAR_LAYERS
from titan_hd.adapters.dora import DoRALinear
from titan_hd.adapters.lora import LoRALinear
from titan_hd.distributed.adapter_init import generator_of

STEPS, BATCH, RANK, ALPHA, LR = 20, 4, 3, 4.0, 3e-3
# fp32 on both sides, in another order; Adam divides by what may be rounding noise.
LOSS_TOLERANCE = 1e-4
WEIGHT_TOLERANCE = 1e-4

# name -> (options of ours, of peft's LoraConfig)
METHODS = {
    "lora": ({"adapter__method": "lora"}, {}),
    "rslora": ({"adapter__method": "lora", "adapter__rslora": "true"}, {"use_rslora": True}),
    "loraplus": ({"adapter__method": "lora", "adapter__loraplus_lr_ratio": 8}, {}),
    "olora": ({"adapter__method": "lora", "adapter__init": "olora"}, {"init_lora_weights": "olora"}),
    "pissa": ({"adapter__method": "pissa", "adapter__svd": "exact"}, {"init_lora_weights": "pissa"}),
    "dora": ({"adapter__method": "dora"}, {"use_dora": True}),
}


def set_first_values(layer: torch.nn.Module, name: str) -> None:
    """What ours draws for a layer, in peft's tensors (B is zero in both)."""
    linear = torch.nn.Linear(layer.in_features, layer.out_features)
    values = LoRALinear(linear, RANK, 1.0).initial(None, generator_of(42, name))
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(values["lora_A"])
        layer.lora_B["default"].weight.copy_(values["lora_B"])


def train_with_peft(folder: Path, records: list[dict], settings: dict, lr_ratio: float):
    """Losses, and the weights after merging."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LINEAR_LAYERS, **settings)
    model = peft.get_peft_model(model, config)
    if "init_lora_weights" not in settings:
        for name, module in model.named_modules():
            if isinstance(module, peft.tuners.lora.Linear):
                set_first_values(module, name.removeprefix("base_model.model."))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for name, p in trained.items() if ("lora_B" in name) is b], "lr": LR * (lr_ratio if b else 1)}
        for b in (False, True)
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        total, count = torch.zeros(()), 0
        for j in range(step * BATCH, (step + 1) * BATCH):
            record = records[j % len(records)]
            logits = model(input_ids=torch.tensor([record["input_ids"]])).logits[0]
            labels = torch.tensor(record["labels"][1:])
            total = total + F.cross_entropy(logits[:-1], labels, ignore_index=-100, reduction="sum")
            count += int((labels != -100).sum())
        (total / count).backward()
        optimizer.step()
        losses.append((total / count).item())
    return losses, model.merge_and_unload().state_dict()


@pytest.mark.parametrize("method", METHODS)
def test_twenty_steps_equal_those_of_peft(method, workers, tmp_path):
    ours, theirs = METHODS[method]
    _, start = runs.write_model(tmp_path / "model", attention_bias=True, hidden_size=24)
    records = runs.write_records(tmp_path / "records.jsonl")
    argv = runs.options(
        tmp_path / "model",
        tmp_path / "records.jsonl",
        tmp_path / "run",
        training__steps=STEPS,
        training__global_batch_size=BATCH,
        adapter__rank=RANK,
        adapter__alpha=ALPHA,
        optimizer__lr=LR,
        **ours,
    )
    losses = workers.run(2, runs.train, argv)[0]
    ratio = float(ours.get("adapter__loraplus_lr_ratio", 1.0))
    want_losses, want = train_with_peft(tmp_path / "model", records, theirs, ratio)
    apart = max(abs(a - b) for a, b in zip(losses, want_losses, strict=True))
    assert apart < LOSS_TOLERANCE
    assert losses[-1] < losses[0] - 0.05, "something was learnt"
    got = runs.exported(tmp_path / "run")
    assert got.keys() == want.keys()
    error = max((got[name] - want[name]).abs().max().item() for name in got)
    print(f"{method}: loss {losses[0]:.3f} to {losses[-1]:.3f}; off by {apart:.1e}, the weights by {error:.1e}")
    assert error < WEIGHT_TOLERANCE
    moved = [name for name in got if not torch.equal(got[name], start[name])]
    assert {name.split(".")[-2] for name in moved} == set(LINEAR_LAYERS)


def test_the_magnitude_is_the_one_of_peft():
    """DoRA's delta is m - ||W||."""
    layer = DoRALinear(torch.nn.Linear(6, 5), 2, 1.0)
    weight, delta = torch.randn(5, 6), torch.randn(5)
    assert torch.allclose(layer.magnitude(weight, delta), weight.norm(dim=1) + delta)
