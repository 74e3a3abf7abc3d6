"""Kills a run with SIGKILL at random moments, starts it again, and compares it with one that nothing disturbed.

    python -m tests.kit.soak --kills 30

One rank or all processes, at a random step or while a checkpoint is being written. At the end the weights must be those
of the undisturbed run bit for bit, and metrics.jsonl must have every step once, with the same losses.
"""

from __future__ import annotations

import collections
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tests.kit import runs
from tests.kit.recovery import Launch, last_step, records, tiny_run
from titan_hd.config.command_line import ToolParser

_STEPS_PER_KILL = 12


def soak(
    folder: Path, kills: int, seed: int, workers: int, train: Callable[[list[str]], object] | None = None
) -> dict[str, int]:
    """Returns how often each kind of kill was done. AssertionError: the disturbed run is another one.

    train: runs without disturbance on as many workers; left out, by the launcher.
    """
    steps = 2 * (kills + 1) * _STEPS_PER_KILL  # what a kill waits for, and what passes until it comes
    (train or (lambda argv: _finish(Launch(argv, workers))))(tiny_run(folder, "undisturbed", training__steps=steps))
    chance, done = random.Random(seed), collections.Counter()
    argv = tiny_run(folder, "disturbed", training__steps=steps)
    while True:
        launch = Launch(argv, workers)
        if done.total() == kills:
            break
        kind = _kill(launch, chance)
        status, said = launch.end()
        assert status != 0 or kind is None, said
        if kind is None:
            raise AssertionError(f"the run ended after {done.total()} kills:\n{said}")
        done[kind] += 1
        print(f"{done.total()}: {kind} at step {last_step(launch.dump)}, status {status}", flush=True)
    _finish(launch)
    compare(folder / "disturbed", folder / "undisturbed", steps)
    return dict(done)


def _finish(launch: Launch) -> None:
    status, said = launch.end(timeout=3600)
    assert status == 0, said


def _kill(launch: Launch, chance: random.Random) -> str | None:
    """Kill something at a random moment; says what, or None if the run ended before."""
    who, during_save = chance.choice(["one rank", "all ranks"]), chance.random() < 0.5
    first = last_step(launch.dump)
    if not launch.wait_for_step(first + chance.randint(1, _STEPS_PER_KILL)):
        return None
    if during_save and not launch.wait_for_save():
        return None
    time.sleep(chance.random() * (0.01 if during_save else 0.1))
    if who == "all ranks":
        launch.kill_all()
    else:
        os.kill(chance.choice(launch.worker_pids()), signal.SIGKILL)
    return who + (", during a save" if during_save else "")


def compare(disturbed: Path, undisturbed: Path, steps: int) -> None:
    """The same weights bit for bit, every step once, the same losses."""
    got, want = runs.exported(disturbed), runs.exported(undisturbed)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    trained = [record for record in records(disturbed) if "loss" in record]
    assert [record["step"] for record in trained] == list(range(1, steps + 1))
    assert [record["loss"] for record in trained] == [record["loss"] for record in records(undisturbed)]


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        done = soak(Path(folder), args.kills, args.seed, args.workers)
    print(f"{args.kills} kills ({done}): weights bit for bit as undisturbed, every step once, the same losses")


if __name__ == "__main__":
    main()
