"""`--help`: every key with its type, its default and its documentation; all of them, or some."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from titan_hd.config import checks, keys, manager
from titan_hd.config.job_config import JobConfig

SECTIONS = keys.fields(JobConfig)
KEYS = keys.every_key()


def test_every_field_has_documentation():
    docs = keys.field_docs()
    for section, cls in SECTIONS.items():
        for field in dataclasses.fields(cls):
            text = docs[cls.__name__].get(field.name, "")
            assert text.endswith("."), f"{section}.{field.name}: {text!r}"
            assert len(text) > 10, f"{section}.{field.name}: {text!r}"


def test_help_holds_every_key_its_default_and_its_documentation():
    docs, text = keys.field_docs(), keys.help_text()
    lines = text.splitlines()
    for section, cls in SECTIONS.items():
        for field in dataclasses.fields(cls):
            (number,) = (i for i, line in enumerate(lines) if line.startswith(f"  --{section}.{field.name} "))
            default = json.dumps(getattr(cls(), field.name)).replace("null", "none")
            assert lines[number].endswith(f"; default {default})")
            assert lines[number + 1].strip() == docs[cls.__name__][field.name]


def test_help_says_in_words_what_a_key_takes():
    """In those of the message of a value that is none of it."""
    words = {
        "adapter.rank": "a whole number",
        "optimizer.lr": "a number",
        "job.dump_folder": "a string",
        "compile.enable": "true or false",
        "hdpissa.aggregate": '"mean" or "sum"',
        "lr_scheduler.decay_type": 'one of "cosine", "linear", "constant"',
        "adapter.mora_type": "1 or 6",
        "data.ignore_fields": "a list of strings",
        "profiling.profile_steps": "a list of whole numbers",
        "activation_checkpoint.keep": 'a list of "qkv" or "gate_up"',
    }
    shown = {line.split()[0][2:]: line for line in keys.help_text().splitlines() if line.startswith("  --")}
    for key, kind in words.items():
        assert f"({kind}; default " in shown[key], shown[key]
        with pytest.raises(manager.ConfigError) as told:
            manager.load_file(None, {key: {}})
        assert f"{key}: must be {kind}, not {{}} (argument)" in told.value.errors
    assert "(a whole number, or none; default none)" in shown["training.steps"]
    assert "(a list of strings, or none; default none)" in shown["adapter.target_modules"]
    assert not [line for line in shown.values() if re.search(r"Literal|None|\b(?:str|int|bool|float)\b", line)]


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_exits_with_zero_whatever_else_is_said(option: str, capsys):
    with pytest.raises(SystemExit) as caught:
        manager.load_or_exit(["--config", "no-such-file.toml", option])
    assert caught.value.code == 0
    assert capsys.readouterr().out == keys.help_text() + "\n"


@pytest.mark.parametrize(
    ("words", "beginnings"),
    [
        ("--help adapter", ("adapter.",)),
        ("--training.steps 3 --help [optimizer] hdpissa.slices", ("optimizer.", "hdpissa.slices")),
        ("--help=debug --training.steps 3", ("debug.",)),
        ("--help all", ("",)),
    ],
)
def test_help_of_a_section_or_a_key(words: str, beginnings: tuple[str, ...], capsys):
    with pytest.raises(SystemExit) as caught:
        manager.load_or_exit(words.split())
    assert caught.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    expected = [key for key in KEYS if key.startswith(beginnings)]
    assert [line.split()[0][2:] for line in lines if line.startswith("  --")] == expected
    sections = list(dict.fromkeys(key.partition(".")[0] for key in expected))
    assert [line[1:-1] for line in lines if line.startswith("[")] == sections


def test_help_of_what_there_is_not(capsys):
    with pytest.raises(SystemExit) as caught:
        manager.load_or_exit(["--help", "adaptr"])
    assert caught.value.code == 2
    line = "titan_hd: error: --help: 'adaptr' is neither a section nor a key; did you mean adapter? (sections: job,"
    assert capsys.readouterr().err.startswith(line)


def test_limits_name_real_keys():
    assert set(checks._AT_LEAST) <= set(KEYS)
