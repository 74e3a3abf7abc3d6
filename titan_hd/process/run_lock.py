"""One run per folder: a lock that goes with the process that holds it, however that ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from titan_hd.config.job_config import JobConfig
from titan_hd.errors import UserError

logger = logging.getLogger("titan_hd")

LOCK_FILE, HOLDER_FILE = "run.lock", "run.lock.holder"
_PATIENCE_SECONDS = 5  # a run that was killed and started again: its old process may still be about to go
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP)  # of a file system, or of NFS without its lock service


class RunLock:
    """Holds `folder` for this process. key: what names it.

    The kernel drops the lock with the process, and NFS passes it on to other machines where its lock service runs. A
    file system without locks gives a warning and no protection: the substitute of the filelock package, a marker file,
    would outlive a run that is killed and keep the next one away.

    Raises:
        UserError: another process holds it.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, key: str = "job.dump_folder"):
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder / LOCK_FILE, fallback_to_soft=False)
        try:
            self._lock.acquire(timeout=_PATIENCE_SECONDS, poll_interval=0.2)
        except Timeout:
            raise _held(folder, key) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            logger.warning("%s: cannot be locked (%s): start no second run on it", key, error.strerror)
        with contextlib.suppress(OSError):  # a full disk: the lock holds, and only the name of its holder is missing
            (folder / HOLDER_FILE).write_text(f"process {os.getpid()} on {socket.gethostname()}\n")

    def release(self) -> None:
        self._lock.release()


def run_locks(config: JobConfig) -> Iterator[RunLock]:
    """One after another as they are held: that of job.dump_folder, and of a checkpoint.folder that lies elsewhere."""
    folder, checkpoint = Path(config.job.dump_folder), config.checkpoint
    yield RunLock(folder)
    if checkpoint.enable and "://" not in checkpoint.folder:
        elsewhere = (folder / checkpoint.folder).resolve()
        if not elsewhere.is_relative_to(folder.resolve()):
            yield RunLock(elsewhere, "checkpoint.folder")


def check_unlocked(folder: Path) -> None:
    """Whether `RunLock` would get the folder now; neither waits nor writes.

    Raises:
        UserError: another process holds it.
        OSError: its lock cannot be written.
    """
    # Without O_CREAT and O_TRUNC: the file stays as it is.
    with contextlib.suppress(FileNotFoundError), open(folder / LOCK_FILE, "r+b") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _held(folder) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise


def _held(folder: Path, key: str = "job.dump_folder") -> UserError:
    name = "unknown"
    with contextlib.suppress(OSError):
        name = (folder / HOLDER_FILE).read_text(errors="replace").strip()
    return UserError(f"{key}: another run writes to {folder} ({name}); wait for its end, or name another folder")
