"""What a record says beside its prompt and response, or its tokens, is used, refused or named in the log."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path
from typing import ClassVar

import pytest

from tests.kit.datasets import build_dataset
from tests.kit.errors import message
from tests.kit.tokenizers import Letters, chat_directory
from titan_hd.config.job_config import Data, DataSource
from titan_hd.data.dataset import TokenizedDataset
from titan_hd.data.example import IGNORE
from titan_hd.data.formats import ChatFormat
from titan_hd.data.sources import Record
from titan_hd.data.text.tokenizer import Tokenizer, load_tokenizer

HEAD = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
HEAD_INPUT = HEAD.replace("task.", "task, paired with an input that provides further context.")


@pytest.fixture
def jsonl(tmp_path: Path):
    def write(*rows: dict, name: str = "r.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


@pytest.fixture(scope="module")
def chatml(tmp_path_factory) -> Tokenizer:
    return load_tokenizer(chat_directory(tmp_path_factory.mktemp("chatml")))


def instruction(path: str, tokenizer: Tokenizer | None = None, **settings) -> TokenizedDataset:
    data = Data(validation=path, **{"format": "instruction", "template": "none", **settings})
    return build_dataset(data, "validation", 500, 2000, lambda: tokenizer or Letters())


class TestOptionalTexts:
    @pytest.mark.parametrize(
        ("fields", "settings", "prompt"),
        [
            ({"instruction": "q", "context": "c", "response": "r"}, {}, "q\nc"),  # Dolly
            ({"instruction": "q", "input": "", "context": "c", "output": "r"}, {}, "q\nc"),
            ({"instruction": "q", "input": "i", "context": "c", "output": "r"}, {}, "q\ni"),
            ({"question": "q", "passage": "p", "answer": "r"}, {"input_field": "passage"}, "q\np"),
            ({"question": "q", "input": "i", "answer": "r"}, {"input_field": "passage"}, "q"),
            ({"system_prompt": "s", "question": "q", "response": "r"}, {}, "s\nq"),  # OpenOrca
            ({"system": "s", "instruction": "q", "input": "i", "output": "r"}, {}, "s\nq\ni"),
            ({"role": "s", "system": "x", "prompt": "q", "response": "r"}, {"system_field": "role"}, "s\nq"),
            ({"system": None, "prompt": "q", "response": "r", "input": None, "history": None}, {}, "q"),
            ({"system": "", "prompt": "q", "response": "r", "input": "", "history": []}, {}, "q"),
            ({"system": {}, "prompt": "q", "response": "r", "input": [], "context": "c"}, {}, "q\nc"),
            ({"context": "s", "prompt": "q", "response": "r"}, {"system_field": "context"}, "s\nq"),
            ({"system": "i", "prompt": "q", "response": "r"}, {"input_field": "system"}, "q\ni"),
        ],
    )
    def test_they_are_in_the_prompt(self, jsonl, fields: dict, settings: dict, prompt: str):
        records = instruction(jsonl(fields), **settings)
        assert (records.prompt(0), records.response(0)) == (prompt, "r")
        ids = records.prompt_ids(0)
        assert records[0].input_ids[: len(ids)] == ids

    @pytest.mark.parametrize("template", ["none", "pissa", "alpaca", "chat"])
    def test_a_field_is_one_thing(self, jsonl, chatml: Tokenizer, template: str):
        """A prompt in `input` is no input besides, and a response there is no part of the prompt."""
        path = jsonl({"input": "the fox", "output": "lazy dog"})
        there = instruction(path, chatml, prompt_field="input", response_field="output", template=template)
        back = instruction(path, chatml, prompt_field="output", response_field="input", template=template)
        for records, asked, answer in ((there, "the fox", "lazy dog"), (back, "lazy dog", "the fox")):
            assert records.prompt(0).count(asked) == 1
            assert answer not in records.prompt(0)
            assert "### Input" not in records.prompt(0)
            assert "\n\n<|im_end|>" not in records.prompt(0)
            assert records.response(0) == answer

    def test_a_system_text_is_one_thing(self, jsonl):
        path = jsonl({"system": "a", "history": "b"})
        records = instruction(path, prompt_field="system", response_field="history")
        assert (records.prompt(0), records.response(0)) == ("a", "b")

    @pytest.mark.parametrize("value", [21, 1.5, True, [1, 2, 3], {"a": 1}, ["x"]])
    @pytest.mark.parametrize("field", ["input", "context", "system", "system_prompt"])
    def test_they_are_texts(self, jsonl, field: str, value):
        good = {"instruction": "q", "output": "r"}
        path = jsonl(good, {**good, field: value})
        assert message(instruction, path) == f"{path}:2: {field}: must be a string"

    @pytest.mark.parametrize(
        ("settings", "says"),
        [
            ({"response_field": "prompt"}, "data.response_field: is 'prompt', as data.prompt_field is"),
            ({"input_field": "response"}, "data.input_field: is 'response', as data.response_field is"),
            ({"system_field": "prompt"}, "data.system_field: is 'prompt', as data.prompt_field is"),
            ({"system_field": "x", "input_field": "x"}, "data.system_field: is 'x', as data.input_field is"),
        ],
    )
    def test_two_keys_with_one_field(self, jsonl, settings: dict, says: str):
        assert message(instruction, jsonl({"prompt": "a", "response": "b"}), **settings) == says


class TestSystemTexts:
    ROW: ClassVar = {"system": "the {prompt}", "prompt": "fox {system}", "response": "dog"}

    @pytest.mark.parametrize("template", ["alpaca", "pissa"])
    def test_in_place_of_alpacas_heading(self, jsonl, template: str):
        other = {"prompt": "q", "response": "r"}
        rows = [self.ROW, {**self.ROW, "input": "{input}"}, other, {**other, "input": "i"}]
        records = instruction(jsonl(*rows), template=template)
        assert [records.prompt(i) for i in range(4)] == [
            "the {prompt}\n\n### Instruction:\nfox {system}\n\n### Response:",
            "the {prompt}\n\n### Instruction:\nfox {system}\n\n### Input:\n{input}\n\n### Response:",
            f"{HEAD}\n\n### Instruction:\nq\n\n### Response:",
            f"{HEAD_INPUT}\n\n### Instruction:\nq\n\n### Input:\ni\n\n### Response:",
        ]

    def test_a_file_writes_it_or_it_is_named(self, jsonl, tmp_path: Path, chatml: Tokenizer, caplog):
        template = tmp_path / "t.txt"
        template.write_text("S:{system} Q:{prompt}")
        path = jsonl(self.ROW, {"prompt": "q", "response": "r"})
        records = instruction(path, chatml, template=str(template))
        assert [records.prompt(i) for i in range(2)] == ["S:the {prompt} Q:fox {system}", "S: Q:q"]
        assert "not used" not in caplog.text
        template.write_text("Q:{prompt}")
        assert instruction(path, chatml, template=str(template)).prompt(0) == "Q:fox {system}"
        assert "data.validation: fields that are not used: system" in caplog.text

    def test_so_is_an_input(self, jsonl, tmp_path: Path, caplog):
        template = tmp_path / "t.txt"
        template.write_text("I:{input} Q:{prompt}")
        path = jsonl({"prompt": "q", "response": "r", "context": "c"})
        assert instruction(path, template=str(template)).prompt(0) == "I:c Q:q"
        assert "not used" not in caplog.text
        template.write_text("Q:{prompt}")
        assert instruction(path, template=str(template)).prompt(0) == "Q:q"
        assert "data.validation: fields that are not used: context" in caplog.text

    def test_a_turn_of_a_chat(self, jsonl, chatml: Tokenizer):
        rows = [{"system": "be lazy", "prompt": "the fox", "response": "dog"}, {"prompt": "a", "response": "b"}]
        records = instruction(jsonl(*rows), chatml, template="chat")
        turns = [("system", "be lazy"), ("user", "the fox"), ("assistant", "dog")]
        assert records[0] == chat(chatml, *turns)
        assert records[1] == chat(chatml, ("user", "a"), ("assistant", "b"))
        assert records.prompt(0).startswith("<|im_start|>system\nbe lazy<|im_end|>\n<|im_start|>user\nthe fox")
        ids = records.prompt_ids(0)
        assert records[0].input_ids[: len(ids)] == ids


def chat(tokenizer: Tokenizer, *turns: tuple[str, str]):
    messages = [{"role": role, "content": content} for role, content in turns]
    return ChatFormat(Data(), tokenizer).encode(Record({"messages": messages}, "f:1"))


class TestHistory:
    ROW: ClassVar = {
        "instruction": "2",
        "input": "b",
        "output": "r",
        "system": "s",
        "history": [["1", "x"], ["3", "y"]],
    }

    def test_a_chat_is_written(self, jsonl, chatml: Tokenizer):
        """Its answers are trained on, as those of any chat."""
        records = instruction(jsonl(self.ROW), chatml, template="chat")
        turns = [("system", "s"), ("user", "1"), ("assistant", "x"), ("user", "3"), ("assistant", "y")]
        assert records[0] == chat(chatml, *turns, ("user", "2\nb"), ("assistant", "r"))
        assert records.response(0) == "r"
        assert records.prompt(0).endswith("y<|im_end|>\n<|im_start|>user\n2\nb<|im_end|>\n<|im_start|>assistant\n")
        assert records[0].input_ids[: len(records.prompt_ids(0))] == records.prompt_ids(0)
        without = instruction(jsonl(self.ROW), chatml, template="chat", ignore_fields=["history", "system"])
        assert without[0] == chat(chatml, ("user", "2\nb"), ("assistant", "r"))

    @pytest.mark.parametrize("template", ["pissa", "none"])
    def test_other_templates_have_no_turns(self, jsonl, template: str):
        path = jsonl(self.ROW)
        assert message(instruction, path, template=template) == (
            f"{path}:1: history: data.template = '{template}' writes no earlier turns; use \"chat\", or "
            "data.ignore_fields to leave the field out"
        )
        records = instruction(path, template=template, ignore_fields=["history"])
        assert records.prompt(0).count("2") == 1

    @pytest.mark.parametrize("value", ["x", ["x"], [["x"]], [["x", 1]], [{"q": "x"}], 3])
    def test_faults(self, jsonl, value):
        path = jsonl({**self.ROW, "history": value})
        assert message(instruction, path) == f"{path}:1: history: must be a list of pairs [question, answer]"


class TestTokens:
    """Five tokens, of which the last two have no label."""

    ROW: ClassVar = {"input_ids": [1, 2, 3, 4, 5], "labels": [IGNORE, 2, 3, IGNORE, IGNORE]}

    def build(self, path: str, **settings) -> TokenizedDataset:
        return build_dataset(Data(train=path, **settings), "train", 10, 8)

    @pytest.mark.parametrize(
        "more",
        [
            {"attention_mask": [1] * 5, "position_ids": [0, 1, 2, 3, 4]},
            {"attention_mask": [True] * 5, "loss_mask": None},
            {"attention_mask": [1, 1, 1, 0, 0], "loss_mask": [0, 1, 1, 0, 0]},  # padding at the right
            {"attention_mask": [1, 1, 0, 0, 0]},  # the last label is predicted from the second token
            {"completion_mask": [0, 1, 1, 1, 1], "assistant_masks": [0, 1, 1, 0, 0]},
            {"segment_ids": [7] * 5, "seq_lengths": [5], "cu_seqlens": [0, 5]},
        ],
    )
    def test_what_agrees(self, jsonl, caplog, more: dict):
        assert list(self.build(jsonl({**self.ROW, **more}))) == list(self.build(jsonl(self.ROW)))
        assert "not used" not in caplog.text

    @pytest.mark.parametrize(
        ("more", "says"),
        [
            ({"attention_mask": [0, 1, 1, 1, 1]}, "attention_mask: hides token 0 from a token with a label"),
            ({"attention_mask": [1, 0, 1, 1, 1]}, "attention_mask: hides token 1 from a token with a label"),
            ({"attention_mask": [1, 1]}, "attention_mask: must be a list of 5 numbers, one for each of input_ids"),
            ({"attention_mask": [[1] * 5] * 5}, "attention_mask: must be a list of 5 numbers"),
            ({"attention_mask": [1, 1, 2, 2, 2]}, "attention_mask: must be 0 or 1 for every token"),
            ({"attention_mask": "11111"}, "attention_mask: must be a list of 5 numbers"),
            ({"position_ids": [0, 1, 2, 0, 1]}, "position_ids: must be 0, 1, 2, ... over a whole record"),
            ({"position_ids": [1, 2, 3, 4, 5]}, "position_ids: must be 0, 1, 2, ... over a whole record"),
            ({"loss_mask": [1, 1, 0, 0, 0]}, "loss_mask: leaves out token 2, whose label is not -100"),
            ({"completion_mask": [0, 0, 1, 1, 1]}, "completion_mask: leaves out token 1, whose label is not -100"),
            ({"loss_weights": [1, 1, 0.5, 1, 1]}, "loss_weights: must be 0 or 1 for every token"),
            ({"segment_ids": [1, 1, 2, 2, 2]}, "segment_ids: tells of several documents, but a record is one"),
            ({"seq_lengths": [3, 2]}, "seq_lengths: tells of several documents"),
            ({"cu_seqlens": [0, 3, 5]}, "cu_seqlens: tells of several documents"),
        ],
    )
    def test_what_contradicts(self, jsonl, more: dict, says: str):
        path = jsonl(self.ROW, {**self.ROW, **more})
        text = message(self.build, path)
        assert text.startswith(f"{path}:2: {says}")
        assert "data.ignore_fields leaves the field out" in text
        assert len(self.build(path, ignore_fields=list(more))) == 2

    def test_the_rest_is_named(self, jsonl, caplog):
        self.build(jsonl({**self.ROW, "token_type_ids": [0, 0, 1, 1, 1], "text": "x", "empty": [], "id": 0}))
        assert "data.train: fields that are not used: id, text, token_type_ids" in caplog.text


class TestWhatIsNotUsed:
    ROWS: ClassVar = [
        {"prompt": "a", "response": "b"},
        {"prompt": "a", "response": "b", "label": None, "tags": [], "note": ""},
        {"prompt": "a", "response": "b", "label": False},
        {"prompt": "a", "response": "b", "question": "c", "label": True},
    ]

    def lines(self, caplog) -> list[str]:
        return [r.message for r in caplog.records if "not used" in r.message and r.levelno == logging.WARNING]

    def test_it_is_named_once(self, jsonl, caplog):
        instruction(jsonl(*self.ROWS))
        assert self.lines(caplog) == ["data.validation: fields that are not used: label, question"]

    def test_each_source_by_itself(self, jsonl, caplog):
        first, second = jsonl(*self.ROWS), jsonl({"text": "a", "meta": 1}, name="s.jsonl")
        data = Data(train=[DataSource(first, ignore_fields=["label"]), DataSource(second)], template="none")
        build_dataset(data, "train", 30, 64)
        assert self.lines(caplog) == [
            "data.train[0]: fields that are not used: question",
            "data.train[1]: fields that are not used: meta",
        ]

    @pytest.mark.parametrize("processes", [1, 2])
    def test_from_the_cache_and_other_processes(
        self, jsonl, tmp_path: Path, chatml: Tokenizer, caplog, monkeypatch, processes: int
    ):
        monkeypatch.setattr("titan_hd.data.build.SMALL", 0)
        path = jsonl(*self.ROWS)
        if processes == 2:
            monkeypatch.setattr("titan_hd.data.tokens.tokenizing.CHUNK_RECORDS", 1)
        for _ in range(2):
            instruction(path, chatml, cache_dir=str(tmp_path / "cache"), num_proc=processes)
            monkeypatch.setattr("titan_hd.data.tokens.encoding.Encoder.chunk", None)  # none is encoded again
        assert self.lines(caplog) == ["data.validation: fields that are not used: label, question"] * 2

    def test_streamed(self, jsonl, caplog):
        rows = [{"prompt": "a", "response": "b", "id": i} for i in range(1, 300)]
        path = jsonl(*rows, {**rows[0], "rare": 1}, {**rows[0], "rare": 2})
        data = Data(train=path, template="none", streaming=True, shuffle=False, shuffle_window=400)
        stream = build_dataset(data, "train", 30, 16)
        assert self.lines(caplog) == ["data.train: fields that are not used: id"]
        stream = pickle.loads(pickle.dumps(stream))  # as a data worker process gets it
        for index in (0, 299, 300, 599):
            stream[index]
        assert self.lines(caplog)[1:] == ["data.train: fields that are not used: rare"]

    def test_ignored_fields_do_not_choose_the_format(self, jsonl):
        path = jsonl({"input_ids": "x", "text": "abc"})
        data = Data(train=path, ignore_fields=["input_ids"])
        assert build_dataset(data, "train", 30, 16).statistics.format == "text"
        assert "input_ids: must be" in message(build_dataset, Data(train=path), "train", 30, 16)
