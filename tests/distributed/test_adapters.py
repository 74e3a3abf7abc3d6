"""Adapters beside a frozen weight: what a run does with them, and how far they move it. See also test_trajectory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.kit import runs

METHODS = ["lora", "pissa", "dora"]
# Another order of the same fp32 sums.
LOSS_TOLERANCE = 1e-5
# The merged weight has been rounded once more than the factors.
MERGE_TOLERANCE = 1e-5


@pytest.fixture
def setup(tmp_path):
    runs.write_model(tmp_path / "model")
    runs.write_records(tmp_path / "records.jsonl", count=20)

    def argv(dump: str, **overrides):
        values = {"training__global_batch_size": 8, "adapter__rank": 3, "training__steps": 3} | overrides
        return runs.options(tmp_path / "model", tmp_path / "records.jsonl", tmp_path / dump, **values)

    return argv


@pytest.mark.parametrize("method", METHODS)
def test_checkpointing_and_accumulation_change_nothing(method, workers, setup):
    """Dropout's masks, too, are the same when a block is computed once more."""
    changes = {"adapter__method": method, "adapter__dropout": 0.3, "training__local_batch_size": 2}
    losses = {
        mode: workers.run(2, runs.train, setup(f"{method}-{mode}", **changes, activation_checkpoint__mode=mode))[0]
        for mode in ("none", "selective", "full")
    }
    assert losses["selective"] == pytest.approx(losses["none"], rel=LOSS_TOLERANCE)
    assert losses["full"] == pytest.approx(losses["none"], rel=LOSS_TOLERANCE)
    without = workers.run(2, runs.train, setup(f"{method}-0", **changes | {"adapter__dropout": 0.0}))[0]
    assert without[-1] != pytest.approx(losses["none"][-1], rel=LOSS_TOLERANCE), "there was dropout"


COMPILED = {"adapter__method": "dora", "activation_checkpoint__mode": "full", "training__steps": 2}


@pytest.mark.slow  # the C++ alone: test_every_method traces each method's blocks, test_against_oracle has C++
def test_compiled_blocks(workers, setup):
    """DoRA has all that LoRA has."""
    plain = workers.run(1, runs.train, setup("plain", **COMPILED))[0]
    compiled = workers.run(1, runs.train, setup("compiled", **COMPILED, compile__enable="true"))[0]
    assert compiled == pytest.approx(plain, rel=LOSS_TOLERANCE)


@pytest.mark.slow
def test_compiled_dropout(workers, setup):
    """The masks are others than without compilation, but the same on any number of workers."""
    changes = {**COMPILED, "compile__enable": "true", "adapter__dropout": 0.3}
    one, two = (workers.run(n, runs.train, setup(f"dropout-{n}", **changes))[0] for n in (1, 2))
    assert two == pytest.approx(one, rel=LOSS_TOLERANCE)
    without = workers.run(1, runs.train, setup("without", **COMPILED))[0]
    assert one[-1] != pytest.approx(without[-1], rel=LOSS_TOLERANCE)


def dtypes_after_a_run(argv) -> tuple[list[float], set[torch.dtype], set[torch.dtype]]:
    """Losses, and the dtypes of the frozen and of the trained parameters."""
    import torch.distributed as dist

    from titan_hd.config import manager
    from titan_hd.preflight import plan_run
    from titan_hd.train import Trainer

    config = manager.load(argv)
    trainer = Trainer(config, plan_run(config, dist.get_world_size()), torch.device("cpu"))
    losses = [trainer.train_step().loss for _ in range(3)]
    trainer.close()
    parameters = list(trainer.model.parameters())
    return losses, *({p.dtype for p in parameters if p.requires_grad is trained} for trained in (False, True))


@pytest.mark.parametrize("method", METHODS)
def test_a_bf16_base_under_fp32_adapters(method, workers, setup):
    """One FSDP2 group holds both. On any number of workers the same, and near the fp32 base's losses."""
    changes = {"adapter__method": method, "training__master_dtype": "bfloat16"}
    runs_of = {n: workers.run(n, dtypes_after_a_run, setup(f"{method}{n}", **changes))[0] for n in (1, 4)}
    for _, frozen, trained in runs_of.values():
        assert (frozen, trained) == ({torch.bfloat16}, {torch.float32})
    assert runs_of[4][0] == pytest.approx(runs_of[1][0], rel=LOSS_TOLERANCE)
    whole = workers.run(1, runs.train, setup(f"{method}-fp32", adapter__method=method))[0]
    assert runs_of[1][0] == pytest.approx(whole, rel=0.02)
    mixed = changes | {"training__mixed_precision_param": "bfloat16"}
    assert workers.run(2, runs.train, setup(f"{method}-mixed", **mixed))[0] == pytest.approx(whole, rel=0.05)


def difference_after_merging(argv, dump: Path) -> float:
    """Train, then compare logits of the model with its adapters and of the export; the largest difference."""
    import torch.distributed as dist

    from titan_hd.checkpoint.pretrained import load_pretrained
    from titan_hd.config import manager
    from titan_hd.preflight import plan_run
    from titan_hd.train import Trainer

    config = manager.load(argv)
    trainer = Trainer(config, plan_run(config, dist.get_world_size()), torch.device("cpu"))
    trainer.train()
    trainer.close()
    ids = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        merged, _ = load_pretrained(dump / "hf", "", torch.float32, torch.device("cpu"))
        return (trainer.model.eval()(ids) - merged(ids)).abs().max().item()


@pytest.mark.parametrize("method", METHODS)
def test_the_export_computes_what_the_model_did(method, workers, setup, tmp_path):
    argv = setup("run", adapter__method=method, adapter__alpha=4, training__steps=6)
    assert max(workers.run(2, difference_after_merging, argv, tmp_path / "run")) < MERGE_TOLERANCE


def test_reports_of_pissas_decompositions(workers, setup, tmp_path):
    workers.run(2, runs.train, setup("p", adapter__method="pissa", training__steps=1))
    lines = (tmp_path / "p" / "svd.jsonl").read_text().splitlines()
    assert len(lines) == 2 * 7
    assert all('"captured_energy"' in line for line in lines)


# A direction counts if its singular value is at least this share of the largest. fp32 noise lies near 1e-6.
RANK_THRESHOLD = 1e-4


def test_ranks_of_the_update(workers, tmp_path):
    """LoRA moves W by rank r, PiSSA by 2 r, eight slices of HD-PiSSA by at least 16 times as much as LoRA."""
    sizes = {"hidden_size": 96, "intermediate_size": 96, "head_dim": 24, "num_key_value_heads": 4}
    _, start = runs.write_model(tmp_path / "model", num_hidden_layers=1, **sizes)
    runs.write_records(tmp_path / "records.jsonl", count=64)
    rank, ranks = 4, {}
    for method in ("lora", "pissa", "hdpissa"):
        argv = runs.options(
            tmp_path / "model",
            tmp_path / "records.jsonl",
            tmp_path / method,
            adapter__method=method,
            adapter__rank=rank,
            hdpissa__num_adapters=8,
            hdpissa__aggregate="sum",
            training__global_batch_size=16,
            training__steps=8,
            optimizer__lr=1e-3,
        )
        workers.run(2, runs.train, argv)
        got = runs.exported(tmp_path / method)
        values = {n: torch.linalg.svdvals((got[n] - start[n]).double()) for n in got if "proj" in n}
        ranks[method] = {n: int((s > RANK_THRESHOLD * s[0]).sum()) for n, s in values.items()}
    for name in ranks["lora"]:
        assert ranks["lora"][name] == rank, name
        assert ranks["pissa"][name] == 2 * rank, name
        assert ranks["hdpissa"][name] >= 16 * rank, name
