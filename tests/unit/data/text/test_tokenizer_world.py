"""RWKV's World tokenizer: the longest match, on a vocabulary made here and on the published one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.kit.torture import TORTURE
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


def test_ids_are_the_packages(tmp_path: Path):
    rwkv = pytest.importorskip("rwkv.rwkv_tokenizer", reason="the rwkv package is not installed")
    published = Path(rwkv.__file__).with_name(VOCABULARY)
    shutil.copyfile(published, tmp_path / VOCABULARY)
    ours, theirs = load_tokenizer(tmp_path), rwkv.TRIE_TOKENIZER(str(published))
    assert ours.vocab_size == 65530
    for text in TORTURE:
        assert ours.encode(text) == theirs.encode(text), text
