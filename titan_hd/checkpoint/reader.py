"""Reads checkpoints of torch.distributed.checkpoint (DCP), whoever wrote them.

DCP's own FileSystemReader trusts a checkpoint: its table of contents, `.metadata`, is a pickle, which can run any code
when it is loaded, and may name files anywhere. Here an unpickler admits only the classes that make up such a table, and
only files in the checkpoint's folder are opened. The files of the tensors are read by torch with weights_only.
"""

from __future__ import annotations

import functools
import pickle
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from titan_hd.errors import UserError

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


class _TableUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) in _ALLOWED:
            return super().find_class(module, name)
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of a table of contents")


class CheckpointReader(dcp.FileSystemReader):
    """DCP's reader of a folder, which reads the table of contents once and without running code.

    table: the table of contents, if another rank has read it already.

    Raises:
        UserError: from `read_metadata`: there is none, or it cannot be read.
    """

    def __init__(self, folder: Path, table: Metadata | None = None):
        super().__init__(str(folder))
        self.folder = folder
        if table is not None:
            self._table = table

    def read_metadata(self, *args, **kwargs) -> Metadata:
        if self._table.storage_meta is None:
            self._table.storage_meta = StorageMeta()
        self._table.storage_meta.load_id = self.load_id
        return self._table

    @functools.cached_property
    def _table(self) -> Metadata:
        path = self.folder / ".metadata"
        if not path.is_file():
            raise UserError(f"{self.folder}: is no checkpoint: it holds no .metadata")
        try:
            with open(path, "rb") as file:
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

    def holds(self, key: str) -> bool:
        return key in self._table.state_dict_metadata

    def tensor_dtype(self, key: str) -> torch.dtype:
        """Of a tensor that is known to be there."""
        entry = self._table.state_dict_metadata[key]
        assert isinstance(entry, TensorStorageMetadata)
        return entry.properties.dtype

    def tensor_dtypes(self, shapes: dict[str, torch.Size], prefix: str = "model.") -> set[torch.dtype]:
        """The dtypes of the weights, which are named "model." and the HF name, or of the tensors of another prefix.

        shapes: name without the prefix -> shape.

        Raises:
            UserError: a line for every tensor that is missing or misshapen, or no part of the model.
        """
        entries = self._table.state_dict_metadata
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
