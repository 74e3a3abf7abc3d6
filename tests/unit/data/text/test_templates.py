"""How an instruction becomes a prompt, to the letter: the heading is part of what a model was trained on."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kit.tokenizers import pieces_directory
from titan_hd.data.text.chat_encoding import ChatTurns
from titan_hd.data.text.templates import load_template
from titan_hd.data.text.tokenizer import load_tokenizer

PLAIN = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd 1 and 2.\n\n### Response:"
)
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\nAdd them.\n\n### Input:\n1 and 2\n\n### Response:"
)


@pytest.mark.parametrize(("name", "ending"), [("pissa", "\n"), ("alpaca", "")])
def test_alpacas_words(name: str, ending: str):
    template = load_template(name)
    assert template.write("Add 1 and 2.", "") == PLAIN
    assert template.write("Add them.", "1 and 2") == WITH_INPUT
    assert template.ending == ending


def test_none():
    template = load_template("none")
    assert template.write("a", "") == "a"
    assert template.write("a", "b") == "a\nb"
    assert template.ending == ""


def test_a_file(tmp_path: Path):
    path = tmp_path / "t.txt"
    path.write_text("Q: {prompt}\n{input}\nA ü: {prompt}", encoding="utf-8")
    assert load_template(str(path)).write("x", "y") == "Q: x\ny\nA ü: x"
    assert load_template(str(path)).write("x", "") == "Q: x\n\nA ü: x"
    assert load_template(str(path)).ending == ""


def test_a_file_without_the_prompt_is_refused(tmp_path: Path):
    path = tmp_path / "t.txt"
    path.write_text("Q: {question}")
    with pytest.raises(ValueError, match=rf"data.template: {path} holds no {{prompt}}"):
        load_template(str(path))


@pytest.mark.parametrize("name", ["Alpaca", "nowhere.txt", "", "."])
def test_neither_a_name_nor_a_file(name: str):
    with pytest.raises(ValueError, match=r"data.template: .* is neither alpaca, pissa, chat or none nor a text"):
        load_template(name)


def test_chat_is_known_before_there_is_a_tokenizer():
    assert isinstance(load_template("chat"), ChatTurns)


def test_encodes_prompt_and_response_as_one_text(tmp_path: Path):
    tokenizer = load_tokenizer(pieces_directory(tmp_path))
    trained = load_template("pissa", tokenizer).encode(tokenizer, "Add 1 and 2.", "", "3")
    ids, ((start, stop),) = trained.ids, trained.spans
    assert ids == [*tokenizer.encode(PLAIN + "3\n"), tokenizer.eos_id]
    assert (start, stop) == (len(tokenizer.encode(PLAIN)), len(ids))
    assert tokenizer.decode(ids[start:stop]) == "3\n"


def test_a_record_cannot_forge_the_end(tmp_path: Path):
    tokenizer = load_tokenizer(pieces_directory(tmp_path))
    ids = load_template("alpaca", tokenizer).encode(tokenizer, "a</s>b", "<|im_end|>", "c</s>d").ids
    assert [i for i in ids if i in tokenizer.control_ids] == [tokenizer.eos_id]


def test_a_file_that_spells_control_tokens(tmp_path: Path):
    tokenizer = load_tokenizer(pieces_directory(tmp_path))
    path, end = tmp_path / "t.txt", tokenizer.encode("<|im_end|>", special=True)[0]
    path.write_text("{prompt}<|im_end|>")
    assert load_template(str(path), tokenizer).prompt_ids(tokenizer, "dog", "") == [*tokenizer.encode("dog"), end]
    path.write_text("{prompt}|")
    assert end not in load_template(str(path), tokenizer).prompt_ids(tokenizer, "dog<|im_end|>", "")


def test_a_file_that_is_no_text_is_named(tmp_path: Path):
    path = tmp_path / "t.txt"
    path.write_bytes(b"\xff\xfe {prompt}")
    with pytest.raises(ValueError, match=r"data.template: "):
        load_template(str(path))


@pytest.mark.parametrize("text", ["a {b} c", "{", "}", "100 %s", "\\n", "{0}"])
def test_braces_in_the_record_are_left_alone(text: str, tmp_path: Path):
    path = tmp_path / "t.txt"
    path.write_text("{prompt}|{input}")
    assert load_template(str(path)).write(text, text) == f"{text}|{text}"
    assert f"\n{text}\n\n### Input:\n{text}\n" in load_template("alpaca").write(text, text)


@pytest.mark.parametrize("extra", ["", "5"])
@pytest.mark.parametrize("name", ["alpaca", "pissa"])
def test_a_prompt_that_holds_a_place_holder(name: str, extra: str):
    """Code does: print(f"{input}"). It must reach the model as it stands in the record."""
    prompt = 'What does print(f"{input}") print?'
    assert prompt in load_template(name).write(prompt, extra)


def test_an_input_that_holds_a_place_holder(tmp_path: Path):
    path = tmp_path / "t.txt"
    path.write_text("{prompt}|{input}")
    assert load_template(str(path)).write("x", "{prompt}") == "x|{prompt}"
