"""RWKV's World tokenizer: the longest match, on a vocabulary made here and on the published one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.kit.torture import TORTURE
from titan_hd.data.text.chat import load_chat_template
from titan_hd.data.text.chat_encoding import ENDLESS, ConversationEncoder
from titan_hd.data.text.tokenizer import TOKENIZER_FILES, load_tokenizer
from titan_hd.data.text.tokenizer_world import VOCABULARY

# "abc" is no token though its two beginnings are: a match that has gone too far must come back.
WORDS = ["ab", "abcd", " the", "\n\n", "é", "日本", "' \"", b"\xf0\x9f"]


def write(folder: Path, *more: str, words=WORDS) -> Path:
    tokens = [*(bytes([i]) if i > 127 else chr(i) for i in range(256)), *words]
    lines = [f"{i} {t!r} {len(t.encode() if isinstance(t, str) else t)}" for i, t in enumerate(tokens, 1)]
    (folder / VOCABULARY).write_text("\n".join([*lines, *more]) + "\n", encoding="utf-8")
    return folder


def test_the_longest_match(tmp_path: Path):
    tokenizer = load_tokenizer(write(tmp_path))
    first = 257
    ids = {token: first + n for n, token in enumerate(WORDS)}
    assert tokenizer.encode("abcd the") == [ids["abcd"], ids[" the"]]
    assert tokenizer.encode("abcx") == [ids["ab"], ord("c") + 1, ord("x") + 1]
    assert tokenizer.encode("日本é\n\n\n") == [ids["日本"], ids["é"], ids["\n\n"], ord("\n") + 1]
    assert tokenizer.encode("😀")[0] == ids[b"\xf0\x9f"]
    assert tokenizer.encode("") == []
    assert tokenizer.decode([ids["ab"], 0, ids["é"], 60_000]) == "abé"
    assert tokenizer.decode([0xF0 + 1]) == "\ufffd"
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (None, 0, 0, 265)
    assert tokenizer.stop_ids == tokenizer.control_ids == {0}
    assert VOCABULARY in TOKENIZER_FILES, "an export has it"


@pytest.mark.parametrize("text", TORTURE)
def test_every_text_comes_back(tmp_path_factory, text: str):
    tokenizer = load_tokenizer(write(tmp_path_factory.mktemp("world")))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.continuation(text) == tokenizer.encode(text)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("300 open('x') 9", ":265: must be an id, a token as a Python literal, and its length in bytes"),
        ("300 'ab", ":265: must be an id"),
        ("300 'xy' 3", ":265: must be an id"),
        ("300 12 2", ":265: must be an id"),
        ("257 'xy' 2", ":265: id 257 is taken"),
        ("0 'xy' 2", ":265: id 0 is taken"),
        ("300 'ab' 2", ": a token is there twice"),
    ],
)
def test_a_line_that_is_no_token_is_named(tmp_path: Path, line: str, says: str):
    with pytest.raises(ValueError, match=rf"{VOCABULARY}{says}"):
        load_tokenizer(write(tmp_path, line))


def test_every_byte_must_be_a_token(tmp_path: Path):
    write(tmp_path)
    lines = (tmp_path / VOCABULARY).read_text(encoding="utf-8").split("\n")
    (tmp_path / VOCABULARY).write_text("\n".join(lines[1:]), encoding="utf-8")
    with pytest.raises(ValueError, match=f"{VOCABULARY}: byte 0 is no token"):
        load_tokenizer(tmp_path)


def special(i: int, text: str, special: bool = True) -> dict:
    return {str(i): {"content": text, "special": special}}


@pytest.mark.parametrize(
    "settings",
    [
        {"eos_token": "<s>", "bos_token": "<s>", "added_tokens_decoder": special(0, "<s>")},
        {"added_tokens_decoder": special(0, "<s>", special=False)},
        {"eos_token": "<s>", "pad_token": "\n\n"},  # the latter is a word of the vocabulary
    ],
)
def test_the_end_has_the_name_that_the_files_give_it(tmp_path: Path, settings: dict):
    (write(tmp_path) / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(tmp_path)
    ab = 257
    assert tokenizer.encode("ab<s>ab\n\n<s>", special=True) == [ab, 0, ab, 260, 0]
    assert tokenizer.encode("<s>") == [ord(c) + 1 for c in "<s>"]
    assert tokenizer.control_tokens == {"<s>": 0}
    assert tokenizer.decode([ab, 0, 260]) == "ab\n\n"
    assert (tokenizer.eos_id, tokenizer.vocab_size, tokenizer.control_ids) == (0, 265, {0})


def test_tokens_behind_the_vocabulary(tmp_path: Path):
    added = special(0, "<s>") | special(265, "<turn>") | special(267, "<tool>", special=False) | special(257, "ab")
    (write(tmp_path) / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("<turn>a<tool>", special=True) == [265, ord("a") + 1, 267]
    assert tokenizer.encode("<turn>a<tool>")[-2:] == [ord("a") + 1, 267]
    assert tokenizer.decode([265, 267, 257]) == "<tool>ab"
    assert (tokenizer.control_ids, tokenizer.vocab_size, tokenizer.learned_size) == ({0, 265}, 268, 265)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"added_tokens_decoder": special(257, "<s>")}, "id 257 is b'ab', in the files beside it '<s>'"),
        ({"additional_special_tokens": ["<turn>"]}, "'<turn>' is none of its tokens; name it with its id"),
    ],
)
def test_names_that_cannot_be(tmp_path: Path, settings: dict, says: str):
    (write(tmp_path) / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=f"{VOCABULARY}: {says}"):
        load_tokenizer(tmp_path)


TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"


def test_chats_end_answers_with_the_end(tmp_path: Path):
    messages = [{"role": role, "content": text} for role, text in (("user", "ab"), ("assistant", "abcd"))]
    settings = {"eos_token": "<s>", "added_tokens_decoder": special(0, "<s>"), "chat_template": TEMPLATE}
    (write(tmp_path) / "tokenizer_config.json").write_text(json.dumps(settings))

    def encoder() -> ConversationEncoder:
        tokenizer = load_tokenizer(tmp_path)
        return ConversationEncoder(load_chat_template(tokenizer), tokenizer)

    trained = encoder().encode(messages)
    (start, stop), *more = trained.spans
    assert not more
    assert trained.ids[start:stop][-2:] == [258, 0]
    assert trained.ids.count(0) == 2
    whole = encoder().encode_all(messages)
    assert (whole.ids, whole.spans, whole.notes) == (trained.ids, [(0, len(whole.ids))], ())
    assert encoder().stop_ids() == {0}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    with pytest.raises(ValueError, match="the chat template ends turn 2 with no special token"):
        encoder().encode(messages)
    assert encoder().encode_all(messages).notes == (ENDLESS,)


def test_ids_are_the_packages(tmp_path: Path):
    rwkv = pytest.importorskip("rwkv.rwkv_tokenizer", reason="the rwkv package is not installed")
    published = Path(rwkv.__file__).with_name(VOCABULARY)
    shutil.copyfile(published, tmp_path / VOCABULARY)
    ours, theirs = load_tokenizer(tmp_path), rwkv.TRIE_TOKENIZER(str(published))
    assert ours.vocab_size == 65530
    for text in TORTURE:
        assert ours.encode(text) == theirs.encode(text), text
