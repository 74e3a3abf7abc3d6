"""Which checkpoint is resumed from, and which may not be. Saving and loading need workers and are tested elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.metadata import TensorProperties as Properties

from titan_hd.components.checkpoint import Checkpointer, allocate_optimizer_state, check_resumable, optimizer_state

IDENTITY = {"adapter.method": "hdpissa", "adapter.rank": 16, "adapter.target_modules": None, "training.seed": 42}


class TestCheckResumable:
    def test_the_same_run(self):
        check_resumable(dict(IDENTITY), IDENTITY)

    def test_nothing_to_resume_from(self):
        check_resumable(None, IDENTITY)

    def test_every_difference_is_a_line_that_names_its_key(self):
        current = {**IDENTITY, "adapter.rank": 8, "adapter.target_modules": ["q_proj"]}
        with pytest.raises(ValueError) as caught:
            check_resumable(IDENTITY, current)
        first, second = str(caught.value).split("\n")
        assert first.startswith("adapter.rank: the checkpoint has 16, this run 8; ")
        assert second.startswith("adapter.target_modules: the checkpoint has None, this run ['q_proj']; ")
        assert "checkpoint.load_step = 0" in first

    def test_a_key_that_the_checkpoint_does_not_have(self):
        saved = {k: v for k, v in IDENTITY.items() if k != "training.seed"}
        with pytest.raises(ValueError, match=r"training.seed: the checkpoint has None, this run 42"):
            check_resumable(saved, IDENTITY)

    def test_a_key_that_only_the_checkpoint_has(self):
        check_resumable({**IDENTITY, "of.old": 1}, IDENTITY)

    def test_after_json(self):
        """What is compared was written to train_state.json and read again."""
        check_resumable(json.loads(json.dumps(IDENTITY)), IDENTITY)


class TestChoose:
    def checkpointer(self, folder: Path, *names: str, torn: tuple[str, ...] = ()) -> Checkpointer:
        for name in (*names, *torn):
            (folder / name).mkdir()
        for name in names:
            (folder / name / "train_state.json").write_text("{}")
        return Checkpointer(folder, 2)

    def test_the_latest_by_number(self, tmp_path: Path):
        checkpointer = self.checkpointer(tmp_path, "step-9", "step-100", "step-20")
        assert checkpointer.steps() == [9, 20, 100]
        assert checkpointer.choose(-1) == 100
        assert checkpointer.choose(20) == 20
        assert checkpointer.choose(0) is None

    def test_torn_ones_are_not_there(self, tmp_path: Path):
        """Written under another name and renamed when complete; a folder without its state file is none either."""
        checkpointer = self.checkpointer(tmp_path, "step-5", "step-9.partial", "step-x", torn=("step-7",))
        assert checkpointer.steps() == [5]
        with pytest.raises(ValueError, match=r"checkpoint.load_step: .* has no complete checkpoint 7 \(has 5\)"):
            checkpointer.choose(7)

    def test_no_checkpoint_yet(self, tmp_path: Path):
        checkpointer = Checkpointer(tmp_path / "none", 2)
        assert checkpointer.choose(-1) is None
        assert checkpointer.choose(0) is None
        with pytest.raises(ValueError, match=r"has no complete checkpoint 3 \(has none\)"):
            checkpointer.choose(3)


class TestSave:
    @pytest.fixture(autouse=True)
    def one_process(self, monkeypatch):
        """The files alone: no process group, no tensors."""
        monkeypatch.setattr("titan_hd.components.checkpoint.dist.get_rank", lambda: 0)
        monkeypatch.setattr("titan_hd.components.checkpoint.dist.barrier", lambda: None)
        monkeypatch.setattr("titan_hd.components.checkpoint.dcp.save", lambda tensors, checkpoint_id: None)

    def test_the_latest_are_kept(self, tmp_path: Path):
        for keep, left in ((0, [1, 2, 3, 4]), (1, [4]), (3, [2, 3, 4])):
            checkpointer = Checkpointer(tmp_path / str(keep), keep)
            for step in (1, 2, 3, 4):
                checkpointer.save(step, {}, {"step": step})
                assert checkpointer.train_state(step) == {"step": step}
            assert checkpointer.steps() == left

    def test_the_same_step_again(self, tmp_path: Path):
        checkpointer = Checkpointer(tmp_path, 2)
        checkpointer.save(3, {}, {"run": "first"})
        checkpointer.save(3, {}, {"run": "second"})
        assert checkpointer.train_state(3) == {"run": "second"}
        assert [p.name for p in tmp_path.iterdir()] == ["step-3"]

    def test_a_torn_one_is_written_over(self, tmp_path: Path):
        (tmp_path / "step-3.partial").mkdir()
        (tmp_path / "step-3.partial" / "leftover").write_text("x")
        Checkpointer(tmp_path, 2).save(3, {}, {})
        assert [p.name for p in (tmp_path / "step-3").iterdir()] == ["train_state.json"]

    @pytest.mark.parametrize("load_step", [0, 500])
    def test_a_run_that_went_back_keeps_what_it_saves(self, tmp_path: Path, load_step: int):
        """checkpoint.load_step = 0 or an early step: the steps after it belong to a run that is not this one."""
        earlier = Checkpointer(tmp_path, 0)
        for step in (500, 9500, 10000):
            earlier.save(step, {}, {"run": "first"})
        checkpointer = Checkpointer(tmp_path, 2)
        checkpointer.choose(load_step)
        checkpointer.save(1000, {}, {"run": "second"})
        assert 1000 in checkpointer.steps()


class TestOptimizerState:
    def trained(self) -> tuple[torch.optim.Optimizer, dict[nn.Parameter, str]]:
        params = {nn.Parameter(torch.ones(2, 3)): "layer.delta_A", nn.Parameter(torch.ones(3)): "b"}
        optimizer = torch.optim.AdamW(list(params), lr=0.1, foreach=True)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        return optimizer, params

    def test_keyed_by_the_parameters_name(self):
        state = optimizer_state(*self.trained())
        assert set(state) == {
            f"optimizer.{n}.{k}" for n in ("layer.delta_A", "b") for k in ("step", "exp_avg", "exp_avg_sq")
        }
        assert state["optimizer.layer.delta_A.exp_avg"].shape == (2, 3)

    def test_allocated_as_the_checkpoint_has_it(self):
        """A fresh optimizer gets tensors of the same keys, shapes and dtypes; other entries are passed over."""
        saved = optimizer_state(*self.trained())
        entries = {
            key: TensorStorageMetadata(Properties(dtype=value.dtype), value.shape, []) for key, value in saved.items()
        }
        other = TensorStorageMetadata(Properties(dtype=torch.float32), torch.Size((2, 3)), [])
        entries |= {"model.b": other, "optimizer.unknown.exp_avg": other, "optimizer.b.text": BytesStorageMetadata()}
        params = {nn.Parameter(torch.ones(2, 3)): "layer.delta_A", nn.Parameter(torch.ones(3)): "b"}
        optimizer = torch.optim.AdamW(list(params), lr=0.1, foreach=True)
        allocate_optimizer_state(optimizer, params, Metadata(entries))
        made = optimizer_state(optimizer, params)
        assert made.keys() == saved.keys()
        for key, value in saved.items():
            assert (made[key].shape, made[key].dtype) == (value.shape, value.dtype), key
