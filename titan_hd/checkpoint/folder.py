"""The folder with a run's checkpoints: their names, their manifests, and which old ones are removed. Knows no tensors
and no communication.

`step-N` is a checkpoint. A folder gets this name only when every file in it is on the disk, and listed with size and
checksum in its manifest. `step-N.partial` is a checkpoint that is being written or removed. `abandoned-N` is one that a
later run did not resume from: it went back to an earlier step. `best.json` says which checkpoint is the best so far:
that one is not purged.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import stat
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from titan_hd.components.best_validation import Best
from titan_hd.errors import UserError
from titan_hd.files import folder_size, read_small_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

logger = logging.getLogger("titan_hd")
STATE_FILE = "train_state.json"  # what a run's checkpoint has beside DCP's files
MANIFEST = "manifest.json"
BEST = "best.json"
Files = dict[str, dict[str, Any]]  # name -> {"size": bytes, "crc32": of the content}

_BLOCK = 2**20


class CheckpointFolder:
    """The checkpoints in `folder`, of this machine's file system; `object_store` has those in a store.

    keep_latest_k: how many of them are kept, 0 for all.
    """

    def __init__(self, folder: Any, keep_latest_k: int):
        self.folder, self.keep_latest_k = folder, keep_latest_k

    def path(self, step: int) -> Any:
        """Where a checkpoint is: a Path, or what has of one what is needed here."""
        return self.folder / f"step-{step}"

    def partial(self, step: int) -> Any:
        """Where a checkpoint is written to."""
        return self.folder / f"step-{step}.partial"

    def steps(self) -> list[int]:
        """Steps of the checkpoints, ascending."""
        numbers = (int(m[1]) for name in self._names() if (m := re.fullmatch(r"step-(\d+)", name)))
        return sorted(filter(self.holds, numbers))

    def holds(self, step: int) -> bool:
        """Whether there is a checkpoint of this step."""
        try:
            return stat.S_ISDIR(self.path(step).stat().st_mode)
        except FileNotFoundError:
            return False

    def candidates(self, load_step: int) -> list[int]:
        """Steps to resume from, the best first: the latest ones for -1, none for 0.

        Raises:
            UserError: a step is asked for that is not there, or the folder cannot be read.
        """
        try:
            steps = self.steps()
        except OSError as error:
            raise UserError(f"{error.filename or self.folder}: cannot be read: {error.strerror or error}") from None
        if load_step in (-1, 0):
            return steps[::-1] if load_step else []
        if load_step not in steps:
            have = ", ".join(map(str, steps)) or "none"
            raise UserError(f"checkpoint.load_step: {self.folder} has no complete checkpoint {load_step} (has {have})")
        return [load_step]

    def first_whole(self, steps: list[int], load_step: int, faults_of: Callable[[Any], list[str]]) -> int | None:
        """The first of the candidates whose files are as they were written; the damaged ones before it are warned of.
        None where there are no candidates.

        faults_of: a line for each damaged file of a checkpoint.

        Raises:
            UserError: the one that is asked for by `load_step` is damaged, or all are.
        """
        faults: list[str] = []
        for step in steps:
            faults = faults_of(self.path(step))
            if not faults:
                return step
            for line in faults:
                logger.warning("checkpoint %s is damaged, and skipped: %s", self.path(step), line)
        if steps:
            left = "no whole checkpoint is left" if load_step == -1 else "it is the one that is asked for"
            advice = f"{left}: name another checkpoint.load_step, or 0 to start anew"
            raise UserError("\n".join(f"{line} ({advice})" for line in faults))
        return None

    def clear_partial(self) -> None:
        """Remove the remains of saves and removals that were cut off."""
        for path in self.folder.glob("step-*.partial"):
            shutil.rmtree(path, ignore_errors=True)

    def start(self, step: int) -> Any:
        """An empty folder to write the checkpoint to."""
        partial = self.partial(step)
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        return partial

    def discard(self, step: int) -> None:
        """What a save has written that fails."""
        shutil.rmtree(self.partial(step), ignore_errors=True)

    def written(self, step: int) -> int:
        """Bytes that are there of a checkpoint that is being written; 0 where that is not known."""
        return folder_size(self.partial(step))

    def publish(self, step: int, state: dict[str, Any], files: Files, best: Best | None = None) -> None:
        """Complete `step-N.partial`, whose other `files` are on the disk, and give it its name; then purge.

        best: the best checkpoint from now on, this one or an earlier one; None leaves it as it is.

        Raises:
            OSError: the disk is full or fails, or a file that a rank wrote is not there; nothing but the partial folder
                has changed.
        """
        partial, there = self.partial(step), self._sizes(step)
        for name, entry in files.items():
            if there.get(name) != entry["size"]:
                shared = "all nodes must write to one file system (job.dump_folder)"
                raise OSError(f"{name} is not there as its rank has written it: {shared}")
        files = {**files, STATE_FILE: write_text(partial / STATE_FILE, json.dumps(state, indent=1))}
        write_text(partial / MANIFEST, json.dumps({"files": dict(sorted(files.items()))}, indent=1))
        self._give_name(step)
        tidy = {
            f"{BEST} cannot be written": lambda: self.name_best(best),
            "an old checkpoint cannot be removed": self._purge,
        }
        for fault, action in tidy.items():
            try:
                action()
            except OSError as error:  # the checkpoint is there: its save has not failed
                logger.warning("%s: %s: %s", self.folder, fault, error)

    def best(self) -> Best | None:
        """The best checkpoint, as best.json names it; None if there is no such file, or the checkpoint is not there."""
        try:
            found = Best(**json.loads(_read_text(self.folder / BEST)))
            return found if isinstance(found.step, int) and self.holds(found.step) else None
        except (OSError, ValueError, TypeError, RecursionError):
            return None

    def name_best(self, best: Best | None) -> None:
        """Write best.json, if that checkpoint is there: its save may have failed, or a later best one have replaced it
        before the run went back. A best.json of a checkpoint that is gone is removed."""
        if best and self.holds(best.step):
            if best != self.best():
                self._replace(BEST, json.dumps(best._asdict()) + "\n")
        elif (self.folder / BEST).exists() and not self.best():
            self._remove_file(BEST)

    def set_aside(self, step: int) -> None:
        """Rename the checkpoints from `step` on: the run has gone back to an earlier step, so they are not its own."""
        for later in [s for s in self.steps() if s >= step]:
            aside = f"abandoned-{later}"
            self._move(f"step-{later}", aside)
            logger.warning("%s is of a run that was left behind; kept as %s", f"step-{later}", self.folder / aside)

    def _purge(self) -> None:
        """Leave the latest checkpoints, the best, and as many of the abandoned ones (those that were written last)."""
        if not self.keep_latest_k:
            return
        best = self.best()
        old = [f"step-{step}" for step in self.steps()[: -self.keep_latest_k] if not best or step != best.step]
        for name in [*old, *self._abandoned()[: -self.keep_latest_k]]:
            self._remove(name)

    # What another store does in another way.

    def _names(self) -> list[str]:
        """Of what is in the folder. One that cannot be read is not empty: `glob` would have it so, and the run start
        anew."""
        try:
            return os.listdir(self.folder)
        except FileNotFoundError:
            return []

    def _sizes(self, step: int) -> dict[str, int]:
        """Of the files of a checkpoint that is being written."""
        return {path.name: path.stat().st_size for path in self.partial(step).iterdir() if path.is_file()}

    def _give_name(self, step: int) -> None:
        """All files of a checkpoint are written: from now on it is there."""
        sync_folder(self.partial(step))
        self.set_aside(step)
        self.partial(step).rename(self.path(step))
        sync_folder(self.folder)

    def _replace(self, name: str, text: str) -> None:
        """Write a file of which others see all or nothing."""
        partial = self.folder / f"{name}.partial"
        write_text(partial, text)
        partial.replace(self.folder / name)
        sync_folder(self.folder)

    def _remove_file(self, name: str) -> None:
        (self.folder / name).unlink()

    def _move(self, name: str, aside: str) -> None:
        shutil.rmtree(self.folder / aside, ignore_errors=True)
        (self.folder / name).rename(self.folder / aside)

    def _remove(self, name: str) -> None:
        # Under another name first: a folder that is half removed is no checkpoint.
        removed = self.folder / f"step-{name}.partial"
        shutil.rmtree(removed, ignore_errors=True)
        (self.folder / name).rename(removed)
        shutil.rmtree(removed, ignore_errors=True)

    def _abandoned(self) -> list[str]:
        """Names of the checkpoints that were left behind, those that were written last at the end."""
        return [path.name for path in sorted(self.folder.glob("abandoned-*"), key=lambda path: path.stat().st_mtime)]


def _read_text(path: Any) -> str:
    return read_small_text(path) if isinstance(path, Path) else path.read_text(encoding="utf-8")


def read_manifest(checkpoint: Any) -> Files:
    """The files that a checkpoint must have, with their sizes and checksums.

    Raises:
        UserError: there is no manifest, or it is damaged.
    """
    path = checkpoint / MANIFEST
    try:
        files = json.loads(_read_text(path))["files"]
        for name, entry in files.items():
            if Path(name).name != name or not isinstance(entry["size"], int) or not isinstance(entry["crc32"], int):
                raise ValueError(f"{name!r} is no entry of a manifest")
        if STATE_FILE not in files or ".metadata" not in files:
            raise ValueError("it is not complete")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {type(error).__name__}: {error}") from None
    return files


def wrong_size(path: Any, entry: dict[str, Any]) -> str | None:
    """In one line, that a file of a checkpoint is not there or has another size; None if it has its size."""
    try:
        size = path.stat().st_size
    except OSError as error:
        return f"{path}: cannot be read: {error.strerror or error}"
    return None if size == entry["size"] else f"{path}: has {size} bytes, must have {entry['size']}"


def damage(path: Any, entry: dict[str, Any]) -> str | None:
    """What is wrong with a file of a checkpoint, in one line, or None. Reads all of it."""
    if line := wrong_size(path, entry):
        return line
    try:
        with path.open("rb") as file:
            checksum = 0
            while block := file.read(_BLOCK):
                checksum = zlib.crc32(block, checksum)
    except OSError as error:
        return f"{path}: cannot be read: {error.strerror or error}"
    return None if checksum == entry["crc32"] else f"{path}: its content has changed since it was written"


def incomplete(checkpoint: Any) -> list[str]:
    """What can be said against a checkpoint without reading its files: a line for each that is not there or has another
    size, or one for its manifest."""
    try:
        files = read_manifest(checkpoint)
    except UserError as error:
        return [str(error)]
    return [line for name in sorted(files) if (line := wrong_size(checkpoint / name, files[name]))]


def check_files(checkpoint: Any) -> None:
    """Read all files of a checkpoint, in one process.

    Raises:
        UserError: a line for each that is not as it was written.
    """
    files = read_manifest(checkpoint)
    faults = [line for name in sorted(files) if (line := damage(checkpoint / name, files[name]))]
    if faults:
        raise UserError("\n".join(faults))


def read_train_state(checkpoint: Any) -> dict[str, Any]:
    """The state of the run that wrote a checkpoint; its configuration, parsed, under "settings".

    Raises:
        UserError: it is not there or not what a run writes.
    """
    path = checkpoint / STATE_FILE
    try:
        state = json.loads(_read_text(path))
        state["settings"] = tomllib.loads(state["config"])
        if not isinstance(state["step"], int) or not isinstance(state["identity"], dict):
            raise TypeError("step or identity is of another type")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: is not the state of a titan_hd run: {type(error).__name__}: {error}") from None
    return state


def write_text(path: Any, text: str) -> dict[str, Any]:
    """Write a file onto the disk; its entry in the manifest."""
    return write_content(path, text.encode())


def write_content(path: Any, content: bytes) -> dict[str, Any]:
    """As `write_text`."""
    with durable(path) as file:
        file.write(content)
    return {"size": len(content), "crc32": zlib.crc32(content)}


@contextlib.contextmanager
def durable(path: Any) -> Iterator[IO[bytes]]:
    """A file to write, which is on the disk, or in the store, when the block has ended."""
    with path.open("wb") as file:
        yield file
        if isinstance(path, Path):
            file.flush()
            os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot do this for folders
            raise
    finally:
        os.close(descriptor)
