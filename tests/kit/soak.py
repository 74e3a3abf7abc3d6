"""Disturbs a run by random faults, starts it again where it has ended, and compares it with one that nothing disturbed.

    python -m tests.kit.soak --faults 30 --workers 4

The kinds of faults, and what each must lead to, are in tests/kit/faults.py: the run goes on, or ends with one clear
line and then resumes. After every fault the losses must be those of the undisturbed run; at the end also the weights,
bit for bit, and metrics.jsonl must have every step once. A table of kinds, counts and outcomes is printed.
"""

from __future__ import annotations

import collections
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from tests.kit import runs
from tests.kit.faults import KINDS, OPTIONS, mount_small_disk, resumed_before, unmount
from tests.kit.forked_launch import ForkedLaunch
from tests.kit.recovery import last_step, records, tiny_run
from titan_hd.components.trackers.tracker import Tracker
from titan_hd.config.command_line import ToolParser

_STEPS_PER_FAULT = 10
Outcomes = dict[tuple[str, str], int]


class Pace(Tracker):
    """Slows a run down, so that the faults of a slow machine come before its end."""

    def log(self, step: int, values: object) -> None:
        time.sleep(0.03)


def soak(
    folder: Path,
    faults: Sequence[str],
    seed: int,
    workers: int,
    train: Callable[[list[str]], object] | None = None,
) -> Outcomes:
    """Returns how often each (kind, outcome) was. AssertionError: a fault led to what it must not, or the disturbed run
    is another one.

    faults: keys of KINDS, in order. train: runs without disturbance on as many workers; left out, by the launcher.
    """
    steps = 2 * (len(faults) + 2) * _STEPS_PER_FAULT  # what a fault waits for, and what passes until it has come
    shared = {"training__steps": steps}
    undisturbed = tiny_run(folder, "undisturbed", checkpoint__enable="false", **shared)
    (train or (lambda argv: _finish(ForkedLaunch(argv, workers, 0))))(undisturbed)
    argv = tiny_run(folder, "disturbed", metrics__trackers='["tests.kit.soak:Pace"]', **shared, **OPTIONS)
    mounted = mount_small_disk(folder / "disturbed" / "checkpoint")
    starts: list[ForkedLaunch] = []

    def start_anew() -> ForkedLaunch:
        starts.append(ForkedLaunch(argv, workers, len(starts) + 1))
        return starts[-1]

    try:
        outcomes = _disturb(folder, start_anew, faults, random.Random(seed), workers)
        compare(folder / "disturbed", folder / "undisturbed", steps)
        return outcomes
    finally:
        if starts and starts[-1].process.poll() is None:
            starts[-1].kill_all()
        if mounted:
            unmount(folder / "disturbed" / "checkpoint")


def _disturb(
    folder: Path, start_anew: Callable[[], ForkedLaunch], faults: Sequence[str], chance: random.Random, workers: int
) -> Outcomes:
    """A run with all the faults, to its end."""
    outcomes: collections.Counter[tuple[str, str]] = collections.Counter()
    want = [record["loss"] for record in records(folder / "undisturbed")]
    launch, cut, start = start_anew(), "", time.monotonic()
    for number, kind in enumerate(faults, 1):
        first = last_step(launch.dump)
        during_save = chance.random() < 0.5
        assert launch.wait_for_step(first + chance.randint(2, _STEPS_PER_FAULT)), launch.said()
        if during_save:
            assert launch.wait_for_save(), launch.said()
        if cut:
            outcomes["a file of the newest checkpoint is cut off", resumed_before(launch, cut)] += 1
        step, outcome = last_step(launch.dump), KINDS[kind](launch, chance, workers)
        cut = outcome if outcome.startswith("cut off ") else ""
        if not cut:
            outcomes[kind, outcome] += 1
        if launch.process.poll() is not None:
            launch = start_anew()
        got = [record["loss"] for record in records(launch.dump) if "loss" in record]
        assert got == want[: len(got)], f"after {kind} at step {step} the losses are others"
        print(f"{number}: {kind} at step {step}: {outcome} ({time.monotonic() - start:.0f} s)", flush=True)
    _finish(launch)
    if cut:
        outcomes["a file of the newest checkpoint is cut off", resumed_before(launch, cut)] += 1
    return dict(outcomes)


def _finish(launch: ForkedLaunch) -> None:
    status, said = launch.end(timeout=3600)
    assert status == 0, said


def compare(disturbed: Path, undisturbed: Path, steps: int) -> None:
    """The same weights bit for bit, every step once, the same losses."""
    got, want = runs.exported(disturbed), runs.exported(undisturbed)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)
    trained = [record for record in records(disturbed) if "loss" in record]
    assert [record["step"] for record in trained] == list(range(1, steps + 1))
    assert [record["loss"] for record in trained] == [record["loss"] for record in records(undisturbed)]


def drawn(count: int, chance: random.Random) -> list[str]:
    """So many faults in a random order: of each kind as many, but for a remainder."""
    kinds = list(KINDS)
    chance.shuffle(kinds)
    faults = [kinds[place % len(kinds)] for place in range(count)]
    chance.shuffle(faults)
    return faults


def table(outcomes: Outcomes) -> str:
    """In Markdown, by kind."""
    rows = [f"| {kind} | {count} | {outcome} |" for (kind, outcome), count in sorted(outcomes.items())]
    return "\n".join(["| fault | times | what the user sees |", "|---|---:|---|", *rows])


def main() -> None:
    parser = ToolParser(__doc__)
    parser.add_argument("--faults", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=4)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and clear up
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        outcomes = soak(Path(folder), drawn(args.faults, random.Random(args.seed)), args.seed, args.workers)
    print(table(outcomes))
    print(f"{args.faults} faults: weights bit for bit as undisturbed, every step once, the same losses")


if __name__ == "__main__":
    main()
