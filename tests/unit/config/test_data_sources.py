"""data.train as a list: accepted in TOML and on the command line, every fault one line that names the entry and key."""

from __future__ import annotations

from pathlib import Path

import pytest

from titan_hd.config import keys, manager
from titan_hd.config.job_config import DataSource

NEEDED = ["--model.hf_assets_path", "m", "--training.steps", "3"]
TOML = """
[training]
steps = 3
[model]
hf_assets_path = "m"
"""


def load(*words: str):
    return manager.load([*NEEDED, *words])


def errors_of(*words: str) -> list[str]:
    with pytest.raises(manager.ConfigError) as caught:
        load(*words)
    return caught.value.errors


@pytest.mark.parametrize(
    "text",
    [
        '[data]\n[[data.train]]\npath = "a"\nweight = 2\n[[data.train]]\npath = "b"\nsamples = 5\nformat = "chat"',
        '[data]\ntrain = [{path = "a", weight = 2.0}, {path = "b", samples = 5, format = "chat"}]',
    ],
)
def test_toml(tmp_path: Path, text: str):
    path = tmp_path / "c.toml"
    path.write_text(TOML + text)
    config = manager.load(["--config", str(path)])
    assert config.data.train == [DataSource("a", weight=2.0), DataSource("b", samples=5, format="chat")]


def test_json_on_the_command_line():
    config = load("--data.train", ' [ {"path": "a", "template": "none"}, "b"]', "--data.validation", '["v"]')
    assert config.data.train == [DataSource("a", template="none"), DataSource("b")]
    assert config.data.validation == [DataSource("v")]


@pytest.mark.parametrize("path", ["a.jsonl", "[ab].jsonl", "[0-9]*/x.jsonl", "org/name:train"])
def test_paths_stay_paths(path: str):
    assert load("--data.train", path).data.train == path


def test_written_and_read_again(tmp_path: Path):
    config = load("--data.train", '[{"path": "a \\"b\\" ü", "weight": 0.5, "prompt_field": "q"}, {"path": "b"}]')
    path = tmp_path / "resolved.toml"
    path.write_text(manager.to_toml(config), encoding="utf-8")
    assert manager.load(["--config", str(path)]) == config


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ('[{"path": "a", "weigth": 1}]', "data.train[0].weigth: unknown key (command line); did you mean weight?"),
        ('["a", {"path": "b", "weight": "x"}]', "data.train[1].weight: must be a number, not 'x' (command line)"),
        ('[{"path": "a", "weight": true}]', "data.train[0].weight: must be a number, not True (command line)"),
        ('[{"path": "a", "samples": 1.5}]', "data.train[0].samples: must be a whole number, not 1.5 (command line)"),
        ('[{"path": 3}]', "data.train[0].path: must be a string, not 3 (command line)"),
        ('[{"weight": 1}]', "data.train[0].path: is missing (command line)"),
        ('[{"path": ""}]', "data.train[0].path: is missing (command line)"),
        ("[[1]]", "data.train[0]: must be a path or a table, not [1] (command line)"),
        ("[]", "data.train: must be a path, or a list of paths or tables that is not empty, not [] (command line)"),
        ('[{"path": "a", "weight": 1, "samples": 2}]', "data.train[0].samples: give either weight or samples"),
        ('["a", {"path": "b", "weight": 0}]', "data.train[1].weight: must be above 0, not 0.0"),
        ('["a", {"path": "b", "samples": 0}]', "data.train[1].samples: must be at least 1, not 0"),
    ],
)
def test_faults(value: str, says: str):
    assert errors_of("--data.train", value) == [says]


def test_other_faults():
    (line,) = errors_of("--data.train", '[{"path"')
    assert line.startswith("data.train: not valid JSON: ")
    (line,) = errors_of("--data.train", '[{"path": "a", "format": "csv"}]')
    assert line.startswith('data.train[0].format: must be one of "auto", "instruction", ')
    lines = errors_of("--data.train", '[{"path": "a", "weight": -1, "sample": 3}, {}]')
    assert [line.partition(":")[0] for line in lines] == [
        "data.train[0].sample",
        "data.train[1].path",
        "data.train[0].weight",
    ]


def test_validation_reads_all():
    (line,) = errors_of("--data.train", "t", "--data.validation", '[{"path": "a", "weight": 2}]')
    assert line == "data.validation[0].weight: validation reads every record once; leave it out"


class TestNamedValidationSets:
    NAMED = '[{name = "math", path = "a"}, {name = "plain-1", path = "b", format = "text", text_field = "t"}]'
    SETS = (DataSource("a", name="math"), DataSource("b", name="plain-1", format="text", text_field="t"))

    def test_toml(self, tmp_path: Path):
        path = tmp_path / "c.toml"
        path.write_text(TOML + f'[data]\ntrain = "t"\nvalidation = {self.NAMED}\n')
        config = manager.load(["--config", str(path)])
        assert config.data.validation == [*self.SETS]
        path.write_text(manager.to_toml(config))
        assert manager.load(["--config", str(path)]) == config, "written and read again"

    def test_json_on_the_command_line(self):
        text = '[{"name": "math", "path": "a"}, {"name": "plain-1", "path": "b", "format": "text", "text_field": "t"}]'
        assert load("--data.train", "t", "--data.validation", text).data.validation == [*self.SETS]

    @pytest.mark.parametrize(
        ("value", "says"),
        [
            (
                '[{"path": "a", "name": "m"}, "b"]',
                "data.validation[1].name: is missing; give every entry a name, or none",
            ),
            (
                '[{"path": "a", "name": "m"}, {"path": "b", "name": "m"}]',
                "data.validation[1].name: 'm' is the name of data.validation[0] already",
            ),
            (
                '[{"path": "a", "name": "m/x"}]',
                "data.validation[0].name: must be of letters, digits, _ and -, not 'm/x'",
            ),
            ('[{"path": "a", "name": ""}]', "data.validation[0].name: must be of letters, digits, _ and -, not ''"),
            ('[{"path": "a", "name": 3}]', "data.validation[0].name: must be a string, not 3 (command line)"),
            ('[{"name": "m"}]', "data.validation[0].path: is missing (command line)"),
        ],
    )
    def test_faults(self, value: str, says: str):
        assert errors_of("--data.train", "t", "--data.validation", value) == [says]

    def test_training_records_have_none(self):
        (line,) = errors_of("--data.train", '[{"path": "a", "name": "m"}]')
        assert line == "data.train[0].name: only validation sets have names; leave it out"


def test_streaming_has_no_epochs():
    words = ["--data.train", '[{"path": "a", "samples": 2}, {"path": "b"}]', "--data.streaming"]
    assert errors_of(*words) == ["data.train[0].samples: data.streaming reads all in order; leave it out"]
    words = ["--data.train", "t", "--data.streaming", "--training.steps=none", "--training.epochs", "1"]
    assert errors_of(*words) == ["training.epochs: data.streaming knows no length of an epoch; give training.steps"]
    assert load("--data.train", '["a", "b"]', "--data.streaming").data.streaming


def test_the_documentation():
    assert "data.train  (a path, or a list of paths or tables;" in keys.help_text()
