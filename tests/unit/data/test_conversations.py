"""What conversations say: system texts, flags of turns, tools and calls of them, in the forms that are published."""

from __future__ import annotations

import datetime
import functools
import json
from pathlib import Path
from typing import ClassVar

import pytest

from tests.kit.datasets import build_dataset
from tests.kit.tokenizers import CHATML, chat_directory
from titan_hd.config.job_config import Data
from titan_hd.data.conversations import read_conversation
from titan_hd.data.example import IGNORE, Example
from titan_hd.data.formats import ChatFormat
from titan_hd.data.sources import RawRecord, Record
from titan_hd.data.text.tokenizer import Tokenizer, load_tokenizer
from titan_hd.data.tokens.encoding import Encoder

# As CHATML, with tools and their calls in the manner of Hermes.
TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content %}{{ m.content }}{% endif %}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ADD = {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
TOOL, CALL = {"type": "function", "function": ADD}, {"name": "add", "arguments": {"a": 1}}
CALLS = [{"type": "function", "function": CALL}]
USER, ANSWER = {"role": "user", "content": "the fox"}, {"role": "assistant", "content": "1 + 2"}
OTHER = {"role": "assistant", "content": "my box"}


@pytest.fixture(scope="module")
def chatml(tmp_path_factory) -> Tokenizer:
    return load_tokenizer(chat_directory(tmp_path_factory.mktemp("chatml")))


@pytest.fixture(scope="module")
def hermes(tmp_path_factory) -> Tokenizer:
    return load_tokenizer(chat_directory(tmp_path_factory.mktemp("hermes"), TOOLS))


@functools.cache  # it has a process that renders
def chat_format(tokenizer: Tokenizer, train_on_prompt: bool = False) -> ChatFormat:
    return ChatFormat(Data(train_on_prompt=train_on_prompt), tokenizer)


def encode(tokenizer: Tokenizer, train_on_prompt: bool = False, **fields) -> Example:
    return chat_format(tokenizer, train_on_prompt).encode(Record(fields, "f:1"))


def trained(tokenizer: Tokenizer, example: Example) -> list[str]:
    """What each stretch of labels says."""
    stretches: list[list[int]] = [[]]
    for label in example.labels:
        stretches += [[]] if label == IGNORE else []
        stretches[-1] += [] if label == IGNORE else [label]
    return [tokenizer.decode(ids).strip() for ids in stretches if ids]


def message(call, *args, **kwargs) -> str:
    with pytest.raises(ValueError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestFlags:
    @pytest.mark.parametrize(
        ("off", "on"),
        [
            ({"weight": 0}, {"weight": 1}),
            ({"weight": 0.0}, {"weight": 1.0}),
            ({"train": False}, {"train": True}),
            ({"training": False}, {}),
            ({"loss": False}, {"loss": True}),
            ({"loss_scale": 0.0}, {"loss_scale": 1.0}),
            ({"masked": True}, {"masked": False}),
            ({"weight": 0, "train": False, "masked": True}, {"weight": None, "train_detail": None}),
        ],
    )
    @pytest.mark.parametrize("sharegpt", [False, True])
    def test_a_turn_that_is_left_out(self, chatml: Tokenizer, off: dict, on: dict, sharegpt: bool):
        messages = [USER, {**ANSWER, **off}, {**USER, **off}, {**OTHER, **on}]
        fields = {"messages": messages}
        if sharegpt:
            fields = {"conversations": [{"from": m["role"], "value": m["content"], **m} for m in messages]}
            for turn in fields["conversations"]:
                del turn["role"], turn["content"]
        example, plain = encode(chatml, **fields), encode(chatml, messages=[USER, ANSWER, USER, OTHER])
        assert example.input_ids == plain.input_ids
        assert [len(stretch) for stretch in (trained(chatml, example), trained(chatml, plain))] == [1, 2]
        last = max(i for i, label in enumerate(example.labels) if label == IGNORE and plain.labels[i] != IGNORE)
        assert example.labels == [IGNORE] * (last + 1) + plain.labels[last + 1 :]
        assert trained(chatml, example)[0].startswith("my box")

    def test_the_answer_to_compare_with_is_a_trained_one(self, chatml: Tokenizer):
        record = Record({"messages": [USER, ANSWER, USER, {**OTHER, "weight": 0}]}, "f:1")
        question = chat_format(chatml).question(record)
        assert question == [[USER], None, "1 + 2"]

    def test_what_json_cannot_hold_is_left_out_of_what_is_kept(self, tmp_path: Path):
        """Where the template has no use for it; elsewhere the record is a bad one."""
        rows = [[{**said, "time": datetime.datetime(2024, 1, day)} for said in (USER, ANSWER)] for day in (1, 2)]
        raws = [RawRecord(f"f: row {i}", {"messages": row}, True) for i, row in enumerate(rows)]
        tokenizer = load_tokenizer(chat_directory(tmp_path / "no"))
        chunk = Encoder("n", ChatFormat(Data(), tokenizer), 99, False, keep_questions=True).chunk(raws)
        assert (chunk.faults, len(chunk.arrays["ends"])) == ([], 2)
        assert json.loads(chunk.arrays["questions"].tobytes()[: chunk.arrays["question_ends"][0]]) == [
            [USER], None, ANSWER["content"],
        ]  # fmt: skip
        reads = CHATML.replace("{{ m.content", "{% if m.time %}{% endif %}{{ m.content")
        reading = ChatFormat(Data(), load_tokenizer(chat_directory(tmp_path / "yes", reads)))
        assert reading._chat.reads("time")
        assert len(Encoder("n", reading, 99, False).chunk(raws).arrays["ends"]) == 2
        chunk = Encoder("n", reading, 99, False, keep_questions=True).chunk(raws)
        assert (len(chunk.faults), len(chunk.arrays["ends"]), chunk.statistics.records) == (2, 0, 0)
        assert chunk.faults[1].startswith("f: row 1: cannot be kept for validation: ")

    def test_an_answer_that_is_a_call_alone(self, hermes: Tokenizer):
        record = Record({"messages": [USER, {"role": "assistant", "tool_calls": CALLS}]}, "f:1")
        assert chat_format(hermes).question(record) == [[USER], None, ""]

    def test_all_left_out(self, tmp_path: Path, chatml: Tokenizer):
        path = tmp_path / "r.jsonl"
        rows = [{"messages": [USER, {**ANSWER, "weight": 0}]}, {"messages": [USER, ANSWER]}]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        records = build_dataset(Data(train=str(path)), "train", 500, 64, lambda: chatml)
        assert (len(records), records.statistics.first_unlabelled) == (1, f"{path}:1")

    def test_with_loss_on_all_tokens(self, chatml: Tokenizer):
        messages = [{**USER, "train": True}, {**ANSWER, "weight": 0}, USER, OTHER]
        example, answers = encode(chatml, True, messages=messages), encode(chatml, messages=[USER, ANSWER, USER, OTHER])
        gone = [i for i, label in enumerate(example.labels) if label == IGNORE]
        assert gone == list(range(gone[0], gone[-1] + 1)), "one stretch"
        assert [answers.labels[i] for i in gone] == [example.input_ids[i] for i in gone]
        assert chatml.decode([example.input_ids[i] for i in gone]).startswith("1 + 2")
        text = message(encode, chatml, True, messages=[{**USER, "train": False}, ANSWER])
        assert text == "turn 1 is marked not to be trained on, but data.train_on_prompt is true"

    @pytest.mark.parametrize(
        ("turn", "flags", "says"),
        [
            (1, {"weight": 0.5}, "messages[1].weight: must be 0 or 1 (false or true), not 0.5"),
            (1, {"weight": "0"}, "messages[1].weight: must be 0 or 1 (false or true), not '0'"),
            (1, {"train": True, "weight": 0}, "messages[1]: its flags (weight, train) contradict"),
            (1, {"masked": True, "train": True}, "messages[1]: its flags (train, masked) contradict"),
            (1, {"train_detail": [{"begin_offset": 0}]}, "messages[1].train_detail: a turn is trained on as a whole"),
            (0, {"train": True}, "messages[0]: is marked to be trained on, but data.train_on_prompt = false trains"),
        ],
    )
    def test_faults(self, chatml: Tokenizer, turn: int, flags: dict, says: str):
        messages = [USER, ANSWER]
        messages[turn] = {**messages[turn], **flags}
        assert message(encode, chatml, messages=messages).startswith(says)


class TestSystemTexts:
    SYSTEM: ClassVar = {"role": "system", "content": "be lazy"}

    @pytest.mark.parametrize("field", ["system", "system_prompt"])
    def test_beside_the_messages(self, chatml: Tokenizer, field: str):
        expected = encode(chatml, messages=[self.SYSTEM, USER, {**ANSWER, "weight": 0}, USER, OTHER])
        sharegpt = [{"from": "human", "value": "the fox"}, {"from": "gpt", "value": "1 + 2", "weight": 0}]
        sharegpt += [{"from": "human", "value": "the fox"}, {"from": "gpt", "value": "my box"}]
        assert encode(chatml, conversations=sharegpt, **{field: "be lazy"}) == expected
        assert encode(chatml, messages=[self.SYSTEM, USER, ANSWER], **{field: "be lazy"}) == encode(
            chatml, messages=[self.SYSTEM, USER, ANSWER]
        )
        assert encode(chatml, messages=[USER, ANSWER], **{field: ""}) == encode(chatml, messages=[USER, ANSWER])

    def test_two_that_differ(self, chatml: Tokenizer):
        text = message(encode, chatml, messages=[self.SYSTEM, USER, ANSWER], system="be quick")
        assert text == "system: says something else than messages[0], which is a system message too"
        assert message(encode, chatml, messages=[USER, ANSWER], system=["x"]) == "system: must be a string"


class TestTools:
    """All forms of one conversation with a tool."""

    MESSAGES: ClassVar = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": CALLS},
        {"role": "tool", "content": "3"},
        OTHER,
    ]

    def expected(self, hermes: Tokenizer) -> Example:
        example = encode(hermes, messages=self.MESSAGES, tools=[TOOL])
        written = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
        assert [text.removesuffix("<|im_end|>") for text in trained(hermes, example)] == [written, "my box"]
        return example

    @pytest.mark.parametrize(
        "fields",
        [
            {"tools": json.dumps([TOOL])},
            {"tools": [json.dumps(TOOL)]},
            {"functions": [ADD]},
            {"functions": json.dumps([ADD]), "tools": ""},
        ],
    )
    def test_forms_of_tools(self, hermes: Tokenizer, fields: dict):
        assert encode(hermes, messages=self.MESSAGES, **fields) == self.expected(hermes)

    @pytest.mark.parametrize(
        "call",
        [
            {"tool_calls": [{"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]},
            {"tool_calls": [CALL]},
            {"tool_calls": json.dumps(CALLS)},
            {"function_call": {"name": "add", "arguments": '{"a": 1}'}, "content": ""},
            {"function_call": CALL, "tool_calls": []},
        ],
    )
    def test_forms_of_calls(self, hermes: Tokenizer, call: dict):
        """The text of arguments would be quoted once more: "{\\"a\\": 1}"."""
        messages = [USER, {"role": "assistant", "content": None, **call}, *self.MESSAGES[2:]]
        example = encode(hermes, messages=messages, tools=[TOOL])
        expected = self.expected(hermes)
        assert (example.input_ids, example.labels) == (expected.input_ids, expected.labels)

    @pytest.mark.parametrize(
        "called", [json.dumps(CALL), json.dumps([CALL]), json.dumps({**CALL, "arguments": '{"a": 1}'})]
    )
    @pytest.mark.parametrize("answered", ["observation", "tool", "function_response"])
    def test_sharegpt(self, hermes: Tokenizer, called: str, answered: str):
        turns = [("human", "the fox"), ("function_call", called), (answered, "3"), ("gpt", "my box")]
        conversations = [{"from": speaker, "value": value} for speaker, value in turns]
        example = encode(hermes, conversations=conversations, tools=json.dumps([TOOL]))
        assert example == self.expected(hermes)

    @pytest.mark.parametrize(
        ("fields", "says"),
        [
            ({"tools": "add"}, "tools: not valid JSON: "),
            ({"tools": {"a": 1}}, "tools: must be a list, or the JSON text of one"),
            ({"tools": [3]}, "tools[0]: must be an object that describes a function"),
            ({"messages": [USER, {**ANSWER, "tool_calls": "x"}]}, "messages[1].tool_calls: not valid JSON: "),
            ({"messages": [USER, {**ANSWER, "tool_calls": CALLS[0]}]}, "messages[1].tool_calls: must be a list"),
            ({"messages": [USER, {**ANSWER, "tool_calls": [{}]}]}, "messages[1].tool_calls[0]: must be an object with"),
            ({"messages": [{**USER, "tool_calls": CALLS}, ANSWER]}, "messages[0].tool_calls: only the assistant"),
            (
                {"messages": [USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": "[1]"}]}]},
                "messages[1].tool_calls[0].arguments: must be an object, or the JSON text of one",
            ),
            ({"conversations": [{"from": "function_call", "value": "add(1)"}]}, "conversations[0]: not valid JSON: "),
        ],
    )
    def test_faults(self, hermes: Tokenizer, fields: dict, says: str):
        if "conversations" not in fields:
            fields = {"messages": [USER, ANSWER], **fields}
        assert message(encode, hermes, **fields).startswith(says)

    def test_a_template_that_does_not_write_calls(self, chatml: Tokenizer):
        """CHATML would write "None" as the assistant's answer."""
        text = message(encode, chatml, messages=self.MESSAGES)
        assert text == "the chat template does not write tool_calls, which turn 2 has"

    def test_nulls_that_a_table_adds(self, tmp_path: Path, hermes: Tokenizer):
        """Two rows with other tools: in Parquet each has the keys of both. In JSON a null is what it says."""
        parquet, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
        rows = []
        for name, key, value in (("add", "a", 1), ("say", "text", "x")):
            properties = {key: {"type": "integer", "enum": [1, None]}}
            function = {"name": name, "parameters": {"type": "object", "properties": properties}}
            calls = [{"type": "function", "function": {"name": name, "arguments": {key: value}}}]
            messages = [USER, {"role": "assistant", "content": None, "tool_calls": calls}, {**OTHER, "weight": 1}]
            rows.append({"tools": [{"type": "function", "function": function}], "messages": messages})
        (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "r.parquet")
        lines, table = (
            list(build_dataset(Data(train=str(tmp_path / name)), "train", 500, 900, lambda: hermes))
            for name in ("r.jsonl", "r.parquet")
        )
        assert table == lines
        assert all('"enum": [1, null]' in hermes.decode(example.input_ids) for example in table)
        said = [USER, {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {"a": None}}]}]
        assert '{"a": null}' in hermes.decode(encode(hermes, messages=said).input_ids)


class TestContent:
    def test_parts(self, chatml: Tokenizer):
        """One behind the other, as templates for such parts write them."""
        parts = [{"type": "text", "text": "1 +"}, {"type": "output_text", "text": " 2"}]
        assert encode(chatml, messages=[USER, {**ANSWER, "content": parts}]) == encode(chatml, messages=[USER, ANSWER])

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            ([{"type": "image_url", "image_url": "x"}], ".content[0]: is of type 'image_url'; only text can be read"),
            ([{"type": "text", "text": "a"}, {"type": "text"}], ".content[1].text: must be a string"),
            (["a"], ".content: must be a string, or a list of parts"),
            ([], ".content: must be a string, or a list of parts"),
            ({"type": "text"}, ".content: must be a string, or a list of parts"),
            ([{"type": "text", "text": " "}], ".content: is empty"),
        ],
    )
    def test_faults(self, chatml: Tokenizer, content, says: str):
        text = message(encode, chatml, messages=[USER, {"role": "assistant", "content": content}])
        assert text.startswith("messages[1]" + says)


class TestSpeakers:
    @pytest.mark.parametrize(
        ("asks", "answers"), [("human", "gpt"), ("user", "chatgpt"), ("human", "assistant"), ("user", "bing")]
    )
    @pytest.mark.parametrize("keys", [("from", "value"), ("role", "content")])
    def test_names(self, asks: str, answers: str, keys: tuple[str, str]):
        """Also under `role`, where a template would write a turn of "human" or "gpt", which no model knows."""
        turns = [dict(zip(keys, (asks, "the fox"))), dict(zip(keys, (answers, "1 + 2")))]
        assert read_conversation(Record({"conversations": turns}, "f:1")).messages == [USER, ANSWER]

    def test_both_forms_in_one_message(self, chatml: Tokenizer):
        both = [{**USER, "from": "human", "value": "the fox"}, {**ANSWER, "from": "gpt", "value": None}]
        assert encode(chatml, messages=both) == encode(chatml, messages=[USER, ANSWER])
        for wrong in ({"from": "gpt"}, {"value": "dog"}, {"from": ["user"]}):
            text = message(encode, chatml, messages=[{**USER, **wrong}, ANSWER])
            assert text == "messages[0]: from and value say something else than role and content"

    @pytest.mark.parametrize(("role", "known"), [("Assistant", "assistant"), ("user ", "user"), ("SYSTEM", "system")])
    def test_nearly_a_role(self, chatml: Tokenizer, role: str, known: str):
        text = message(encode, chatml, messages=[{"role": role, "content": "x"}, USER, ANSWER])
        assert text == f"messages[0].role: must be {known}, not {role!r}"

    def test_other_roles_are_the_templates(self, chatml: Tokenizer):
        example = encode(chatml, messages=[{"role": "developer", "content": "x"}, USER, ANSWER])
        assert "developer" in chatml.decode(example.input_ids)


def test_of_two_columns_the_one_with_a_value():
    """As of a table in which conversations of two kinds were put together."""
    record = Record({"messages": None, "conversations": [USER, ANSWER]}, "f:1", from_table=True)
    assert read_conversation(record).messages == [USER, ANSWER]


def test_keys_of_messages_that_a_template_does_not_read(tmp_path: Path):
    reads = load_tokenizer(
        chat_directory(tmp_path, CHATML.replace("{{ m.content }}", "{{ m.thinking }}{{ m.content }}"))
    )
    record = Record(
        {
            "messages": [
                {**USER, "name": "Ann", "id": None},
                {**ANSWER, "thinking": "hm", "reasoning": "x", "weight": 1},
            ],
            "tools": [TOOL],
            "prompt_id": 7,
            "conversations": "x",
        },
        "f:1",
    )
    unused = ChatFormat(Data(), reads).unused(record)
    assert unused == {"messages[].name", "messages[].reasoning", "tools", "prompt_id", "conversations"}
