"""Records of tokens, and of prompts and responses: every fault names file and line, every label is where it belongs."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import ClassVar

import pytest

from tests.kit.datasets import build_dataset
from tests.kit.errors import message
from tests.kit.tokenizers import Letters, llama3_directory, pieces_directory
from titan_hd.config.job_config import Data, DataSource
from titan_hd.data.build import Answering, DatasetBuilder
from titan_hd.data.dataset import TokenizedDataset
from titan_hd.data.example import IGNORE, Example
from titan_hd.data.loader import collate
from titan_hd.data.text.borders import SHARED
from titan_hd.data.text.tokenizer import Tokenizer, load_tokenizer
from titan_hd.data.tokens.statistics import statistics_table

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Pairs(Letters):
    """As Letters, but any two equal letters in a row are one token, 28, greedily from the left, as BPE would merge."""

    def encode(self, text: str, special: bool = False) -> list[int]:
        ids, i = [], 0
        while i < len(text):
            run = 2 if text[i : i + 1] == text[i + 1 : i + 2] else 1
            ids += [28] if run == 2 else super().encode(text[i])
            i += run
        return ids


class Words(Letters):
    """Known words are one token, as in a unigram model; all else is spelled."""

    KNOWN = ("abcdef",)

    def encode(self, text: str, special: bool = False) -> list[int]:
        return [28] if text in self.KNOWN else super().encode(text)


@pytest.fixture
def jsonl(tmp_path: Path):
    """Writes lines (records, text or bytes) to a file and returns its path as text."""

    def write(*lines) -> str:
        path = tmp_path / "records.jsonl"
        rows = [line if isinstance(line, (bytes, str)) else json.dumps(line) for line in lines]
        path.write_bytes(b"".join((r if isinstance(r, bytes) else r.encode()) + b"\n" for r in rows))
        return str(path)

    return write


def instruction(path: str, tokenizer: Tokenizer | None = None, seq_len: int = 64, template: str = "none", **settings):
    data = Data(validation=path, format="instruction", template=template, **settings)
    return build_dataset(data, "validation", 30, seq_len, lambda: tokenizer or Letters())


class TestTokenRecords:
    GOOD: ClassVar = {"input_ids": [1, 2, 3], "labels": [IGNORE, 2, 3]}

    def build(self, path: str, seq_len: int = 8) -> TokenizedDataset:
        return build_dataset(Data(train=path, format="tokens"), "train", 10, seq_len, None)

    def test_taken_as_they_are(self, jsonl):
        records = self.build(jsonl(self.GOOD, {"input_ids": [9], "labels": [0], "more": "x"}))
        assert len(records) == 2
        assert records[0] == Example([1, 2, 3], [IGNORE, 2, 3])
        assert records[1] == Example([9], [0])

    def test_cut_at_the_right(self, jsonl):
        records = self.build(jsonl({"input_ids": [1, 2, 3, 4], "labels": [5, 6, 7, 8]}), seq_len=3)
        assert records[0] == Example([1, 2, 3], [5, 6, 7])

    @pytest.mark.parametrize(
        ("record", "says"),
        [
            ({"input_ids": [1, 2], "labels": [1]}, "labels: has 1 entries, input_ids has 2; they must agree"),
            ({"input_ids": [1], "labels": [1, 2]}, "labels: has 2 entries, input_ids has 1; they must agree"),
            ({"input_ids": [], "labels": []}, "input_ids: is empty"),
            ({"input_ids": [1]}, "labels: must be a list of whole numbers"),
            ({"labels": [1]}, "input_ids: must be a list of whole numbers"),
            ({"input_ids": "12", "labels": "12"}, "input_ids: must be a list of whole numbers"),
            ({"input_ids": [1.0], "labels": [1]}, "input_ids: must be a list of whole numbers"),
            ({"input_ids": [1], "labels": [True]}, "labels: must be a list of whole numbers"),
            ({"input_ids": [[1]], "labels": [[1]]}, "input_ids: must be a list of whole numbers"),
            ({"input_ids": [10], "labels": [1]}, "input_ids: must be from 0 to 9, the model's vocabulary"),
            ({"input_ids": [-1], "labels": [1]}, "input_ids: must be from 0 to 9, the model's vocabulary"),
            ({"input_ids": [IGNORE], "labels": [1]}, "input_ids: must be from 0 to 9, the model's vocabulary"),
            ({"input_ids": [1], "labels": [10]}, "labels: must be -100 or from 0 to 9"),
            ({"input_ids": [1], "labels": [-1]}, "labels: must be -100 or from 0 to 9"),
        ],
    )
    def test_faults_name_file_and_line(self, jsonl, record: dict, says: str):
        path = jsonl(self.GOOD, "", record, self.GOOD)
        assert message(self.build, path) == f"{path}:3: {says}"

    def test_what_is_cut_off_is_checked_too(self, jsonl):
        path = jsonl({"input_ids": [1, 2, 99], "labels": [1, 2, 3]})
        assert message(self.build, path, seq_len=2).startswith(f"{path}:1: input_ids: must be from 0")


class TestInstructionRecords:
    def test_labels_by_hand(self, jsonl):
        """<s> a b | c d </s>: only the response and the end are trained on."""
        (example,) = instruction(jsonl({"prompt": "ab", "response": "cd"}))
        assert example.input_ids == [1, 3, 4, 5, 6, 2]
        assert example.labels == [IGNORE, IGNORE, IGNORE, 5, 6, 2]

    def test_without_bos(self, jsonl):
        (example,) = instruction(jsonl({"prompt": "ab", "response": "cd"}), Letters(bos=None))
        assert example.input_ids == [3, 4, 5, 6, 2]
        assert example.labels == [IGNORE, IGNORE, 5, 6, 2]

    def test_a_newline_ends_pissas_response(self, jsonl):
        """Target "{answer}\\n{eos}", as in PiSSA's experiments; the newline is trained on."""
        records = instruction(jsonl({"prompt": "ab", "response": "cd"}), seq_len=512, template="pissa")
        assert records[0].input_ids[-4:] == [5, 6, 29, 2]
        assert records[0].labels[-5:] == [IGNORE, 5, 6, 29, 2]
        alpaca = instruction(jsonl({"prompt": "ab", "response": "cd"}), seq_len=512, template="alpaca")
        assert alpaca[0].labels[-4:] == [IGNORE, 5, 6, 2]

    def test_what_the_model_is_asked_to_predict(self, jsonl):
        """Through collate: the last token of the prompt predicts the first of the response, the last of it the end."""
        batch = collate(list(instruction(jsonl({"prompt": "ab", "response": "cd"}))), pad_to=(8,))
        assert batch.input_ids.tolist() == [[1, 3, 4, 5, 6, 2, 0, 0]]
        assert batch.targets.tolist() == [[IGNORE, IGNORE, 5, 6, 2, IGNORE, IGNORE, IGNORE]]
        assert batch.trained_tokens == 3

    @pytest.mark.parametrize("seq_len", [4, 5, 6, 7])
    def test_cut_at_the_right(self, jsonl, seq_len: int):
        (example,) = instruction(jsonl({"prompt": "ab", "response": "cd"}), seq_len=seq_len)
        assert example.input_ids == [1, 3, 4, 5, 6, 2][:seq_len]
        assert example.labels == [IGNORE, IGNORE, IGNORE, 5, 6, 2][:seq_len]

    def test_prompt_ids_are_what_training_masks(self, jsonl):
        records = instruction(jsonl({"prompt": "ab", "response": "cd"}))
        assert records.prompt_ids(0) == [1, 3, 4]
        assert records.response(0) == "cd"
        assert records[0].input_ids[:3] == records.prompt_ids(0)

    def test_a_merge_across_the_border(self, jsonl):
        """Prompt and response are cut where one token would hold letters of both."""
        (example,) = instruction(jsonl({"prompt": "ab", "response": "bc"}), Pairs())
        assert example.input_ids == [1, 3, 4, 4, 5, 2]  # a, b; b, c
        assert example.labels == [IGNORE, IGNORE, IGNORE, 4, 5, 2]

    def test_a_merge_across_the_border_that_is_kept(self, jsonl):
        """data.encoding = "joint": the shared token counts as the prompt's."""
        path = jsonl({"prompt": "a", "response": "c"}, {"prompt": "ab", "response": "bc"})
        records = instruction(path, Pairs(), encoding="joint")
        assert records[1].input_ids == [1, 3, 28, 5, 2]  # a, bb, c
        assert records[1].labels == [IGNORE, IGNORE, IGNORE, 5, 2]
        assert records.statistics.notes == {SHARED: (1, f"{path}:2")}

    def test_a_merge_that_leaves_fewer_ids_than_the_prompt(self, jsonl, caplog):
        """<s> abcdef </s> as one text: all of it is the prompt's, so that there is nothing to train on."""
        path = jsonl({"prompt": "abcde", "response": "f"}, {"prompt": "a", "response": "b"})
        records = instruction(path, Words(), encoding="joint")
        assert [e.input_ids for e in records] == [[1, 3, 4, 2]]
        assert records.statistics.first_unlabelled == f"{path}:1"
        assert f"1 of 2 records {SHARED}" in caplog.text
        assert [e.input_ids for e in instruction(path, Words())] == [[1, 3, 4, 5, 6, 7, 8, 2], [1, 3, 4, 2]]

    def test_the_input_field(self, jsonl):
        records = instruction(
            jsonl({"instruction": "a", "input": "b", "output": "c"}, {"instruction": "a", "output": "c"})
        )
        assert records.prompt(0) == "a\nb"
        assert records.prompt(1) == "a"

    @pytest.mark.parametrize(
        ("record", "prompt", "response"),
        [
            ({"question": "q", "answer": "r"}, "q", "r"),
            ({"query": "q", "response": "r", "original_question": "x"}, "q", "r"),
            ({"output": "r", "instruction": "q", "prompt": "x", "answer": "x"}, "q", "r"),
            ({"completion": "r", "prompt": "q"}, "q", "r"),
        ],
    )
    def test_fields_are_found_in_the_first_record(self, jsonl, record: dict, prompt: str, response: str):
        records = instruction(jsonl(record))
        assert (records.prompt(0), records.response(0)) == (prompt, response)

    def test_fields_by_name(self, jsonl):
        path = jsonl({"prompt": "a", "response": "b", "ask": "c", "say": "d"})
        records = instruction(path, prompt_field="ask", response_field="say")
        assert (records.prompt(0), records.response(0)) == ("c", "d")

    @pytest.mark.parametrize(
        ("record", "key"), [({"text": "x", "answer": "y"}, "prompt"), ({"prompt": "x", "text": "y"}, "response")]
    )
    def test_no_field_is_known(self, jsonl, record: dict, key: str):
        path = jsonl(record)
        text = message(instruction, path)
        assert text.startswith(f"{path}:1: none of ")
        assert text.endswith(f"(found {', '.join(record)}); set data.{key}_field")

    @pytest.mark.parametrize(
        ("record", "says"),
        [
            ({"prompt": "a"}, "response: must be a string"),
            ({"response": "a"}, "prompt: must be a string"),
            ({"prompt": "a", "response": None}, "response: must be a string"),
            ({"prompt": ["a"], "response": "b"}, "prompt: must be a string"),
            ({"prompt": "a", "response": ""}, "response: is empty"),
            ({"prompt": "a", "response": " \n"}, "response: is empty"),
        ],
    )
    def test_faults_name_file_and_line(self, jsonl, record: dict, says: str):
        path = jsonl({"prompt": "a", "response": "b"}, record)
        assert message(instruction, path) == f"{path}:2: {says}"

    def test_text_that_no_tokenizer_takes(self, jsonl):
        path = jsonl({"prompt": "a", "response": "b"}, '{"prompt": "a", "response": "\\ud800"}')
        assert message(instruction, path).startswith(f"{path}:2: response: ")

    def test_an_input_that_no_tokenizer_takes(self, jsonl):
        path = jsonl({"prompt": "a", "response": "b"}, '{"prompt": "a", "input": "\\ud800", "response": "b"}')
        assert message(instruction, path).startswith(f"{path}:2: input: ")

    def test_loss_on_the_prompt_too(self, jsonl):
        (example,) = instruction(jsonl({"prompt": "ab", "response": "cd"}), train_on_prompt=True)
        assert example.labels == example.input_ids == [1, 3, 4, 5, 6, 2]

    def test_texts_are_kept_for_generated_answers_alone(self, jsonl):
        data = Data(train=jsonl({"prompt": "ab", "response": "cd"}), template="none")
        data.validation = data.train
        assert build_dataset(data, "validation", 30, 8).answerable
        assert not build_dataset(data, "train", 30, 8).answerable


class TestWhatIsLeftOut:
    """<s> a b | c d </s>, and longer prompts."""

    ROWS: ClassVar = [{"prompt": "a" * n, "response": "bb"} for n in (1, 3, 4, 2, 9)]

    def test_a_record_that_the_cut_leaves_no_label(self, jsonl):
        """seq_len 5: a prompt of three keeps one label, one of four keeps none."""
        path = jsonl(*self.ROWS)
        records = instruction(path, seq_len=5)
        assert [e.trained_tokens for e in records] == [3, 1, 2]
        assert [records.prompt(i) for i in range(3)] == ["a", "aaa", "aa"]
        s = records.statistics
        assert (s.records, s.tokens, s.trained, s.truncated, s.unlabelled, s.bad) == (3, 15, 6, 2, 2, 0)
        assert (s.longest, s.first_unlabelled) == (13, f"{path}:3")

    def test_nothing_is_left(self, jsonl):
        path = jsonl(self.ROWS[-1])
        assert message(instruction, path, seq_len=5) == (
            "data.validation: no record is left; 1 hold no label within training.seq_len = 5 (the "
            "longest has 13 tokens)"
        )

    @pytest.mark.parametrize(("seq_len", "left"), [(2, [[1]]), (3, [[1], [5, 6, 7]])])
    def test_tokens_without_a_label_are_taken_as_they_are_unless_they_were_cut(self, jsonl, seq_len: int, left: list):
        cut = {"input_ids": [5, 6, 7], "labels": [IGNORE, IGNORE, 7]}
        path = jsonl({"input_ids": [1], "labels": [IGNORE]}, cut)
        records = build_dataset(Data(train=path, format="tokens"), "train", 10, seq_len, None)
        assert [e.input_ids for e in records] == left

    def test_bad_records_are_skipped_and_counted(self, jsonl):
        path = jsonl(
            {"prompt": "a", "response": "b"}, "{", {"prompt": 1, "response": "b"}, {"prompt": "c", "response": "d"}
        )
        records = instruction(path, on_error="skip", max_skipped=2)
        assert [records.prompt(i) for i in range(len(records))] == ["a", "c"]
        assert records.statistics.bad == 2

    @pytest.mark.parametrize(("limit", "line"), [(0, 2), (1, 2)])
    def test_one_bad_record_too_many(self, jsonl, limit: int, line: int):
        path = jsonl({"prompt": "a", "response": "b"}, {"prompt": 1, "response": "b"}, "{")
        assert message(instruction, path, on_error="skip", max_skipped=limit) == (
            f"data.max_skipped: more than {limit} bad records; the first: {path}:{line}: prompt: must be a string"
        )

    def test_only_bad_records(self, jsonl):
        text = message(instruction, path := jsonl("{"), on_error="skip")
        assert text.startswith(f"data.validation: no record is left; 1 are bad, the first: {path}:1: not valid JSON")

    def test_the_table(self, jsonl):
        statistics = instruction(jsonl(*self.ROWS), seq_len=5).statistics
        heading, row = statistics_table([statistics]).splitlines()
        assert " ".join(heading.split()).startswith("data set format records tokens trained truncated unlabelled bad")
        assert row.split() == ["data.validation", "instruction", "3", "15", "6", "2", "2", "0", "13"]


def test_named_validation_sets(jsonl, tmp_path: Path):
    """Each is a data set of its own, read as its entry says, and known by its name."""
    path = jsonl({"prompt": "ab", "response": "cd"}, {"prompt": "b", "response": "d"})
    (tmp_path / "plain.jsonl").write_text('{"text": "abc"}\n')
    plain = DataSource(str(tmp_path / "plain.jsonl"), name="plain", format="text")
    data = Data(validation=[DataSource(path, name="math"), plain], format="instruction", template="none")
    sets = DatasetBuilder(data, 30, 64, Letters).validation()
    assert [(name, len(records), records.answerable) for name, records in sets.items()] == [
        ("math", 2, True),
        ("plain", 1, False),
    ]
    assert [row.name for records in sets.values() for row in records.rows] == [
        "data.validation[math]",
        "data.validation[plain]",
    ]
    assert sets["plain"][0].input_ids == [1, 3, 4, 5, 2]


class TestChatRecords:
    """data.template = "chat", with a real tokenizer and a template in the manner of ChatML."""

    def build(self, path: str, folder: Path, template: str = CHAT, seq_len: int = 64):
        tokenizer = load_tokenizer(pieces_directory(folder, chat_template=template, bos_token="</s>"))
        data = Data(validation=path, template="chat")
        return tokenizer, build_dataset(data, "validation", tokenizer.vocab_size, seq_len, lambda: tokenizer)

    def test_labels(self, jsonl, tmp_path: Path):
        tokenizer, records = self.build(jsonl({"prompt": "the fox", "response": "1 + 2"}), tmp_path)
        before = "<|im_start|>user\nthe fox<|im_end|>\n<|im_start|>assistant\n"
        assert records.prompt(0) == before
        assert records.prompt_ids(0) == tokenizer.encode(before, special=True)
        (example,) = records
        assert example.input_ids == tokenizer.encode(before + "1 + 2<|im_end|>\n", special=True)
        prompt, end = len(records.prompt_ids(0)), tokenizer.encode("<|im_end|>", special=True)
        assert example.labels[:prompt] == [IGNORE] * prompt
        assert example.labels[prompt:] == [*tokenizer.encode("1 + 2"), *end, IGNORE]
        assert len(example.labels) == len(example.input_ids)

    @pytest.mark.parametrize("seq_len", [44, 46, 48, 60])
    def test_cut_at_the_right(self, jsonl, tmp_path: Path, seq_len: int):
        path = jsonl({"prompt": "the fox", "response": "1 + 2"})
        (whole,), (cut,) = self.build(path, tmp_path)[1], self.build(path, tmp_path, seq_len=seq_len)[1]
        assert (cut.input_ids, cut.labels) == (whole.input_ids[:seq_len], whole.labels[:seq_len])

    def test_a_bos_of_the_template_is_the_only_one(self, jsonl, tmp_path: Path):
        path = jsonl({"prompt": "a", "response": "b"})
        tokenizer, records = self.build(path, tmp_path, "{{ bos_token }}" + CHAT)
        bos = tokenizer.encode("</s>", special=True)[0]
        assert records[0].input_ids.count(bos) == 1
        assert records[0].input_ids[0] == records.prompt_ids(0)[0] == bos

    def test_a_refused_record_is_named_at_the_start(self, jsonl, tmp_path: Path):
        refuses = "{% if messages[0].content == 'x' %}{{ raise_exception('no x') }}{% endif %}" + CHAT
        path = jsonl({"prompt": "a", "response": "b"}, {"prompt": "x", "response": "b"})
        where = f"{path}:2: {tmp_path / 'tokenizer_config.json'}: chat template: no x"
        assert message(self.build, path, tmp_path, refuses) == where

    def test_a_template_without_an_end_is_refused_at_the_start(self, jsonl, tmp_path: Path):
        path = jsonl({"prompt": "a", "response": "b"})
        text = message(self.build, path, tmp_path, "{% for m in messages %}{{ m.content }}\n{% endfor %}")
        assert text.startswith(
            f"{path}:1: the chat template ends turn 2 with no special token; put {{% generation %}} "
        )

    def test_no_template(self, jsonl, tmp_path: Path):
        text = message(self.build, jsonl({"prompt": "a", "response": "b"}), tmp_path, None)
        assert f"data.template: chat: {tmp_path} has no chat template" in text


class TestBuildRecords:
    TOKENS: ClassVar = {"input_ids": [1, 2], "labels": [1, 2]}
    WORDS: ClassVar = {"prompt": "ab", "response": "cd"}

    def build(self, path: str, format: str = "auto", vocab_size: int = 30):
        return build_dataset(Data(train=path, format=format, template="none"), "train", vocab_size, 16, Letters)

    def test_auto(self, jsonl):
        assert self.build(jsonl(self.TOKENS)).statistics.format == "tokens"
        assert self.build(jsonl(self.WORDS)).statistics.format == "instruction"

    def test_tokens_need_no_tokenizer(self, jsonl):
        def tokenizer():
            raise AssertionError("not needed")

        assert len(build_dataset(Data(train=jsonl(self.TOKENS)), "train", 30, 16, tokenizer)) == 1

    def test_a_given_format_is_not_guessed(self, jsonl):
        assert "input_ids: must be a list" in message(self.build, jsonl(self.WORDS), "tokens")
        assert "none of instruction" in message(self.build, jsonl(self.TOKENS), "instruction")

    def test_a_mixed_file_is_refused(self, jsonl):
        path = jsonl(self.TOKENS, self.WORDS)
        assert message(self.build, path).startswith(f"{path}:2: input_ids: ")

    def test_a_tokenizer_larger_than_the_model(self, jsonl):
        text = message(self.build, jsonl(self.WORDS), "auto", 29)
        assert text == "model.hf_assets_path: the tokenizer has 30 ids, the model's vocabulary 29"

    def test_the_validation_records(self, jsonl):
        data = Data(train="nowhere", validation=jsonl(self.TOKENS))
        assert len(build_dataset(data, "validation", 30, 16, Letters)) == 1
        with pytest.raises(ValueError, match=r"data.train: cannot read nowhere"):
            build_dataset(data, "train", 30, 16, Letters)


class TestAnswering:
    """What whoever generates must know: the ends of all sources' answers, and a template that is in no file."""

    def answering(self, folder: Path, **settings):
        builder = DatasetBuilder(
            Data(**{"template": "none", **settings}), 400, 64, functools.partial(load_tokenizer, folder)
        )
        builder.training()
        return builder.answering()

    def test_tokens_say_nothing(self, jsonl, tmp_path: Path):
        assert self.answering(tmp_path, train=jsonl({"input_ids": [1, 2], "labels": [1, 2]})) == Answering()

    def test_texts_and_instructions_end_with_the_end_of_sequence(self, jsonl, tmp_path: Path):
        folder = pieces_directory(tmp_path / "model")
        assert self.answering(folder, train=jsonl({"text": "fox"})) == Answering([0])
        assert self.answering(folder, train=jsonl({"query": "fox", "response": "dog"})) == Answering([0])

    @pytest.mark.parametrize("streaming", [False, True])
    def test_chats_end_with_the_templates_token(self, jsonl, tmp_path: Path, streaming: bool):
        """ChatML on a base model: the template is in its files, the end of a turn not in its generation config."""
        folder = pieces_directory(tmp_path / "model", chat_template=CHAT)
        chat = {"messages": [{"role": "user", "content": "fox"}, {"role": "assistant", "content": "dog"}]}
        train = jsonl(chat)
        assert self.answering(folder, train=train, streaming=streaming) == Answering([0, 1])
        train = jsonl({"query": "fox", "response": "dog"})
        assert self.answering(folder, train=train, template="chat") == Answering([0, 1])

    def test_a_mixture_has_all_of_them(self, jsonl, tmp_path: Path):
        folder, train = llama3_directory(tmp_path / "model"), jsonl({"query": "fox", "response": "dog"})
        plain = DataSource(path=train)
        assert self.answering(folder, train=[plain]) == Answering([1])
        both = self.answering(folder, train=[DataSource(path=train, template="chat"), plain])
        assert both.stop_ids == [1, 4]
        assert "<|start_header_id|>" in both.chat_template
