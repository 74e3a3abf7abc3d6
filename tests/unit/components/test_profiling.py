"""Traces of chosen steps and ranks, the names in them, and memory snapshots with a stand-in for CUDA's record."""

from __future__ import annotations

import json
import logging
import os
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerAction

from titan_hd.components.phases import Phases
from titan_hd.components.profiling import Profiling, Traces
from titan_hd.config import manager
from titan_hd.config.job_config import JobConfig
from titan_hd.config.job_config import Profiling as Settings
from titan_hd.distributed.named_ranges import name_ranges, named

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def no_names():
    yield
    name_ranges()


def configuration(folder: Path, **settings) -> JobConfig:
    config = JobConfig(profiling=Settings(**settings))
    config.job.dump_folder = str(folder)
    return config


# ---------------------------------------------------------------------------------------------------------------------
# Traces

N, W, R, S = ProfilerAction.NONE, ProfilerAction.WARMUP, ProfilerAction.RECORD, ProfilerAction.RECORD_AND_SAVE


class Asked:
    """In the place of torch's profiler: the action of each step, asked for as it does, by its own count."""

    def __init__(self, schedule, **_):
        self.schedule, self.actions = schedule, [schedule(0)]

    def step(self) -> None:
        self.actions.append(self.schedule(len(self.actions)))

    def start(self) -> None:
        pass

    stop = start


@pytest.mark.parametrize(
    ("settings", "actions"),
    [
        ({"profile_freq": 3}, [N, W, S, N, W, S, N]),
        ({"profile_freq": 1}, [S] * 7),
        ({"profile_steps": [1, 4, 5]}, [S, N, W, R, S, N, N]),
    ],
)
def test_which_steps_are_traced(tmp_path, monkeypatch, settings: dict, actions: list[ProfilerAction]):
    """By the steps of the run, also in a process that goes on with it, and after steps that were made by hand."""
    monkeypatch.setattr(torch.profiler, "profile", Asked)
    for done in (0, 2):
        traces = Traces(Settings(**settings), tmp_path, 0, done)
        for step in range(done + 1, 7):
            traces.after_step(step)
        traces.close()
        assert traces._profiler.actions == actions[done:]
    traces = Traces(Settings(**settings), tmp_path, 0, 0)
    for step in (4, 5, 6):
        traces.after_step(step)
    assert traces._profiler.actions == [actions[0], *actions[4:]]


def step(phases: Phases) -> None:
    phases.begin("data")
    phases.begin("forward_backward")
    torch.ones(64, 64) @ torch.ones(64, 64)
    phases.begin("exchange")
    with named("fold"):
        torch.ones(8, 8).add_(1)
    phases.end()


def profile(config: JobConfig, rank: int, steps: int, first: int = 0) -> None:
    profiling, phases = Profiling(config, rank, CPU), Phases(CPU)
    profiling.start(first, first + steps)
    for number in range(first, first + steps):
        step(phases)
        for after in profiling.after_each_step:
            after(number + 1)
    profiling.close()


def test_a_trace_has_the_names_of_the_parts_of_a_step(tmp_path):
    profile(configuration(tmp_path, enable_profiling=True, profile_steps=[2]), 0, 3)
    assert sorted(path.name for path in (tmp_path / "profile_traces").iterdir()) == [
        "step2-rank0.json",
        "step2-rank0.txt",
    ]
    events = json.loads((tmp_path / "profile_traces" / "step2-rank0.json").read_text())["traceEvents"]
    spans = {e["name"]: (e["ts"], e["ts"] + e["dur"]) for e in events if e.get("cat") in ("user_annotation", "cpu_op")}
    names = ["data", "forward_backward", "exchange"]
    begins, ends = zip(*(spans[f"titan_hd::{name}"] for name in names))
    assert all(end <= begin for end, begin in zip(ends, begins[1:])), "one after the other"
    for inner, outer in (("titan_hd::fold", "titan_hd::exchange"), ("aten::matmul", "titan_hd::forward_backward")):
        assert spans[outer][0] <= spans[inner][0] <= spans[inner][1] <= spans[outer][1]
    table = (tmp_path / "profile_traces" / "step2-rank0.txt").read_text()
    assert table.startswith("part of a step             calls    host, ms\n")
    rows = [line.split() for line in table.split("\n\n")[0].splitlines()[1:]]
    assert sorted(name for name, *_ in rows) == sorted([*names, "fold"])
    assert all(count == "1" and float(milliseconds) > 0 for _, count, milliseconds in rows)
    assert [float(row[2]) for row in rows] == sorted((float(row[2]) for row in rows), reverse=True)
    assert "aten::mm" in table


def test_steps_that_follow_each_other_are_one_trace(tmp_path):
    profile(configuration(tmp_path, enable_profiling=True, profile_steps=[5, 6], profile_ranks=[1]), 1, 4, first=3)
    (trace,) = (tmp_path / "profile_traces").glob("*.json")
    assert trace.name == "step6-rank1.json"
    assert trace.read_text().count('"titan_hd::data"') == 2


def test_nothing_is_done_that_was_not_asked_for(tmp_path):
    """Not by default, and not on other ranks."""
    for settings in ({}, {"enable_profiling": True, "profile_freq": 1}):
        profile(configuration(tmp_path, **settings), 1, 2)
        profiling = Profiling(configuration(tmp_path, **settings), 1, CPU)
        profiling.start(0, 2)
        assert profiling.after_each_step == []
        assert named("fold") is named("exchange"), "one object that does nothing"
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_a_warning(tmp_path, caplog):
    (tmp_path / "profile_traces" / "step1-rank0.json").mkdir(parents=True)
    profile(configuration(tmp_path, enable_profiling=True, profile_steps=[1]), 0, 2)
    assert "step1-rank0.json: cannot be written" in caplog.text


def test_steps_that_the_run_does_not_make(tmp_path, caplog):
    config = configuration(tmp_path, enable_profiling=True, profile_steps=[3, 4, 99], memory_snapshot_steps=[4])
    profile(config, 0, 2, first=3)
    assert "profiling.profile_steps: 3, 99: this run makes steps 4 to 5" in caplog.text
    assert "memory_snapshot_steps" not in caplog.text


@pytest.mark.parametrize(
    ("first", "last", "warns"), [(0, 9, True), (10, 19, True), (0, 10, False), (9, 10, False), (12, 12, False)]
)
def test_a_run_that_ends_before_its_first_trace(tmp_path, caplog, first: int, last: int, warns: bool):
    """One line, on any rank, as of chosen steps; none where the traces are chosen by their steps."""
    Profiling(configuration(tmp_path, enable_profiling=True, profile_freq=10), 1, CPU).start(first, last)
    Profiling(configuration(tmp_path, enable_profiling=True, profile_steps=[last]), 1, CPU).start(first, last)
    Profiling(configuration(tmp_path, profile_freq=10), 1, CPU).start(first, last)
    line = "profiling.profile_freq: 10: there will be no trace, for this run makes steps "
    assert caplog.messages == [f"{line}{first + 1} to {last}"] * warns


# ---------------------------------------------------------------------------------------------------------------------
# What needs a GPU


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """CUDA's record of allocations and its ranges, in a list: what was asked of them."""
    asked: list[object] = []

    def dump(path: str) -> None:
        Path(path).write_bytes(b"a snapshot")
        asked.append(Path(path).name)

    @contextmanager
    def name_range(name: str):
        asked.append(name)
        yield
        asked.append("end")

    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **settings: asked.append(settings))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", dump)
    monkeypatch.setattr(torch.cuda.nvtx, "range", name_range)
    return asked


def test_memory_snapshots(tmp_path, cuda, caplog):
    """After a chosen step, after the step in which the process is asked, and of the moment in which memory runs out."""
    config = configuration(tmp_path, enable_memory_snapshot=True, memory_snapshot_steps=[2])
    before = signal.getsignal(signal.SIGUSR2)
    caplog.set_level(logging.INFO)
    profiling = Profiling(config, 0, CUDA)
    assert cuda == [{"max_entries": 100_000, "stacks": "python"}], "from the start, also of the set-up"
    assert f"kill -USR2 {os.getpid()} on " in caplog.text
    profiling.start(0, 9)
    (after,) = profiling.after_each_step
    for number in range(1, 6):
        if number == 4:
            os.kill(os.getpid(), signal.SIGUSR2)
        after(number)
    with pytest.raises(torch.OutOfMemoryError), profiling.watching_memory(lambda: 5):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(RuntimeError), profiling.watching_memory(lambda: 5):
        raise RuntimeError("another fault")
    profiling.close()
    names = ["step2-rank0.pickle", "step4-rank0.pickle", "out-of-memory-step6-rank0.pickle"]
    assert cuda[1:] == [*names, {"enabled": None}]
    assert {path.name for path in (tmp_path / "memory_snapshots").iterdir()} == set(names)
    assert f"memory ran out; snapshot: {tmp_path}/memory_snapshots/{names[2]}" in caplog.text
    assert signal.getsignal(signal.SIGUSR2) == before


def test_other_ranks_write_where_they_are_asked_or_run_out(tmp_path, cuda):
    config = configuration(tmp_path, enable_memory_snapshot=True, memory_snapshot_steps=[1])
    profiling = Profiling(config, 3, CUDA)
    profiling.after_each_step[0](1)
    with pytest.raises(torch.OutOfMemoryError), profiling.watching_memory(lambda: 0):
        raise torch.OutOfMemoryError
    profiling.close()
    assert cuda[1:-1] == ["out-of-memory-step1-rank3.pickle"]


def test_a_disk_that_takes_no_snapshot(tmp_path, cuda, caplog):
    (tmp_path / "memory_snapshots").write_text("a file")
    profiling = Profiling(configuration(tmp_path, enable_memory_snapshot=True, memory_snapshot_steps=[1]), 0, CUDA)
    profiling.after_each_step[0](1)
    with pytest.raises(torch.OutOfMemoryError), profiling.watching_memory(lambda: 1):
        raise torch.OutOfMemoryError
    profiling.close()
    assert caplog.text.count("cannot be written") == 2


def test_names_for_nsight(tmp_path, cuda):
    profiling = Profiling(configuration(tmp_path, enable_nvtx=True), 0, CUDA)
    step(Phases(CPU))
    profiling.close()
    step(Phases(CPU))
    names = ["titan_hd::data", "end", "titan_hd::forward_backward", "end", "titan_hd::exchange", "titan_hd::fold"]
    assert cuda == [*names, "end", "end"]


def test_without_a_gpu_nothing_is_recorded(tmp_path, cuda):
    settings = {"enable_memory_snapshot": True, "enable_nvtx": True}
    profile(configuration(tmp_path, **settings), 0, 1)
    assert cuda == []


# ---------------------------------------------------------------------------------------------------------------------
# Keys


def test_keys_and_their_faults():
    argv = ["--model.flavor=debugmodel", "--model.name=llama3", "--data.train=x", "--training.steps=9"]
    profiling = manager.load(
        [*argv, "--profiling.enable_profiling", "--profiling.profile_steps=3,5", "--profiling.profile_ranks=[0, 2]"]
    ).profiling
    assert (profiling.profile_steps, profiling.profile_ranks) == ([3, 5], [0, 2])
    numbers = "must be a list of whole numbers"
    faults = {
        "profile_steps=3": "profile_steps: needs profiling.enable_profiling",
        "memory_snapshot_steps=3": "memory_snapshot_steps: needs profiling.enable_memory_snapshot",
        "with_stack=true": "with_stack: needs profiling.enable_profiling",
        "profile_ranks=0,-1": "profile_ranks: must be at least 0, not -1",
        "profile_ranks=a": f"profile_ranks: {numbers}, not 'a' (command line)",
        "profile_ranks=[true]": f"profile_ranks: {numbers}, not '[true]' (command line)",
        "profile_ranks=[1": f"profile_ranks: {numbers}, as a,b or as JSON, not '[1' (command line)",
    }
    for option, line in faults.items():
        with pytest.raises(manager.ConfigError) as caught:
            manager.load([*argv, f"--profiling.{option}"])
        assert str(caught.value).splitlines() == [f"profiling.{line}"]
    with pytest.raises(manager.ConfigError, match=r"profiling\.profile_ranks: names no worker that would write"):
        manager.load([*argv, "--profiling.enable_profiling", "--profiling.profile_ranks=[]"])
