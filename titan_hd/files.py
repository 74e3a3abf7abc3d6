"""Files: reading small ones that somebody else made, replacing one as a whole, and what a failing disk says."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from titan_hd.errors import UserError

LARGEST = 64 * 2**20  # bytes; the largest tokenizer.json is a third of that


def read_small_text(path: Path, largest: int = LARGEST) -> str:
    """The text of a regular file of a sensible size, without the byte order mark that Windows editors put in front.

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
    return path.read_text(encoding="utf-8-sig")


def read_json_object(path: Path, object_pairs_hook: Callable[[list], Any] | None = None) -> dict[str, Any]:
    """The object in a JSON file, of at most LARGEST bytes.

    object_pairs_hook: as json.loads takes it; what it raises (ValueError) is a fault of the file.

    Raises:
        UserError: one line that names the file: it is not there, cannot be read, or holds no JSON object.
    """
    try:
        content = json.loads(read_small_text(path), object_pairs_hook=object_pairs_hook)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not valid JSON: must be an object")
    return content


def expand_home(path: str) -> str:
    """A path whose ~ or ~user at its beginning is replaced by that home directory, as a shell does it. A user that
    there is not leaves it as it is.

    Raises:
        UserError: it begins with ~, and this user has no home directory.
    """
    expanded = os.path.expanduser(path)
    if expanded == path and path.partition("/")[0] == "~":  # a container's user may be a mere number
        raise UserError("must be a path without ~: this user has no home directory")
    return expanded


def user_path(text: str) -> Path:
    """The type of an option of a command that names a file or a folder; raises as `expand_home`."""
    return Path(expand_home(text))


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Put a new file into a place where readers, and a crash, find the old one (or none) or all of the new one.

    write: fills the file of the path that it is given. Of several writers at the same time the last one wins.
    """
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        write(partial)
        sync_file(partial)
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def sync_file(path: Path) -> None:
    """Wait until a file that this process wrote is on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def disk_faults(directory: Path) -> Iterator[None]:
    """A failing or full disk is the user's to mend: one line with the file, or the directory where none is named."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or directory}: cannot be written: {error.strerror or error}") from None


def folder_size(folder: Path) -> int:
    """Bytes of the files in a folder, and below it, that are there now; files may come and go meanwhile."""
    total = 0
    for place, _, names in os.walk(folder):  # which passes over folders that have gone; rglob raises
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(place, name)).st_size
    return total


def shown(name: str) -> str:
    """A name out of a file as part of one line of reasonable length."""
    text = name if name.isprintable() else repr(name)
    return text if len(text) <= 200 else text[:200] + "..."


def shown_size(count: float) -> str:
    """Bytes in a unit in which they are not 0.00: "1.23 GB", "45.60 kB", "7 bytes"."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} bytes"
