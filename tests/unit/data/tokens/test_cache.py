"""Tokenized once: entries are whole or made anew, one process writes, errors reach those who wait."""

from __future__ import annotations

import errno
import gzip
import json
import logging
import os
import pickle
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.kit.commands import REPOSITORY
from tests.kit.datasets import build_dataset
from tests.kit.errors import message
from tests.kit.tokenizers import chat_directory
from titan_hd.config.job_config import Data, DataSource
from titan_hd.data import build as data_build
from titan_hd.data import helper_process
from titan_hd.data.sources import RawRecord
from titan_hd.data.text.tokenizer import load_tokenizer
from titan_hd.data.tokens import cache as token_cache
from titan_hd.data.tokens import processes as token_processes
from titan_hd.data.tokens import tokenizing
from titan_hd.data.tokens.encoding import Encoder

WORDS = ("the fox", "brown dog", "my box", "lazy jug", "1 + 2")


@pytest.fixture
def setup(tmp_path: Path, monkeypatch):
    """A tokenizer's directory, and 60 records in two files; everything is large enough for the cache."""
    monkeypatch.setattr(data_build, "SMALL", 0)
    monkeypatch.setattr(tokenizing, "CHUNK_RECORDS", 7)
    chat_directory(tmp_path / "model")
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [{"prompt": WORDS[i % 5] * (1 + i % 4), "response": WORDS[i % 3]} for i in range(60)]
    (folder / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[:25]))
    (folder / "b.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[25:]))
    return tmp_path


def build(setup: Path, key: str = "train", seq_len: int = 40, tokenizer=None, **settings):
    settings = {"cache_dir": str(setup / "cache"), "num_proc": 1, "template": "none", **settings}
    data = Data(**{key: str(setup / "data"), **settings})
    return build_dataset(data, key, 500, seq_len, tokenizer or (lambda: load_tokenizer(setup / "model")))


def entries(setup: Path) -> list[Path]:
    return sorted(path for path in (setup / "cache").iterdir() if path.name[0] != ".")


def leave_no_encoding(monkeypatch) -> None:
    monkeypatch.setattr("titan_hd.data.tokens.encoding.Encoder.chunk", None)


@pytest.mark.parametrize(
    "settings",
    [{}, {"train_on_prompt": True}, {"template": "chat", "seq_len": 200}, {"seq_len": 6}, {"seq_len": 4}],
    ids=str,
)
def test_equal_to_what_is_held_in_memory(setup: Path, monkeypatch, settings: dict):
    memory, written = build(setup, cache_dir="", **settings), build(setup, **settings)
    leave_no_encoding(monkeypatch)
    read = build(setup, **settings)
    for records in (written, read):
        assert list(records) == list(memory)
        assert records.statistics == memory.statistics
        assert records.lengths().tolist() == memory.lengths().tolist()
    base = read._arrays["ids"]
    assert isinstance(base.base, np.memmap) or isinstance(base, np.memmap)
    assert list(pickle.loads(pickle.dumps(read))) == list(memory)
    assert len(pickle.dumps(read)) < 2000, "other processes map the files themselves"


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_chunks_do_not_show(setup: Path, monkeypatch, chunk: int):
    whole = build(setup, cache_dir="")
    monkeypatch.setattr(tokenizing, "CHUNK_RECORDS", chunk)
    assert list(build(setup, cache_dir="")) == list(whole)


@pytest.mark.parametrize(
    "value",
    [
        b"x" * 1000,
        {"text": "x" * 1000},
        {"messages": [{"role": "user", "content": "x" * 500}, {"role": "assistant", "content": "x" * 500}]},
        {"input_ids": [7] * 64, "labels": [7] * 64},
    ],
    ids=["line", "text", "chat", "tokens"],
)
def test_long_records_make_short_chunks(monkeypatch, value):
    """Also those that come decoded, from Parquet or a JSON array: a process holds one chunk at a time."""
    monkeypatch.setattr(tokenizing, "CHUNK_BYTES", 10_000)
    sizes = [len(chunk) for chunk in tokenizing._chunks(RawRecord("r:1", value) for _ in range(100))]
    assert max(sizes) in (10, 11)
    assert sum(sizes) == 100


def test_deep_records_are_measured():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    assert tokenizing._size({"a": deep, "b": None, "c": "xy", "d": []}) == 2


def test_tokens_have_labels_of_their_own(setup: Path, monkeypatch):
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, 7, 8]}, {"input_ids": [4], "labels": [-100]}]
    path = setup / "t.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    for _ in range(2):
        records = build(setup, train=str(path), tokenizer=lambda: 1 / 0)
        assert [(e.input_ids, e.labels) for e in records] == [tuple(r.values()) for r in rows]
        leave_no_encoding(monkeypatch)


@pytest.mark.parametrize("format", ["instruction", "chat"])
def test_questions_are_kept_for_validation(setup: Path, monkeypatch, format: str):
    turns = [("user", "the fox"), ("assistant", "dog"), ("user", "and?"), ("assistant", "my box"), ("user", "1")]
    chat = {"messages": [{"role": role, "content": content} for role, content in turns]}
    row = chat if format == "chat" else {"prompt": "the fox", "response": "my box"}
    path = setup / "v.jsonl"
    path.write_text(json.dumps(row) + "\n")
    for _ in range(2):
        records = build(setup, "validation", 200, validation=str(path), template="chat")
        assert records.answerable
        assert records.response(0) == "my box"
        ids = records.prompt_ids(0)
        assert records[0].input_ids[: len(ids)] == ids
        assert records.prompt(0).endswith("<|im_start|>assistant\n")
        assert not set(records.stop_ids()).isdisjoint(load_tokenizer(setup / "model").control_ids)
        assert ("and?" in records.prompt(0)) == (format == "chat")
        leave_no_encoding(monkeypatch)


def test_what_an_entry_depends_on(setup: Path):
    build(setup)
    different = [
        {"seq_len": 41},
        {"template": "chat", "seq_len": 90},
        {"train_on_prompt": True},
        {"prompt_field": "response", "response_field": "prompt"},
    ]
    different += [{"on_error": "skip"}, {"format": "text", "text_field": "prompt"}]
    different += [{"input_field": "x"}, {"system_field": "x"}, {"ignore_fields": ["input"]}]
    for count, settings in enumerate(different, 2):
        build(setup, **settings)
        assert len(entries(setup)) == count, settings
    build(setup, num_proc=3, format="instruction", max_skipped=100, shuffle=False)
    assert len(entries(setup)) == count, "neither the number of processes nor the order"
    with (setup / "data" / "b.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "the fox", "response": "dog"}) + "\n")
    assert len(build(setup)) == 61
    (setup / "model" / "tokenizer_config.json").write_text(
        (setup / "model" / "tokenizer_config.json").read_text() + " "
    )
    build(setup)
    assert len(entries(setup)) == count + 2


@pytest.mark.parametrize("cache", ["", "cache"])
def test_a_file_that_changes_while_it_is_read(setup: Path, monkeypatch, cache: str):
    """The entry would be under the name of what the file was before."""
    path, parse = setup / "data" / "b.jsonl", Encoder.chunk

    def download(self, raws):
        with path.open("a") as file:
            file.write('{"prompt": "the fox", "response": "dog"}\n')
        return parse(self, raws)

    monkeypatch.setattr(Encoder, "chunk", download)
    text = message(build, setup, cache_dir=cache and str(setup / cache))
    assert text == f"data.train: {path} was changed while it was read; start again when it is complete"


def test_records_are_told_apart_by_their_content(setup: Path):
    """Which has the same number of records and tokens after two files change places, but samples of other records."""

    def summary(**settings) -> str:
        return build(setup, **settings).summary()

    before = summary()
    assert before == summary(cache_dir="") == summary(num_proc=2)
    a, b = (setup / "data" / name for name in ("a.jsonl", "b.jsonl"))
    a.rename(setup / "data" / "c.jsonl")
    after = summary()
    assert after.partition("content")[0] == before.partition("content")[0]
    assert after != before
    both = [DataSource(str(path)) for path in (setup / "data" / "c.jsonl", b)]
    assert summary(train=both) != summary(train=both[::-1])


def test_a_template_file_counts_by_its_content(setup: Path):
    template = setup / "template.txt"
    for text in ("the {prompt}", "my {prompt}", "the {prompt}"):
        template.write_text(text)
        build(setup, template=str(template))
    assert len(entries(setup)) == 2


def test_moved_files_are_known_and_named(setup: Path, caplog):
    caplog.set_level(logging.INFO, "titan_hd")
    with (setup / "data" / "b.jsonl").open("a") as file:
        file.write("{\n")
    build(setup, on_error="skip")
    (setup / "data").rename(setup / "moved")
    records = build(setup, on_error="skip", train=str(setup / "moved"))
    assert len(entries(setup)) == 1
    assert records.statistics.first_bad.startswith(f"{setup}/moved/b.jsonl:36: not valid JSON")
    assert f"1 bad records are skipped; the first: {setup}/moved/b.jsonl:36" in caplog.text


@pytest.mark.parametrize("damage", ["cut", "gone", "meta", "no meta"])
def test_a_damaged_entry_is_made_anew(setup: Path, caplog, damage: str):
    expected = list(build(setup))
    (entry,) = entries(setup)
    if damage == "cut":
        os.truncate(entry / "ids", 8)
    elif damage == "gone":
        (entry / "spans").unlink()
    elif damage == "meta":
        os.truncate(entry / "meta.json", 20)
    else:
        (entry / "meta.json").unlink()
    assert list(build(setup)) == expected
    assert f"{entry} is damaged" in caplog.text
    caplog.clear()
    assert list(build(setup)) == expected
    assert not caplog.text


def test_a_folder_that_cannot_be_used(setup: Path):
    (setup / "file").write_text("")
    text = message(build, setup, cache_dir=str(setup / "file" / "cache"))
    assert text.startswith(f"data.cache_dir: cannot use {setup}/file/cache: ")


def test_a_user_without_a_home(setup: Path, monkeypatch):
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # what it does where the user is a mere number
    text = message(build, setup, cache_dir="auto")
    line = "data.cache_dir: ~/.cache/titan_hd/tokens: this user has no home directory; name a folder"
    assert text.startswith(line)
    assert message(data_build.check_data, Data(train=str(setup / "data"))).startswith(line), (
        "before anything is started"
    )
    data_build.check_data(Data(train=str(setup / "data"), streaming=True))
    monkeypatch.setattr(data_build, "SMALL", 2**20)
    data_build.check_data(Data(train=str(setup / "data")))
    assert list(build(setup, cache_dir="auto")) == list(build(setup, cache_dir="")), "what is small needs no folder"


def test_a_full_disk_is_noted_for_those_who_wait(setup: Path, monkeypatch):
    """Each of them would fill it once more, one after the other."""
    monkeypatch.setattr("titan_hd.data.tokens.cache.os.fsync", refuse)
    text = message(build, setup)
    assert text.startswith(f"data.cache_dir: cannot use {setup}/cache: No space left on device; name another folder")
    (failures,) = (setup / "cache").glob(".*.failed")
    assert json.loads(failures.read_text()) == text


def refuse(*unused) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_an_entry_that_came_in_between_stays(setup: Path, monkeypatch):
    """Another node's, where locks do not reach it; its readers have mapped the files."""
    expected, fsync = list(build(setup)), os.fsync
    (entry,) = entries(setup)
    entry.rename(setup / "kept")
    inode = (setup / "kept" / "ids").stat().st_ino

    def quicker(file: int) -> None:
        if not entry.exists():
            (setup / "kept").rename(entry)
        fsync(file)

    monkeypatch.setattr("titan_hd.data.tokens.cache.os.fsync", quicker)
    assert list(build(setup)) == expected
    assert (entry / "ids").stat().st_ino == inode


def test_little_data_is_not_cached(setup: Path, monkeypatch):
    monkeypatch.setattr(data_build, "SMALL", 2**20)
    assert len(build(setup)) == 60
    assert not (setup / "cache").exists()


PROGRAM = """
    import json, logging, sys, time
    from pathlib import Path
    from titan_hd.config.job_config import Data
    from titan_hd.data import build
    from titan_hd.data.tokens import encoding, tokenizing
    from titan_hd.data.text.tokenizer import load_tokenizer

    logging.basicConfig(stream=sys.stdout, level=logging.INFO, format="%(message)s")
    folder = Path(sys.argv[1])
    build.SMALL, tokenizing.CHUNK_RECORDS = 0, 7
    chunk = encoding.Encoder.chunk
    def waiting(self, raws):
        print("chunk", flush=True)
        while not (folder / "go").exists():
            time.sleep(0.02)
        return chunk(self, raws)
    encoding.Encoder.chunk = waiting
    data = Data(train=str(folder / "data"), template="none", cache_dir=str(folder / "cache"), num_proc=1)
    try:
        records = build.DatasetBuilder(data, 500, 40, lambda: load_tokenizer(folder / "model")).training()
        print(json.dumps([e.input_ids for e in records]))
    except ValueError as error:
        print("error", error)
"""
CHUNKS = 9  # 60 records by seven


def start(setup: Path) -> subprocess.Popen:
    """A program that tokenizes once the file `go` is there."""
    command = [sys.executable, "-u", "-c", textwrap.dedent(PROGRAM), str(setup)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def wait_for(program: subprocess.Popen, words: str) -> None:
    assert any(line.startswith(words) for line in iter(program.stdout.readline, ""))


@pytest.fixture
def writer_and_reader(setup: Path) -> Iterator[tuple[subprocess.Popen, subprocess.Popen]]:
    """Two programs; the first is in the middle of writing an entry, the second waits for it."""
    writer = start(setup)
    wait_for(writer, "chunk")
    reader = start(setup)
    wait_for(reader, "waiting for the process that tokenizes")
    yield writer, reader
    for program in (writer, reader):
        program.kill()
        program.communicate()


def rest(program: subprocess.Popen) -> list[str]:
    return program.communicate(timeout=300)[0].splitlines()


def test_a_writer_that_is_killed_leaves_nothing_behind(setup: Path, writer_and_reader):
    writer, reader = writer_and_reader
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    (setup / "go").touch()
    said = rest(reader)
    assert said.count("chunk") == CHUNKS, "it has made all of it"
    assert json.loads(said[-1]) == [e.input_ids for e in build(setup, cache_dir="")]
    (entry,) = entries(setup)
    left = [path.name for path in (setup / "cache").iterdir() if path != entry and ".digest" not in path.name]
    assert left == [f".{entry.name}.lock"], "the killed one's part is removed"


def test_of_two_at_once_one_writes(setup: Path, writer_and_reader):
    (setup / "go").touch()
    wrote, read = map(rest, writer_and_reader)
    assert 1 + wrote.count("chunk") == CHUNKS
    assert "chunk" not in read
    assert wrote[-1] == read[-1]
    assert len(json.loads(read[-1])) == 60


def test_who_waited_fails_with_the_writer(setup: Path, request):
    """And does not try the same for as long again, one after the other."""
    with (setup / "data" / "b.jsonl").open("a") as file:
        file.write("{\n")
    programs = request.getfixturevalue("writer_and_reader")
    (setup / "go").touch()
    wrote, read = map(rest, programs)
    assert "chunk" not in read
    assert wrote[-1] == read[-1]
    assert read[-1].startswith(f"error {setup}/data/b.jsonl:36: not valid JSON: ")
    assert entries(setup) == []


class TestProcesses:
    @pytest.mark.parametrize("count", [1, 2, 3])
    def test_the_order_is_the_files(self, setup: Path, count: int):
        alone = build(setup, "validation", cache_dir="")
        records = build(setup, "validation", num_proc=count)
        assert list(records) == list(alone)
        assert [records.response(i) for i in range(60)] == [alone.response(i) for i in range(60)]
        assert records.statistics == alone.statistics

    @pytest.mark.parametrize("line", ["{", '{"prompt": 1, "response": "x"}', "[1]"])
    def test_the_first_bad_record_is_named(self, setup: Path, line: str):
        path = setup / "data" / "a.jsonl"
        rows = path.read_text().splitlines()
        for place in (20, 9, 10):
            rows[place] = line
        path.write_text("\n".join(rows))
        text = message(build, setup, num_proc=3)
        assert text.startswith(f"{path}:10: ")
        assert text == message(build, setup, num_proc=1)

    def test_the_limit_counts_over_all(self, setup: Path):
        path = setup / "data" / "a.jsonl"
        rows = path.read_text().splitlines()
        rows[::3] = ["{"] * 9
        path.write_text("\n".join(rows) + "\n")
        records = build(setup, num_proc=3, on_error="skip", max_skipped=9)
        assert (len(records), records.statistics.bad) == (51, 9)
        assert list(records) == list(build(setup, num_proc=1, on_error="skip", max_skipped=9, cache_dir=""))
        text = message(build, setup, num_proc=3, on_error="skip", max_skipped=8)
        assert text.startswith(f"data.max_skipped: more than 8 bad records; the first: {path}:1: ")

    def test_a_file_that_ends_early_is_said_after_what_is_before_it(self, setup: Path):
        good = (setup / "data" / "a.jsonl").read_bytes()
        packed = gzip.compress(good * 50)[:-100]
        (setup / "data" / "c.jsonl.gz").write_bytes(packed)
        assert message(build, setup, num_proc=2).startswith(f"data.train: cannot read {setup}/data/c.jsonl.gz: ")
        (setup / "data" / "b.jsonl").write_bytes(good + b"{\n")
        assert message(build, setup, num_proc=2).startswith(f"{setup}/data/b.jsonl:26: ")

    def test_a_process_that_is_killed(self, setup: Path, monkeypatch):
        send = token_processes.TokenProcesses._send

        def kill_then_send(self, connection, chunk):
            self._helpers[connection]._program.kill()
            self._helpers[connection].status()
            send(self, connection, chunk)

        monkeypatch.setattr(token_processes.TokenProcesses, "_send", kill_then_send)
        text = message(build, setup, num_proc=2)
        assert text.startswith("data.num_proc: a tokenizing process ended with signal 9")

    def test_one_that_cannot_be_started(self, setup: Path, monkeypatch):
        start, programs = subprocess.Popen, []

        def popen(*arguments, **options) -> subprocess.Popen:
            if programs:
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            programs.append(start(*arguments, **options))
            return programs[0]

        monkeypatch.setattr(helper_process.subprocess, "Popen", popen)
        text = message(build, setup, num_proc=3)
        assert text.startswith("data.num_proc: cannot start 3 tokenizing processes (1 are running): Resource temporari")
        assert programs[0].returncode == -signal.SIGKILL, "it has ended"

    def test_a_chat_template_travels(self, setup: Path):
        chat = {"messages": [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": "dog"}]}
        path = setup / "c.jsonl"
        path.write_text((json.dumps(chat) + "\n") * 20)
        records = build(setup, seq_len=100, train=str(path), num_proc=2)
        assert list(records) == list(build(setup, seq_len=100, train=str(path), num_proc=1, cache_dir=""))


class TestDigest:
    """The hash of a file is computed once, and anew when the file changes."""

    @pytest.fixture
    def hashed(self, monkeypatch) -> list[str]:
        names: list[str] = []
        real = token_cache._hash
        monkeypatch.setattr(token_cache, "_hash", lambda path: names.append(path.name) or real(path))
        return names

    def test_a_file_that_was_written_a_moment_ago_is_not_remembered(self, tmp_path: Path, hashed: list[str]):
        path, folder = tmp_path / "a.jsonl", tmp_path / "cache"
        path.write_text("{}")
        os.utime(path, (1e9, 1e9))
        first = token_cache.file_digest(path, folder)
        assert token_cache.file_digest(path, folder) == first
        assert hashed == ["a.jsonl", "a.jsonl"], "its ctime is of this moment: not remembered yet"

    def test_a_file_at_rest_is_read_once(self, tmp_path: Path, hashed: list[str], monkeypatch):
        monkeypatch.setattr(token_cache, "_SETTLED_SECONDS", -1.0)
        path, folder = tmp_path / "a.jsonl", tmp_path / "cache"
        path.write_text("{}")
        first = token_cache.file_digest(path, folder)
        assert token_cache.file_digest(path, folder) == first
        assert hashed == ["a.jsonl"]
        path.write_text("[]")
        assert token_cache.file_digest(path, folder) != first
        assert hashed == ["a.jsonl", "a.jsonl"]

    def test_a_folder_that_cannot_be_written_costs_the_memory_alone(self, tmp_path: Path, hashed: list[str]):
        path = tmp_path / "a.jsonl"
        path.write_text("{}")
        (tmp_path / "file").write_text("")
        assert token_cache.file_digest(path, tmp_path / "file") == token_cache.file_digest(path, tmp_path / "cache")
        with pytest.raises(OSError, match="missing"):
            token_cache.file_digest(tmp_path / "missing", tmp_path / "cache")
