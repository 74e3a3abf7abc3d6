"""Reports on a comparison from the files in its folder alone, so that it can be done again whenever one likes."""

from __future__ import annotations

import logging
from pathlib import Path

from charts.drawing import matplotlib_is_there, save

from compare import figures
from compare.outcome import read_outcome
from compare.page import page
from compare.tables import notes_of, points_csv, points_table, table_csv, table_md, tables_of
from titan_hd.files import disk_faults, replace_file

logger = logging.getLogger("titan_hd")


def write(folder: Path, output: Path | None = None) -> str:
    """Write table.md, table.csv, points.csv, comparison.html and, with matplotlib, a PNG file for each figure.

    folder: has grid.csv, comparison.json and, for the curves, losses.csv; the same files give the same bytes again.
    output: the folder to write into; None: `folder`.

    Returns:
        What table.md holds.

    Raises:
        UserError: a file is missing, cannot be written, or a line of it is not what it must be.
    """
    output = output or folder
    outcome = read_outcome(folder)
    text = table_md(outcome)
    files = {"table.md": text, "table.csv": table_csv(outcome), "points.csv": points_csv(outcome)}
    pictures = []
    if matplotlib_is_there():
        pictures = figures.pictures_of(outcome)
    else:
        logger.warning("no figures: matplotlib is missing (the extra `plots`); the tables are complete")
    saved = {"grid.csv": (folder / "grid.csv").read_bytes()}
    saved |= {name: files[name].encode() for name in ("table.csv", "points.csv")}
    with disk_faults(output):
        output.mkdir(parents=True, exist_ok=True)
        save(pictures, output)
        whole = page(outcome, tables_of(outcome), points_table(outcome), notes_of(outcome), pictures, saved)
        for name, content in (files | {"comparison.html": whole}).items():
            replace_file(output / name, lambda path, content=content: path.write_text(content, encoding="utf-8"))
    return text
