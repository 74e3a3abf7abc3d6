"""The default tests in two lanes side by side: one process of tests leaves half of two cores idle.

    python -m tests.kit.lanes

One lane is tests/integration, which waits for launchers and servers; its output comes at the end. The other one is all
the rest: first what needs no workers and leaves a core free, then tests/distributed, in a process of its own. The exit
status is 0 if all passed, else that of the first that did not.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile

from tests.kit.commands import REPOSITORY

LONG = ("integration", "distributed")


def others() -> list[str]:
    """Tests that are neither in tests/integration nor in tests/distributed."""
    paths = (path for path in (REPOSITORY / "tests").iterdir() if path.name not in (*LONG, "kit"))
    return sorted(f"tests/{p.name}" for p in paths if p.match("test_*.py") or (p / "__init__.py").exists())


def main() -> int:
    started: list[subprocess.Popen] = []

    def stop(*_) -> None:
        for process in started:
            process.terminate()
        sys.exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    # Two processes that compute have a core each.
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}

    def start(paths: list[str], output=None) -> subprocess.Popen:
        command, errors = [sys.executable, "-m", "pytest", *paths], output and subprocess.STDOUT
        started.append(subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=output, stderr=errors))
        return started[-1]

    with tempfile.TemporaryFile() as said:
        beside = start(["tests/integration"], said)
        try:
            statuses = [start(paths).wait() for paths in (others(), ["tests/distributed"])]
        finally:  # an interrupt reaches all of them by the terminal, and they clean up
            for process in started:
                process.wait()
            said.seek(0)
            sys.stdout.buffer.write(said.read())
            sys.stdout.flush()
    return next((status for status in (*statuses, beside.returncode) if status), 0)


if __name__ == "__main__":
    sys.exit(main())
