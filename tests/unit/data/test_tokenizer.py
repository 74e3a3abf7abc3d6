"""Tokenizers: a tiny SentencePiece model trained here, tokenizer.json files made here, and the real ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import pytest

from titan_hd.data.tokenizer import Tokenizer, load_tokenizer

TEXT = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs", "1 + 2 = 3\n"] * 5


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A SentencePiece model trained with Llama 2's settings: BOS 1, EOS 2, text taken as it is."""
    sentencepiece = pytest.importorskip("sentencepiece")
    prefix = tmp_path_factory.mktemp("spm") / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_prefix=str(prefix),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


def sentencepiece_directory(folder: Path, model: Path, **settings) -> Path:
    (folder / "tokenizer.model").write_bytes(model.read_bytes())
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def word_directory(folder: Path, vocabulary: dict[str, int], bos: bool, **settings) -> Path:
    """A tokenizer.json that splits at white space; with `bos` its post-processor puts <s> in front."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([t for t in ("<s>", "</s>") if t in vocabulary])
    if bos:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


WORDS = {"<unk>": 0, "<s>": 1, "</s>": 2, "one": 3, "two": 4, "three": 5}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


class TestSentencePiece:
    def test_ids_of_the_special_tokens(self, tmp_path: Path, trained: Path):
        tokenizer = load_tokenizer(sentencepiece_directory(tmp_path, trained))
        assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
        assert tokenizer.vocab_size > 256 + 3

    def test_encode_adds_nothing_and_decode_gives_the_text_back(self, tmp_path: Path, trained: Path):
        tokenizer = load_tokenizer(sentencepiece_directory(tmp_path, trained))
        for text in ("the quick fox", "1 + 2\n\n= 3", "naïve 日本 🚀"):
            ids = tokenizer.encode(text)
            assert not {1, 2} & set(ids)
            assert all(0 <= i < tokenizer.vocab_size for i in ids)
            assert tokenizer.decode(ids) == text
            assert tokenizer.decode([1, *ids, 2]) == text
        assert tokenizer.encode("") == []

    def test_special_tokens_in_a_text_are_text(self, tmp_path: Path, trained: Path):
        tokenizer = load_tokenizer(sentencepiece_directory(tmp_path, trained))
        assert not {1, 2} & set(tokenizer.encode("the </s> fox <s>"))

    def test_without_bos_if_the_directory_says_so(self, tmp_path: Path, trained: Path):
        assert load_tokenizer(sentencepiece_directory(tmp_path, trained, add_bos_token=False)).bos_id is None
        assert load_tokenizer(sentencepiece_directory(tmp_path, trained, add_bos_token=True)).bos_id == 1

    @pytest.mark.parametrize("content", [b"", b"no model at all", b"\x00" * 64])
    def test_another_file_under_its_name(self, tmp_path: Path, content: bytes):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(ValueError, match=r"tokenizer.model: (is no SentencePiece model|has no end-of-sequence)"):
            load_tokenizer(tmp_path)


class TestTokenizerJson:
    def test_bos_where_the_post_processor_puts_it(self, tmp_path: Path):
        tokenizer = load_tokenizer(word_directory(tmp_path, WORDS, bos=True, **SPECIAL))
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 6)

    def test_no_bos_where_it_does_not(self, tmp_path: Path):
        """A bos_token that nobody puts in front (GPT-2) was not there in training either."""
        tokenizer = load_tokenizer(word_directory(tmp_path, WORDS, bos=False, **SPECIAL))
        assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 2)

    def test_bos_where_the_settings_ask_for_it(self, tmp_path: Path):
        folder = word_directory(tmp_path, WORDS, bos=False, add_bos_token=True, **SPECIAL)
        assert load_tokenizer(folder).bos_id == 1

    def test_encode_adds_nothing_and_decode_leaves_special_tokens_out(self, tmp_path: Path):
        tokenizer = load_tokenizer(word_directory(tmp_path, WORDS, bos=True, **SPECIAL))
        assert tokenizer.encode("one three two") == [3, 5, 4]
        assert tokenizer.decode([1, 3, 5, 2]) == "one three"

    def test_special_tokens_as_objects(self, tmp_path: Path):
        settings = {"bos_token": {"content": "<s>"}, "eos_token": {"content": "</s>", "lstrip": False}}
        tokenizer = load_tokenizer(word_directory(tmp_path, WORDS, bos=True, **settings))
        assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)

    @pytest.mark.parametrize("eos", [2, [2, 5]])
    def test_eos_from_config_json(self, tmp_path: Path, eos):
        word_directory(tmp_path, WORDS, bos=True, bos_token="<s>")
        (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": eos}))
        assert load_tokenizer(tmp_path).eos_id == 2

    def test_tokenizer_config_is_nearer_than_config(self, tmp_path: Path):
        word_directory(tmp_path, WORDS, bos=True, **SPECIAL)
        (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 5, "bos_token_id": 4}))
        tokenizer = load_tokenizer(tmp_path)
        assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)

    def test_without_any_eos(self, tmp_path: Path):
        with pytest.raises(ValueError, match=r"tokenizer.json: no end-of-sequence token"):
            load_tokenizer(word_directory(tmp_path, WORDS, bos=True, bos_token="<s>"))

    def test_it_goes_before_tokenizer_model(self, tmp_path: Path):
        (tmp_path / "tokenizer.model").write_bytes(b"no model at all")
        assert load_tokenizer(word_directory(tmp_path, WORDS, bos=True, **SPECIAL)).vocab_size == 6

    def test_a_broken_file(self, tmp_path: Path):
        (tmp_path / "tokenizer.json").write_text("{}")
        with pytest.raises(ValueError, match=r"tokenizer.json: cannot be read as a tokenizer"):
            load_tokenizer(tmp_path)

    def test_ids_are_below_the_vocabulary_size(self, tmp_path: Path):
        """Vocabularies may have gaps; what is checked against the model's embedding must be the largest id."""
        tokenizer = load_tokenizer(word_directory(tmp_path, {**WORDS, "ten": 10}, bos=True, **SPECIAL))
        assert max(tokenizer.encode("one ten")) < tokenizer.vocab_size


class TestDirectory:
    def test_no_tokenizer(self, tmp_path: Path):
        with pytest.raises(
            ValueError, match=r"model.hf_assets_path: .* holds no tokenizer.json and no tokenizer.model"
        ):
            load_tokenizer(tmp_path)

    @pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
    def test_broken_settings(self, tmp_path: Path, name: str):
        word_directory(tmp_path, WORDS, bos=True, **SPECIAL)
        (tmp_path / name).write_text("{")
        with pytest.raises(ValueError, match=f"{name}: not valid JSON"):
            load_tokenizer(tmp_path)


class TestRealTokenizers:
    """Ids that the published tokenizers give."""

    CASES: ClassVar = [
        # folder, vocabulary, BOS, EOS, ids of "Hello world"
        ("llama3_1_hf", 128256, 128000, 128009, [9906, 1917]),
        ("gpt2_hf", 50257, None, 50256, [15496, 995]),
        ("qwen2_5_hf", 151665, None, 151645, [9707, 1879]),
    ]

    def check(self, tokenizer: Tokenizer, size: int, bos: int | None, eos: int, hello: list[int]) -> None:
        assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (size, bos, eos)
        assert tokenizer.encode("Hello world") == hello
        text = "### Instruction:\nWhat is 12 * 7?\n\n### Response:84, naïve 日本"
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode([*tokenizer.encode("Hello world"), eos]) == "Hello world"

    @pytest.mark.parametrize(("folder", "size", "bos", "eos", "hello"), CASES, ids=[c[0] for c in CASES])
    def test_tokenizer_json(self, shared_data: Path, folder: str, size: int, bos, eos: int, hello: list[int]):
        path = shared_data / "tokenizers" / folder
        if not path.is_dir():
            pytest.skip(f"no {path}")
        self.check(load_tokenizer(path), size, bos, eos, hello)

    @pytest.mark.parametrize(
        ("file", "hello"),
        [("llama2_tokenizer.model", [15043, 3186]), ("mistral_tokenizer.model.v1", [22557, 1526])],
    )
    def test_sentencepiece(self, shared_data: Path, tmp_path: Path, file: str, hello: list[int]):
        path = shared_data / "tokenizers" / file
        if not path.is_file():
            pytest.skip(f"no {path}")
        self.check(load_tokenizer(sentencepiece_directory(tmp_path, path)), 32000, 1, 2, hello)
