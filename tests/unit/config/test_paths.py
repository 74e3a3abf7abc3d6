"""Keys that name a file or a folder: "~", links, and what editors do to a TOML file."""

from __future__ import annotations

import dataclasses
import json
import os
import typing
from pathlib import Path

import pytest

from titan_hd.config.job_config import DataSource, JobConfig
from titan_hd.config.manager import PATHS, ConfigError, load

NEEDED = ["--data.train=train.jsonl", "--training.steps=3", "--model.name=llama3", "--model.flavor=debugmodel"]
SECTIONS = typing.get_type_hints(JobConfig)
KEYS = [f"{section}.{field.name}" for section, cls in SECTIONS.items() for field in dataclasses.fields(cls)]

# Every other key whose value is a text of any kind.
NO_PATHS = {
    "job.description",
    "model.name",
    "model.flavor",
    "data.prompt_field",
    "data.response_field",
    "data.input_field",
    "data.system_field",
    "data.text_field",
    "optimizer.name",
    "metrics.wandb_project",
    "metrics.wandb_entity",
    "metrics.wandb_name",
    "metrics.wandb_group",
    "checkpoint.keep_best",
    "validation.answer_marker",
}
SINGLE = sorted(key for key in PATHS if "[]" not in key)


@pytest.fixture
def home(tmp_path: Path, monkeypatch) -> str:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return str(tmp_path / "home")


@pytest.fixture
def homeless(monkeypatch):
    """A container's user that is a mere number: neither HOME nor an entry in passwd."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])


def errors_of(argv: list[str]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(argv)
    return caught.value.errors


def value(config: JobConfig, key: str):
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def default(key: str):
    return value(JobConfig(), key)


def test_every_text_is_a_path_or_known_to_be_none():
    """A new key belongs to one of the lists: the paths are treated alike."""
    texts = {key for key in KEYS if isinstance(default(key), str)}
    choices = {
        key for key in texts if "Literal" in str(SECTIONS[key.partition(".")[0]].__annotations__[key.partition(".")[2]])
    }
    assert texts - choices == NO_PATHS | set(SINGLE)
    entry = {f"data.train[].{field.name}" for field in dataclasses.fields(DataSource)}
    assert {key for key in PATHS if "[]" in key} <= entry


@pytest.mark.parametrize("key", SINGLE)
def test_a_path_may_begin_with_the_home_directory(key: str, home: str, tmp_path: Path):
    """No shell replaces it in --key=~/path, nor in a file."""
    assert value(load([*NEEDED, f"--{key}=~/a/b"]), key) == f"{home}/a/b"
    section, _, name = key.partition(".")
    toml = tmp_path / "run.toml"
    toml.write_text(f"[{section}]\n{name} = '~/a/b'\n")
    needed = NEEDED[1:] if key == "data.train" else NEEDED
    assert value(load(["--config", str(toml), *needed]), key) == f"{home}/a/b"


def test_those_of_a_list_too(home: str, tmp_path: Path):
    entries = ["~/a", {"path": "~/b", "template": "~/c"}]
    train = load(["--data.train", json.dumps(entries), *NEEDED[1:]]).data.train
    assert [(s.path, s.template) for s in train] == [(f"{home}/a", None), (f"{home}/b", f"{home}/c")]


def test_what_is_no_home_directory_stays(home: str):
    for path in ("./~/a", "a~/b", "~no-such-user-here/a", "auto", ""):
        assert load([*NEEDED, f"--data.cache_dir={path}"]).data.cache_dir == path


def test_a_user_without_a_home(homeless):
    (line,) = errors_of([*NEEDED, "--job.dump_folder=~/run"])
    assert line == (
        "job.dump_folder: must be a path without ~: this user has no home directory, not '~/run' (command line)"
    )
    (line, *_) = errors_of(["--config=~/run.toml"])
    assert line == "--config: must be a path without ~: this user has no home directory, not '~/run.toml'"
    load(NEEDED)


class TestFiles:
    @pytest.fixture
    def file(self, tmp_path: Path):
        def write(name: str, text: str, encoding: str = "utf-8") -> str:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding=encoding)
            return str(path)

        return write

    def test_the_file_and_its_base_may_be_in_the_home_directory(self, home: str, file):
        file("home/base.toml", "[optimizer]\nlr = 0.25\n")
        file("home/run.toml", "base = '~/base.toml'\n")
        assert load(["--config=~/run.toml", *NEEDED]).optimizer.lr == 0.25

    def test_a_linked_file_inherits_from_where_it_is_linked_or_from_where_it_lies(self, file, tmp_path: Path):
        file("recipes/base.toml", "[optimizer]\nlr = 0.25\n")
        path = file("recipes/run.toml", "base = 'base.toml'\n")
        (tmp_path / "mine").mkdir()
        link = tmp_path / "mine" / "run.toml"
        link.symlink_to(path)
        assert load(["--config", str(link), *NEEDED]).optimizer.lr == 0.25
        file("mine/base.toml", "[optimizer]\nlr = 0.5\n")
        assert load(["--config", str(link), *NEEDED]).optimizer.lr == 0.5

    def test_a_byte_order_mark_is_no_part_of_it(self, file):
        """Editors of Windows write one, and \\r\\n."""
        base = file("base.toml", "[optimizer]\r\nlr = 0.25\r\n", "utf-8-sig")
        path = file("run.toml", f"base = '{os.path.basename(base)}'\r\n[job]\r\ndescription = 'ä'\r\n", "utf-8-sig")
        config = load(["--config", path, *NEEDED])
        assert (config.optimizer.lr, config.job.description) == (0.25, "ä")

    @pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
    def test_another_encoding_is_named(self, encoding: str, file):
        path = file("run.toml", "[job]\ndescription = 'ä'\n", encoding)
        assert errors_of(["--config", path])[0] == f"{path}: not valid TOML: it is not UTF-8; save it as that"
