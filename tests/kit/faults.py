"""What befalls a run in the soak, one function for each kind of fault.

A fault is done at a random moment of a run, which then either goes on or has ended. It returns what became of that, in
a few words; AssertionError if it was not what the kind of fault owes to its user: to go on, or one clear line.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.kit.forked_launch import ForkedLaunch

TIMEOUT = 8  # seconds, of every collective once the run has started
_BRIEF = 1.0  # an fsync of a slow disk; a checkpoint has about eight
_PATIENCE = 120  # seconds within which what a fault must lead to has come
OPTIONS = {"comm__train_timeout_seconds": TIMEOUT, "comm__save_timeout_seconds": TIMEOUT}
_KEEPS = r"the checkpoint cannot be saved: .*(No space left on device|File too large).*; earlier ones are untouched"

Fault = Callable[[ForkedLaunch, random.Random, int], str]


def _only_line(said: str, pattern: str) -> str:
    """The one line of a log that matches."""
    found = [line for line in said.splitlines() if re.search(pattern, line)]
    assert len(found) == 1, f"{len(found)} lines for {pattern!r}:\n{said}"
    return found[0]


def _until(launch: ForkedLaunch, condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not condition():
        assert launch.process.poll() is None, f"the run has ended, before {what}:\n{launch.said()}"
        assert time.monotonic() < deadline, f"waited {_PATIENCE} s for {what}:\n{launch.said()}"
        time.sleep(0.02)


def kill_one(launch: ForkedLaunch, chance: random.Random, workers: int) -> str:
    """The launcher ends the others, and says which worker was lost, with its signal's status."""
    rank = chance.randrange(workers)
    os.kill(launch.worker(rank), signal.SIGKILL)
    status, said = launch.end(_PATIENCE)
    assert status == 128 + signal.SIGKILL, said
    _only_line(said, rf"^titan_hd: worker {rank} ended with signal 9$")
    assert said.count("titan_hd: worker") == 1, said
    assert "Traceback" not in said, said
    return "status 137, one line"


def kill_all(launch: ForkedLaunch, chance: random.Random, workers: int) -> str:
    """As when the machine goes down: nobody can say anything."""
    launch.kill_all()
    status, _ = launch.end(_PATIENCE)
    assert status == -signal.SIGKILL
    return "nothing is left to speak"


def stop_one(launch: ForkedLaunch, chance: random.Random, workers: int) -> str:
    """Stopped for longer than the time-out, then continued: the others have named who was late, and ended."""
    rank = chance.randrange(workers)
    pid = launch.worker(rank)
    os.kill(pid, signal.SIGSTOP)
    try:
        _until(launch, lambda: re.search(r"has waited for", launch.said()), "the report")
        time.sleep(TIMEOUT)
    finally:
        os.kill(pid, signal.SIGCONT)
    status, said = launch.end(_PATIENCE)
    assert status not in (0, None), said
    assert _names_late(said, rank) == 1, said
    return "one line names the rank"


def full_disk(launch: ForkedLaunch, chance: random.Random, workers: int) -> str:
    """A save fails with one line, leaves nothing, and the training goes on."""
    disk = launch.dump / "checkpoint"
    before = launch.said().count("the checkpoint cannot be saved")
    undo = _fill(disk) if os.path.ismount(disk) else _forbid_files(launch.worker(chance.randrange(1, workers)))
    try:
        _until(launch, lambda: launch.said().count("the checkpoint cannot be saved") > before, "a save that fails")
    finally:
        undo()
    failed = [line for line in launch.said().splitlines() if "the checkpoint cannot be saved" in line][before:]
    assert all(re.search(_KEEPS, line) for line in failed), failed
    _goes_on(launch)
    return "a warning for each save, goes on"


def _fill(disk: Path) -> Callable[[], None]:
    ballast = disk / "ballast"
    with open(ballast, "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    return ballast.unlink


def _forbid_files(pid: int) -> Callable[[], None]:
    """Of a rank without a disk of its own that could be full: it may not write any file. (Not rank 0: its log.)"""
    import resource

    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, before[1]))
    return lambda: resource.prlimit(pid, resource.RLIMIT_FSIZE, before) and None


def _goes_on(launch: ForkedLaunch) -> None:
    """Until a checkpoint is saved again."""
    before = launch.said().count("saved checkpoint ")
    _until(launch, lambda: launch.said().count("saved checkpoint ") > before, "the next checkpoint")


def slow_disk(launch: ForkedLaunch, chance: random.Random, workers: int) -> str:
    """Slow, but within the time-out: the save takes as long as it takes."""
    slow = launch.dump.parent / f"slow-{chance.randrange(1, workers)}"
    slow.write_text(str(_BRIEF))
    try:
        begun = len(_seconds_of_saves(launch.said()))
        _until(launch, lambda: any(s >= _BRIEF for s in _seconds_of_saves(launch.said())[begun:]), "a slow save")
    finally:
        slow.unlink()
    _goes_on(launch)
    return "waits, goes on"


def _seconds_of_saves(said: str) -> list[float]:
    return [float(seconds) for seconds in re.findall(r"saved checkpoint .* in ([\d.]+) s$", said, re.MULTILINE)]


def dead_disk(launch: ForkedLaunch, chance: random.Random, workers: int) -> str:
    """A disk that does not answer within the time-out, as of a file server that is gone: the run ends, and says who."""
    rank = chance.randrange(1, workers)
    status, said = _dead_disk_of(rank, launch)
    assert status == 2, said
    line = _only_line(said, "^titan_hd: error: ")
    assert re.search(rf"cannot be saved: rank {rank} has waited for .* for its disk, in .*; earlier ones are unt", line)
    assert "Traceback" not in said, said
    _names_late(said, rank)
    return "status 2, one line names the rank"


def dead_disk_of_rank_zero(launch: ForkedLaunch, chance: random.Random, workers: int) -> str:
    """As `dead_disk`; but this rank's training waits for its disk, too, which writes metrics.jsonl."""
    status, said = _dead_disk_of(0, launch)
    assert status not in (0, None), said
    assert _names_late(said, 0), said
    return "one line names the rank"


def _dead_disk_of(rank: int, launch: ForkedLaunch) -> tuple[int, str]:
    slow = launch.dump.parent / f"slow-{rank}"
    slow.write_text(str(4 * TIMEOUT))
    try:
        return launch.end(_PATIENCE)
    finally:
        slow.unlink()


def _names_late(said: str, rank: int) -> int:
    """How often it is said who is late: at most once, and it is this rank."""
    lines = [line for line in said.splitlines() if re.search(r"^titan_hd: rank \d+ has waited for ", line)]
    assert len(lines) <= 1, lines
    for line in lines:
        assert f"rank {rank} is late: " in line, line
        assert line.count("is late") == 1, line
    return len(lines)


def truncated_file(launch: ForkedLaunch, chance: random.Random, workers: int) -> str:
    """All are killed, and a file of the newest checkpoint is cut off: the next start names it and takes the one before.
    (`resumed_before` looks at that start.)"""
    _until(launch, lambda: len(_checkpoints(launch.dump)) > 1, "two checkpoints")
    launch.kill_all()
    launch.end(_PATIENCE)
    newest = _checkpoints(launch.dump)[-1]
    path = chance.choice(
        [path for path in sorted(newest.iterdir()) if path.stat().st_size and path.name != "manifest.json"]
    )
    os.truncate(path, chance.randrange(path.stat().st_size))
    return f"cut off {path}"


def _checkpoints(dump: Path) -> list[Path]:
    return sorted((dump / "checkpoint").glob("step-*[0-9]"), key=lambda path: int(path.name.partition("-")[2]))


def resumed_before(launch: ForkedLaunch, cut: str) -> str:
    """What the start after `truncated_file` owes."""
    path = cut.partition("cut off ")[2]
    said = launch.said()
    _only_line(said, re.escape(path) + r": has \d+ bytes, must have \d+")
    resumed = _only_line(said, "resumed from ")
    assert f"{Path(path).parent} " not in resumed + " ", resumed
    return "one line names the file, the one before is taken"


KINDS: dict[str, Fault] = {
    "a rank is killed": kill_one,
    "all are killed": kill_all,
    "a rank stops for longer than the time-out": stop_one,
    "a full disk": full_disk,
    "a slow disk": slow_disk,
    "a disk that does not answer": dead_disk,
    "the disk of rank 0 does not answer": dead_disk_of_rank_zero,
    "a file of the newest checkpoint is cut off": truncated_file,
}


def mount_small_disk(folder: Path) -> bool:
    """A disk of 8 MB of its own for a folder, where this process may mount one; `unmount` ends it."""
    folder.mkdir(parents=True, exist_ok=True)
    if os.geteuid() or not shutil.which("mount"):
        return False
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def unmount(folder: Path) -> None:
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
