"""The default tests in two lanes side by side: one process of tests leaves half of two cores idle.

    python -m tests.kit.lanes

The tests are in groups, a process each, the longest first; a lane that is free takes the next. What a group says is
printed when it has ended. The exit status is 0 if all passed, else that of the first that did not.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from tests.kit.commands import REPOSITORY

LANES, PARTS = 2, 4
LONG = ("distributed", "integration")  # the second waits for launchers and servers


def groups() -> list[list[str]]:
    """Paths of each group: the long ones, then all the others in parts."""
    tests = REPOSITORY / "tests"
    folders = (path for path in (*tests.iterdir(), *(tests / "unit").iterdir()))
    short = sorted(path for path in folders if _is_test(path) and path.name not in ("unit", "kit"))
    names = [f"{path.relative_to(REPOSITORY)}" for path in short if path.parent != tests or path.name not in LONG]
    return [*([f"tests/{name}"] for name in LONG), *(names[i::PARTS] for i in range(PARTS))]


def _is_test(path: Path) -> bool:
    return path.match("test_*.py") or (path / "__init__.py").exists()


def main() -> int:
    started: list[subprocess.Popen] = []
    statuses: list[int] = []
    waiting: queue.SimpleQueue[list[str]] = queue.SimpleQueue()
    for paths in groups():
        waiting.put(paths)
    stopping, printing = threading.Event(), threading.Lock()

    def stop(*_) -> None:
        stopping.set()
        for process in started:
            process.terminate()

    signal.signal(signal.SIGTERM, stop)
    # Two processes that compute have a core each.
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}

    def lane() -> None:
        while not stopping.is_set():
            try:
                paths = waiting.get_nowait()
            except queue.Empty:
                return
            print(f"started: {' '.join(paths)}", flush=True)
            with tempfile.TemporaryFile() as said:
                command = [sys.executable, "-m", "pytest", *paths]
                process = subprocess.Popen(
                    command, cwd=REPOSITORY, env=environment, stdout=said, stderr=subprocess.STDOUT
                )
                started.append(process)
                statuses.append(process.wait())
                said.seek(0)
                with printing:
                    sys.stdout.buffer.write(said.read())
                    sys.stdout.flush()

    lanes = [threading.Thread(target=lane) for _ in range(LANES)]
    for thread in lanes:
        thread.start()
    for thread in lanes:  # an interrupt reaches the tests by the terminal, and they clean up
        thread.join()
    return 128 + signal.SIGTERM if stopping.is_set() else next((status for status in statuses if status), 0)


if __name__ == "__main__":
    sys.exit(main())
