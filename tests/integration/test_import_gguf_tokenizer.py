"""The tokenizer that comes out of a GGUF file gives the ids of the published one that was written into it."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers

from tests.kit.gguf_files import write_byte_level, write_gguf, write_vocabulary
from tests.kit.torture import TORTURE
from titan_hd.data.text.tokenizer import load_tokenizer
from titan_hd.errors import UserError
from tools import import_gguf

TEXTS = [*TORTURE, "I'll pay $1,234,567.89 in 2025 -- that's 100% (or 3/4)!", "DON'T SHOUT 'S 'LL", "\n 1"]


def save_tokenizer(folder: Path) -> Path:
    """The tokenizer of folder/model.gguf in a folder of its own."""
    file = import_gguf.GGUFFile(folder / "model.gguf", "model.gguf")
    import_gguf.save_tokenizer(folder / "model.gguf", file, folder / "hf")
    return folder / "hf"


# The gguf package reads strings one by one: Llama 3's take half a minute.
@pytest.mark.parametrize(
    ("folder", "pre", "eos", "bos"),
    [
        pytest.param("llama3_1_hf", "llama-bpe", ("<|eot_id|>", 3), 128000, marks=pytest.mark.slow),
        pytest.param("qwen2_5_hf", "qwen2", ("<|im_end|>", 3), None, marks=pytest.mark.slow),
        ("gpt2_hf", "gpt-2", ("<|endoftext|>", 3), None),
    ],
)
def test_byte_level(shared_data: Path, tmp_path: Path, folder: str, pre: str, eos: tuple, bos: int | None):
    path = shared_data / "tokenizers" / folder
    settings = {"bos_token_id": bos} if bos else {}
    write_byte_level(tmp_path / "model.gguf", path, pre, eos=eos, **settings)
    saved = save_tokenizer(tmp_path)
    published = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    again = tokenizers.Tokenizer.from_file(str(saved / "tokenizer.json"))
    rows = max(published.get_vocab().values()) + 17
    assert again.get_vocab_size() <= rows
    assert published.get_vocab().items() <= again.get_vocab().items()
    for text in TEXTS:
        ids = published.encode(text).ids
        assert again.encode(text).ids == ids, text
        assert again.decode(ids) == published.decode(ids)
    ours = load_tokenizer(saved)
    assert (ours.bos_id, ours.eos_id) == (bos, published.token_to_id(eos[0]))


@pytest.mark.parametrize("file", ["llama2_tokenizer.model", "mistral_tokenizer.model.v1"])
def test_sentencepiece(shared_data: Path, tmp_path: Path, file: str):
    """Merges ranked by score and bytes for unknown characters: the ids of the sentencepiece library itself."""
    sentencepiece = pytest.importorskip("sentencepiece")
    published = sentencepiece.SentencePieceProcessor(model_file=str(shared_data / "tokenizers" / file))
    ids = range(published.vocab_size())
    types = [
        2 if published.is_unknown(i) else 3 if published.is_control(i) else 6 if published.is_byte(i) else 1
        for i in ids
    ]
    write_vocabulary(
        tmp_path / "model.gguf",
        [published.id_to_piece(i) for i in ids],
        types,
        tokenizer_model="llama",
        tokenizer_pre="default",
        token_scores=[published.get_score(i) for i in ids],
        bos_token_id=1,
        eos_token_id=2,
        unk_token_id=0,
    )
    saved = save_tokenizer(tmp_path)
    ours = load_tokenizer(saved)
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (1, 2, 32000)
    for text in TEXTS:
        assert ours.encode(text) == published.encode(text), text
        assert ours.decode(published.encode(text)) == published.decode(published.encode(text))
    again = tokenizers.Tokenizer.from_file(str(saved / "tokenizer.json"))
    assert again.encode("</s>").ids == [1, 2]  # as the published tokenizer.json has it, unlike sentencepiece


def test_smollm_splits_off_each_digit(tmp_path: Path):
    write_gguf(tmp_path / "model.gguf", "llama", pre="smollm")
    again = tokenizers.Tokenizer.from_file(str(save_tokenizer(tmp_path) / "tokenizer.json"))
    assert [word for word, _ in again.pre_tokenizer.pre_tokenize_str("in\n 12")] == ["in", "ĊĠ", "1", "2"]


def test_unknown_rule(tmp_path: Path):
    """A guess would show nowhere."""
    write_gguf(tmp_path / "model.gguf", "llama", pre="tekken")
    with pytest.raises(UserError, match=r"tokenizer.ggml.pre: 'tekken' is not supported; known are smollm, llama-bpe"):
        save_tokenizer(tmp_path)
