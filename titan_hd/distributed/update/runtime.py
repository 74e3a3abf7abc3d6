"""Runs update tasks so that collectives of one overlap the arithmetic of another, with bounded memory.

A task is a generator that issues asynchronous collectives, yields, and then waits for them and computes. All ranks run
the same tasks in the same order, so collectives are issued in the same order everywhere.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable

Task = Generator[None, None, None]


def run_tasks(tasks: Iterable[Task], in_flight: int) -> None:
    """Run all tasks with at most `in_flight` of them started and not finished; 1 means no overlap.

    Task j + in_flight starts only when task j is done, so the buffers of `in_flight` tasks live at the same time.
    """
    started: deque[Task] = deque()
    for task in tasks:
        if len(started) == in_flight:
            _finish(started.popleft())
        if next(task, _DONE) is not _DONE:
            started.append(task)
    while started:
        _finish(started.popleft())


_DONE = object()


def _finish(task: Task) -> None:
    for _ in task:
        pass
