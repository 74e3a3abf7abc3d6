"""All records of a source, encoded in their order and appended to arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO

from titan_hd.console import Progress
from titan_hd.data.sources import Faults, InputFiles, RawRecord, read_raw
from titan_hd.data.tokens.encoding import ArrayWriter, Chunk, Encoder
from titan_hd.data.tokens.processes import TokenProcesses
from titan_hd.data.tokens.statistics import Statistics

CHUNK_RECORDS, CHUNK_BYTES = 512, 2**19


def tokenize(
    files: InputFiles,
    encoder: Encoder,
    faults: Faults,
    processes: int,
    shown: bool,
    open_file: Callable[[str], BinaryIO],
) -> Statistics:
    """Encode the records of a source in the order of its files, whoever encodes them, and write their arrays.

    processes: how many encode; 1 is this one. shown: say how far it is.
    open_file: gives the file of an array by its name.

    Raises:
        UserError: a bad record that `faults` does not let pass, or a file that was changed meanwhile.
    """
    statistics, writer = encoder.new_statistics(), ArrayWriter(encoder.names, open_file)
    with Progress(f"tokenizing {encoder.name}", unit="records", shown=shown) as progress:
        for chunk in _encoded(_chunks(read_raw(files.source, encoder.name)), encoder, processes):
            for line in chunk.faults:
                faults.report(line)
            writer.add(chunk.arrays)
            statistics.add(chunk.statistics)
            progress.update(chunk.read)
    statistics.bad, statistics.first_bad, statistics.content = faults.count, faults.first, writer.content()
    files.check_unchanged(encoder.name)
    return statistics


def _encoded(chunks: Iterator[list[RawRecord]], encoder: Encoder, processes: int) -> Iterator[Chunk]:
    if processes == 1:
        yield from map(encoder.chunk, chunks)
        return
    with TokenProcesses(encoder, processes) as helpers:
        yield from helpers.encode(chunks)


def _chunks(raws: Iterable[RawRecord]) -> Iterator[list[RawRecord]]:
    chunk: list[RawRecord] = []
    size = 0
    for raw in raws:
        chunk.append(raw)
        size += _size(raw.data)
        if len(chunk) == CHUNK_RECORDS or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _size(value: object, depth: int = 4) -> int:
    """About how many bytes a record's line or its decoded value holds, as deep as conversations go."""
    if isinstance(value, (bytes, str)):
        return len(value)
    if isinstance(value, list) and value and isinstance(value[0], int):
        return 8 * len(value)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(_size(part, depth - 1) for part in parts) if depth else 0
