"""From the [data] section to records: read, understood, tokenized and counted."""

from __future__ import annotations

import dataclasses
import io
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from titan_hd import __version__
from titan_hd.config.job_config import Data, DataSource
from titan_hd.data.formats import Format, build_format, detect_format
from titan_hd.data.hub_datasets import check_library, fingerprint, is_hub_name
from titan_hd.data.order.mixture import Concatenation, Mixture
from titan_hd.data.order.order import Order, build_order
from titan_hd.data.sources import Faults, Raw, Record, find_files, read_raw, read_records
from titan_hd.data.streaming import StreamedRecords, StreamSource, WindowOrder
from titan_hd.data.text.templates import load_template, template_file
from titan_hd.data.text.tokenizer import TOKENIZER_FILES
from titan_hd.data.text.tokenizer_base import Tokenizer
from titan_hd.data.tokens.cache import TokenCache, cache_folder, content_key
from titan_hd.data.tokens.encoding import ArrayWriter, Chunk, Encoder, as_array
from titan_hd.data.tokens.processes import Task, TokenProcesses
from titan_hd.data.tokens.records import InstructionRecords, Statistics, TokenizedRecords
from titan_hd.errors import UserError

SMALL = 2**20  # bytes of files that every worker tokenizes by itself, in a second or two
CHUNK_RECORDS, CHUNK_BYTES = 512, 2**19
MAX_PROCESSES = 32  # more would wait for the one that reads and writes
logger = logging.getLogger("titan_hd")


def build_records(
    config: Data,
    key: str,
    vocab_size: int,
    seq_len: int,
    tokenizer: Callable[[], Tokenizer],
    progress: bool = False,
    seed: int = 0,
) -> TokenizedRecords | Concatenation | StreamedRecords:
    """The records of data.train or data.validation (`key` is "train" or "validation"), tokenized and cut at seq_len.

    The same on every worker: in the order of the files and their lines, without the records that data.on_error skips
    and those that the cut leaves nothing to train on. Blocks while another process tokenizes the same into the cache.

    tokenizer: called only where the format needs one.
    progress: show a bar where this process tokenizes, if the standard error is a terminal.
    seed: of a mixture's walks, and of the order within the windows of a stream.

    Returns:
        TokenizedRecords; InstructionRecords for validation records with a prompt and a response; of a list in
        data.train a Mixture, of one in data.validation a Concatenation; of data.train with data.streaming
        StreamedRecords, which have read nothing yet.

    Raises:
        UserError: names the key, or the file and its line; or no record is left.
    """
    value, name = getattr(config, key), f"data.{key}"

    def build(config: Data, path: str, name: str) -> TokenizedRecords:
        return _Source(config, path, name, vocab_size, seq_len, tokenizer, key == "validation", progress).build()

    if config.streaming and key == "train":
        return _build_stream(config, vocab_size, seq_len, tokenizer, seed)
    if isinstance(value, str):
        return build(config, value, name)
    parts = [build(*source) for source in _named_sources(config, key)]
    return Mixture(name, value, parts, config.shuffle, seed) if key == "train" else Concatenation(name, parts)


def sample_order(
    records: TokenizedRecords | Concatenation | StreamedRecords, config: Data, seq_len: int, seed: int
) -> Order:
    """Which of the training records make up which sample of the run."""
    if isinstance(records, StreamedRecords):
        return records.order
    size, index = (records.size, records.index) if isinstance(records, Mixture) else (len(records), None)
    return build_order(records.lengths, size, config.pack, seq_len, config.shuffle, seed, index)


def data_summary(records: TokenizedRecords | Concatenation | StreamedRecords, config: Data, seq_len: int) -> str:
    """What tells the samples of a run from those of another: equal for equal records, mixtures and packs (of a stream,
    for files of equal sizes)."""
    if isinstance(records, StreamedRecords):
        names = ("format", "template", "prompt_field", "response_field", "text_field", "train_on_prompt")
        settings = ", ".join(f"{name} {getattr(config, name)}" for name in names)
        said = f"a stream of {records.extent}, {settings}, training.seq_len {seq_len}"
        return f"{said}, permuted in windows of {config.shuffle_window}" if config.shuffle else said
    s = records.statistics
    said = f"{s.records} records of format {s.format}, {s.tokens} tokens, {s.trained} trained, content {s.content}"
    if isinstance(records, Mixture):
        said += ", of each source " + ", ".join(f"{share.taken} of {share.records}" for share in records.shares)
    return f"{said}; packs of {seq_len} tokens" if config.pack else said


def _named_sources(config: Data, key: str) -> list[tuple[Data, str, str]]:
    """The [data] section as it is for each source of data.train or data.validation, its path, and what messages call
    it."""
    value, name = getattr(config, key), f"data.{key}"
    if isinstance(value, str):
        return [(config, value, name)] if value else []
    return [(source_config(config, source), source.path, f"{name}[{i}]") for i, source in enumerate(value)]


def _build_stream(
    config: Data, vocab_size: int, seq_len: int, tokenizer: Callable[[], Tokenizer], seed: int
) -> StreamedRecords:
    sources, skip = [], config.on_error == "skip"
    for own, path, name in _named_sources(config, "train"):
        first, chosen = open_source(own, path, name)
        format = build_format(own, chosen, first, vocab_size, tokenizer)
        sources.append(StreamSource(path, name, Encoder(name, chosen, format, seq_len, False, not skip)))
    order = WindowOrder(config.shuffle_window, config.shuffle, seed)
    return StreamedRecords(sources, order, Faults(skip, config.max_skipped), " and ".join(map(_extent, sources)))


def _extent(source: StreamSource) -> str:
    """How much a source of a stream holds, as far as that is known before it is read."""
    if is_hub_name(source.path):
        return source.path
    sizes = [size for size, _ in _stamps(find_files(source.path, source.name))]
    return f"{len(sizes)} file(s) of {sum(sizes)} bytes"


def source_config(config: Data, source: DataSource) -> Data:
    """The [data] section as it is for one entry of a list."""
    own = {f.name: getattr(source, f.name) for f in dataclasses.fields(DataSource) if hasattr(config, f.name)}
    return dataclasses.replace(config, **{name: value for name, value in own.items() if value is not None})


def check_data(config: Data) -> None:
    """What can be said of data.train and data.validation before they are read: files, packages and templates.

    Raises:
        UserError: one line for each fault.
    """
    errors: dict[str, None] = {}  # several sources may have the same fault

    def attempt(function: Callable, *args: object) -> None:
        try:
            function(*args)
        except UserError as error:
            errors[str(error)] = None

    for key in ("train", "validation"):
        for own, path, name in _named_sources(config, key):
            if own.format in ("auto", "instruction"):
                attempt(load_template, own.template)
            attempt(check_library if is_hub_name(path) else find_files, path, name)
    if errors:
        raise UserError("\n".join(errors))


def open_source(config: Data, path: str, name: str) -> tuple[Record, str]:
    """The first good record of a data set, and the name of its format.

    Raises:
        UserError: there is none, or its fields are those of no format.
    """
    faults = Faults(config.on_error == "skip", config.max_skipped)
    first = next(read_records(path, name, faults), None)
    if first is None:
        raise UserError(f"{name}: no record is left; {faults.count} are bad, the first: {faults.first}")
    if config.format != "auto":
        return first, config.format
    chosen, found = detect_format(config, first)
    logger.info("%s: format %s, because the first record has %s", name, chosen, found)
    return first, chosen


class _Source:
    """One data set on its way to TokenizedRecords."""

    def __init__(
        self,
        config: Data,
        path: str,
        name: str,
        vocab_size: int,
        seq_len: int,
        tokenizer: Callable[[], Tokenizer],
        keep_questions: bool,
        progress: bool,
    ):
        self._config, self._path, self._name = config, path, name
        first, chosen = open_source(config, path, name)
        self._format: Format = build_format(config, chosen, first, vocab_size, tokenizer)
        self._directory = None if chosen == "tokens" else getattr(tokenizer(), "directory", None)
        self._task = Task(
            name,
            config,
            chosen,
            first,
            vocab_size,
            seq_len,
            keep_questions and chosen in ("instruction", "chat"),
            str(self._directory),
        )
        self._files = [] if is_hub_name(path) else find_files(path, name)
        self._stamps = _stamps(self._files)
        self._is_small = bool(self._files) and sum(size for size, _ in self._stamps) < SMALL
        self._progress = progress

    def build(self) -> TokenizedRecords:
        folder, task = cache_folder(self._config.cache_dir), self._task
        if folder is None or self._is_small:
            files: dict[str, io.BytesIO] = {}
            statistics = self._tokenize(lambda name: files.setdefault(name, io.BytesIO()))
            arrays = {name: as_array(name, np.frombuffer(f.getbuffer(), np.uint8)) for name, f in files.items()}
        else:
            entry = TokenCache(folder).get(self._key(folder), [str(file) for file in self._files], self._tokenize)
            statistics, arrays = entry.statistics, entry.arrays
        statistics.name = self._name
        _check_what_is_left(statistics, task.seq_len)
        if task.keep_questions:
            return InstructionRecords(statistics, arrays, self._format)
        return TokenizedRecords(statistics, arrays)

    def _key(self, folder: Path) -> str:
        """Stands for everything that the arrays depend on. folder: the cache."""
        task, config = self._task, self._config
        names = ("prompt_field", "response_field", "text_field", "train_on_prompt", "template", "on_error")
        settings = {name: getattr(config, name) for name in (*names, "max_skipped")}
        settings |= {name: getattr(task, name) for name in ("format", "vocab_size", "seq_len", "keep_questions")}
        settings |= {"titan_hd": __version__, "files": len(self._files)}
        settings |= {name: metadata.version(name) for name in ("tokenizers", "sentencepiece", "tiktoken", "jinja2")}
        if not self._files:
            settings["dataset"] = fingerprint(self._path, self._name)
        files = list(self._files)
        if task.format != "tokens":
            names = (*TOKENIZER_FILES, "config.json", "special_tokens_map.json", "original/tokenizer.model")
            found = [name for name in sorted(set(names)) if (self._directory / name).exists()]
            settings["tokenizer"] = found
            files += [self._directory / name for name in found]
        template = template_file(config.template)
        if task.format == "instruction" and template:
            settings["template"] = "file"
            files.append(template)
        try:
            return content_key(settings, files, folder)
        except OSError as error:
            raise UserError(f"{self._name}: cannot read {error.filename}: {error.strerror}") from None

    def _tokenize(self, open_file: Callable[[str], BinaryIO]) -> Statistics:
        """All records, in the order of the files, whoever encodes them."""
        config, task = self._config, self._task
        stop = config.on_error == "raise"
        encoder = Encoder(task.name, task.format, self._format, task.seq_len, task.keep_questions, stop)
        statistics, writer = Statistics(task.name, task.format), ArrayWriter(encoder.names, open_file)
        faults = Faults(not stop, config.max_skipped)
        hidden = not (self._progress and sys.stderr.isatty())
        with tqdm(desc=f"tokenizing {task.name}", unit=" records", disable=hidden) as bar:
            for chunk in self._encoded(encoder):
                for line in chunk.faults:
                    faults.report(line)
                writer.add(chunk.arrays)
                statistics.add(chunk.statistics)
                bar.update(chunk.read)
        statistics.bad, statistics.first_bad, statistics.content = faults.count, faults.first, writer.content()
        for file, before, now in zip(self._files, self._stamps, _stamps(self._files)):
            if now != before:
                raise UserError(f"{task.name}: {file} was changed while it was read; start again when it is complete")
        return statistics

    def _encoded(self, encoder: Encoder) -> Iterator[Chunk]:
        chunks, count = _chunks(read_raw(self._path, self._name)), _process_count(self._config)
        if count == 1 or self._is_small or (self._directory is None and self._task.format != "tokens"):
            yield from map(encoder.chunk, chunks)
            return
        with TokenProcesses(self._task, count) as processes:
            yield from processes.encode(chunks)


def _stamps(files: list[Path]) -> list[tuple[int, int]]:
    """Size and time of the last change of every file; a missing one has neither."""
    found = [file.stat() if file.exists() else None for file in files]
    return [(stat.st_size, stat.st_mtime_ns) if stat else (0, 0) for stat in found]


def _process_count(config: Data) -> int:
    """data.num_proc, else the cores of this node; where every worker tokenizes for itself, its share of them."""
    if config.num_proc:
        return config.num_proc
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = 1 if cache_folder(config.cache_dir) else int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(cores // share, MAX_PROCESSES))


def _chunks(raws: Iterable[Raw]) -> Iterator[list[Raw]]:
    chunk: list[Raw] = []
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


def _check_what_is_left(statistics: Statistics, seq_len: int) -> None:
    s = statistics
    if s.bad:
        logger.info("%s: %d bad records are skipped; the first: %s", s.name, s.bad, s.first_bad)
    if s.unlabelled:
        line = "%s: %d records hold no label within training.seq_len = %d and are skipped; the first: %s"
        logger.info(line, s.name, s.unlabelled, seq_len, s.first_unlabelled)
    if not s.records:
        bad = f", {s.bad} are bad, the first: {s.first_bad}" if s.bad else ""
        raise UserError(
            f"{s.name}: no record is left; {s.unlabelled} hold no label within training.seq_len = {seq_len} (the "
            f"longest has {s.longest} tokens){bad}"
        )
