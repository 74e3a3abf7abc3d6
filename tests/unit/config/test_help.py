"""`--help`: every key with its type, its default and its documentation; all of them, or some."""

from __future__ import annotations

import dataclasses
import json

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
            assert f"default {json.dumps(getattr(cls(), field.name))}" in lines[number]
            assert lines[number + 1].strip() == docs[cls.__name__][field.name]


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
