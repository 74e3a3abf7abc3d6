"""Chat templates: what transformers renders, from wherever it is found, and nothing that a stranger's program wants."""

from __future__ import annotations

import json
import os
import pickle
import time
from pathlib import Path
from typing import ClassVar

import pytest

from tests.kit.tokenizers import pieces_directory, tiktoken_directory
from titan_hd.data.text import sandbox
from titan_hd.data.text.chat import ChatTemplate, load_chat_template
from titan_hd.data.text.chat_encoding import ChatTurns
from titan_hd.data.text.chat_spans import OTHER_PROMPT
from titan_hd.data.text.tokenizer import load_tokenizer

CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MISTRAL = """{{ bos_token }}{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {{- ' [INST] ' + message['content'] + ' [/INST]' }}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + message['content'] | trim + eos_token }}
    {%- endif %}
{%- endfor %}"""
# What else templates in the wild use: whitespace control, namespaces, macros, filters, methods, slices, break.
MANY = """{%- macro turn(role, text) -%}<|{{ role|upper }}|>{{ text }}{%- endmacro %}
{% set ns = namespace(system='', n=0) %}
    {% for m in messages %}
  {% if m.role == 'system' %}{% set ns.system = m['content'].strip() %}{% continue %}{% endif %}
  {% generation %}
    {{ turn(m.role, m.content.split('</think>')[-1].lstrip('\\n') | replace('a', 'AA')) }}{% endgeneration %}
  {% set ns.n = ns.n + 1 %}
{% endfor %}
{{ ns.system ~ '|' ~ ns.n ~ '|' ~ (messages | length * 2) ~ '|' ~ '%s-%d' % ('x', 3) }}
{{ messages | map(attribute='role') | join(', ') }} {{ messages[::-1][0].content | tojson }}
{{ {'ü': [1, none]} | tojson(indent=2) }}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }} {{ tools is none }} {{ nothing is defined }}
{% for k, v in {'b': 1, 'a': 2} | dictsort %}{{ k }}{{ v }}{% if v == 2 %}{% break %}{% endif %}{% endfor %}
{{ add_generation_prompt }} {{ range(3) | list }} {{ 'a' in ('a', 'b') }} {{ 2 ** 5 }} {{ eos_token }}
"""
# What only a few templates use.
FILTERS = """{{ [1, 2, 3] | sum }} {{ messages | sum(attribute='content', start='') if nothing is defined else 0 }}
{{ '%s: %05d' | format('a', 7) }} {{ '{} and {x}'.format(1, x=2) }} {{ 'a'.center(9) }} {{ 'a' | center(9) }}
{% for part in range(7) | batch(3, 'none') %}{{ part | join('-') }};{% endfor %}
{% for part in range(7) | slice(3) %}{{ part | list }};{% endfor %}
{{ messages[0].content | wordwrap(9) }} {{ messages[0].content | truncate(9) }} {{ messages[0].content | escape }}
{{ 1234567 | filesizeformat }} {{ {'a': 1} | xmlattr }} {{ 'a b' | urlencode }} {{ {'a': 1} | items | list }}
{{ {'a': 1} | pprint }} {{ '<b>x</b>' | striptags }} {{ [3, 1, 2] | sort | random is number }} {{ 5 is divisibleby 5 }}
{{ dict(a=1).get('b', 2) }}
{{ 'x' is filter }} {{ 'upper' is filter }} {{ cycler('a', 'b').next() }} {{ joiner(',')() }}
"""
USER = {"role": "user", "content": "Is <b> & \"c\" 'd' ü 日\n  right?  "}
ANSWER = {"role": "assistant", "content": "<think>a</think>\n\nYes, banana. "}
CHATS = [
    [USER],
    [USER, ANSWER],
    [{"role": "system", "content": " Say little. "}, USER, ANSWER, USER],
    [USER, ANSWER, {"role": "user", "content": "{{ 7 * 7 }}{% raw %}"}, {"role": "assistant", "content": ""}],
]


def directory(folder: Path, template, **settings) -> Path:
    return pieces_directory(folder, chat_template=template, **settings)


def check_renders_as_transformers(folder: Path, chats: list = CHATS) -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    chat = load_chat_template(tokenizer)
    for messages in chats:
        for prompt in (False, True):
            text = chat.render(messages, add_generation_prompt=prompt)
            arguments = {"add_generation_prompt": prompt, "return_dict": False}
            assert text == reference.apply_chat_template(messages, tokenize=False, **arguments)
            assert tokenizer.encode(text, special=True) == reference.apply_chat_template(messages, **arguments)


def fault(call, *args, **kwargs) -> str:
    with pytest.raises(ValueError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestRenders:
    def test_chatml_with_a_default_system_turn(self, tmp_path: Path):
        folder = directory(tmp_path, CHATML)
        text = load_chat_template(load_tokenizer(folder)).render([{"role": "user", "content": "Hi"}], True)
        assert text == (
            "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
        )
        check_renders_as_transformers(folder)

    def test_mistral(self, tmp_path: Path):
        folder = directory(tmp_path, MISTRAL, bos_token="<|im_end|>")
        check_renders_as_transformers(folder, CHATS[:2] + CHATS[3:])
        chat = load_chat_template(load_tokenizer(folder))
        assert chat.render([USER, ANSWER]).startswith("<|im_end|> [INST] Is <b>")
        assert fault(chat.render, [ANSWER]) == (
            f"{folder / 'tokenizer_config.json'}: chat template: Conversation roles must alternate user/assistant"
        )

    def test_what_templates_use(self, tmp_path: Path):
        check_renders_as_transformers(directory(tmp_path, MANY))

    def test_all_of_jinjas_filters_and_tests(self, tmp_path: Path):
        check_renders_as_transformers(directory(tmp_path, FILTERS))

    @pytest.mark.parametrize("name", ["llama3_1_hf", "qwen2_5_hf"])
    def test_published_templates(self, shared_data: Path, name: str):
        folder = shared_data / "tokenizers" / name
        if not folder.is_dir():
            pytest.skip(f"no {folder}")
        check_renders_as_transformers(folder)

    def test_the_date_is_always_the_same(self, tmp_path: Path):
        chat = load_chat_template(load_tokenizer(directory(tmp_path, "{{ strftime_now('%d %b %Y') }}")))
        assert chat.render([]) == "26 Jul 2024"

    def test_it_can_be_pickled(self, tmp_path: Path):
        chat = load_chat_template(load_tokenizer(directory(tmp_path, CHATML)))
        assert pickle.loads(pickle.dumps(chat)).render([USER]) == chat.render([USER])


class TestWhereItIsFound:
    def test_a_list_of_named_ones(self, tmp_path: Path):
        both = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
        assert load_chat_template(load_tokenizer(directory(tmp_path, both))).render([]) == "yes"

    def test_files_beside_it_go_first(self, tmp_path: Path):
        tokenizer = load_tokenizer(directory(tmp_path, "config"))
        (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
        assert load_chat_template(tokenizer).render([]) == "json"
        (tmp_path / "chat_template.jinja").write_text("jinja ü", encoding="utf-8")
        assert load_chat_template(tokenizer).render([]) == "jinja ü"
        check_renders_as_transformers(tmp_path)

    def test_llama_3s_is_built_in(self, tmp_path: Path):
        tokenizer = load_tokenizer(tiktoken_directory(tmp_path))
        chat = load_chat_template(tokenizer)
        user, answer = {"role": "user", "content": " Hi\n"}, {"role": "assistant", "content": "Yes"}
        assert chat.render([user, answer]) == (
            "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nYes<|eot_id|>"
        )
        assert chat.render([user, answer]).startswith(chat.render([user], add_generation_prompt=True))
        ids = tokenizer.encode(chat.render([user]), special=True)
        assert ids[:2] == [tokenizer.bos_id, tokenizer.bos_id + 6]

    def test_it_is_that_of_the_published_one(self, shared_data: Path, tmp_path: Path):
        folder = shared_data / "tokenizers" / "llama3_1_hf"
        if not folder.is_dir():
            pytest.skip(f"no {folder}")
        published, built_in = load_chat_template(load_tokenizer(folder)), tiktoken_directory(tmp_path)
        built_in = load_chat_template(load_tokenizer(built_in))
        for messages in CHATS:
            for prompt in (False, True):
                assert built_in.render(messages, prompt) == published.render(messages, prompt)

    @pytest.mark.parametrize(
        ("template", "says"),
        [
            (None, "data.template: chat: {folder} has no chat template"),
            ([{"name": "rag", "template": "x"}], "{config}: chat_template: is a list without one named default"),
            (["x"], "{config}: chat_template: is a list without one named default"),
            (7, "{config}: chat_template: must be a string"),
            ("{% for %}", "{config}: chat template: "),
            ("{{ 'a'|nothing }}", "{config}: chat template: No filter named 'nothing'."),
            ("{% endfor %}", "{config}: chat template: "),
        ],
    )
    def test_faults(self, tmp_path: Path, template, says: str):
        tokenizer = load_tokenizer(directory(tmp_path, template))
        expected = says.format(folder=tmp_path, config=tmp_path / "tokenizer_config.json")
        assert fault(load_chat_template, tokenizer).startswith(expected)

    def test_a_file_that_is_no_text(self, tmp_path: Path):
        tokenizer = load_tokenizer(directory(tmp_path, None))
        (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
        assert (
            fault(load_chat_template, tokenizer)
            == f"{tmp_path / 'chat_template.jinja'}: chat template: not valid UTF-8"
        )


class TestBounds:
    """Templates come from strangers: the kernel ends what takes too much, and the sandbox keeps Python's internals."""

    GROW = "{%% set ns = namespace(s=%s) %%}{%% for i in range(99) %%}%s{%% endfor %%}{{ ns.s | length }}"
    LARGE: ClassVar = {
        "a long text": "{{ 'a' * 10**10 }}",
        "a long list": "{{ [1] * 10**10 }}",
        "doubling with +": GROW % ("'a'", "{% set ns.s = ns.s + ns.s %}"),
        "doubling with ~": GROW % ("'a'", "{% set ns.s = ns.s ~ ns.s %}"),
        "doubling a block": GROW % ("'a'", "{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}"),
        "doubling by join": GROW % ("'ab'", "{% set ns.s = ns.s | join(ns.s) %}"),
        "replace": "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
        "padding": "{{ 'a'.ljust(10**10) }}",
        "a filter that pads": "{{ 'a' | center(10**10) }}",
        "a wide format": "{{ '%10000000000d' % 1 }}",
        "a wide format, the method": "{{ '{:10000000000}'.format(1) }}",
        "indent of JSON": "{{ messages | tojson(indent=10**10) }}",
    }
    SLOW: ClassVar = {
        "lipsum": "{{ lipsum(10**7) }}",
        "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "a tree of calls": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "one operation": "{{ 9 ** (9 ** 9) }}",
        "a long number": "{{ ('f' * 9000000) | int(base=7) }}{{ (7 ** 9999999) | string }}",
    }
    REFUSED: ClassVar = {
        "a huge range": "{% for i in range(10**9) %}x{% endfor %}",
        "endless recursion": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
        "classes": "{{ ''.__class__.__mro__ }}",
        "by filter": "{{ ('' | attr('__class__')).x }}",
        "globals": "{{ cycler.__init__.__globals__ }}",
        "a function's globals": "{{ raise_exception.__globals__.x }}",
        "the environment": "{{ self._TemplateReference__context.environment }}",
        "changing the messages": "{{ messages.append(1) }}",
        "another file": "{% include '/etc/passwd' %}",
        "an import": "{% import 'os' as os %}",
        "much output": "{% set s = 'a' * 1500000 %}" + "{{ s }}" * 14,
    }

    def test_a_long_one_is_not_compiled(self, tmp_path: Path):
        source = "{{ a }}" * 50_000
        says = "some/file: chat template: longer than 262144 characters"
        assert fault(ChatTemplate, source, "some/file", {}) == says
        tokenizer = load_tokenizer(directory(tmp_path, None))
        (tmp_path / "chat_template.jinja").write_text(source)
        says = "chat template: cannot be read: 350000 bytes are more than 262144"
        assert fault(load_chat_template, tokenizer) == f"{tmp_path / 'chat_template.jinja'}: {says}"

    @pytest.mark.parametrize("kind", ["fifo", "device", "directory"])
    def test_only_a_regular_file_is_read(self, tmp_path: Path, kind: str):
        tokenizer, path = load_tokenizer(directory(tmp_path, "config")), tmp_path / "chat_template.jinja"
        if kind == "fifo":
            os.mkfifo(path)
            writer = os.open(path, os.O_RDWR | os.O_NONBLOCK)  # whoever reads it gets this, and does not hang the test
            os.write(writer, b"x" * 60_000)
        elif kind == "device":
            path.symlink_to("/dev/null")
        else:
            path.mkdir()
        assert fault(load_chat_template, tokenizer) == f"{path}: chat template: cannot be read: it is no regular file"
        path.rmdir() if kind == "directory" else path.unlink()
        (tmp_path / "elsewhere").write_text("linked")
        path.symlink_to(tmp_path / "elsewhere")  # as the hub's cache has it
        assert load_chat_template(tokenizer).render([]) == "linked"

    def render(self, source: str) -> str:
        return ChatTemplate(source, "some/file", {}).render([USER])

    @pytest.mark.parametrize("source", LARGE.values(), ids=LARGE.keys())
    def test_memory(self, source: str, monkeypatch):
        monkeypatch.setattr(sandbox, "MAX_BYTES", 2**28)
        assert fault(self.render, source) == "some/file: chat template: it needs more than 256 MiB of memory"

    @pytest.mark.parametrize("source", SLOW.values(), ids=SLOW.keys())
    def test_time(self, source: str, monkeypatch):
        monkeypatch.setattr(sandbox, "MAX_SECONDS", 0)  # the kernel counts whole seconds: this is one of them
        assert fault(self.render, source) == "some/file: chat template: it runs for more than 0 seconds"

    @pytest.mark.parametrize("source", REFUSED.values(), ids=REFUSED.keys())
    def test_refused(self, source: str):
        assert fault(self.render, source).startswith("some/file: chat template: ")

    def test_the_next_rendering_is_not_harmed(self, monkeypatch):
        monkeypatch.setattr(sandbox, "MAX_SECONDS", 1)
        source = "{% if messages[0].content == 'x' %}{% for i in range(99999) %}{% for j in range(99999) %}"
        source += "{% endfor %}{% endfor %}{% elif messages[0].content == 'y' %}{{ 'a' * 10**10 }}{% endif %}fine"
        chat = ChatTemplate(source, "some/file", {})
        for content in "xy":
            fault(chat.render, [{"role": "user", "content": content}])
            assert chat.render([USER]) == "fine"

    def test_the_seconds_are_those_of_one_rendering(self, monkeypatch):
        monkeypatch.setattr(sandbox, "MAX_SECONDS", 1)
        chat = ChatTemplate("{% for i in range(9999) %}{% for j in range(99) %}{% endfor %}{% endfor %}", "f", {})
        start = time.perf_counter()
        while time.perf_counter() - start < 3:
            assert chat.render([]) == ""

    def test_its_process_ends_with_it(self):
        chat = ChatTemplate("{{ 1 }}", "f", {})
        program = chat._template._helper._program
        assert program.poll() is None
        del chat
        assert program.poll() is not None

    def test_a_long_chat_is_no_attack(self):
        chat = ChatTemplate(MANY.replace("[-1].lstrip('\\n')", "[-1].rstrip('\\n').rsplit('</tool_call>')[0]"), "f", {})
        messages = [
            {"role": "user" if i % 2 == 0 else "assistant", "content": "some words, " * 500} for i in range(100)
        ]
        assert chat.render(messages).count("some words") == 50_500

    def test_a_long_document_is_no_attack(self):
        text = "words and\n" * 100_000
        source = "{% for m in messages %}{{ m.content | trim | replace('\\n', '\\n  ') }}{% endfor %}"
        assert len(ChatTemplate(source, "f", {}).render([{"role": "user", "content": text}])) > len(text)


class TestTurns:
    def turns(self, folder: Path, template: str, **settings):
        tokenizer = load_tokenizer(directory(folder, template, eos_token="</s>", **settings))
        return tokenizer, ChatTurns(tokenizer)

    def test_trained_from_the_response_to_the_end_of_turn(self, tmp_path: Path):
        tokenizer, turns = self.turns(tmp_path, CHATML)
        trained = turns.encode(tokenizer, "Hi", "", "the dog")
        ids, ((start, stop),) = trained.ids, trained.spans
        assert ids[:start] == turns.prompt_ids(tokenizer, "Hi", "")
        assert tokenizer.decode(ids[start:stop]) == "the dog"
        assert ids[stop - 1] == tokenizer.encode("<|im_end|>", special=True)[0]
        assert ids[stop:] == tokenizer.encode("\n")  # ChatML's newline stays, untrained
        assert tokenizer.eos_id not in ids

    def test_the_input_field(self, tmp_path: Path):
        _, turns = self.turns(tmp_path, "{{ messages[0].content }}")
        assert turns.write("a", "b") == "a\nb"
        assert turns.write("a", "") == "a"

    def test_an_answer_that_does_not_begin_with_the_prompt(self, tmp_path: Path):
        tokenizer, turns = self.turns(tmp_path, CHATML.replace("assistant\\n'", "assistant\\n<think>'"))
        trained = turns.encode(tokenizer, "a", "", "b")
        ((start, stop),) = trained.spans
        assert tokenizer.decode(trained.ids[start:stop]) == "b"
        assert trained.ids[stop - 1] == tokenizer.encode("<|im_end|>", special=True)[0]
        assert trained.notes == (OTHER_PROMPT,)

    def test_an_answer_that_does_not_end(self, tmp_path: Path):
        tokenizer, turns = self.turns(tmp_path, "{% for m in messages %}{{ m.content }}\n{% endfor %}")
        assert "ends turn 2 with no special token; put {% generation %}" in fault(turns.encode, tokenizer, "a", "", "b")

    def test_it_can_be_pickled(self, tmp_path: Path):
        tokenizer, turns = self.turns(tmp_path, CHATML)
        expected = turns.encode(tokenizer, "Hi", "", "the dog")
        assert pickle.loads(pickle.dumps(turns)).encode(tokenizer, "Hi", "", "the dog") == expected
