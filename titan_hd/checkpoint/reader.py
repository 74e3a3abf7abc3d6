"""Reads checkpoints of torch.distributed.checkpoint (DCP), whoever wrote them.

DCP's own FileSystemReader trusts a checkpoint: its table of contents, `.metadata`, is a pickle, which can run any code
when it is loaded, and may name files anywhere. Here an unpickler admits only the classes that make up such a table, and
only files in the checkpoint's folder are opened. The files of the tensors are read by torch with weights_only.
"""

from __future__ import annotations

import bisect
import functools
import math
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem

from titan_hd.checkpoint.pieces import is_stack, name_in_block
from titan_hd.checkpoint.stored_tensor import StoredTensor, narrowed
from titan_hd.errors import UserError

TABLE = ".metadata"  # the file
_METADATA = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *((_METADATA, name) for name in ("TensorStorageMetadata", "ChunkStorageMetadata", "BytesStorageMetadata")),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    *(("pathlib", name) for name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")),
    *(("pathlib._local", name) for name in ("PosixPath", "PurePosixPath")),  # Python 3.13
    ("collections", "OrderedDict"),
}


def _memory_format(of: object, name: str) -> object:
    """What stands for `getattr`, by which Python 3.11.0 to 3.11.3 pickle a member of an enumeration."""
    if of is not _MEM_FORMAT_ENCODING:
        raise pickle.UnpicklingError(f"it asks {of} for {name}, which is no part of a table of contents")
    return _MEM_FORMAT_ENCODING[name]


class _TableUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        if (module, name) == ("builtins", "getattr"):
            return _memory_format
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of a table of contents")


class _Place(NamedTuple):
    """Where a tensor lies: in a stored one of this name, of a stack in the block with this number."""

    stored: str
    block: int | None


class CheckpointReader(dcp.FileSystemReader):
    """DCP's reader of a folder, which reads the table of contents once and without running code, shows each block's
    tensor of a stack (see `pieces`) under its own name, and reads of a file what is asked for.

    Of an optimizer's numbers, such as its count of steps, there is one for all tensors, `optimizer.<key>`; checkpoints
    from before have equal ones for each.

    table: as `table`, if another rank has read it already.

    Raises:
        UserError: from `read_metadata` and `table`: there is none, or it cannot be read.
    """

    def __init__(self, folder: Any, table: Metadata | None = None):
        super().__init__(str(folder))
        self.folder = folder
        if table is not None:
            self.table = table

    def read_metadata(self, *args, **kwargs) -> Metadata:
        return self._by_name[0]

    @functools.cached_property
    def table(self) -> Metadata:
        """As it is stored, with stacks."""
        path = self.folder / TABLE
        if not path.is_file():
            raise UserError(f"{self.folder}: is no checkpoint: it holds no .metadata")
        try:
            with path.open("rb") as file:
                table = _TableUnpickler(file).load()
            files = {info.relative_path for info in (table.storage_data or {}).values()}
            tensors = table.state_dict_metadata.items()
            if not isinstance(table, Metadata) or not all(isinstance(key, str) for key, _ in tensors):
                raise ValueError("it is no table of contents")
        except Exception as error:  # a torn pickle can raise anything
            raise UserError(f"{path}: cannot be read: {type(error).__name__}: {error}") from None
        outside = [name for name in files if not isinstance(name, str) or Path(name).name != name]
        if outside:
            raise UserError(f"{path}: names {outside[0]!r}, which is not a file of the folder")
        return table

    @functools.cached_property
    def _by_name(self) -> tuple[Metadata, dict[str, _Place]]:
        """The table with the tensors' own names, and where they lie."""
        entries, places, stacks = {}, {}, self._stacks
        for stored, entry in self.table.state_dict_metadata.items():
            if stored in stacks:
                for block, part in enumerate(_blocks_of(stacks[stored])):
                    entries[name_in_block(stored, block)] = part
                    places[name_in_block(stored, block)] = _Place(stored, block)
                continue
            number = isinstance(entry, TensorStorageMetadata) and not entry.size and stored.startswith("optimizer.")
            name = f"optimizer.{stored.rpartition('.')[2]}" if number else stored
            entries[name], places[name] = entry, _Place(stored, None)
        meta = self.table.storage_meta or StorageMeta()
        meta.load_id = self.load_id
        return Metadata(entries, storage_data=self.table.storage_data, storage_meta=meta), places

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> torch.futures.Future[None]:
        """As DCP's; a stored piece is opened once for all that is read of it."""
        by_file: dict[str, dict[MetadataIndex, list[tuple[int | None, ReadItem]]]] = {}
        for item in plan.items:
            index, block = self._stored_piece(item.storage_index)
            by_piece = by_file.setdefault(self.storage_data[index].relative_path, {})
            by_piece.setdefault(index, []).append((block, item))
        for name, by_piece in by_file.items():
            with (self.folder / name).open("rb") as file:
                for index, items in by_piece.items():
                    info = self.storage_data[index]
                    self._read_piece(StoredTensor(file, info.offset, info.length), items, planner)
        done: torch.futures.Future[None] = torch.futures.Future()
        done.set_result(None)
        return done

    def _stored_piece(self, index: MetadataIndex) -> tuple[MetadataIndex, int | None]:
        """The stored piece that a tensor's piece is in, and in which of the piece's blocks."""
        place = self._by_name[1][index.fqn]
        if place.block is None:
            return MetadataIndex(place.stored, index.offset), None
        starts = self._starts[place.stored]
        start = starts[bisect.bisect_right(starts, place.block) - 1]
        assert index.offset is not None
        return MetadataIndex(place.stored, torch.Size((start, *index.offset))), place.block - start

    @functools.cached_property
    def _starts(self) -> dict[str, list[int]]:
        """At which blocks the pieces of a stack begin."""
        return {name: sorted({chunk.offsets[0] for chunk in entry.chunks}) for name, entry in self._stacks.items()}

    @property
    def _stacks(self) -> dict[str, TensorStorageMetadata]:
        entries = self.table.state_dict_metadata.items()
        return {name: e for name, e in entries if is_stack(name) and isinstance(e, TensorStorageMetadata) and e.size}

    def _read_piece(self, stored: StoredTensor, items: list[tuple[int | None, ReadItem]], planner: LoadPlanner) -> None:
        for _, item in items:
            if item.type == LoadItemType.BYTE_IO:  # an object, as whose pickle DCP would run anything
                raise ValueError(f"{item.storage_index.fqn} is no tensor")
        whole = stored.read(sum(math.prod(item.lengths) for _, item in items))
        for block, item in items:
            if whole is None:
                values = stored.read_part(block, item.storage_offsets, item.lengths)
            else:
                values = narrowed(whole if block is None else whole[block], item.storage_offsets, item.lengths)
            target = planner.resolve_tensor(item).detach()
            target.copy_(values)
            planner.commit_tensor(item, target)

    def fill(self, tensors: dict[str, torch.Tensor]) -> None:
        """Read tensors in place, of DTensors this rank's parts. Not collective.

        Raises:
            UserError: one is not there, has another shape or cannot be read.
        """
        try:
            with warnings.catch_warnings():  # that one process reads
                warnings.simplefilter("ignore")
                dcp.load(dict(tensors), storage_reader=self, no_dist=True)
        except CheckpointException as error:
            reason = next(iter(error.failures.values()))[0]
            raise UserError(f"{self.folder}: cannot be read: {reason}") from None

    def holds(self, key: str) -> bool:
        return key in self.read_metadata().state_dict_metadata

    def tensor_dtype(self, key: str) -> torch.dtype:
        """Of a tensor that is known to be there."""
        entry = self.read_metadata().state_dict_metadata[key]
        assert isinstance(entry, TensorStorageMetadata)
        return entry.properties.dtype

    def tensor_dtypes(self, shapes: dict[str, torch.Size], prefix: str = "model.") -> set[torch.dtype]:
        """The dtypes of the weights, which are named "model." and the HF name, or of the tensors of another prefix.

        shapes: name without the prefix -> shape.

        Raises:
            UserError: a line for every tensor that is missing or misshapen, or no part of the model.
        """
        entries = self.read_metadata().state_dict_metadata
        stored = {key: entry for key, entry in entries.items() if key.startswith(prefix)}
        expected = {f"{prefix}{name}": shape for name, shape in shapes.items()}
        dtypes: set[torch.dtype] = set()
        errors = [f"{self.folder}: {key}: is not part of the model" for key in sorted(stored.keys() - expected.keys())]
        for key, shape in expected.items():
            entry = stored.get(key)
            if not isinstance(entry, TensorStorageMetadata):
                errors.append(f"{self.folder}: {key}: is missing")
            elif entry.size != shape:
                errors.append(f"{self.folder}: {key}: has shape {list(entry.size)}, must be {list(shape)}")
            else:
                dtypes.add(entry.properties.dtype)
        if errors:
            raise UserError("\n".join(errors))
        return dtypes


def _blocks_of(stack: TensorStorageMetadata) -> Iterator[TensorStorageMetadata]:
    """The entry of each block's tensor. Blocks that were written together share the list of their pieces."""
    together: dict[tuple[int, int], list[ChunkStorageMetadata]] = {}
    for chunk in stack.chunks:
        chunks = together.setdefault((chunk.offsets[0], chunk.sizes[0]), [])
        chunks.append(ChunkStorageMetadata(torch.Size(chunk.offsets[1:]), torch.Size(chunk.sizes[1:])))
    for (_, blocks), chunks in sorted(together.items()):
        for _ in range(blocks):
            yield TensorStorageMetadata(stack.properties, torch.Size(stack.size[1:]), chunks)
