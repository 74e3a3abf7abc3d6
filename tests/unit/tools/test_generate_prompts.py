"""Prompts of tools/generate.py --file: what a record says is in the prompt, or it is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.kit.errors import message
from titan_hd.components.generation import GREEDY
from titan_hd.data.text.tokenizer import load_tokenizer
from tools import generate
from tools.generate import read_prompts


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_records(tmp_path: Path, capsys):
    rows = [
        {"instruction": "a", "input": "b", "output": "r"},
        {"question": "a", "context": "c", "system_prompt": "s", "id": 7},
        {"prompt": "a", "input": None, "history": [["b", "c"]], "tags": []},
    ]
    path = write(tmp_path / "p.jsonl", *rows)
    assert read_prompts(path) == [("a", "b", ""), ("a", "c", "s"), ("a", "", "")]
    assert capsys.readouterr().err == f"{path}: fields that are not used: id, history\n"


def test_lines_end_at_line_ends_alone(tmp_path: Path):
    """And a byte order mark, as Windows editors write it, is no part of the first."""
    text = "\ufeffOnce upon a time\r\nThe cat\u2028sat\x85\n\n \nA\x0cB\x1c\rC\n"
    (tmp_path / "p.txt").write_bytes(text.encode())
    prompts = [prompt for prompt, *_ in read_prompts(tmp_path / "p.txt")]
    assert prompts == ["Once upon a time", "The cat\u2028sat\x85", "A\x0cB\x1c", "C"]


@pytest.mark.parametrize("field", ["prompt", "input", "context", "system"])
def test_a_field_that_is_no_text(tmp_path: Path, field: str):
    path = write(tmp_path / "p.jsonl", {"prompt": "a"}, {"prompt": "a", field: 21})
    assert message(read_prompts, path) == f"{path}:2: {field}: must be a string"


def test_a_response_keeps_its_first_space(monkeypatch, capsys):
    """Decoded by itself it would lose it with this tokenizer, which is of SentencePiece's kind."""
    tokenizer = load_tokenizer(Path(__file__).parents[3] / "assets" / "quickstart" / "model")
    monkeypatch.setattr(generate, "generate", lambda *args, **options: [tokenizer.continuation("  x = 1")])
    generate.Session(None, tokenizer, GREEDY, 9, None).answer_file([("if x:", "", "")], "none", 1)
    assert json.loads(capsys.readouterr().out) == {"prompt": "if x:", "response": "  x = 1"}
