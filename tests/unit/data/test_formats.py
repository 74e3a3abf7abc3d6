"""What the fields of a record mean: masks by hand for every format, chats as transformers writes them."""

from __future__ import annotations

import functools
import json
import pickle
from pathlib import Path
from typing import ClassVar, get_args, get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kit.datasets import build_dataset
from tests.kit.tokenizers import CHATML, Letters, chat_directory
from titan_hd.config.job_config import Data, DataSource
from titan_hd.data.conversations import read_conversation
from titan_hd.data.example import IGNORE, Example
from titan_hd.data.formats import FORMATS, ChatFormat, detect_format
from titan_hd.data.loader import collate
from titan_hd.data.sources import Record
from titan_hd.data.text import chat_encoding
from titan_hd.data.text.chat_spans import LEFT_OUT, OTHERWISE
from titan_hd.data.text.tokenizer import Tokenizer, load_tokenizer

# As CHATML, with the marks by which transformers tells what an assistant says.
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}\n"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SYSTEM, USER, ANSWER = ("system", "Be kind."), ("user", "the fox"), ("assistant", "1 + 2")
TOOLS = [{"type": "function", "function": {"name": "add", "description": "ü", "parameters": {"type": "object"}}}]


def turns(*pairs: tuple[str, str]) -> list[dict]:
    return [{"role": role, "content": content} for role, content in pairs]


def encode(tokenizer: Tokenizer, messages: list[dict], train_on_prompt: bool = False, **fields) -> Example:
    return chat_format(tokenizer, train_on_prompt).encode(Record({"messages": messages, **fields}, "f:1"))


@functools.cache  # it has a process that renders
def chat_format(tokenizer: Tokenizer, train_on_prompt: bool) -> ChatFormat:
    return ChatFormat(Data(train_on_prompt=train_on_prompt), tokenizer)


def stretches(example: Example) -> list[list[int]]:
    """The stretches of ids that carry labels."""
    found: list[list[int]] = []
    for position, label in enumerate(example.labels):
        if label != IGNORE:
            if example.labels[position - 1] == IGNORE:
                found.append([])
            found[-1].append(label)
    return found


def trained_text(tokenizer: Tokenizer, example: Example) -> list[str]:
    """What each stretch of labels says, with `#` for a control token."""
    assert all(label in (IGNORE, i) for i, label in zip(example.input_ids, example.labels, strict=True))
    return [
        "".join("#" if i in tokenizer.control_ids else tokenizer.decode([i]) for i in ids) for ids in stretches(example)
    ]


def message(call, *args, **kwargs) -> str:
    with pytest.raises(ValueError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def chatml(tmp_path_factory) -> Tokenizer:
    return load_tokenizer(chat_directory(tmp_path_factory.mktemp("chatml")))


class TestChat:
    def test_labels_by_hand(self, chatml: Tokenizer):
        """Two answers: each and its <|im_end|> are trained on; headings, other turns and ChatML's newlines are not."""
        example = encode(chatml, turns(SYSTEM, USER, ANSWER, ("user", "dog"), ("assistant", "my box")))
        system = "<|im_start|>system\nBe kind.<|im_end|>\n"
        pieces = [
            (system + "<|im_start|>user\nthe fox<|im_end|>\n<|im_start|>assistant\n", False),
            ("1 + 2<|im_end|>", True),
            ("\n<|im_start|>user\ndog<|im_end|>\n<|im_start|>assistant\n", False),
            ("my box<|im_end|>", True),
            ("\n", False),
        ]
        ids, labels = [], []
        for text, trained in pieces:
            part = chatml.encode(text, special=True)
            ids += part
            labels += part if trained else [IGNORE] * len(part)
        assert (example.input_ids, example.labels) == (ids, labels)

    def test_what_the_model_is_asked_to_predict(self, chatml: Tokenizer):
        example = encode(chatml, turns(USER, ANSWER, USER, ANSWER))
        batch = collate([example])
        for t, target in enumerate(batch.targets[0].tolist()[: len(example.labels) - 1]):
            assert target == example.labels[t + 1]
        assert batch.trained_tokens == 2 * len(chatml.encode("1 + 2<|im_end|>", special=True))

    def test_a_user_at_the_end_is_not_trained_on(self, chatml: Tokenizer):
        example = encode(chatml, turns(USER, ANSWER, ("user", "more?")))
        assert trained_text(chatml, example) == ["1 + 2#"]
        assert example.input_ids == chatml.encode(
            "<|im_start|>user\nthe fox<|im_end|>\n<|im_start|>assistant\n1 + 2<|im_end|>\n"
            "<|im_start|>user\nmore?<|im_end|>\n",
            special=True,
        )

    def test_two_answers_in_a_row(self, chatml: Tokenizer):
        assert trained_text(chatml, encode(chatml, turns(USER, ANSWER, ("assistant", "and")))) == ["1 + 2#", "and#"]

    def test_loss_on_all_tokens(self, chatml: Tokenizer):
        example = encode(chatml, turns(SYSTEM, USER, ANSWER, USER), train_on_prompt=True)
        assert example.labels == example.input_ids == encode(chatml, turns(SYSTEM, USER, ANSWER, USER)).input_ids

    @pytest.mark.parametrize("answer", ["\nthe", "\n\n\nthe", " the", "the\n", "the <|im_end|> fox", "é🚀", "  "])
    def test_one_turn_is_trained_as_an_instruction_is(self, tmp_path: Path, answer: str):
        """Also where a token reaches across the border of heading and answer (the newline of both as one)."""
        folder = tmp_path / "tokenizer"
        tokenizer = load_tokenizer(chat_directory(folder))
        if not answer.strip():
            assert message(encode, tokenizer, turns(USER, ("assistant", answer))) == "messages[1].content: is empty"
            return
        path = tmp_path / "r.jsonl"
        path.write_text(json.dumps({"prompt": "the fox", "response": answer}) + "\n")
        data = Data(train=str(path), template="chat")
        (expected,) = build_dataset(data, "train", 500, 500, lambda: tokenizer)
        assert encode(tokenizer, turns(USER, ("assistant", answer))) == expected

    def test_sharegpt_is_the_same_conversation(self, chatml: Tokenizer):
        speakers = [("system", "Be kind."), ("human", "the fox"), ("gpt", "1 + 2")]
        record = Record({"conversations": [{"from": f, "value": v} for f, v in speakers]}, "f:1")
        assert read_conversation(record).messages == turns(SYSTEM, USER, ANSWER)
        assert ChatFormat(Data(), chatml).encode(record) == encode(chatml, turns(SYSTEM, USER, ANSWER))

    def test_what_parquet_adds_is_not_there(self):
        record = Record({"messages": [{"role": "user", "content": "a", "tool_calls": None}]}, "f:1")
        assert read_conversation(record).messages == turns(("user", "a"))

    @pytest.mark.parametrize(
        ("messages", "says"),
        [
            (None, "messages: must be a list of messages, and not empty"),
            ([], "messages: must be a list of messages, and not empty"),
            ("hi", "messages: must be a list of messages, and not empty"),
            (["hi"], "messages[0]: must be an object with role and content, not str"),
            ([{"content": "x"}], "messages[0].role: must be a string"),
            ([{"role": "user"}], "messages[0].content: must be a string"),
            ([{"role": "user", "content": ["x"]}], "messages[0].content: must be a string"),
            (turns(USER, ("assistant", " ")), "messages[1].content: is empty"),
            ([{"from": "gtp", "value": "x"}], "messages[0].from: must be one of human, user, gpt, "),
            (turns(USER), "holds no assistant turn, so that there is nothing to train on; its roles: user"),
            (turns(ANSWER, USER, ANSWER), "begins with an assistant turn; a system's or user's must come first"),
            (turns(USER, ("assistant", "\ud800")), "character "),
        ],
    )
    def test_faults(self, chatml: Tokenizer, messages, says: str):
        assert message(encode, chatml, messages).startswith(says)

    def test_tools_must_be_a_list(self, chatml: Tokenizer):
        text = message(encode, chatml, turns(USER, ANSWER), tools={"name": "add"})
        assert text == "tools: must be a list, or the JSON text of one"


class TestManyTurns:
    """What is counted from control tokens is what encoding the text up to every turn gives."""

    CONTENTS: ClassVar = [
        "the fox",
        " dog ",
        "assistant\n",
        "1 + 2",
        "<|im_end|>",
        "<|im_start|>assistant\n",
        "\ue000",
        "a\n\n",
    ]

    def both(self, monkeypatch, tokenizer: Tokenizer, messages: list[dict]) -> tuple:
        """What `encode` gives or says as it is, and where no control token is found."""
        results = []
        for quick in (True, False):
            with monkeypatch.context() as patch:
                if not quick:
                    patch.setattr(chat_encoding.ConversationEncoder, "_controls", lambda *_: None)
                try:
                    results.append(encode(tokenizer, messages))
                except ValueError as error:
                    results.append(str(error))
        return tuple(results)

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.lists(st.tuples(st.booleans(), st.sampled_from(CONTENTS)), min_size=1, max_size=9))
    def test_the_same_as_slowly(self, chatml: Tokenizer, monkeypatch, said: list[tuple[bool, str]]):
        messages = turns(USER, *(("assistant" if by else "user", text) for by, text in said), ANSWER)
        quick, slow = self.both(monkeypatch, chatml, messages)
        assert quick == slow

    @pytest.mark.parametrize("name", ["llama3_1_hf", "qwen2_5_hf"])
    def test_real_tokenizers(self, shared_data: Path, monkeypatch, name: str):
        tokenizer = load_tokenizer(shared_data / "tokenizers" / name)
        said = [turns(("user", f"{i} apples?"), ("assistant", f" {i}\nand\n")) for i in range(6)]
        quick, slow = self.both(monkeypatch, tokenizer, [m for pair in said for m in pair])
        assert quick == slow
        assert len(stretches(quick)) == 6

    def test_encoding_is_linear(self, chatml: Tokenizer, monkeypatch):
        """Counted, not timed: characters that are encoded, for ten times the turns."""
        short, long = (self.encoded(chatml, monkeypatch, turns(USER, ANSWER) * count) for count in (5, 50))
        assert 0 < long < 12 * short

    def encoded(self, tokenizer: Tokenizer, monkeypatch, messages: list[dict]) -> int:
        sizes, run = [], tokenizer.encode

        def counting_encode(text, special=False):
            sizes.append(len(text))
            return run(text, special)

        with monkeypatch.context() as patch:
            patch.setattr(tokenizer, "encode", counting_encode)
            ChatFormat(Data(), tokenizer).encode(Record({"messages": messages}, "f:1"))
        return sum(sizes)

    def test_it_can_be_pickled(self, chatml: Tokenizer):
        """Data worker processes get the formats of a stream so."""
        format = ChatFormat(Data(), chatml)
        record = Record({"messages": turns(USER, ANSWER) * 4}, "f:1")
        assert pickle.loads(pickle.dumps(format)).encode(record) == format.encode(record)

    def test_a_middle_turn_that_is_written_otherwise(self, tmp_path: Path):
        template = CHATML.replace(
            "{{ m.content }}", "{{ m.content[:2] if loop.index == 4 and not loop.last else m.content }}"
        )
        tokenizer = load_tokenizer(chat_directory(tmp_path, template))
        example = encode(tokenizer, turns(USER, ANSWER) * 3)
        assert trained_text(tokenizer, example) == ["1 + 2#", "1 #", "1 + 2#"]
        assert example.notes == (OTHERWISE, LEFT_OUT)


class TestTemplatesThatDoNotAllowIt:
    def encode(self, folder: Path, template: str) -> str:
        tokenizer = load_tokenizer(chat_directory(folder, template))
        return message(encode, tokenizer, turns(USER, ANSWER, USER, ANSWER))

    def test_no_end_of_turn(self, tmp_path: Path):
        text = self.encode(tmp_path, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
        assert text.startswith("the chat template ends turn 2 with no special token; put {% generation %} and ")

    def test_only_the_conversation_ends(self, tmp_path: Path):
        end = "{% if messages[-1].role == 'assistant' %}</s>{% endif %}"
        template = "{% for m in messages %}{{ m.content }}\n{% endfor %}" + end
        assert "ends turn 2 with no special token; put {% generation %}" in self.encode(tmp_path, template)

    def test_the_generation_prompt_is_not_where_the_answer_is(self, tmp_path: Path):
        """And the answer's text stands there twice."""
        template = CHATML.replace("{{ m.content }}", "{{ m.content }}{{ m.content if m.role == 'assistant' }}")
        text = self.encode(tmp_path, template.replace("assistant\n", "assistant\n<think>"))
        assert text.startswith("the chat template writes turn 2 differently when the conversation goes on, so that")
        assert text.endswith("or train on all of it (data.train_on_prompt)")

    def test_the_record_is_named(self, tmp_path: Path):
        folder, path = chat_directory(tmp_path / "t", "{{ raise_exception('no') }}"), tmp_path / "r.jsonl"
        path.write_text(json.dumps({"messages": turns(USER, ANSWER)}) + "\n")
        text = message(build_dataset, Data(train=str(path)), "train", 500, 64, lambda: load_tokenizer(folder))
        assert text == f"{path}:1: {folder}/tokenizer_config.json: chat template: no"


CHATS = [
    turns(USER, ANSWER),
    turns(SYSTEM, USER, ANSWER, ("user", "and 3 + 4?\n"), ("assistant", "  7, of course.\n")),
    turns(USER, ANSWER, ("user", "日本語 🚀 é")),
    turns(USER, ("assistant", "\n\nfirst"), USER, ("assistant", "second\n\n"), USER, ("assistant", "<|eot_id|> x")),
]


class TestAsTransformers:
    def reference(self, folder: Path):
        return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)

    @pytest.mark.parametrize("name", ["qwen2_5_hf", "llama3_1_hf"])
    def test_ids_of_published_templates(self, shared_data: Path, name: str):
        folder = shared_data / "tokenizers" / name
        if not folder.is_dir():
            pytest.skip(f"no {folder}")
        reference, tokenizer = self.reference(folder), load_tokenizer(folder)
        for messages in CHATS:
            example = encode(tokenizer, messages)
            if example.notes:  # "\n" of the heading and "\n\n" of the answer are one token in Qwen's vocabulary
                assert (name, messages[1]["content"][:2]) == ("qwen2_5_hf", "\n\n")
            else:
                assert example.input_ids == reference.apply_chat_template(messages, return_dict=False)
            joint = ChatFormat(Data(encoding="joint"), tokenizer).encode(Record({"messages": messages}, "f:1"))
            assert joint.input_ids == reference.apply_chat_template(messages, return_dict=False)
            answers = [m["content"] for m in messages if m["role"] == "assistant"]
            end = {"qwen2_5_hf": "<|im_end|>", "llama3_1_hf": "<|eot_id|>"}[name]
            got = [reference.decode(ids) for ids in stretches(example)]
            assert [text.strip() for text in got] == [
                (a.strip() if "llama" in name else a.lstrip()) + end for a in answers
            ]
            assert "llama" in name or got == [a + end for a in answers]

    def test_tool_calls(self, shared_data: Path):
        folder = shared_data / "tokenizers" / "qwen2_5_hf"
        if not folder.is_dir():
            pytest.skip(f"no {folder}")
        reference, tokenizer = self.reference(folder), load_tokenizer(folder)
        call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
        messages = [
            *turns(SYSTEM, USER),
            {"role": "assistant", "content": None, "tool_calls": [call]},
            *turns(("tool", "3"), ("tool", "4"), ("assistant", "It is 3.")),
        ]
        example = encode(tokenizer, messages, tools=TOOLS)
        assert example.input_ids == reference.apply_chat_template(messages, tools=TOOLS, return_dict=False)
        first, second = (reference.decode(ids) for ids in stretches(example))
        assert second == "It is 3.<|im_end|>"
        assert first.strip() == '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call><|im_end|>'

    WORDS: ClassVar = st.text(st.sampled_from("ab \n1+é🚀<|>"), min_size=1, max_size=12).filter(str.strip)

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(contents=st.lists(WORDS, min_size=2, max_size=7), system=st.booleans())
    def test_masks_by_generation_marks(self, marked, contents: list[str], system: bool):
        """What lies between {% generation %} and {% endgeneration %} in any conversation."""
        reference, tokenizer = marked
        roles = ["system"] * system + ["user", "assistant"] * len(contents)
        messages = turns(*zip(roles, [*(["Be kind."] * system), *contents]))
        both = reference.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        example = encode(tokenizer, messages)
        assert example.input_ids == both["input_ids"]
        assert [int(label != IGNORE) for label in example.labels] == both["assistant_masks"]

    @pytest.fixture(scope="class")
    def marked(self, tmp_path_factory):
        folder = chat_directory(tmp_path_factory.mktemp("marked"), MARKED)
        return self.reference(folder), load_tokenizer(folder)


class TestText:
    def build(self, tmp_path: Path, *rows: dict, tokenizer: Tokenizer | None = None, seq_len: int = 16, **settings):
        path = tmp_path / "r.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return build_dataset(Data(train=str(path), **settings), "train", 30, seq_len, lambda: tokenizer or Letters())

    def test_labels_by_hand(self, tmp_path: Path):
        """<s> a b c </s>: loss on all that can be predicted."""
        (example,) = self.build(tmp_path, {"text": "abc"})
        assert example.input_ids == example.labels == [1, 3, 4, 5, 2]
        assert example.trained_tokens == 4

    def test_without_bos(self, tmp_path: Path):
        (example,) = self.build(tmp_path, {"text": "abc"}, tokenizer=Letters(bos=None))
        assert example.input_ids == example.labels == [3, 4, 5, 2]

    def test_a_field_by_name_and_the_cut(self, tmp_path: Path):
        (example,) = self.build(tmp_path, {"text": 1, "body": "abc"}, format="text", text_field="body", seq_len=3)
        assert example.input_ids == example.labels == [1, 3, 4]

    @pytest.mark.parametrize(
        ("row", "says"),
        [({"text": None}, "must be a string"), ({"text": " "}, "is empty"), ({"text": "\ud800"}, "holds half of")],
    )
    def test_faults(self, tmp_path: Path, row: dict, says: str):
        text = message(self.build, tmp_path, {"text": "a"}, row)
        assert text.startswith(f"{tmp_path}/r.jsonl:2: text: {says}")


def test_the_table_has_what_the_configuration_takes():
    assert set(get_args(get_type_hints(Data)["format"])) == {"auto", *FORMATS}
    own, _ = get_args(get_type_hints(DataSource)["format"])  # of a source: the same, or None
    assert set(get_args(own)) == {"auto", *FORMATS}


class TestDetection:
    @pytest.mark.parametrize(
        ("fields", "settings", "found"),
        [
            ("input_ids labels messages", {}, ("tokens", "input_ids")),
            ("prompt messages", {}, ("chat", "messages")),
            ("id conversations", {}, ("chat", "conversations")),
            ("messages ask say", {"prompt_field": "ask"}, ("instruction", "ask")),
            ("instruction input output text", {}, ("instruction", "instruction and output")),
            ("text answer", {}, ("instruction", "answer")),
            ("text meta", {}, ("text", "text")),
            ("body", {"text_field": "body"}, ("text", "body")),
        ],
    )
    def test_by_the_first_record(self, fields: str, settings: dict, found: tuple[str, str]):
        assert detect_format(Data(**settings), Record(dict.fromkeys(fields.split()), "f:1")) == found

    def test_unknown_fields(self):
        text = message(detect_format, Data(), Record({"body": 1, "meta": 2}, "f:1"))
        assert text.startswith("f:1: data.format: auto knows none of its fields (body, meta); set data.format")

    def test_the_log_says_it(self, tmp_path: Path, caplog):
        import logging

        logger = logging.getLogger("titan_hd")
        logger.propagate = True
        path = tmp_path / "r.jsonl"
        path.write_text('{"text": "abc"}\n')
        with caplog.at_level(logging.INFO, logger="titan_hd"):
            build_dataset(Data(train=str(path)), "train", 30, 8, Letters)
        assert "data.train: format text, because the first record has text" in caplog.text
