"""Hugging Face weight files: which tensor lies where, blocks read one at a time, files written in place by many.

Parameter names are HF's own, so there is no renaming in either direction. Nothing here knows of meshes: callers ask
for a block of rows and columns, and write one. A directory is untrusted: no path leads out of it, and nothing pickled
is read.

Why not the readers of the safetensors library? Each worker reads only its own block of every tensor, into a tensor that
exists already. The library maps files into memory: the pages count against the memory limit of a container, for whole
files once every row was touched, and a file that shrinks meanwhile is a SIGBUS instead of an error. Its backend without
a map reads the whole tensor for a slice of it (safetensors 0.8: 67 MB for 0.4 MB). So blocks are read by their position
(`preadv`), through small buffers (`staging`). The library checks the headers (`safetensors_header`).

Writing is the mirror image: a file's header is written first, so that any number of workers can then write the rows
that they own, each into its place. The library's writers, and torch's HuggingFaceStorageWriter, need whole tensors or
write one file per rank, which a single process must then read and merge.
"""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from titan_hd.errors import UserError
from titan_hd.files import read_json_object, shown, shown_size, sync_file
from titan_hd.models.model_config import ModelConfig
from titan_hd.models.registry import parameter_shapes, read_hf_config
from titan_hd.models.safetensors_header import DTYPES, Entry, build_header, read_header, unique_keys
from titan_hd.models.staging import PIECE_BYTES, Staging

logger = logging.getLogger("titan_hd")

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = (".bin", ".pth", ".pt", ".ckpt", ".pkl")
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# Buffers that old Llama checkpoints carry and that the decoder computes by itself.
_IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)


class WeightFiles:
    """The safetensors files of a HF directory, checked against the shapes that a model expects.

    Attributes:
        bytes_read: of tensors, so far.
        nonzero: names of the tensors of which something else than zeros was read.
        missing: names of the tensors that the files lack, and may.

    Raises:
        UserError: with one line for every fault of the directory, an index, a header or a tensor; nothing is read then.
    """

    def __init__(
        self,
        directory: str | Path,
        expected: dict[str, torch.Size],
        tied_head: bool,
        may_lack: tuple[str, ...] = (),
        may_have: tuple[str, ...] = (),
        prefix: str = "",
    ):
        """may_lack, may_have: first parts of names of what the files need not have, and of what is passed over. prefix:
        of names that have none of it in files of the model without a head."""
        self.directory, self._may_have, self._prefix = Path(directory), may_have, prefix
        self.missing = {name for name in expected if name.startswith(may_lack)} if may_lack else set()
        self.bytes_read = 0
        self.nonzero: set[str] = set()
        self._staging = Staging()
        self._places: dict[str, tuple[Path, Entry]] = {}
        self._open: dict[Path, io.FileIO] = {}  # each file once, not once per tensor: opening loads a file system most
        errors = self._locate(expected, tied_head)
        if errors:
            raise UserError("\n".join(sorted(errors)))

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor in its file."""
        return self._places[name][1].nbytes

    def dtype(self, name: str) -> torch.dtype:
        """dtype of a tensor in its file."""
        return DTYPES[self._places[name][1].dtype]

    @torch.no_grad()
    def read_into(self, name: str, out: torch.Tensor, row: int = 0, column: int = 0) -> None:
        """Fill `out` [rows, columns] (or [rows] of a vector), of any device and floating dtype, with the block of a
        tensor that begins at (row, column). Only that block is read, in pieces of at most 16 MiB or one row; they are
        converted where `out` lies.

        Raises:
            UserError: it cannot be read, or holds a value that is NaN, infinite or too large for `out`.
        """
        dtype = self.dtype(name)
        wanted = out[0].numel() * dtype.itemsize if len(out) else 0  # bytes of a row of the block
        step = max(1, PIECE_BYTES // max(1, wanted))
        if self._staging.device != out.device:
            self._staging = Staging(out.device)
        for start in range(0, len(out), step):
            target = out[start : start + step]
            slot = self._staging.next(len(target) * wanted)
            self.read_bytes(name, slot.on_host(), row + start, len(target), column, out.dtype)
            target.copy_(slot.sent().view(dtype).view(target.shape))
            slot.release()

    def read_bytes(self, name: str, raw: torch.Tensor, row: int, rows: int, column: int, dtype: torch.dtype) -> None:
        """Fill `raw`, uint8 on the host, with so many rows of a tensor as they lie in its file, from (row, column) on;
        its length says how many columns. dtype: what they will be converted to.

        Raises:
            UserError: as `read_into`.
        """
        path, entry = self._places[name]
        stored = DTYPES[entry.dtype]
        width = entry.nbytes // max(1, entry.shape[0])  # bytes of a row in the file
        offset = entry.offset + row * width + column * stored.itemsize
        try:
            if path not in self._open:
                self._open[path] = io.FileIO(path)
            _read_strided(self._open[path].fileno(), raw.numpy().data, offset, len(raw) // max(1, rows), width)
        except (OSError, EOFError) as error:
            raise UserError(f"{path}: {name}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
        if len(raw):
            self._check_values(name, raw.view(stored), dtype)
        self.bytes_read += len(raw)

    def _check_values(self, name: str, values: torch.Tensor, dtype: torch.dtype) -> None:
        """One pass at the speed of memory; a NaN is the smallest and the largest of its tensor."""
        stored = torch.stack(torch.aminmax(values))
        ends = stored.to(dtype)
        if not ends.isfinite().all():
            reason = f"too large for {dtype}" if stored.isfinite().all() else "NaN or infinite"
            raise UserError(f"{self._places[name][0]}: {name}: holds a value that is {reason}")
        if ends.any():
            self.nonzero.add(name)

    def close(self) -> None:
        """Close the files; what is read later opens them again."""
        while self._open:
            self._open.popitem()[1].close()

    def read_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop of a tensor on the host, in the file's dtype."""
        out = torch.empty(stop - start, *self._places[name][1].shape[1:], dtype=self.dtype(name))
        self.read_into(name, out, start)
        return out

    def heads_differ(self) -> bool:
        """Whether the files of a tied model hold a head, too, that is not the embedding. Reads both."""
        if not {_HEAD, _EMBEDDING} <= self._places.keys():
            return False
        rows, width = self._places[_EMBEDDING][1].shape
        step = max(1, PIECE_BYTES // (8 * width))
        blocks = ((start, min(rows, start + step)) for start in range(0, rows, step))
        return any(
            not torch.equal(self.read_rows(_EMBEDDING, *block).double(), self.read_rows(_HEAD, *block).double())
            for block in blocks
        )

    # ------------------------------------------------------------------------------------------------------ checking

    def _locate(self, expected: dict[str, torch.Size], tied_head: bool) -> list[str]:
        """Find every expected tensor; returns what is wrong."""
        weight_map = find_files(self.directory)
        errors: list[str] = []
        headers: dict[str, dict[str, Entry]] = {}
        files = sorted(set(weight_map.values())) if weight_map else [SINGLE]
        for file in files:
            try:
                headers[file] = read_header(self.directory / file)
            except UserError as error:
                errors += str(error).splitlines()
        if not headers:
            return errors
        if self._prefix and not any(name.startswith(self._prefix) for entries in headers.values() for name in entries):
            headers = {file: {self._prefix + n: e for n, e in entries.items()} for file, entries in headers.items()}
            weight_map = weight_map and {self._prefix + name: file for name, file in weight_map.items()}
        for file, entries in headers.items():
            for name, entry in entries.items():
                if not self._passed_over(name):
                    if name in self._places:
                        errors.append(f"{self.directory / file}: {shown(name)}: is in {self._places[name][0].name} too")
                    self._places[name] = self.directory / file, entry
        if weight_map:
            if tied_head and _HEAD not in self._places:  # a converter may have written the index before it tied them
                weight_map.pop(_HEAD, None)
            errors += self._contradictions(weight_map, headers.keys())
            not_named = (expected.keys() & self._places.keys()) - weight_map.keys()
            errors += [f"{self._places[n][0]}: {n}: is in this file, the index does not name it" for n in not_named]
        if tied_head:
            errors += self._tie(expected)
        if self._places and all(f"model.{name}" in expected for name in self._places):
            line = "the names lack the prefix 'model.', as those of a model without its head; save the ...ForCausalLM"
            return [*errors, f"{self.directory}: {line}"]
        # A head that is there in part is no head: what is missing of it is missing.
        self.missing = self.missing if self.missing.isdisjoint(self._places) else set()
        for name in expected.keys() - self._places.keys() - (weight_map or {}).keys() - self.missing:
            errors.append(f"{self.directory}: {name}: is missing")
        for name in self._places.keys() - expected.keys() - ({_HEAD} if tied_head else set()):
            errors.append(f"{self._places[name][0]}: {shown(name)}: is not part of the model")
        for name in expected.keys() & self._places.keys():
            errors += self._misfits(name, tuple(expected[name]))
        return errors

    def _passed_over(self, name: str) -> bool:
        return name.endswith(_IGNORED_SUFFIXES) or (bool(self._may_have) and name.startswith(self._may_have))

    def _contradictions(self, weight_map: dict[str, str], readable: Iterable[str]) -> list[str]:
        """Where the index and the headers of the files that could be read do not agree."""
        errors = []
        for name, file in weight_map.items():
            path = self._places[name][0] if name in self._places else None
            if file in readable and not self._passed_over(name) and (path is None or path.name != file):
                holder = f"; {path.name} holds it" if path else ""
                errors.append(f"{self.directory / file}: {shown(name)}: the index names it, the file lacks it{holder}")
        return errors

    def _tie(self, expected: dict[str, torch.Size]) -> list[str]:
        """One matrix is embedding and head: the one that is there. Exporters name it either way, or repeat it."""
        if _HEAD not in self._places:
            return []
        path, entry = self._places[_HEAD]
        if _EMBEDDING not in self._places:
            self._places[_EMBEDDING] = self._places.pop(_HEAD)
        elif entry.shape != tuple(expected[_EMBEDDING]):
            return [f"{path}: {_HEAD}: has shape {list(entry.shape)}, the tied embedding {list(expected[_EMBEDDING])}"]
        return []

    def _misfits(self, name: str, shape: tuple[int, ...]) -> list[str]:
        path, entry = self._places[name]
        errors = []
        if entry.shape != shape:
            errors.append(f"{path}: {name}: has shape {list(entry.shape)}, must be {list(shape)}")
        if entry.dtype not in DTYPES:
            errors.append(f"{path}: {name}: has dtype {entry.dtype}, must be one of {', '.join(DTYPES)}")
        return errors


def weight_files(directory: str | Path, expected: dict[str, torch.Size], config: ModelConfig) -> WeightFiles:
    """The weight files of a HF directory, which are those of a configuration. expected: the shapes of the weights.

    Raises:
        UserError: as `WeightFiles`.
    """
    names = config.new_weights, config.other_weights, config.base_prefix
    return WeightFiles(directory, expected, config.tie_word_embeddings, *names)


def open_model_weights(directory: str | Path, config: ModelConfig) -> WeightFiles:
    """The weight files of a HF directory, checked against the model of a configuration.

    Raises:
        UserError: as `WeightFiles`.
    """
    return weight_files(directory, parameter_shapes(config), config)


def read_model_config(directory: str | Path, name: str = "") -> ModelConfig:
    """As `read_hf_config`, with the head that transformers would take: where config.json ties it to the embedding and
    the files hold another one (merges of trained heads do), theirs, and the configuration, also for the export, says
    that it is not tied. Files that are not there, or not in order, change nothing: whoever reads them says so.

    Raises:
        UserError: as `read_hf_config`, or the two matrices cannot be read.
    """
    config = read_hf_config(directory, name)
    if not config.tie_word_embeddings:
        return config
    try:
        files = open_model_weights(directory, config)
    except UserError:
        return config
    if not files.heads_differ():
        return config
    logger.warning(
        "%s: %s is not the embedding, though tie_word_embeddings is set; it is used, as by transformers, and an export "
        "says tie_word_embeddings = false",
        *(files.directory, _HEAD),
    )
    return config.changed(tie_word_embeddings=False, hf={**config.hf, "tie_word_embeddings": False})


def _read_strided(file: int, out: memoryview, offset: int, wanted: int, width: int) -> None:
    """Fill `out` with pieces of `wanted` bytes that lie `width` bytes apart; in one go where they touch."""
    if wanted == width:
        wanted = width = max(1, len(out))
    for start in range(0, len(out), max(1, wanted)):
        _read_exactly(file, out[start : start + wanted], offset + start // wanted * width)


def _read_exactly(file: int, out: memoryview, offset: int) -> None:
    while len(out):
        count = os.preadv(file, [out], offset)  # at most 2 GiB a call, and fewer where a file ends
        if count == 0:
            raise EOFError("the file ends before it; did something write to it meanwhile?")
        out, offset = out[count:], offset + count


# ---------------------------------------------------------------------------------------------------------------------
# The files of a directory


def find_files(directory: Path) -> dict[str, str] | None:
    """The index of a HF directory, tensor -> file in this directory, or None for a single model.safetensors.

    Raises:
        UserError: there are no safetensors, an index is broken or leads out of the directory; all faults at once.
    """
    if not directory.is_dir():
        raise UserError(f"model.hf_assets_path: {directory} is no directory")
    single, index = directory / SINGLE, directory / INDEX
    if not index.exists():
        if not single.exists():
            raise UserError(_what_else(directory))
        return None
    weight_map = read_json_object(index, unique_keys).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()) or not weight_map:
        raise UserError(f"{index}: weight_map: must be an object of file names")
    files = sorted(set(weight_map.values()))
    errors = [f"{index}: weight_map: {reason}" for file in files if (reason := _refusal(file))]
    if single.exists() and SINGLE not in files:
        errors.append(f"{directory}: holds both {SINGLE} and an index of other files; remove the one that is stale")
    if errors:
        raise UserError("\n".join(errors))
    return weight_map


def _refusal(file: str) -> str | None:
    """Why an index may not name a file, or None. A file of the directory may be a link, as in the hub's cache."""
    if Path(file).name != file or "\0" in file:
        return f"{shown(repr(file))} is not a file of the directory"
    if file.endswith(_PICKLES):
        return f"{shown(file)} is pickled, which can run code when it is read; convert it to safetensors"
    if not file.endswith(".safetensors"):
        return f"{shown(repr(file))} is no safetensors file"
    return None


def _what_else(directory: Path) -> str:
    pickles = [path.name for path in directory.iterdir() if path.name.endswith(_PICKLES)]
    if pickles:
        return (
            f"model.hf_assets_path: {directory / min(pickles)} is pickled, which can run code when it is read; convert "
            "the weights to safetensors"
        )
    return f"model.hf_assets_path: {directory} holds no {SINGLE} and no index of it"


# ---------------------------------------------------------------------------------------------------------------------
# Writing


@dataclass(frozen=True)
class TensorSlot:
    """Where one tensor is to lie: file, byte offset of its first row, bytes per row, dtype."""

    file: Path
    offset: int
    row_bytes: int
    dtype: torch.dtype


def plan_files(
    directory: Path, shapes: dict[str, torch.Size], dtype: torch.dtype, max_file_bytes: float = 5e9
) -> tuple[dict[str, TensorSlot], dict[Path, bytes]]:
    """Lay tensors out over safetensors files of bounded size; a larger tensor gets a file of its own.

    Returns:
        slots by tensor name, and for each file its header (length prefix included). A file is its header followed by
        its tensors, so any number of writers can fill it once the header is there.
    """
    groups: list[dict[str, torch.Size]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        nbytes = shape.numel() * dtype.itemsize
        if groups[-1] and filled + nbytes > max_file_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = shape
        filled += nbytes
    slots, headers = {}, {}
    for i, group in enumerate(groups):
        path = directory / (SINGLE if len(groups) == 1 else f"model-{i + 1:05}-of-{len(groups):05}.safetensors")
        headers[path], offsets = build_header(group, dtype)
        for name, shape in group.items():
            row_bytes = shape.numel() * dtype.itemsize // max(1, shape[0])
            slots[name] = TensorSlot(path, offsets[name], row_bytes, dtype)
    return slots, headers


def write_headers(slots: dict[str, TensorSlot], headers: dict[Path, bytes]) -> None:
    """Create the files with their headers and, if there are several, the index. One process does this, first."""
    for path, header in headers.items():
        path.write_bytes(header)
    if len(headers) > 1:
        directory = next(iter(headers)).parent
        sizes = (json.loads(header[8:]) for header in headers.values())
        total = sum(e["data_offsets"][1] for entries in sizes for e in [list(entries.values())[-1]])
        weight_map = {name: slot.file.name for name, slot in slots.items()}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def write_rows(slot: TensorSlot, start: int, rows: torch.Tensor, column: int = 0) -> None:
    """Write rows [rows, columns] (or [rows] of a vector) of any device and floating dtype as the block of a tensor that
    begins at (start, column). Rounded once, to nearest, in pieces of at most 16 MiB or one row."""
    if not rows.numel():
        return
    item = slot.dtype.itemsize
    wanted = rows[0].numel() * item if rows.dim() else item
    step = max(1, PIECE_BYTES // wanted)
    with open(slot.file, "r+b", buffering=0) as file:
        for first in range(0, len(rows), step):
            piece = rows[first : first + step].to("cpu", slot.dtype).contiguous()
            data = piece.view(torch.uint8).numpy().data.cast("B")
            offset = slot.offset + (start + first) * slot.row_bytes + column * item
            _write_strided(file.fileno(), data, offset, wanted, slot.row_bytes)


def _write_strided(file: int, data: memoryview, offset: int, given: int, width: int) -> None:
    """Write pieces of `given` bytes so that they lie `width` bytes apart; in one go where they touch."""
    if given == width:
        given = width = len(data)
    for start in range(0, len(data), given):
        piece, at = data[start : start + given], offset + start // given * width
        while len(piece):
            count = os.pwrite(file, piece, at)
            piece, at = piece[count:], at + count


def sync_files(paths: Iterable[Path]) -> None:
    """Wait until what this process wrote to the files is on the disk: once per file, not once per tensor."""
    for path in paths:
        sync_file(path)


def check_space(directory: Path, slots: dict[str, TensorSlot], shapes: dict[str, torch.Size]) -> None:
    """UserError if the tensors do not fit on the disk of `directory`."""
    check_room(directory, sum(shapes[name].numel() * slot.dtype.itemsize for name, slot in slots.items()))


def check_room(directory: Path, needed: int) -> None:
    """UserError if weights of so many bytes do not fit on the disk of `directory`."""
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise UserError(f"{directory}: the weights need {shown_size(needed)}, {shown_size(free)} are free")
