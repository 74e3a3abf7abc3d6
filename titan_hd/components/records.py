"""Files of records by step, one JSON object a line: metrics.jsonl and validation_samples.jsonl."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import logging
import os
from pathlib import Path
from typing import Any

from titan_hd.files import replace_file

logger = logging.getLogger("titan_hd")


class RecordFile:
    """Appends records to a file. What a full disk does not take is written later: it stops neither training nor the
    record.

    Attributes:
        went_back: the file had records of later steps than the one that the run goes on from; they are dropped.
    """

    def __init__(self, path: Path, first_step: int, lazily: bool = False):
        """first_step: of the checkpoint that the run goes on from. 0: it starts anew, and what an earlier run left is
        kept under another name. lazily: there is no file before its first record."""
        self.path, self.went_back = path, False
        if first_step:
            self.went_back = keep_records_until(path, first_step)
        else:
            set_aside(path)
        self._file: io.FileIO | None = None if lazily else self._open()
        self._unwritten = b""

    def append(self, record: dict[str, Any]) -> None:
        """Write a record; one that the disk does not take now goes before the next one."""
        self._unwritten += json.dumps(record).encode() + b"\n"
        self.write()

    def write(self, sync: bool = False) -> None:
        """What has not been written yet. sync: wait until it is on the disk."""
        try:
            while self._unwritten:
                self._file = self._file or self._open()
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
            if sync and self._file:
                os.fsync(self._file.fileno())
        except OSError as error:
            logger.warning("%s: cannot be written (%s); its records wait", self.path.name, error.strerror)

    def close(self) -> None:
        """Write what the disk has not taken yet; what is lost is said."""
        self.write()
        if self._unwritten:
            lost = self._unwritten.count(b"\n")
            logger.warning("%s: its last %d record(s) are lost: the disk has not taken them", self.path.name, lost)
        with contextlib.suppress(OSError):  # of a network disk, after everything that could be written was
            if self._file:
                self._file.close()

    def _open(self) -> io.FileIO:
        return open(self.path, "ab", buffering=0)


def set_aside(path: Path) -> None:
    """Give the records of an earlier run, if there are any, the name of `path` with the first free number."""
    if not path.exists() or not path.stat().st_size:
        return
    names = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in itertools.count(1))
    aside = next(name for name in names if not name.exists())
    path.rename(aside)
    logger.warning("%s is of an earlier run; kept as %s", path, aside.name)


def keep_records_until(path: Path, step: int) -> bool:
    """Drop records after `step` from a file (and a torn last line): a resumed run writes them again. Returns whether
    there were any."""
    if not path.exists():
        return False
    kept, later = [], False
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
            else:
                later = True
        except (ValueError, KeyError, TypeError):
            continue
    text = "".join(line + "\n" for line in kept)
    replace_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))  # a run killed here loses nothing
    return later


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a file, none without one. A full disk may have cut its last line, which is left out."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]
