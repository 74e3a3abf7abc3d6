"""Where the metrics go besides metrics.jsonl: each step once over resumptions, and no failure ends a run."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.kit import wandb_files
from tests.kit.commands import REPOSITORY
from titan_hd.components import wandb_run
from titan_hd.components.metrics import MetricsLogger
from titan_hd.components.trackers import registry
from titan_hd.components.trackers.tracker import Samples, TrackedRun, Tracker
from titan_hd.config.job_config import JobConfig


def config_in(folder: Path, *trackers: str) -> JobConfig:
    config = JobConfig()
    config.job.dump_folder = str(folder / "run")
    config.metrics.trackers = list(trackers)
    return config


ROW = {"record": 0, "prompt": "1 + 1?", "reference": "2", "output": "3", "right": False}


def log(config: JobConfig, first: int, last: int, runs: dict[str, str]) -> dict[str, str]:
    """A part of a run; every third step has a validation. Losses tell which part they are of. Returns what a
    checkpoint would have of the trackers."""
    metrics = MetricsLogger(config, 10, first, runs)
    for step in range(first + 1, last + 1):
        metrics.log(step, {"loss": step + first / 100})
        if step % 3 == 0:
            metrics.log(step, {"validation_loss": step / 10})
            metrics.log_samples(step, "samples", [ROW])
    found = metrics.tracker_runs
    metrics.close()
    return found


class Memory(Tracker):
    """Keeps what it gets, over all parts of a run."""

    title = "memory"
    parts: list[Memory] = []  # noqa: RUF012 (emptied by the test)

    def start(self, run: TrackedRun) -> None:
        self.run, self.got, self.ended = run, [], None
        self.run_id = run.run_id or "first"
        self.log_again(run)
        self.parts.append(self)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.got.append((step, dict(values)))

    def log_samples(self, step: int, samples: Samples) -> None:
        self.got.append((step, samples.rows[0]["output"]))

    def finish(self, failed: bool) -> None:
        self.ended = failed


class Broken(Tracker):
    """Fails in one of its methods."""

    fails = "start"

    def __init__(self):
        self._perhaps("__init__")

    def start(self, run: TrackedRun) -> None:
        self.run_id = "known"
        self._perhaps("start")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._perhaps("log")

    def finish(self, failed: bool) -> None:
        self._perhaps("finish")

    def _perhaps(self, what: str) -> None:
        if self.fails == what:
            raise OSError(f"no\nroute in {what}")


class TestTrackersOfOnesOwn:
    NAME = f"{__name__}:Memory"

    def test_it_gets_everything_and_what_came_before(self, tmp_path: Path):
        Memory.parts.clear()
        config = config_in(tmp_path, self.NAME)
        runs = log(config, 0, 4, {})
        assert runs == {self.NAME: "first"}
        log(config, 3, 5, runs)
        first, second = Memory.parts
        assert first.got == [
            *((1, {"loss": 1.0}), (2, {"loss": 2.0}), (3, {"loss": 3.0})),
            *((3, {"validation_loss": 0.3}), (3, "3"), (4, {"loss": 4.0})),
        ]
        assert second.got == [*first.got[:-1], (4, {"loss": 4.03}), (5, {"loss": 5.03})]
        assert (first.run.went_back, first.run.first_step, first.run.run_id) == (False, 0, None)
        assert (second.run.went_back, second.run.first_step, second.run.run_id) == (True, 3, "first")
        assert (first.ended, second.ended) == (False, False)

    def test_a_run_that_goes_on_where_it_stopped_has_not_gone_back(self, tmp_path: Path):
        Memory.parts.clear()
        log(config_in(tmp_path, self.NAME), 3, 5, log(config_in(tmp_path, self.NAME), 0, 3, {}))
        assert [part.run.went_back for part in Memory.parts] == [False, False]

    def test_a_failed_run_says_so(self, tmp_path: Path):
        Memory.parts.clear()
        metrics = MetricsLogger(config_in(tmp_path, self.NAME), 10, 0)
        registry.finish_failed_run()
        assert Memory.parts[0].ended is True
        metrics.close()
        assert Memory.parts[0].ended is True, "it ends once"

    @pytest.mark.parametrize("fails", ["__init__", "start", "log", "finish"])
    def test_a_failure_costs_the_tracker_and_nothing_else(self, fails: str, tmp_path: Path, monkeypatch, caplog):
        monkeypatch.setattr(Broken, "fails", fails)
        Memory.parts.clear()
        before = {f"{__name__}:Broken": "known"} if fails == "__init__" else {}
        found = log(config_in(tmp_path, f"{__name__}:Broken", self.NAME), 0, 2, before)
        assert [step for step, _ in Memory.parts[0].got] == [1, 2]
        trouble = "metrics.trackers: {} cannot start" if fails in ("__init__", "start") else "{} failed"
        line = f"{trouble.format(f'{__name__}:Broken')} (no route in {fails}); going on without it"
        assert [text for text in caplog.messages if "going on" in text] == [line]
        assert found[f"{__name__}:Broken"] == "known", "a later part of the run may find it again"

    def test_a_checkpoint_keeps_what_a_part_without_the_tracker_does_not_use(self, tmp_path: Path):
        assert log(config_in(tmp_path), 0, 2, {"wandb": "abc"}) == {"wandb": "abc"}
        assert registry.saved_run_ids({"wandb_id": "old"}) == {"wandb": "old"}
        assert registry.saved_run_ids({"wandb_id": None}) == {}
        assert registry.saved_run_ids({"trackers": {"x": "y"}}) == {"x": "y"}


FAULTS = {
    "mlflow": "'mlflow' is no tracker; there are tensorboard, wandb, and package.module:Class",
    "no.such:Thing": "'no.such:Thing' cannot be imported: ModuleNotFoundError: No module named 'no'",
    "json:nothing": "'json:nothing' cannot be imported: AttributeError: module 'json' has no attribute 'nothing'",
    "json:loads": "'json:loads' is no subclass of titan_hd.components.trackers.tracker.Tracker",
    "json:JSONDecoder": "'json:JSONDecoder' is no subclass of titan_hd.components.trackers.tracker.Tracker",
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_no_tracker(name: str, tmp_path: Path):
    assert registry.tracker_errors(config_in(tmp_path, name)) == [f"metrics.trackers: {FAULTS[name]}"]


def test_a_package_within_one_that_cannot_be_had(tmp_path: Path, monkeypatch):
    """Python imports the outer one to look for the inner one."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "torn_outer.py").write_text("1 / 0")
    faults = {
        "no_such.part": "needs the package no_such.part: pip install no_such.part",
        "torn_outer.part": "the package torn_outer.part cannot be imported: ZeroDivisionError: division by zero",
    }
    for package, line in faults.items():
        monkeypatch.setattr(Memory, "package", package)
        assert registry.tracker_errors(config_in(tmp_path, f"{__name__}:Memory")) == [f"metrics.trackers: {line}"]


def test_the_keys_of_one_tracker_make_one(tmp_path: Path):
    config = config_in(tmp_path, "wandb", "a:B")
    config.metrics.enable_wandb = True
    assert registry.tracker_names(config.metrics) == {"wandb": "metrics.enable_wandb", "a:B": "metrics.trackers"}


def test_tensorboard_goes_on_at_its_step(tmp_path: Path, monkeypatch):
    """Its own package is not needed: what torch's writer is given."""
    calls = []

    class Writer:
        def __init__(self, folder, purge_step):
            calls.append(("start", folder, purge_step))

        def add_scalar(self, *what):
            calls.append(what)

        def add_text(self, *what):
            calls.append(what)

        def flush(self):
            pass

        def close(self):
            calls.append("close")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    monkeypatch.setattr(registry, "find_spec", lambda name: name)
    config = config_in(tmp_path, "tensorboard")
    log(config, 2, 3, log(config, 0, 1, {}))
    folder = str(tmp_path / "run" / "tb")
    table = "|record|prompt|reference|output|right|\n|---|---|---|---|---|\n|0|1 + 1?|2|3|False|"
    assert calls == [
        *(("start", folder, 0), ("loss", 1.0, 1), "close"),
        *(("start", folder, 3), ("loss", 3.02, 3), ("validation_loss", 0.3, 3), ("samples", table, 3), "close"),
    ]


def test_tensorboards_own_reader_finds_every_step_once(tmp_path: Path, monkeypatch):
    """A run that is killed, its last event cut off; one that goes back to an earlier step; one that goes on."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (pip install tensorboard)")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = config_in(tmp_path, "tensorboard")
    killed = MetricsLogger(config, 10, 0)
    for step in range(1, 8):
        killed.log(step, {"loss": float(step)})
    (file,) = (tmp_path / "run" / "tb").iterdir()
    kept = tmp_path / "kept"
    shutil.copy(file, kept)  # as it is when no writer gets to close it
    killed.close()
    shutil.copy(kept, file)
    os.truncate(file, file.stat().st_size - 3)
    # The files are read in the order of the seconds in their names.
    monkeypatch.setattr(time, "time", lambda now=time.time: now() + 2)
    log(config, 5, 8, {})
    log(config, 8, 9, {})
    events = EventAccumulator(str(tmp_path / "run" / "tb"))
    events.Reload()
    losses = {event.step: event.value for event in events.Scalars("loss")}
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 10))
    assert losses == pytest.approx({**{n: n for n in range(1, 6)}, 6: 6.05, 7: 7.05, 8: 8.05, 9: 9.08})
    assert [event.step for event in events.Scalars("validation_loss")] == [6, 9]
    assert [event.step for event in events.Tensors("samples/text_summary")] == [6, 9]


def test_wandb_offline_has_every_step_once_in_its_last_file(tmp_path: Path, monkeypatch):
    """A run that is interrupted, goes back, and goes on again. `wandb sync` uploads what it finds without a mark."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = config_in(tmp_path, "wandb")
    config.job.description = "what this is about"
    config.metrics.wandb_project, config.metrics.wandb_group = "project", "group"
    runs = log(config, 0, 7, {})
    for first, last in ((5, 8), (8, 9)):
        assert log(config, first, last, runs) == runs
    expected = {step: {"loss": step + first / 100} for first, last in ((0, 5), (5, 8), (8, 9))
                for step in range(first + 1, last + 1)}  # fmt: skip
    for step in (3, 6, 9):
        expected[step]["validation_loss"] = step / 10
    files = list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    (last,) = (path for path in files if not path.with_name(f"{path.name}.synced").exists())
    assert len(files) == 3
    until = time.monotonic() + 30  # wandb's own process writes the last of it when the run has been finished
    while (found := wandb_files.history(last)).keys() != expected.keys():
        assert time.monotonic() < until
        time.sleep(0.05)
    tables = {step: row.pop("samples/path") for step, row in found.items() if "samples/path" in row}
    numbers = {s: {k: v for k, v in row.items() if not k.startswith("samples/")} for s, row in found.items()}
    assert numbers == expected
    assert list(tables) == [3, 6, 9]
    table = json.loads((last.parent / "files" / tables[9]).read_text())
    assert (table["columns"], table["data"]) == (list(ROW), [list(ROW.values())])
    run = wandb_files.start(last)
    assert {run.run_id} == set(runs.values())
    assert (run.project, run.run_group, run.notes) == ("project", "group", "what this is about")
    assert len(run.git.commit) == 40
    settings = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert settings["optimizer"]["lr"] == config.optimizer.lr


class Server:
    """A stand-in for wandb with a server: what it drops, and what it keeps, of a run's history."""

    def __init__(self):
        self.history: dict[int, dict] = {}
        self.lost_from: int | None = None  # a crash keeps these steps from the server
        self.starts: list[str | None] = []

    def init(self, *, id, resume, settings, dir, **words):
        self.starts.append(resume)
        if resume != "allow":
            self.history.clear()
        step = max(self.history) + 1 if self.history else 0
        return SimpleNamespace(id=id or "abc", step=step, dir=dir, log=self.log, finish=lambda exit_code: None)

    def log(self, values, step):
        if (self.history and step < max(self.history)) or (self.lost_from and step >= self.lost_from):
            return
        self.history.setdefault(step, {}).update(values)


def test_wandb_online_takes_up_its_run(tmp_path: Path, monkeypatch):
    server = Server()
    table = lambda columns, data: data  # noqa: E731
    monkeypatch.setattr(registry, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(Settings=dict, init=server.init, Table=table))
    config = config_in(tmp_path, "wandb")
    runs = log(config, 0, 2, {})
    server.lost_from = 4
    log(config, 2, 5, runs)
    assert list(server.history) == [1, 2, 3]
    server.lost_from = None
    log(config, 5, 7, runs)
    assert list(server.history) == list(range(1, 8)), "what the server had missed is there"
    assert [server.history[step]["loss"] for step in (1, 4, 6)] == [1.0, 4.02, 6.05]
    log(config, 3, 8, runs)
    assert list(server.history) == list(range(1, 9))
    assert [server.history[step]["loss"] for step in (1, 3, 4, 8)] == [1.0, 3.02, 4.03, 8.03], "no step is of before"
    assert server.history[3]["samples"] == [list(ROW.values())]
    assert server.starts == [None, "allow", "allow", None]


def test_wandb_records_titan_hds_commit_and_not_that_of_the_folder(tmp_path: Path, monkeypatch):
    seen = []
    fake = SimpleNamespace(Settings=dict, init=lambda **words: seen.append(words["settings"]) or SimpleNamespace(id=1))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for root in (None, tmp_path):
        monkeypatch.setattr(wandb_run, "repository", lambda root=root: root)
        wandb_run.WandbRun(str(tmp_path))
    timeout = {"init_timeout": wandb_run.START_SECONDS}
    assert seen == [{**timeout, "disable_git": True}, {**timeout, "git_root": str(tmp_path)}]


class Mlflow:
    """What the example of docs/metrics.md calls, as its library does it: metrics of a run are only added."""

    def __init__(self):
        self.runs: dict[str, list] = {}
        self.deleted: list[str] = []
        self.files: list[str] = []
        self.ends: list[str] = []

    def set_experiment(self, name):
        pass

    def start_run(self, run_id):
        assert run_id not in self.deleted
        self.now = run_id or f"run {len(self.runs)}"
        self.runs.setdefault(self.now, [])
        return SimpleNamespace(info=SimpleNamespace(run_id=self.now))

    def log_metrics(self, values, step):
        self.runs[self.now].append((step, *values.values()))

    def log_dict(self, values, path):
        json.dumps(values)
        self.files.append(path)

    def delete_run(self, run_id):
        self.deleted.append(run_id)

    def end_run(self, status):
        self.ends.append(status)


def write_example(folder: Path, monkeypatch) -> None:
    page = (REPOSITORY / "docs" / "metrics.md").read_text(encoding="utf-8")
    (folder / "my_trackers.py").write_text(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1])
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "my_trackers", raising=False)


def test_the_example_of_the_documentation(tmp_path: Path, monkeypatch):
    """As it stands there, against a stand-in for MLflow."""
    write_example(tmp_path, monkeypatch)
    mlflow = Mlflow()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setattr(registry, "find_spec", lambda name: name)
    config = config_in(tmp_path, "my_trackers:MlflowTracker")
    assert registry.tracker_errors(config) == []
    runs: dict[str, str] = {}
    for first, last in ((0, 2), (2, 4), (3, 4)):
        runs = log(config, first, last, runs)
    one, other = mlflow.runs.values()
    assert [step for step, _ in one] == [1, 2, 3, 3, 4]
    assert other == [(1, 1.0), (2, 2.0), (3, 3.02), (3, 0.3), (4, 4.03)]
    assert (mlflow.deleted, list(runs.values())) == (["run 0"], ["run 1"])
    assert mlflow.files == ["config.json", "samples/step-3.json", "config.json", "samples/step-3.json"]
    assert mlflow.ends == ["FINISHED"] * 3


def test_mlflows_own_reader_finds_what_the_example_logs(tmp_path: Path, monkeypatch):
    """Three starts from one checkpoint, which knows the first run of MLflow's only: that has been deleted meanwhile."""
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed (pip install mlflow-skinny)")
    write_example(tmp_path, monkeypatch)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlruns")
    config = config_in(tmp_path, "my_trackers:MlflowTracker")
    checkpoint = log(config, 0, 4, {})
    for first, last in ((3, 3), (3, 5), (3, 4)):
        log(config, first, last, checkpoint)
    client = mlflow.MlflowClient()
    (experiment,) = client.search_experiments(filter_string="name = 'titan_hd'")
    (run,) = client.search_runs([experiment.experiment_id])
    history = [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, "loss")]
    assert sorted(history) == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.03)]
    assert run.info.status == "FINISHED"
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["config.json", "samples"]
