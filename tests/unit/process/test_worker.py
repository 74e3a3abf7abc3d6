"""How a worker leaves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import multiprocessing, time
from titan_hd.process import worker
multiprocessing.get_context("fork").Process(target=time.sleep, args=(100,), daemon=True).start()
worker._exit_status = lambda run: 3
worker.run_worker(None)
"""


def test_it_leaves_no_process_behind():
    """os._exit runs none of the interpreter's own cleaning up. The child holds the pipe that is read here."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=Path(__file__).resolve().parents[3],
        stdout=subprocess.PIPE,
        timeout=90,
        check=False,
    )
    assert done.returncode == 3
