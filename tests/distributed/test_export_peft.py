"""export.format = "peft": the peft library puts the adapters onto the base model and computes what we trained."""

from __future__ import annotations

import json

import pytest
import torch

from tests.kit import runs

# Logits of one fp32 model, with the adapters beside the weights in both.
LOGITS_TOLERANCE = 1e-5

METHODS = {
    "lora": {"adapter__method": "lora", "adapter__rank": 3, "adapter__alpha": 5},
    "rslora": {"adapter__method": "lora", "adapter__rank": 3, "adapter__alpha": 5, "adapter__rslora": "true"},
    "olora": {"adapter__method": "lora", "adapter__rank": 3, "adapter__alpha": 5, "adapter__init": "olora"},
    "pissa": {"adapter__method": "pissa", "adapter__rank": 3, "adapter__alpha": 5},
    "dora": {"adapter__method": "dora", "adapter__rank": 3, "adapter__alpha": 5},
    "hira": {"adapter__method": "hira", "adapter__rank": 3},
    "bone": {"adapter__method": "bone", "adapter__rank": 5},
    "bat": {"adapter__method": "bat", "adapter__rank": 2},
}


def train_and_ask(argv: list[str]) -> torch.Tensor:
    """The rest of a run, and then the logits of the model as it was trained."""
    import torch.distributed as dist

    from titan_hd.config import manager
    from titan_hd.preflight import plan_run
    from titan_hd.train import Trainer

    config = manager.load(argv)
    trainer = Trainer(config, plan_run(config, dist.get_world_size()), torch.device("cpu"))
    trainer.train()
    trainer.close()
    with torch.no_grad():
        return trainer.model.eval()(question()).clone()


def question() -> torch.Tensor:
    return torch.arange(40).view(2, 20)


@pytest.mark.parametrize("method", METHODS)
def test_peft_computes_what_was_trained(method: str, workers, tmp_path):
    """After a resume on another number of workers; biases, and target_modules that leave some layers alone."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    runs.write_model(tmp_path / "model", hidden_size=24, intermediate_size=40, attention_bias=True)
    runs.write_records(tmp_path / "records.jsonl")
    argv = runs.options(
        tmp_path / "model",
        tmp_path / "records.jsonl",
        tmp_path / "run",
        checkpoint__enable="true",
        export__format="peft",
        export__folder="adapter",
        adapter__target_modules="q_proj,v_proj,o_proj,up_proj,down_proj",
        training__global_batch_size=4,
        **METHODS[method],
    )
    workers.run(2, runs.train, argv, stop_after=2)
    ours = workers.run(4, train_and_ask, argv)[0]

    folder = tmp_path / "run" / "adapter"
    assert sorted(p.name for p in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    with torch.no_grad():
        unchanged = base(question()).logits
        model = peft.PeftModel.from_pretrained(base, folder).eval()
        theirs = model(question()).logits
        merged = model.merge_and_unload()(question()).logits
    assert (ours - unchanged).abs().max() > 100 * LOGITS_TOLERANCE, "the adapter does something"
    assert (ours - theirs).abs().max() < LOGITS_TOLERANCE
    assert (ours - merged).abs().max() < 2 * LOGITS_TOLERANCE
    said = json.loads((folder / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == "model"
    assert str(tmp_path) not in json.dumps(said)
