"""Checkpoints in an object store, or whatever else fsspec reaches by a URL: s3://bucket/run, gs://..., file:///...

Such a store has no rename, and no folders: an object is there, whole, when its upload has ended. So the files of
`step-N` are written to where they stay, and its manifest last: a `step-N` without a manifest is no checkpoint. In the
same way one goes: first its manifest, then the rest.
"""

from __future__ import annotations

import contextlib
import stat
import types
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from titan_hd.checkpoint.folder import MANIFEST, CheckpointFolder, write_text
from titan_hd.config.job_config import JobConfig
from titan_hd.errors import UserError


def checkpoint_folder(config: JobConfig) -> CheckpointFolder:
    """Where a run's checkpoints are: in job.dump_folder, or at the URL that checkpoint.folder is.

    Raises:
        UserError: nothing that is installed reaches the URL.
    """
    c = config.checkpoint
    if "://" not in c.folder:
        return CheckpointFolder(Path(config.job.dump_folder) / c.folder, c.keep_latest_k)
    return ObjectStore(open_url(c.folder), c.keep_latest_k)


def open_url(url: str) -> StorePath:
    """The place that a URL names.

    Raises:
        UserError: nothing that is installed reaches it.
    """
    try:
        from fsspec.core import url_to_fs

        # Another process writes there, too: a listing that is remembered is an old one.
        options: dict[str, Any] = {"use_listings_cache": False}
        if url.startswith(("file:", "local:")):  # the one that has folders, which must be made
            options["auto_mkdir"] = True
        store, path = url_to_fs(url.rstrip("/"), **options)
    except (ImportError, ValueError) as error:
        extra = 'pip install "titan_hd[remote]" has s3://'
        raise UserError(f"checkpoint.folder: {url}: cannot be opened: {error}; {extra}") from None
    return StorePath(store, path, url.rstrip("/"))


class StorePath:
    """A place in a store, with what pathlib.Path has of use for it. Every fault of the store is an OSError."""

    def __init__(self, store: Any, path: str, url: str):
        self.store, self.path, self.url = store, path, url

    def __truediv__(self, name: str) -> StorePath:
        return StorePath(self.store, f"{self.path}/{name}", f"{self.url}/{name}")

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    def exists(self) -> bool:
        return self._kind() != ""

    def is_file(self) -> bool:
        return self._kind() == "file"

    def is_dir(self) -> bool:
        return self._kind() == "directory"

    def _kind(self) -> str:
        """What is there; "" for nothing. Not by fsspec's own exists, isfile and isdir: for them a store that does not
        answer has nothing, and what is thought to be no checkpoint is removed."""
        with _as_os_errors():
            try:
                return self.store.info(self.path)["type"]
            except FileNotFoundError:
                return ""

    def stat(self) -> types.SimpleNamespace:
        with _as_os_errors():
            return types.SimpleNamespace(st_size=self.store.size(self.path), st_mode=stat.S_IFREG)

    def read_text(self, encoding: str) -> str:
        with _as_os_errors():
            return self.store.cat_file(self.path).decode(encoding)

    @contextlib.contextmanager
    def open(self, mode: str) -> Iterator[IO[bytes]]:
        """To read ("rb"), or to write ("wb"): then it is there, whole, when the block has ended."""
        with _as_os_errors(), self.store.open(self.path, mode) as file:
            yield file if mode == "rb" else cast(IO[bytes], _Upload(file))

    def sizes(self) -> dict[str, int]:
        """Of the files below, by the rest of their names."""
        with _as_os_errors():
            found = self.store.find(self.path, detail=True)
        return {path[len(self.path) + 1 :]: entry["size"] for path, entry in found.items()}

    def remove(self) -> None:
        """All that is below, the manifest first."""
        with _as_os_errors():
            for name in sorted(self.sizes(), key=lambda name: name != MANIFEST):
                self.store.rm_file((self / name).path)
            if self.is_dir():  # where there are folders
                self.store.rm(self.path, recursive=True)

    def copy_to(self, other: StorePath) -> None:
        """Of a checkpoint all files, the manifest last."""
        with _as_os_errors():
            for name in sorted(self.sizes(), key=lambda name: name == MANIFEST):
                self.store.cp_file((self / name).path, (other / name).path)


class _Upload:
    """A file that is written to a store."""

    def __init__(self, file: IO[bytes]):
        self._file = file

    def write(self, data: Any) -> int:
        with _as_os_errors():
            return self._file.write(data)

    def flush(self) -> None:
        """Nothing: whoever writes need not wait for the upload before its end."""


@contextlib.contextmanager
def _as_os_errors() -> Iterator[None]:
    """Libraries of stores raise errors of many kinds; a store that fails is as a disk that does."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


class ObjectStore(CheckpointFolder):
    """The checkpoints at a URL. Nothing is renamed: what `publish` adds last, the manifest, makes a checkpoint."""

    folder: StorePath

    def __init__(self, folder: StorePath, keep_latest_k: int):
        super().__init__(folder, keep_latest_k)

    def partial(self, step: int) -> StorePath:
        return self.folder / f"step-{step}"

    def holds(self, step: int) -> bool:
        return (self.folder / f"step-{step}" / MANIFEST).is_file()

    def clear_partial(self) -> None:
        """As for folders; a store that cannot be written to, or is not there, is found out here and not after hours."""
        write_text(self.folder / "can_be_written", "")
        self._remove_file("can_be_written")
        for name in self._names():
            if name.startswith("step-") and not (self.folder / name / MANIFEST).is_file():
                (self.folder / name).remove()

    def start(self, step: int) -> StorePath:
        place = self.partial(step)
        if self.holds(step):
            self.set_aside(step)
        place.remove()
        return place

    def discard(self, step: int) -> None:
        with contextlib.suppress(OSError):
            self.partial(step).remove()

    def written(self, step: int) -> int:
        return 0

    def _names(self) -> list[str]:
        if not self.folder.is_dir():
            return []
        with _as_os_errors():
            return [
                path.rstrip("/").rpartition("/")[2] for path in self.folder.store.ls(self.folder.path, detail=False)
            ]

    def _sizes(self, step: int) -> dict[str, int]:
        return self.partial(step).sizes()

    def _give_name(self, step: int) -> None:
        pass

    def _replace(self, name: str, text: str) -> None:
        write_text(self.folder / name, text)

    def _remove_file(self, name: str) -> None:
        with _as_os_errors():
            self.folder.store.rm_file((self.folder / name).path)

    def _move(self, name: str, aside: str) -> None:
        (self.folder / aside).remove()
        (self.folder / name).copy_to(self.folder / aside)
        if not (self.folder / aside / MANIFEST).is_file():
            raise OSError(f"{self.folder / aside}: the copy of {name} is not whole")
        (self.folder / name).remove()

    def _remove(self, name: str) -> None:
        (self.folder / name).remove()

    def _abandoned(self) -> list[str]:
        names = [name for name in self._names() if name.startswith("abandoned-")]
        return sorted(names, key=lambda name: int(name.rpartition("-")[2]))
