"""Makes the runs of a comparison, one after another or several at a time, and says how each ended."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from titan_hd.config import manager
from titan_hd.config.job_config import JobConfig
from titan_hd.errors import UserError
from titan_hd.files import disk_faults, read_json_object
from titan_hd.preflight import RunPlan

COMPLETE = "complete"
RUN_TRAIN = Path(__file__).resolve().parent.parent.parent / "run_train.sh"
_USER_ERROR, _DIVERGED, _KILLED = 2, 3, 137
_STOPPED = (75, 130, 143)  # by a signal: neither finished nor failed
# What torch says on a GPU and on a CPU. A kernel that lacks memory kills without a word.
_OUT_OF_MEMORY = ("OutOfMemoryError", "out of memory", "can't allocate memory")


class Stopped(Exception):
    """A signal has ended a run, or this program is to end."""


@dataclass(frozen=True)
class PlannedRun:
    """A run, its folder, its options for run_train.sh, and what these come to."""

    name: str
    folder: Path
    options: list[str]
    config: JobConfig
    plan: RunPlan

    @property
    def log(self) -> Path:
        return self.folder / "run.log"


class Runner:
    """Makes runs in processes of their own.

    workers: of each run. parallel: runs at a time; each has GPUs of its own, or its share of the cores.
    """

    def __init__(self, workers: int, parallel: int):
        self.workers = workers
        self._environments: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
        for place in range(parallel):
            self._environments.put(environment(workers, parallel, place))
        self._pool = ThreadPoolExecutor(parallel)
        self._children: set[subprocess.Popen] = set()
        self._stopping = False
        self._lock = threading.Lock()  # of these two: nothing starts once the others have been told to end

    def make(self, planned: Sequence[PlannedRun], done: Callable[[PlannedRun, str], None]) -> None:
        """Make the runs, in order; done: called in this thread with each as it ends and its status: complete, diverged,
        out_of_memory, failed.

        Raises:
            UserError: a run found its settings or its files at fault, so that the others are likely to.
            Stopped: a signal ended a run, or came here; what was running saves and ends, and no other starts.
        """
        with self._ending_children():
            futures = {self._pool.submit(self._run, run): run for run in planned}
            try:
                for future in as_completed(futures):
                    done(futures[future], future.result())
            except BaseException as error:
                self._stop()
                self._pool.shutdown(wait=True, cancel_futures=True)
                # A run that was stopped for another's fault may be heard of first.
                ended = (future.exception() for future in futures if future.done() and not future.cancelled())
                fault = next((found for found in ended if isinstance(found, UserError)), None)
                if isinstance(error, Stopped) and fault is not None:
                    raise fault from None
                raise

    def _run(self, run: PlannedRun) -> str:
        variables = self._environments.get()
        try:
            run.folder.mkdir(parents=True, exist_ok=True)
            with open(run.log, "ab") as log:
                command = [str(RUN_TRAIN), *run.options]
                with self._lock:
                    if self._stopping:
                        raise Stopped
                    child = subprocess.Popen(command, env={**os.environ, **variables}, stdout=log, stderr=log)
                    self._children.add(child)
                status = child.wait()
            with self._lock:
                self._children.discard(child)
            return _kind(status, run)
        except BaseException:
            self._stop()  # before this place is free for the next
            raise
        finally:
            self._environments.put(variables)

    def _stop(self) -> None:
        """Let nothing start any more, and have what runs save and end. A second signal would end it without saving."""
        with self._lock:
            if not self._stopping:
                for child in self._children:
                    child.send_signal(signal.SIGTERM)
            self._stopping = True

    @contextmanager
    def _ending_children(self) -> Iterator[None]:
        """SIGTERM is passed on to the runs, which save; Ctrl-C has reached them already."""

        def stop(number: int, frame: object) -> None:
            raise Stopped

        before = signal.signal(signal.SIGTERM, stop)
        try:
            yield
        except KeyboardInterrupt:
            raise Stopped from None
        finally:
            signal.signal(signal.SIGTERM, before)


def environment(workers: int, parallel: int, place: int) -> dict[str, str]:
    """Variables of the run at one of `parallel` places: its GPUs, or its threads."""
    variables = {"NGPU": str(workers)}
    if torch.cuda.is_available():
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(devices[place * workers : (place + 1) * workers])
    elif "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        variables["OMP_NUM_THREADS"] = str(max(1, cores // (workers * parallel)))
    return variables


def _kind(status: int, run: PlannedRun) -> str:
    text = run.log.read_text(encoding="utf-8", errors="replace")
    if status == 0:
        return COMPLETE
    if status in _STOPPED or status in (-signal.SIGTERM, -signal.SIGINT):
        raise Stopped
    if status == _USER_ERROR:
        said = [line for line in text.splitlines() if line.startswith("titan_hd: error: ")]
        raise UserError(f"{run.name}: {said[-1].removeprefix('titan_hd: error: ') if said else 'status 2'} ({run.log})")
    if status == _DIVERGED:
        return "diverged"
    if status in (_KILLED, -signal.SIGKILL) or any(words in text for words in _OUT_OF_MEMORY):
        return "out_of_memory"
    return "failed"


def check_started(run: PlannedRun, options: Mapping[str, float]) -> None:
    """See that the run's folder, if it is there, is of the same settings, and note them.

    options: of the comparison that change what a run comes to, by their names.

    Raises:
        UserError: it is of other settings, or cannot be written.
    """
    started, noted = run.folder / "comparison.toml", run.folder / "options.json"
    with disk_faults(run.folder):
        if started.exists():
            # Read rather than compared as text: a later version of titan_hd may have more keys, with their defaults.
            if manager.from_toml(started.read_text(encoding="utf-8"), str(started)) != run.config:
                raise UserError(
                    f"--folder: {run.folder} holds a run with other settings; name another folder, or remove it"
                )
            before = read_json_object(noted) if noted.exists() else {}  # an earlier version's has none
            for name, value in options.items():
                if before.get(name, value) != value:
                    raise UserError(
                        f"--{name}: {run.folder} holds a run with {before[name]}, not {value}; give that, or name "
                        "another folder"
                    )
            return
        run.folder.mkdir(parents=True, exist_ok=True)
        noted.write_text(json.dumps(dict(options)), encoding="utf-8")
        started.write_text(manager.to_toml(run.config), encoding="utf-8")
