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
from titan_hd.data.text.chat import ChatTemplate, ChatTurns, load_chat_template
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
    """Templates come from strangers."""

    GROW = "{%% set ns = namespace(s=%s) %%}{%% for i in range(99) %%}%s{%% endfor %%}{{ ns.s }}"
    HOSTILE: ClassVar = {
        "a huge range": "{% for i in range(10**9) %}x{% endfor %}",
        "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "loops over text": "{% set s = 'a' * 9999 %}{% for i in s %}{% for j in s %}{% endfor %}{% endfor %}",
        "literal text in loops": "{% for i in range(9999) %}" + "x" * 9999 + "{% endfor %}",
        "endless recursion": "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
        "a tree of calls": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "a loop that calls itself": "{% for x in [messages] recursive %}{{ loop([x, x]) }}{% endfor %}",
        "a long text": "{{ 'a' * 10**10 }}",
        "a long list": "{{ [1] * 10**10 }}",
        "doubling with +": GROW % ("'a'", "{% set ns.s = ns.s + ns.s %}"),
        "doubling with ~": GROW % ("'a'", "{% set ns.s = ns.s ~ ns.s %}"),
        "doubling a block": GROW % ("'a'", "{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}"),
        "doubling a list": GROW % ("[1]", "{% set ns.s = [ns.s, ns.s] %}"),
        "doubling a mapping": GROW % ("1", "{% set ns.s = {'a': ns.s, 'b': ns.s} %}"),
        "doubling by join": GROW % ("'ab'", "{% set ns.s = ns.s | join(ns.s) %}"),
        "much output": "{% set s = 'a' * 1500000 %}" + "{{ s }}" * 14,
        "squaring a number": GROW % ("9", "{% set ns.s = ns.s * ns.s %}"),
        "a power": "{{ 9**9**9 ** 9 }}",
        "replace": "{{ ('a' * 9999) | replace('a', 'b' * 9999) }}",
        "replace, the method": "{{ ('a' * 9999).replace('a', 'b' * 9999) }}",
        "indent": "{{ ('\\n' * 9999) | indent(10**6) }}",
        "indent of JSON": "{{ messages | tojson(indent=10**9) }}",
        "padding": "{{ 'a'.ljust(10**10) }}",
        "a filter that pads": "{{ 'a' | center(10**10) }}",
        "a wide format": "{{ '%1000000000d' % 1 }}",
        "a wide format, the method": "{{ '{:1000000000}'.format(1) }}",
        "a wide date": "{{ strftime_now('%1000000000d') }}",
        "large numbers": "{{ (1).to_bytes(10**9, 'big') }}",
        "lipsum": "{{ lipsum(10**6) }}",
        "rounding up to a huge precision": "{{ 1.5 | round(300000000, 'ceil') }}",
        "rounding to a huge power": "{{ 5 | round(-300000000) }}",
        "rounding, by name": "{{ 5 | round(precision=-300000000) }}",
        "a long number": "{{ ('f' * 1000000) | int(base=16) is even }}",
        "a long float": "{{ ('1' * 1000000) | float is none }}",
        "numbers out of a list": "{{ ['f' * 200] | map('int', base=16) | list is none }}",
        "a large literal": "{{ 0x" + "f" * 9999 + " // 3 }}",
        "a large negative": "{{ -0x" + "f" * 9999 + " is none }}",
        "a power of a power": "{{ 2**64**2 // 3 }}",
        "dividing large numbers": "{{ (9 ** 63) // (7 ** 60) }}",
        "the remainder of large numbers": "{{ (9 ** 63) % (7 ** 60) }}",
        "numbers that collide": "{{ range(0, 0x30D3FFFFFFFFFFFE795D, 0x1FFFFFFFFFFFFFFF) | unique | list | length }}",
        "many lists": "{% set a = [0] * 100000 %}" * 60,
        "many sums of lists": "{% set a = [0] * 60000 %}" + "{% set a = a + [1] %}" * 60,
        "many texts": "{% set a = 'x' * 1500000 %}" * 60,
        "many slices": "{% set s = 'x' * 1500000 %}" + "{% set a = s[1:] %}" * 60,
        "many concatenations": "{% set s = 'x' * 1500000 %}" + "{% set a = s ~ 1 %}" * 60,
        "widths by key": "{{ '%(a)999s' * 3000 % {'a': 'x'} }}",
        "widths by key, small": "{{ '%(a)99s' * 3000 % {'a': 'x'} }}",
        "a precision": "{{ '%.999f' % 1.5 }}",
        "a width given apart": "{{ '%*d' % (999999, 1) }}",
        "many small widths": "{{ '%99s' * 9000 % (range(9000) | list) }}",
        "indent of deep JSON": "{% set ns = namespace(s=[1] * 999) %}{% for i in range(99) %}{% set ns.s = [ns.s] %}"
        "{% endfor %}{{ ns.s | tojson(indent=99) }}",
        "separators of JSON": "{{ ([1] * 9999) | tojson(separators=('x' * 9999, '')) }}",
        "a long path": "{{ (['a'] * 9999) | map(attribute='0' ~ '.0' * 9999) | list }}",
        "searching from the right": "{{ ('a' * 1000000).rfind('ab' ~ 'a' * 9999) }}",
        "stripping many characters": "{{ ('a' * 1000000).strip('b' * 9999 ~ 'a') }}",
        "trimming many characters": "{{ ('a' * 1000000) | trim('b' * 9999 ~ 'a') }}",
        "adding lists up": "{{ ([[1]] * 9999) | sum(start=[]) }}",
        "classes": "{{ ''.__class__.__mro__ }}",
        "one class": "{{ ''.__class__ }}",
        "by filter": "{{ '' | attr('__class__') }}",
        "by index": "{{ messages['__class__'] }}{{ messages.__init__ }}",
        "globals": "{{ cycler.__init__.__globals__ }}",
        "a function's globals": "{{ raise_exception.__globals__ }}",
        "the environment": "{{ self._TemplateReference__context.environment }}",
        "changing the messages": "{{ messages.append(1) }}",
        "another file": "{% include '/etc/passwd' %}",
        "an import": "{% import 'os' as os %}",
    }

    SLOW: ClassVar = {  # nothing is printed: only what stands in front of {% if %} looks at the clock
        "comparisons": "{% if s == t %}{% endif %}",
        "the test of a loop": "{% for x in s if not x %}{% endfor %}",
        "tests by filter": "{{ [s] | select('none') | first }}",
        "the items of a filter": "{% for x in [s] | map('length') %}{% break %}{% endfor %}",
        "arithmetic": "{% set x = 1 - 1 %}",
        "a sign": "{% set x = -n %}",
    }

    @pytest.mark.parametrize("source", SLOW.values(), ids=SLOW.keys())
    def test_every_operation_looks_at_the_clock(self, source: str):
        from titan_hd.data.text.chat import _compile

        template = _compile(source)
        template.environment.start()
        template.environment._deadline = 0.0
        with pytest.raises(sandbox.SecurityError, match="too long"):
            template.render(s="text", t="text", n=1)

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

    @pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE.keys())
    def test_refused(self, source: str, monkeypatch):
        monkeypatch.setattr(sandbox, "MAX_SIZE", 2_000_000)  # half of the real one, for the test's time

        def run():
            ChatTemplate(source, "some/file", {}).render([USER])

        start = time.process_time()
        assert fault(run).startswith("some/file: chat template: ")
        assert time.process_time() - start < 3

    def test_a_slow_one_is_stopped_by_the_clock(self, monkeypatch):
        monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.0)
        chat = ChatTemplate("{% for m in messages %}{{ m }}{% endfor %}", "some/file", {})
        assert fault(chat.render, [USER]) == "some/file: chat template: it runs too long or writes too much"

    def test_the_budget_is_anew_for_every_rendering(self, monkeypatch):
        monkeypatch.setattr(sandbox, "MAX_TOTAL", 4_000_000)
        chat = ChatTemplate("{% for i in range(50000) %}{% endfor %}", "some/file", {})
        for _ in range(5):
            assert chat.render([]) == ""

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
        ids, start, stop = turns.encode(tokenizer, "Hi", "", "the dog")
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
        _, turns = self.turns(tmp_path, CHATML.replace("assistant\\n", "assistant\\n<think>"))
        assert "does not begin with its generation prompt" in fault(turns.texts, "a", "", "b")

    def test_an_answer_that_does_not_end(self, tmp_path: Path):
        tokenizer, turns = self.turns(tmp_path, "{% for m in messages %}{{ m.content }}\n{% endfor %}")
        assert "ends an answer with no special token" in fault(turns.encode, tokenizer, "a", "", "b")

    def test_it_can_be_pickled(self, tmp_path: Path):
        tokenizer, turns = self.turns(tmp_path, CHATML)
        expected = turns.encode(tokenizer, "Hi", "", "the dog")
        assert pickle.loads(pickle.dumps(turns)).encode(tokenizer, "Hi", "", "the dog") == expected
