"""Curves of runs: pictures, and one HTML page that shows the numbers under the pointer and asks nothing of any server.

    python tools/plot_run.py outputs/quickstart
    python tools/plot_run.py outputs/lora outputs/hdpissa --output outputs/plots
    python tools/plot_run.py outputs/a outputs/a/metrics.1.jsonl

RUN is the folder of a run (its job.dump_folder), which may be under way, or a file of its metrics, such as those of an
earlier run in the same folder. Several are drawn on each other; the legends say in which keys they differ.

The output folder gets run.html and the figures as PNG files: loss, validation, rate, speed, phases, memory, and one for
each family of metrics (NAME/...). The last line printed is the path of the page. Needs matplotlib (the extra `plots`).
docs/metrics.md says what the metrics are.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from run_plots import report
from run_plots.records import names_of, read_run

from titan_hd.config import manager
from titan_hd.config.command_line import ToolParser
from titan_hd.errors import UserError
from titan_hd.files import user_path

logger = logging.getLogger("titan_hd")


def main() -> None:
    """Draw the runs that the command line names, and print the path of the page. What the user can mend is a line each,
    with exit status 2."""
    parser = ToolParser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=user_path, metavar="RUN", help="the folder of a run, or a file of its metrics")
    add("--output", type=user_path, metavar="DIR", help="default: plots in the run's folder, or in that of all runs")
    add("--title", default="", help="of the page; default: the run's name")
    args = parser.parse_args()
    logging.basicConfig(format="titan_hd: warning: %(message)s", level=logging.WARNING)
    try:
        print(plot(args.runs, args.output, args.title))
    except UserError as error:
        manager.exit_with(str(error).splitlines())


def plot(paths: Sequence[Path], output: Path | None = None, title: str = "") -> Path:
    """Draw the runs at these paths; returns the path of the page. What its notes say is warned of.

    Raises:
        UserError: a run has no metrics; matplotlib is missing; the output cannot be written.
    """
    paths = list({path.resolve(): path for path in paths}.values())
    runs = [read_run(path, name) for path, name in zip(paths, names_of(paths))]
    for note in report.notes_of(runs):
        logger.warning("%s", note)
    common = Path(os.path.commonpath([run.folder.resolve() for run in runs]))
    return report.write(runs, output or common / "plots", title)


if __name__ == "__main__":
    main()
