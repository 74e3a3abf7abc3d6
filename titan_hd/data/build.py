"""From the [data] section to datasets: sources opened, formats chosen, records tokenized (or found in the cache)."""

from __future__ import annotations

import dataclasses
import functools
import io
import logging
import os
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np

from titan_hd import __version__
from titan_hd.config.job_config import Data, DataSource
from titan_hd.console import is_first_rank
from titan_hd.data.dataset import Concatenation, Dataset, FiniteDataset, Mixture, TokenizedDataset
from titan_hd.data.fields import log_unused
from titan_hd.data.formats import FORMATS, Format, QuestionFormat, detect_format
from titan_hd.data.sources import (
    Faults,
    InputFiles,
    Record,
    check_files,
    check_hub_library,
    is_hub_name,
    load_hub_dataset,
    read_records,
)
from titan_hd.data.streaming import StreamedDataset, StreamSource
from titan_hd.data.text.chat import borrowed_template
from titan_hd.data.text.templates import load_template, template_file
from titan_hd.data.text.tokenizer import TOKENIZER_FILES
from titan_hd.data.text.tokenizer_base import Tokenizer
from titan_hd.data.tokens.cache import TokenCache, cache_folder, content_key
from titan_hd.data.tokens.encoding import Encoder, as_array
from titan_hd.data.tokens.statistics import Statistics
from titan_hd.data.tokens.tokenizing import tokenize
from titan_hd.errors import UserError

SMALL = 2**20  # bytes of files that every worker tokenizes by itself, in a second or two
MAX_PROCESSES = 32  # more would wait for the one that reads and writes
logger = logging.getLogger("titan_hd")


@dataclasses.dataclass(frozen=True)
class Source:
    """One path of data.train or data.validation.

    config: the [data] section as it is for this path. name: what messages call it: data.train, data.train[1],
        data.validation[math] (of a named set), ... set_name: of a validation set that has one, else "".
    """

    config: Data
    path: str
    name: str
    set_name: str = ""


def sources(config: Data, key: str) -> list[Source]:
    """What data.train or data.validation names (`key` is "train" or "validation")."""
    value, name = getattr(config, key), f"data.{key}"
    if isinstance(value, str):
        return [Source(config, value, name)] if value else []
    return [
        Source(_with_own(config, entry), entry.path, f"{name}[{entry.name or i}]", entry.name or "")
        for i, entry in enumerate(value)
    ]


def _with_own(config: Data, entry: DataSource) -> Data:
    """The [data] section with what an entry of a list sets itself."""
    own = {f.name: getattr(entry, f.name) for f in dataclasses.fields(DataSource) if hasattr(config, f.name)}
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

    for source in (*sources(config, "train"), *sources(config, "validation")):
        if source.config.format == "auto" or FORMATS[source.config.format].needs_template:
            attempt(load_template, source.config.template)
        attempt(_check_files, source)
    if errors:
        raise UserError("\n".join(errors))


def _check_files(source: Source) -> None:
    """The files are there, or the package for those of the Hub, and so is a place for their tokens."""
    if is_hub_name(source.path):
        check_hub_library(source.path, source.name)
    else:
        check_files(source.path, source.name)
    files = InputFiles(source.path, source.name)
    if not source.config.streaming and not _is_small(files):
        cache_folder(source.config.cache_dir)


def _is_small(files: InputFiles) -> bool:
    return bool(files.paths) and files.size < SMALL


@dataclasses.dataclass(frozen=True)
class Answering:
    """What whoever generates with the trained model must know of its training records.

    stop_ids: tokens that ended the answers there, or that the model directory names. chat_template: the source of the
    template that wrote the chats, if the model directory has none. Nothing for records that bring their own tokens.
    """

    stop_ids: list[int] = dataclasses.field(default_factory=list)
    chat_template: str | None = None


NO_ANSWERS = Answering()


@dataclasses.dataclass(frozen=True)
class DatasetBuilder:
    """Makes the datasets of a run, the same on every worker.

    vocab_size: the model's. tokenizer: called only where a format needs one.

    Raises (both methods):
        UserError: names the key, or the file and its line; or no record is left.
    """

    config: Data
    vocab_size: int
    seq_len: int
    tokenizer: Callable[[], Tokenizer]
    _trained: list[Format] = dataclasses.field(default_factory=list)  # of the sources of data.train, when it was built

    def training(self) -> Dataset:
        """The dataset of data.train: of a list a mixture; with data.streaming a stream, which has read nothing yet.

        Blocks while another process tokenizes the same into the cache.
        """
        config = self.config
        if config.streaming:
            return self._stream()
        parts = [self._tokenized(source) for source in sources(config, "train")]
        return parts[0] if isinstance(config.train, str) else Mixture("data.train", parts, config.train)

    def validation(self) -> dict[str, FiniteDataset]:
        """The datasets of data.validation by their names, the main one first. Without names it is one, under "": of a
        list, all records of all its sources.

        Blocks while another process tokenizes the same into the cache.
        """
        found = sources(self.config, "validation")
        parts = [self._tokenized(source, keep_questions=True) for source in found]
        if isinstance(self.config.validation, str):
            return {"": parts[0]}
        if found[0].set_name:
            return {source.set_name: part for source, part in zip(found, parts)}
        return {"": Concatenation("data.validation", parts)}

    def answering(self) -> Answering:
        """How the answers of the training records ended, and who wrote their chats; after `training`."""
        stops: set[int] = set()
        template = None
        for format in self._trained:
            if isinstance(format, QuestionFormat):
                stops |= format.stop_ids()
            elif format.generates:
                stops.add(format.tokenizer.eos_id)
            if format.name == "chat" or (format.needs_template and format.config.template == "chat"):
                template = borrowed_template(format.tokenizer)
        return Answering(sorted(stops), template)

    def _encoder(self, source: Source, keep_questions: bool = False) -> Encoder:
        first, name = open_source(source)
        format = FORMATS[name].create(source.config, self.vocab_size, self.tokenizer, first)
        if self.seq_len < format.shortest:
            line = f"training.seq_len: must be at least {format.shortest} for the records of {source.name}"
            raise UserError(f"{line}, not {self.seq_len}")
        if not keep_questions:
            self._trained.append(format)
        stops, ignored = source.config.on_error == "raise", tuple(source.config.ignore_fields)
        return Encoder(source.name, format, self.seq_len, stops, ignored, keep_questions)

    def _stream(self) -> StreamedDataset:
        config = self.config
        parts, extents = [], []
        for source in sources(config, "train"):
            encoder = self._encoder(source)
            parts.append(StreamSource(source.path, encoder, encoder.unused_at_first(source.path)))
            log_unused(source.name, parts[-1].named)
            files = InputFiles(source.path, source.name)
            extents.append(f"{len(files.paths)} file(s) of {files.size} bytes" if files.paths else source.path)
        names = ("format", "template", "prompt_field", "response_field", "text_field", "train_on_prompt")
        names += ("encoding", "parse_control_tokens")
        settings = ", ".join(f"{name} {getattr(config, name)}" for name in names)
        later = {name: getattr(config, name) for name in ("input_field", "system_field", "ignore_fields", "labels")}
        settings += "".join(f", {name} {value}" for name, value in later.items() if value)
        text = f"a stream of {' and '.join(extents)}, {settings}, training.seq_len {self.seq_len}"
        if config.shuffle:
            text += f", permuted in windows of {config.shuffle_window}"
        return StreamedDataset(parts, config.shuffle_window, _faults(config), text)

    def _tokenized(self, source: Source, keep_questions: bool = False) -> TokenizedDataset:
        encoder, config = self._encoder(source, keep_questions), source.config
        files = InputFiles(source.path, source.name)
        folder, processes = (None, 1) if _is_small(files) else (cache_folder(config.cache_dir), _process_count(config))
        shown = folder is not None or is_first_rank()  # without a cache all ranks do the same
        write = functools.partial(tokenize, files, encoder, _faults(config), processes, shown)
        if folder is None:
            buffers: dict[str, io.BytesIO] = {}
            statistics = write(lambda name: buffers.setdefault(name, io.BytesIO()))
            arrays = {name: as_array(name, np.frombuffer(b.getbuffer(), np.uint8)) for name, b in buffers.items()}
        else:
            key = self._cache_key(source, encoder, files, folder)
            entry = TokenCache(folder).get(key, [str(file) for file in files.paths], write)
            statistics, arrays = entry.statistics, entry.arrays
        statistics.name = source.name
        _check_what_is_left(statistics, self.seq_len)
        return TokenizedDataset(statistics, arrays, encoder.questions)

    def _cache_key(self, source: Source, encoder: Encoder, files: InputFiles, folder: Path) -> str:
        """Stands for everything that the arrays depend on. folder: the cache."""
        config, format = source.config, encoder.format
        names = ("prompt_field", "response_field", "input_field", "system_field", "text_field", "ignore_fields")
        names += ("train_on_prompt", "template", "encoding", "parse_control_tokens", "on_error", "max_skipped")
        names += ("labels",)
        settings = {name: getattr(config, name) for name in names}
        settings |= {"format": format.name, "vocab_size": self.vocab_size, "seq_len": self.seq_len}
        settings |= {"keep_questions": encoder.questions is not None}
        settings |= {"titan_hd": __version__, "files": len(files.paths)}
        settings |= {name: metadata.version(name) for name in ("tokenizers", "sentencepiece", "tiktoken", "jinja2")}
        if not files.paths:
            settings["dataset"] = load_hub_dataset(source.path, source.name)._fingerprint
        content = list(files.paths)
        if format.needs_tokenizer:
            names = (*TOKENIZER_FILES, "config.json", "special_tokens_map.json", "original/tokenizer.model")
            found = [name for name in sorted(set(names)) if (format.tokenizer.directory / name).exists()]
            settings["tokenizer"] = found
            content += [format.tokenizer.directory / name for name in found]
        template = template_file(config.template)
        if format.needs_template and template:
            settings["template"] = "file"
            content.append(template)
        try:
            return content_key(settings, content, folder)
        except OSError as error:
            raise UserError(f"{source.name}: cannot read {error.filename}: {error.strerror}") from None


def open_source(source: Source) -> tuple[Record, str]:
    """The first good record of a source, and the name of its format.

    Raises:
        UserError: there is none, or its fields are those of no format.
    """
    config, name, faults = source.config, source.name, _faults(source.config)
    first = next(read_records(source.path, name, faults, config.ignore_fields), None)
    if first is None:
        raise UserError(f"{name}: no record is left; {faults.count} are bad, the first: {faults.first}")
    if config.format != "auto":
        return first, config.format
    chosen, fields = detect_format(config, first)
    logger.info("%s: format %s, because the first record has %s", name, chosen, fields)
    return first, chosen


def _faults(config: Data) -> Faults:
    return Faults(config.on_error == "skip", config.max_skipped)


def _process_count(config: Data) -> int:
    """data.num_proc, else the cores of this node; where every worker tokenizes for itself, its share of them."""
    if config.num_proc:
        return config.num_proc
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = 1 if cache_folder(config.cache_dir) else int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(cores // share, MAX_PROCESSES))


def _check_what_is_left(statistics: Statistics, seq_len: int) -> None:
    """Say in the log what was left out."""
    s = statistics
    log_unused(s.name, s.unused)
    for note, (count, where) in s.notes.items():
        total = s.records + s.unlabelled  # notes are of both
        logger.warning("%s: %d of %d records %s; the first: %s", s.name, count, total, note, where)
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
