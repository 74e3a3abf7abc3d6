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

from titan_hd.config import manager
from titan_hd.process import launch


def main() -> None:
    """Exits with the status of a worker that failed."""
    job = manager.load_or_exit(launch.split_arguments(sys.argv[1:])[1]).job
    launch.main()
    if job.print_plan or job.dry_run:
        return
    for number in (signal.SIGTERM, signal.SIGINT):  # torch's agent leaves its handlers, which raise
        signal.signal(number, signal.SIG_DFL)
    try:
        print(f"the curves of this run: {plot([Path(job.dump_folder)])}")
    except Exception as error:  # the run itself has ended well
        print(f"no page with the curves of this run: {error}")


if __name__ == "__main__":
    main()
