"""Reading the JSON and text files of a directory that somebody else made."""

from __future__ import annotations

import stat
from pathlib import Path

LARGEST = 64 * 2**20  # bytes; the largest tokenizer.json is a third of that


def read_small_text(path: Path, largest: int = LARGEST) -> str:
    """The text of a regular file of a sensible size.

    Raises:
        OSError: it is not there, cannot be read, is no regular file (a pipe would wait for ever, a device never end) or
            is larger than `largest` bytes; `strerror` says which.
        UnicodeDecodeError: it is not UTF-8.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(0, "it is no regular file", str(path))
    if status.st_size > largest:
        raise OSError(0, f"{status.st_size} bytes are more than {largest}", str(path))
    return path.read_text(encoding="utf-8")
