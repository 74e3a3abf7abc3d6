"""Which tokens of a conversation are trained on, for the kinds of chat templates that there are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.kit.errors import message
from tests.kit.tokenizers import CHATML, pieces_directory
from titan_hd.data.text.borders import CUT, SHARED
from titan_hd.data.text.chat import load_chat_template
from titan_hd.data.text.chat_encoding import ConversationEncoder
from titan_hd.data.text.chat_spans import LEFT_OUT, NO_PROMPT, NOT_WRITTEN, OTHER_PROMPT, OTHERWISE
from titan_hd.data.text.tokenizer import Tokenizer, load_tokenizer

# As Qwen3's: an empty or filled <think> in front of answers behind the last question, none in front of earlier ones.
REASONING = """{%- set ns = namespace(last=0) -%}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor -%}
{%- for m in messages -%}
    {{- '<|im_start|>' + m.role + '\\n' -}}
    {%- set parts = (m.content or '').split('</think>') -%}
    {%- if m.role == 'assistant' and loop.index0 > ns.last -%}
        {%- set thought = parts[0].split('<think>')[-1].strip() if parts | length > 1 else '' -%}
        {{- '<think>\\n' + thought + '\\n</think>\\n\\n' -}}
    {%- endif -%}
    {{- parts[-1].lstrip() -}}
    {%- for call in m.tool_calls or [] %}{{ '<tool_call>' + call.name + '</tool_call>' }}{% endfor -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
# As DeepSeek-R1's distills: what is in front of </think> is dropped everywhere, and generation begins with <think>.
DISTILLED = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<User>' + m.content }}"
    "{% elif m.role == 'assistant' %}{{ '<Assistant>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<Assistant><think>\\n' }}{% endif %}"
)
# As Phi-3's: one more token ends the conversation.
ENDED = (
    "{% for m in messages %}{{ '<' + m.role + '>\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# As Llama 2's, where a question's end is all that is in front of an answer; and one that passes over the option.
NO_HEADING = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
PROMPTLESS = CHATML.split("{% if add_generation_prompt")[0]
SHORTENED = CHATML.replace("m.content", "m.content.split('</think>')[-1]")
# As SmolLM3's: what is said is marked, and generation begins with more than the heading.
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\\n' }}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
)


def chat(*said: str, first: str = "user") -> list[dict]:
    """Turns of user and assistant."""
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]


SYSTEM = {"role": "system", "content": "Be kind."}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}
RESULT = {"role": "tool", "content": "3"}


def load(folder: Path, template: str) -> tuple[Tokenizer, ConversationEncoder]:
    tokenizer = load_tokenizer(pieces_directory(folder, chat_template=template, bos_token="</s>"))
    return tokenizer, ConversationEncoder(load_chat_template(tokenizer), tokenizer)


def trained(tokenizer: Tokenizer, encoder: ConversationEncoder, messages: list[dict], tools: list | None = None):
    """The text of each span, with the control tokens in it, and the notes."""
    encoded = encoder.encode(messages, tools)
    names = {i: name for name, i in tokenizer.control_tokens.items()}
    texts = []
    for start, stop in encoded.spans:
        ids = encoded.ids[start:stop]
        inner = next((i for i, token in enumerate(ids) if token in names), len(ids))
        texts.append(
            tokenizer.decode(ids[:inner]) + "".join(names.get(i) or tokenizer.decode([i]) for i in ids[inner:])
        )
    return texts, encoded.notes


class TestTurnsThatChange:
    @pytest.mark.parametrize(
        ("template", "messages", "texts", "notes"),
        [
            (REASONING, chat("2+2?", "4"), ["<think>\n\n</think>\n\n4<|im_end|>"], ()),
            (REASONING, chat("2+2?", "<think>\neasy\n</think>\n\n4"), ["<think>\neasy\n</think>\n\n4<|im_end|>"], ()),
            (
                REASONING,
                chat("2+2?", "<think>\neasy\n</think>\n\n4", "3+3?", "6"),
                ["4<|im_end|>", "<think>\n\n</think>\n\n6<|im_end|>"],
                (OTHERWISE, LEFT_OUT),
            ),
            (
                REASONING,
                [SYSTEM, *chat("a", "b", "c", "<think>\nd\n</think>\n\ne", "f")],
                ["b<|im_end|>", "e<|im_end|>"],
                (OTHERWISE, LEFT_OUT),
            ),
            (
                REASONING,
                [*chat("a"), CALL, RESULT, *chat("three", "c", "d", first="assistant")],
                ["<tool_call>add</tool_call><|im_end|>", "three<|im_end|>", "<think>\n\n</think>\n\nd<|im_end|>"],
                (OTHERWISE,),
            ),
            (REASONING, chat("a", "the <|im_end|> fox", "b", "c"), None, (OTHERWISE,)),
            (DISTILLED, chat("a", "b"), ["b</s>"], (OTHER_PROMPT,)),
            (DISTILLED, chat("a", "<b>", "c", "<think>"), ["<b></s>", "<think></s>"], (OTHER_PROMPT,)),
            (DISTILLED, chat("a", "<think>x</think>b"), ["b</s>"], (OTHER_PROMPT, LEFT_OUT)),
            (DISTILLED, chat("b", "b", "b", "b"), ["b</s>", "b</s>"], (OTHER_PROMPT,)),
            (ENDED, chat("a", "b"), ["b<|im_end|>"], ()),
            (ENDED, chat("a", "b", "c", "d"), ["b<|im_end|>", "d<|im_end|>"], ()),
            (ENDED, chat("a", "b", "c"), ["b<|im_end|>"], ()),
            (ENDED, chat("a", "\ue000 b", "c", "\ue000\ue001"), ["\ue000 b<|im_end|>", "\ue000\ue001<|im_end|>"], ()),
            (CHATML, chat("a", "b", "c", "d"), ["b<|im_end|>", "d<|im_end|>"], ()),
            (SHORTENED, chat("a", "x</think>b"), ["b<|im_end|>"], (LEFT_OUT,)),
            (NO_HEADING, chat("a", "b", "c", "d"), [" b</s>", " d</s>"], ()),
            (PROMPTLESS, chat("q", "b"), ["<|im_start|>assistant\nb<|im_end|>"], (NO_PROMPT,)),
            (MARKED, chat("a", "b", "c", "d"), ["b<|im_end|>", "d<|im_end|>"], ()),
        ],
    )  # fmt: skip
    def test_what_is_trained(self, tmp_path: Path, template: str, messages: list, texts: list | None, notes: tuple):
        tokenizer, encoder = load(tmp_path, template)
        got = trained(tokenizer, encoder, messages)
        assert got[1] == notes
        if texts is None:  # the answer that spells a control token ends with its own end all the same
            texts = ["the <|im_end|> fox<|im_end|>", "<think>\n\n</think>\n\nc<|im_end|>"]
            encoded = encoder.encode(messages)
            assert [tokenizer.decode(encoded.ids[a:b]) for a, b in encoded.spans] == [
                text.replace("<|im_end|>", "") for text in texts
            ]
        else:
            assert got[0] == texts

    def test_ids_are_those_of_the_whole(self, tmp_path: Path):
        tokenizer, encoder = load(tmp_path, REASONING)
        messages = chat("2+2?", "<think>\neasy\n</think>\n\n4", "3+3?", "6")
        assert encoder.encode(messages).ids == tokenizer.encode(
            "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n<|im_start|>user\n3+3?<|im_end|>\n"
            "<|im_start|>assistant\n<think>\n\n</think>\n\n6<|im_end|>\n",
            special=True,
        )

    @pytest.mark.parametrize(("template", "end"), [(ENDED, "<|im_end|>"), (DISTILLED, "</s>"), (MARKED, "<|im_end|>")])
    def test_generation_ends_where_an_answer_does(self, tmp_path: Path, template: str, end: str):
        tokenizer, encoder = load(tmp_path, template)
        assert encoder.stop_ids() == tokenizer.stop_ids | {tokenizer.control_tokens[end]}


class TestMarks:
    """{% generation %}: exactly what stands between the marks."""

    HEAD = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    TAIL = "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    SAID, END = "{% generation %}{{ m.content }}", "{% endgeneration %}"
    ONLY = HEAD + "{% if m.role == 'assistant' %}BODY{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\\n' }}" + TAIL
    SPACED = """{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- generation %}
            {{- m.content.split('</think>')[-1] }}
            {{- '<|im_end|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- m.content + '<|im_end|>' }}
    {%- endif %}
{%- endfor %}"""
    TEMPLATES = (
        MARKED,
        ONLY.replace("BODY", "{% generation %}{{ m.content }}{% endgeneration %}<|im_end|>"),
        ONLY.replace("BODY", "{%- generation -%} {{ m.content }} {%- endgeneration -%} <|im_end|>"),
        ONLY.replace("BODY", SAID + END + "|{% generation %}<|im_end|>" + END),
        ONLY.replace("BODY", "{% if loop.last %}" + SAID + "<|im_end|>" + END + "{% endif %}"),
        ONLY.replace("BODY", "{% generation %}{% set x = m.content %}{{ x | trim }}<|im_end|>{% endgeneration %}"),
        SPACED,
        SPACED.replace("generation %}", "generation +%}"),
        "{% generation %}all{% endgeneration %} of {{ messages | length }}",
        "{{ bos_token }}{% for m in messages %}" + SAID + "{{ eos_token }}" + END + "{% endfor %}",
    )  # fmt: skip
    CHATS = (
        chat("the fox", "jumps over"),
        chat("the", "lazy dog", "the", "1 + 2 = 3\n"),
        [SYSTEM, *chat("<b>", "é🚀 日本", "x", "<think>no</think>yes", "more?")],
        chat("a", " b ", "c", "b\n\nb"),
    )

    @pytest.mark.parametrize("template", TEMPLATES)
    def test_masks_of_transformers(self, tmp_path: Path, template: str):
        transformers = pytest.importorskip("transformers")
        _, encoder = load(tmp_path, template)
        reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
        compared = 0
        for messages in self.CHATS:
            wanted = reference.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
            if not any(wanted["assistant_masks"]):
                assert "marks nothing" in message(encoder.encode, messages)
                continue
            encoded = encoder.encode(messages)
            if CUT not in encoded.notes:  # the ids differ then
                mask = [0] * len(encoded.ids)
                for start, stop in encoded.spans:
                    mask[start:stop] = [1] * (stop - start)
                assert (encoded.ids, mask) == (wanted["input_ids"], wanted["assistant_masks"])
                compared += 1
        assert compared >= 2

    def test_in_a_macro(self, tmp_path: Path):
        """transformers takes them for standing where the macro's text begins."""
        macro = "{% macro turn(t) %}<|im_start|>{% generation %}{{ t }}<|im_end|>{% endgeneration %}{% endmacro %}"
        tokenizer, encoder = load(tmp_path, macro + "{% for m in messages %}{{ turn(m.content) }}{% endfor %}")
        assert trained(tokenizer, encoder, chat("a", "b"))[0] == ["a<|im_end|>", "b<|im_end|>"]

    def test_a_conversation_may_begin_with_an_answer(self, tmp_path: Path):
        tokenizer, encoder = load(tmp_path, MARKED)
        assert trained(tokenizer, encoder, chat("a", "b", "c", first="assistant"))[0] == ["a<|im_end|>", "c<|im_end|>"]

    def test_marks_that_are_lost(self, tmp_path: Path):
        template = "{% set text %}{% generation %}a{% endgeneration %}{% endset %}{{ text | length }}"
        _, encoder = load(tmp_path, template)
        assert message(encoder.encode, chat("a", "b")).endswith(
            "chat template: what {% generation %} marks cannot be found again; put the marks around what is written, "
            "in no text that the template changes afterwards"
        )

    def test_which_message_each_is_of(self, tmp_path: Path):
        _, encoder = load(tmp_path, MARKED)
        assert encoder.encode(chat("a", "b", "c", "d")).places == [1, 3]
        _, encoder = load(tmp_path, self.TEMPLATES[3])
        assert encoder.encode(chat("a", "b")).places == [None, None]


class TestMessagesThatAreNotWritten:
    """Templates pass over a system's message, or over roles that they do not know, without a word."""

    OTHERS = MARKED.replace("{% else %}", "{% elif m.role == 'user' %}")
    PLAIN = CHATML.replace("for m in messages", "for m in messages if m.role in ('user', 'assistant')")

    @pytest.mark.parametrize("template", [OTHERS, PLAIN])
    @pytest.mark.parametrize("role", ["system", "developer", "tool"])
    def test_is_said(self, tmp_path: Path, template: str, role: str):
        _, encoder = load(tmp_path, template)
        unwritten = {"role": role, "content": "Be kind."}
        for messages in ([unwritten, *chat("a", "b")], [*chat("a", "b"), unwritten, *chat("c", "d")]):
            assert encoder.encode(messages).notes == (NOT_WRITTEN,)
            assert encoder.encode_all(messages).notes == (NOT_WRITTEN,)
        assert encoder.encode(chat("a", "b")).notes == ()

    def test_what_is_written_otherwise(self, tmp_path: Path):
        """Without white space around it, or as JSON."""
        json_of_tools = CHATML.replace("m.content", "(m.content | tojson if m.role == 'tool' else m.content | trim)")
        _, encoder = load(tmp_path, json_of_tools)
        messages = [*chat(" a\n", "b"), {"role": "tool", "content": 'a "b"\n\u00e9'}, *chat("c", " d ")]
        assert encoder.encode(messages).notes == ()

    def test_answers_of_a_template_with_marks(self, tmp_path: Path):
        _, encoder = load(tmp_path, MARKED.replace("m.content", "m.content.split('</think>')[-1]"))
        assert encoder.encode(chat("a", "x</think>b")).notes == (LEFT_OUT,)

    def test_an_answer_that_begins_in_the_generation_prompt(self, tmp_path: Path):
        """As R1's, whose prompt ends in <think>; the answer is written in full."""
        _, encoder = load(tmp_path, CHATML.replace("assistant\\n' }}{% endif", "assistant\\n<think>\\n' }}{% endif"))
        assert encoder.encode(chat("a", "<think>\nx</think>b")).notes == ()


class TestToolTemplates:
    DEFAULT, WITH_TOOLS = CHATML, "{{ tools | tojson }}" + CHATML

    def check(self, folder: Path, encoder: ConversationEncoder) -> None:
        plain, with_tools = encoder.encode(chat("a", "b")), encoder.encode(chat("a", "b"), ["add"])
        tokenizer = load_tokenizer(folder)
        front = tokenizer.encode('["add"]')
        assert with_tools.ids == [*front, *plain.ids]
        assert with_tools.spans == [(start + len(front), stop + len(front)) for start, stop in plain.spans]
        transformers = pytest.importorskip("transformers")
        reference = transformers.AutoTokenizer.from_pretrained(folder)
        for tools, ours in ((None, plain), ([{"name": "add"}], encoder.encode(chat("a", "b"), [{"name": "add"}]))):
            assert ours.ids == reference.apply_chat_template(chat("a", "b"), tools=tools, return_dict=False)

    def test_named_in_a_list(self, tmp_path: Path):
        templates = [{"name": "tool_use", "template": self.WITH_TOOLS}, {"name": "default", "template": self.DEFAULT}]
        self.check(tmp_path, load(tmp_path, templates)[1])

    def test_a_file_of_its_own(self, tmp_path: Path):
        (tmp_path / "additional_chat_templates").mkdir()
        (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text(self.WITH_TOOLS)
        (tmp_path / "chat_template.jinja").write_text(self.DEFAULT)
        self.check(tmp_path, load(tmp_path, None)[1])

    def test_one_that_is_not_used_is_not_read(self, tmp_path: Path):
        templates = [{"name": "tool_use", "template": "{% for %}"}, {"name": "default", "template": CHATML}]
        _, encoder = load(tmp_path, templates)
        assert len(encoder.encode(chat("a", "b")).spans) == 1
        assert "chat template: " in message(encoder.encode, chat("a", "b"), ["add"])


class TestBorders:
    """An answer whose first letters would be in one token with its heading."""

    @pytest.fixture(scope="class")
    def merging(self, tmp_path_factory):
        """Headings end in "t", which merges with "he"."""
        return load(
            tmp_path_factory.mktemp("merging"), CHATML.replace("assistant\n", "assistant").replace("\n{{", "{{")
        )

    @pytest.mark.parametrize("answer", ["he quick", "he", "o lazy", "hehe\n", " the", "+", "\nhe", "he<|im_end|>he"])
    def test_the_prompts_ids_begin_the_turn(self, merging, answer: str):
        tokenizer, encoder = merging
        messages = chat("dog", "he fox", "the", answer)
        encoded = encoder.encode(messages)
        texts = [tokenizer.decode(encoded.ids[start:stop]) for start, stop in encoded.spans]
        assert texts == ["he fox", answer.replace("<|im_end|>", "")]
        assert CUT in encoded.notes
        single = encoder.encode(messages[:1] + messages[-1:])
        prompt = tokenizer.encode("<|im_start|>userdog<|im_end|>\n<|im_start|>assistant", special=True)
        assert single.ids[: single.spans[0][0]] == prompt
        joint = ConversationEncoder(encoder._chat, tokenizer, joint=True).encode(messages)
        whole = encoder._chat.render(messages)
        assert (joint.ids, joint.notes) == (tokenizer.encode(whole, special=True), (SHARED,))

    def test_published(self, shared_data: Path):
        folder = shared_data / "tokenizers" / "qwen2_5_hf"
        if not folder.is_dir():
            pytest.skip(f"no {folder}")
        tokenizer = load_tokenizer(folder)
        encoder = ConversationEncoder(load_chat_template(tokenizer), tokenizer)
        encoded = encoder.encode(chat("a", "\n\nb", "c", "\nd"))
        assert [tokenizer.decode(encoded.ids[a:b]) for a, b in encoded.spans] == ["\n\nb", "\nd"]
        newline, (start, _) = tokenizer.encode("\n"), encoded.spans[0]
        assert encoded.ids[start - 1 : start] == newline


def test_a_template_with_a_byte_order_mark(tmp_path: Path):
    pieces_directory(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("\ufeff" + CHATML, encoding="utf-8")
    config = tmp_path / "tokenizer_config.json"
    config.write_text("\ufeff" + config.read_text(), encoding="utf-8")
    assert load_chat_template(load_tokenizer(tmp_path)).render(chat("a")).startswith("<|im_start|>user")


def test_an_end_of_turn_that_is_added_but_not_special(tmp_path: Path):
    folder = pieces_directory(tmp_path, chat_template=CHATML.replace("<|im_end|>", "<end>"))
    content = json.loads((folder / "tokenizer.json").read_text())
    flags = dict.fromkeys(("special", "normalized", "lstrip", "rstrip", "single_word"), False)
    content["added_tokens"].append({"id": 1000, "content": "<end>", **flags})
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = load_tokenizer(folder)
    encoder = ConversationEncoder(load_chat_template(tokenizer), tokenizer)
    encoded = encoder.encode(chat("a", "b", "c", "d"))
    assert [tokenizer.decode(encoded.ids[a:b]) for a, b in encoded.spans] == ["b<end>", "d<end>"]
    assert encoder.stop_ids() == tokenizer.stop_ids | {tokenizer.added_tokens["<end>"]}
