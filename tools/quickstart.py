"""The bundled quick start as run_train.sh starts it: a run, and then the page of its curves.

    python tools/quickstart.py --nproc_per_node 2 -- --config train_configs/quickstart.toml ...

The arguments are those of `python -m titan_hd.launch`.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # run_train.sh asks Python to leave it out

from plot_run import plot
from run_plots.records import METRICS

from titan_hd.config import manager
from titan_hd.errors import UserError
from titan_hd.process import launch


def main() -> None:
    """Exits with the status of a worker that failed."""
    argv = launch.split_arguments(sys.argv[1:])[1]
    folder = Path(manager.load_or_exit(argv).job.dump_folder)
    before = _state(folder / METRICS)
    launch.main()
    for number in (signal.SIGTERM, signal.SIGINT):  # torch's agent leaves its handlers, which raise
        signal.signal(number, signal.SIG_DFL)
    if _state(folder / METRICS) == before:  # it was asked what it would do
        return
    try:
        print(f"the curves of this run: {plot([folder])}")
    except UserError as error:
        print(f"no page with the curves of this run: {error}")


def _state(path: Path) -> tuple[int, int] | None:
    return (path.stat().st_ino, path.stat().st_mtime_ns) if path.exists() else None


if __name__ == "__main__":
    main()
