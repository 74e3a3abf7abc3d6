"""Tables of texts with tabs between the columns (.tsv), as GLUE's files are: no quoting, one record a line."""

from __future__ import annotations

import re
from pathlib import Path

_NAME = re.compile(r"\.tsv(\.gz|\.zst)?$")
# CoLA's files for training have no heading: source, label, the linguists' mark, sentence.
_COLA = ["source", "label", "mark", "sentence"]


def is_table(path: Path) -> bool:
    return _NAME.search(path.name) is not None


class Table:
    """Turns the lines of a file, in their order, into the fields of records.

    The first line is the heading, unless one of its cells is empty or a number. Columns without a heading are called
    column1, column2, ..., or as CoLA's if they look like these.
    """

    def __init__(self) -> None:
        self._columns: list[str] = []

    def fields(self, line: bytes) -> dict[str, str] | None:
        """The fields of a line; None for the heading.

        Raises:
            ValueError: it is no UTF-8, or has another number of cells than the first one.
        """
        try:
            cells = line.decode("utf-8-sig").rstrip("\r\n").split("\t")
        except UnicodeDecodeError:
            raise ValueError("not valid UTF-8") from None
        if not self._columns:
            self._columns = _columns(cells)
            if self._columns == cells:
                return None
        if len(cells) != len(self._columns):
            raise ValueError(f"has {len(cells)} cells, the first line {len(self._columns)}")
        return dict(zip(self._columns, cells))


def _columns(cells: list[str]) -> list[str]:
    if all(cell.strip() and not _is_number(cell) for cell in cells):
        if len(set(cells)) < len(cells):
            raise ValueError("two columns of the heading have one name")
        return cells
    if len(cells) == 4 and cells[1] in ("0", "1") and cells[2] in ("", "*"):
        return _COLA
    return [f"column{i}" for i in range(1, len(cells) + 1)]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
