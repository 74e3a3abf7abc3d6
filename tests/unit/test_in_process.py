"""`from titan_hd import train`: a run in this process, once and once more, and what it leaves behind."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import titan_hd
from tests.kit import runs
from tests.kit.commands import REPOSITORY
from titan_hd import console, in_process
from titan_hd.checkpoint.checkpointer import Checkpointer
from titan_hd.components.metrics import MetricsLogger
from titan_hd.components.profiling import Profiling
from titan_hd.components.trackers.registry import Trackers
from titan_hd.components.trackers.tracker import Tracker
from titan_hd.config import manager
from titan_hd.data.loader import ReadAhead
from titan_hd.in_process import load_config
from titan_hd.process.run_lock import RunLock


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The keys of a run that takes no time; paths as Python has them."""
    folder = tmp_path_factory.mktemp("tiny")
    runs.write_model(folder / "model")
    runs.write_records(folder / "records.jsonl")
    return {
        "model.hf_assets_path": folder / "model",
        "data.train": [folder / "records.jsonl"],
        "data.format": "tokens",
        "training.seq_len": 16,
        "training.mixed_precision_param": "float32",
        "adapter.rank": 1,
        "job.dump_folder": folder / "run",
        "metrics.log_freq": 1,
    }


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def warned_of():
    """What is not deterministic is warned of in this process, and stops nothing."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def surroundings() -> list[object]:
    """What a run changes in its process."""
    logger = logging.getLogger("titan_hd")
    return [
        dict(os.environ),
        (logger.handlers[:], logger.level, logger.propagate, logging.getLogger("titan_hd.progress").level),
        console._bars,
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        gc.isenabled(),
        dist.is_initialized(),
    ]


def test_importing_it_is_light():
    code = "from titan_hd import train; import sys, titan_hd; assert not {'torch', 'numpy'} & sys.modules.keys()"
    code += "; assert titan_hd.UserError.__name__ == 'UserError' and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, timeout=60)


def test_a_run_says_what_it_has_come_to_and_another_may_follow(tiny: dict[str, Any]):
    torch.set_float32_matmul_precision("highest")  # as in a new process, whatever other tests have left
    before = surroundings()
    assert before[2:4] == [True, "highest"], "which this run changes"
    values = tiny | {
        "metrics.progress_bar": False,
        "training.float32_matmul_precision": "high",
        "validation.enable": True,
        "data.validation": tiny["data.train"],
    }
    first = titan_hd.train(None, values, training__steps=3, export__enable=True, debug__deterministic=True)
    assert surroundings() == before
    assert (first.folder, first.steps) == (tiny["job.dump_folder"], 3)
    assert [record["step"] for record in first.records if "loss" in record] == [1, 2, 3]
    assert first.metrics["loss"] == [record["loss"] for record in first.records if "loss" in record][-1]
    assert first.metrics["validation_loss"] < first.records[0]["validation_loss"]
    assert (first.model / "model.safetensors").is_file()

    second = titan_hd.train(None, values, training__steps=3, export__enable=False)
    assert second.metrics["loss"] == first.metrics["loss"]
    assert second.model is None


def test_a_trainer_in_a_block(tiny: dict[str, Any]):
    seen = []
    with titan_hd.open_trainer(None, tiny, training__steps=4) as trainer:
        assert isinstance(trainer, titan_hd.Trainer)
        losses = [trainer.train_step().loss for _ in range(2)]
        trainer.add_hook(1, lambda result: seen.append((trainer.step, result.loss)))
        trainer.train()
        assert trainer.metrics._lines.step == 4, "what is left is told by the run's steps, those by hand among them"
    assert [step for step, _ in seen] == [3, 4]
    assert all(0 < loss < 10 for loss in (*losses, *(loss for _, loss in seen)))
    validated = {"validation.enable": True, "validation.batch_size": 5, "data.validation": tiny["data.train"]}
    with titan_hd.open_trainer(None, tiny | validated, training__steps=4) as again:
        assert [again.train_step().loss for _ in range(2)] == losses
        batches: list[None] = []
        again.validator.run(again.model, lambda: batches.append(None))
        assert len(batches) == again.validator.batches() == 5, "of 24 records"
    assert "K = 1 of rank 1" in (tiny["job.dump_folder"] / "plan.txt").read_text()


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"training.stepz": 3}, "training.stepz: unknown key (argument); did you mean training.steps?"),
        ({"training.steps": "3"}, "training.steps: must be a whole number, not '3' (argument)"),
        ({"training.steps": 3, "model.hf_assets_path": "none"}, "model.hf_assets_path: "),
        ({"training.steps": 3, "data.train": ["none.jsonl"]}, "data.train[0]: "),
        ({"training.steps": 3, "job.dry_run": True}, "job.dry_run, job.print_plan: the launcher answers them"),
    ],
)
def test_what_the_caller_can_mend_is_an_exception(tiny: dict[str, Any], values: dict[str, Any], line: str, warned_of):
    before = surroundings()
    with pytest.raises(titan_hd.UserError) as told:
        titan_hd.train(None, tiny | values)
    assert line in str(told.value)
    assert surroundings() == before


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK"])
def test_in_an_environment_of_several_workers_it_waits_for_none(name: str, tiny: dict[str, Any], monkeypatch):
    monkeypatch.setenv(name, "2")
    monkeypatch.setattr(in_process, "init_process", lambda *_, **__: pytest.fail("it would wait for the others"))
    before = surroundings()
    with pytest.raises(titan_hd.UserError, match=f"^{name}: is 2 in the environment, but .*; unset it, or start"):
        titan_hd.train(None, tiny, training__steps=1)
    assert surroundings() == before


def test_a_run_that_fails_leaves_its_folder_to_the_next(tiny: dict[str, Any], tmp_path: Path):
    """Records whose fault only the builder of the data sees: the folder is locked by then."""
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"input_ids": [1, 2, 3], "labels": [1]}\n')
    before = surroundings()
    with pytest.raises(titan_hd.UserError, match=r"bad\.jsonl") as told:
        titan_hd.train(None, tiny | {"data.train": bad}, training__steps=1)
    with pytest.raises(KeyboardInterrupt), titan_hd.open_trainer(None, tiny, training__steps=1):
        raise KeyboardInterrupt
    assert surroundings() == before
    assert titan_hd.train(None, tiny, training__steps=1).steps == 1
    assert told.traceback, "a notebook keeps it, too, and with it the Trainer that failed"


class Told(Tracker):
    """Keeps how its run ended."""

    ends: list[bool] = []  # noqa: RUF012 (emptied by the test)

    def log(self, step, values):
        pass

    def finish(self, failed: bool) -> None:
        self.ends.append(failed)


def test_a_trainer_that_cannot_be_made_lets_go_of_what_it_has(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    """However late it fails: threads and files are closed, and then the trackers hear that the run has failed, which
    may take them long."""
    closed, ends = [], {RunLock: "release", Trackers: "finish"}
    for cls in (MetricsLogger, Checkpointer, ReadAhead, Profiling, RunLock, Trackers):
        name = ends.get(cls, "close")
        real = getattr(cls, name)
        monkeypatch.setattr(cls, name, lambda self, real=real, **how: (closed.append(type(self)), real(self, **how)))
    monkeypatch.setattr("titan_hd.train.Rates", lambda *_: 1 / 0)
    Told.ends.clear()
    before = surroundings()
    with pytest.raises(ZeroDivisionError):
        titan_hd.train(None, tiny, training__steps=1, metrics__trackers=[f"{__name__}:Told"])
    assert surroundings() == before
    assert Told.ends == [True]
    assert closed == [MetricsLogger, Checkpointer, ReadAhead, Profiling, RunLock, Trackers]


def test_weights_between_two_folds_are_as_they_were(tiny: dict[str, Any], tmp_path: Path, monkeypatch):
    """Exactly, though the base weights' products are remembered with a rounding. A run that is resumed there reads
    every tensor of the checkpoint once."""
    values = {"job.dump_folder": tmp_path, "hdpissa.local_steps": 2, "metrics.update_freq": 1, "training.steps": 2}
    values |= {"checkpoint.enable": True, "checkpoint.interval": 1, "checkpoint.keep_latest_k": 0}
    first, second = (r for r in titan_hd.train(None, tiny | values).records if "measure_seconds" in r)
    of_change = [name for name in first if name.startswith(("update_size", "weight_change", "effective", "energy"))]
    assert len(of_change) == 5 * 7
    assert {first[name] for name in of_change} == {0.0}
    assert all(second[name] > 0 for name in of_change)

    read: list[str] = []
    real = Checkpointer.load
    load = lambda self, reader, tensors: (read.extend(tensors), real(self, reader, tensors))  # noqa: E731
    monkeypatch.setattr(Checkpointer, "load", load)
    with titan_hd.open_trainer(None, tiny | values, checkpoint__load_step=1) as trainer:
        assert trainer.step == 1
        assert sorted(read) == sorted(trainer.update.state(changed_only=False))
    assert any(name.startswith("factors.") for name in read)


def test_keywords_files_and_recipes_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A keyword wins over a value, a value over the file; None unsets; the bundled recipes have their names."""
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text("[optimizer]\nlr = 1.0\nbeta1 = 0.5\neps = 1e-3\n[training]\nsteps = 5\n")
    need = {"model.hf_assets_path": tmp_path, "data.train": "x.jsonl"}
    values = {"optimizer.lr": 2.0, "optimizer.beta1": 0.25, "training.steps": None, "training.epochs": 1}
    config = load_config("run.toml", need | values, optimizer__lr=3.0)
    assert (config.optimizer.lr, config.optimizer.beta1, config.optimizer.eps) == (3.0, 0.25, 1e-3)
    assert (config.training.steps, config.training.epochs) == (None, 1)
    assert config.model.hf_assets_path == str(tmp_path)
    assert load_config("quickstart.toml").hdpissa.num_adapters == 8
    quickstart = load_config()
    assert Path(quickstart.data.train).is_file()
    assert quickstart.training.steps == 160


def test_what_a_bundled_recipe_names_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    config = load_config("study_quickstart.toml")
    named = [config.model.hf_assets_path, config.data.train, *(source.path for source in config.data.validation)]
    assert all(Path(path).is_absolute() and Path(path).exists() for path in named)
    assert Path(load_config("paper/peft_llama32_3b.toml").data.template).is_file()
    assert load_config("llama31_8b_lora.toml").model.hf_assets_path == "./assets/hf/Llama-3.1-8B", "not bundled"
    # Nothing is written into the bundle, though it has a folder of the name that a recipe writes to.
    monkeypatch.setattr(manager, "ROOT", tmp_path / "bundle")
    (tmp_path / "bundle" / "outputs" / "study_quickstart").mkdir(parents=True)
    assert load_config("study_quickstart.toml").job.dump_folder == "./outputs/study_quickstart"
    # What stands in the folder comes first, and a file of one's own names what stands there alone.
    own = Path("assets/quickstart/train.jsonl")
    Path("run.toml").write_text(f'[data]\ntrain = "{own}"\n[training]\nsteps = 1\n[model]\nhf_assets_path = "."\n')
    assert load_config("run.toml").data.train == str(own)
    own.parent.mkdir(parents=True)
    own.touch()
    assert load_config("study_quickstart.toml").data.train == str(own)


def test_train_is_the_function_and_the_module():
    import titan_hd.train as module  # binds the attribute of the package

    assert titan_hd.train is module
    assert module.Trainer is titan_hd.Trainer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("titan_hd.train.run_worker", "changed")
        assert sys.modules["titan_hd.train"].run_worker == "changed"
    assert callable(sys.modules["titan_hd.train"].run_worker)
    with pytest.raises(AttributeError):
        titan_hd.no_such_name  # noqa: B018
