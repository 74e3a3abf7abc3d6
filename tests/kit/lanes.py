"""The default tests in two pytest processes side by side: one process of tests leaves half of two cores idle.

    python -m tests.kit.lanes

The lane of `tests/integration` waits for launchers and servers; the other one computes. Its output comes at the end.
The exit status is 0 if both lanes passed, else that of the first that did not.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile

from tests.kit.commands import REPOSITORY

WAITING = ["tests/integration"]


def computing() -> list[str]:
    """Everything else: tests/unit first, which leaves a core to the other lane; tests/distributed last, which has use
    for both when the other lane has ended."""
    others = (path for path in (REPOSITORY / "tests").iterdir() if path.name not in ("integration", "kit"))
    return sorted(
        (f"tests/{p.name}" for p in others if p.match("test_*.py") or (p / "__init__.py").exists()), reverse=True
    )


def main() -> int:
    # Of two processes that compute, each has a core.
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    pytest = [sys.executable, "-m", "pytest"]

    def start(arguments: list[str], output=None) -> subprocess.Popen:
        return subprocess.Popen(
            [*pytest, *arguments], cwd=REPOSITORY, env=environment, stdout=output, stderr=output and subprocess.STDOUT
        )

    with tempfile.TemporaryFile() as said:
        lanes = [start(computing()), start(WAITING, said)]
        signal.signal(signal.SIGTERM, lambda *_: [lane.terminate() for lane in lanes])
        try:
            statuses = [lane.wait() for lane in lanes]
        finally:  # an interrupt comes to both of them by the terminal; wait for their clean-up
            for lane in lanes:
                lane.wait()
            said.seek(0)
            sys.stdout.buffer.write(said.read())
            sys.stdout.flush()
    return next((status for status in statuses if status), 0)


if __name__ == "__main__":
    sys.exit(main())
