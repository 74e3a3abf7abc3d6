"""Tokenized records on disk: written once, mapped into memory by every worker and every later run.

An entry is a folder named by a hash of everything that its content depends on. It holds one plain file of little-endian
numbers for each array of a `TokenizedDataset`, and meta.json with their sizes and the statistics. It is written beside
its place and renamed when it is complete, so that what is there is whole unless somebody damaged it later, which the
sizes show. Who finds no entry takes the key's lock and writes it; others wait for the lock and read it. The lock is
the kernel's: it ends with its process. Nodes whose locks do not reach each other write one entry each, and the first to
rename wins.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from filelock import FileLock, Timeout

from titan_hd.console import Progress
from titan_hd.data.tokens.encoding import as_array
from titan_hd.data.tokens.statistics import Statistics
from titan_hd.errors import UserError

VERSION = 4  # of what an entry looks like and of how records become tokens
_DIGITS = 32  # of a file's hash
_SETTLED_SECONDS = 2.0
logger = logging.getLogger("titan_hd")


def cache_folder(setting: str) -> Path | None:
    """The folder that data.cache_dir means; None for no cache.

    Raises:
        UserError: it is in a home directory, and there is none.
    """
    if not setting:
        return None
    if setting == "auto":
        setting = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "titan_hd", "tokens")
    try:
        return Path(setting).expanduser()
    except RuntimeError:  # a container's user may be a mere number
        raise UserError(
            f"data.cache_dir: {setting}: this user has no home directory; name a folder, or an empty one for no cache"
        ) from None


def content_key(settings: dict[str, object], files: list[Path], folder: Path) -> str:
    """A hash of settings, and of the bytes of files in their order. folder: remembers the files' hashes.

    Raises:
        OSError: a file cannot be read.
    """
    key = hashlib.blake2b(json.dumps([VERSION, settings], sort_keys=True).encode(), digest_size=16)
    for path in files:
        key.update(file_digest(path, folder).encode())
    return key.hexdigest()


def file_digest(path: Path, folder: Path) -> str:
    """A hash of a file's bytes, which one process of a node computes and the others, and later runs, find in `folder`.

    It is found as long as place, size and times of the file are the same. A file that was changed a moment ago is not
    remembered: it could change again within the same tick of the clock.

    Raises:
        OSError: the file cannot be read.
    """
    status = path.stat()
    seen = [str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev]
    name = hashlib.blake2b(json.dumps(seen).encode(), digest_size=16).hexdigest()
    memo = folder / f".{name}.digest"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _file_lock(folder / f".{name}.digest.lock"):  # many workers of a node ask for the same file at once
            if memo.is_file() and len(known := memo.read_text(encoding="ascii")) == _DIGITS:
                return known
            digest = _hash(path)
            if time.time() - max(status.st_mtime, status.st_ctime) > _SETTLED_SECONDS:
                memo.write_text(digest, encoding="ascii")
            return digest
    except OSError:  # a folder that cannot be written, or a full disk, is reported where the records are written
        return _hash(path)


def _file_lock(path: Path) -> FileLock:
    """The kernel's lock alone: the package's substitute, a marker file, would outlive a process that is killed."""
    return FileLock(path, fallback_to_soft=False)


def _hash(path: Path) -> str:
    content = hashlib.blake2b(digest_size=_DIGITS // 2)
    with open(path, "rb") as file:
        while block := file.read(2**20):
            content.update(block)
    return content.hexdigest()


class MappedArrays(dict):
    """The arrays of an entry, mapped from its files; pickled, it is the folder's name."""

    def __init__(self, folder: Path, sizes: dict[str, int]):
        self._folder, self._sizes = folder, sizes
        for name, size in sizes.items():  # an empty file cannot be mapped
            raw = np.memmap(folder / name, np.uint8, "r", shape=(size,)) if size else np.zeros(0, np.uint8)
            self[name] = as_array(name, raw)

    def __reduce__(self):
        return MappedArrays, (self._folder, self._sizes)


@dataclasses.dataclass
class Entry:
    """What an entry holds."""

    statistics: Statistics
    arrays: MappedArrays


class TokenCache:
    """The entries in one folder.

    Raises (all methods):
        UserError: the folder cannot be written or read; the line names data.cache_dir.
    """

    def __init__(self, folder: Path):
        self._folder = folder

    def get(self, key: str, sources: list[str], write: Callable[[Callable[[str], BinaryIO]], Statistics]) -> Entry:
        """The entry of a key, which is written first where there is none.

        sources: paths of the files that the entry is made of. If they have moved since it was written, the paths that
            are quoted in its statistics are updated.
        write: fills the arrays, whose files the function that it is given opens by name.

        Raises:
            UserError: also what `write` raised here, or in the process that was waited for.
        """
        try:
            entry = self._read(key, sources)
            if entry:
                return entry
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._locked(key):
                entry = self._read(key, sources)
                if not entry:
                    self._write(key, sources, write)
                    entry = self._read(key, sources)
        except OSError as error:
            raise self._unusable(error) from None
        if entry is None:
            raise UserError(f"data.cache_dir: {self._folder / key} is not what was just written there")
        return entry

    def _unusable(self, error: OSError) -> UserError:
        return UserError(
            f"data.cache_dir: cannot use {self._folder}: {error.strerror or error}; name another folder, or an empty "
            "one for no cache"
        )

    def _read(self, key: str, sources: list[str]) -> Entry | None:
        """The entry, if it is there and whole; a damaged one is warned about."""
        folder = self._folder / key
        if not folder.is_dir():
            return None
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            sizes, statistics = meta["sizes"], Statistics(**meta["statistics"])
            for old, new in zip(meta["sources"], sources):
                for field in ("first_unlabelled", "first_bad"):
                    text = getattr(statistics, field)
                    if text.startswith(f"{old}:"):
                        setattr(statistics, field, new + text.removeprefix(old))
                for note, (count, where) in statistics.notes.items():
                    if where.startswith(f"{old}:"):
                        statistics.notes[note] = (count, new + where.removeprefix(old))
            wrong = [name for name, size in sizes.items() if (folder / name).stat().st_size != size]
            if not wrong:
                return Entry(statistics, MappedArrays(folder, sizes))
            reason = f"{wrong[0]} has another size than meta.json says"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
        logger.warning("data.cache_dir: %s is damaged (%s); it is made anew", folder, reason)
        return None

    @contextlib.contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        """Hold the lock of a key. Where the process that was waited for has failed, this one fails with its line: all
        that waited would otherwise fail in the same way, one after the other."""
        lock, before = _file_lock(self._folder / f".{key}.lock"), self._failures(key)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info("waiting for the process that tokenizes into %s", self._folder)
            with Progress("waiting for the tokens"):
                lock.acquire()
            failures = self._failures(key)
            if len(failures) > len(before):
                lock.release()
                raise UserError(json.loads(failures[-1])) from None
        try:
            yield
        finally:
            lock.release()

    def _failures(self, key: str) -> list[str]:
        """A line for each writer that has failed, as JSON."""
        path = self._failures_file(key)
        return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []

    def _failures_file(self, key: str) -> Path:
        return self._folder / f".{key}.failed"

    def _write(self, key: str, sources: list[str], write: Callable[[Callable[[str], BinaryIO]], Statistics]) -> None:
        host = socket.gethostname()
        for left in self._folder.glob(f".{key}.{host}.*"):  # by a process that was killed: the lock is ours
            shutil.rmtree(left)
        folder = self._folder / f".{key}.{host}.{os.getpid()}"
        folder.mkdir()
        try:
            with contextlib.ExitStack() as stack:
                files: dict[str, BinaryIO] = {}

                def open_file(name: str) -> BinaryIO:
                    files[name] = stack.enter_context(open(folder / name, "wb"))
                    return files[name]

                statistics = write(open_file)
                for file in files.values():
                    file.flush()
                    os.fsync(file.fileno())
                sizes = {name: file.tell() for name, file in files.items()}
            meta = {"sizes": sizes, "statistics": dataclasses.asdict(statistics), "sources": sources}
            (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
            try:
                os.rename(folder, self._folder / key)
            except OSError:  # something is there: another node's, which may be in use, or a damaged one
                if self._read(key, sources) is None:
                    shutil.rmtree(self._folder / key, ignore_errors=True)
                    os.rename(folder, self._folder / key)
        except (UserError, OSError) as error:
            shutil.rmtree(folder, ignore_errors=True)  # first: the disk may be full
            line = json.dumps(str(error if isinstance(error, UserError) else self._unusable(error)))
            with open(self._failures_file(key), "a", encoding="utf-8") as file:
                file.write(line + "\n")
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)
