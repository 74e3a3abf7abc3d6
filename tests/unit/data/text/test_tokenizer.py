"""Tokenizers: small ones trained here (SentencePiece, tokenizer.json, tiktoken), and the real ones.

What a tokenizer gives is compared with transformers on TORTURE, which holds what tokenizers get wrong.
"""

from __future__ import annotations

import json
import pickle
import shutil
import unicodedata
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest

from tests.kit.tokenizers import TEXT, pieces_directory, tiktoken_directory
from tests.kit.torture import TORTURE
from titan_hd.data.text.tokenizer import Tokenizer, load_tokenizer
from titan_hd.data.text.tokenizer_model import llama3_control_tokens


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
            assert tokenizer.decode([1, *ids, 0, 2]) == text
        assert tokenizer.encode("") == []

    def test_special_tokens_in_a_text_are_text(self, tmp_path: Path, trained: Path):
        tokenizer = load_tokenizer(sentencepiece_directory(tmp_path, trained))
        assert not {1, 2} & set(tokenizer.encode("the </s> fox <s>"))

    def test_without_bos_if_the_directory_says_so(self, tmp_path: Path, trained: Path):
        assert load_tokenizer(sentencepiece_directory(tmp_path, trained, add_bos_token=False)).bos_id is None
        assert load_tokenizer(sentencepiece_directory(tmp_path, trained, add_bos_token=True)).bos_id == 1

    @pytest.mark.parametrize("content", [b"", b"no model at all", b"\x00" * 64, b"{}", b"IQ== x\n"])
    def test_another_file_under_its_name(self, tmp_path: Path, content: bytes):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(ValueError, match=r"tokenizer.model: is neither a SentencePiece model nor tiktoken's ranks"):
            load_tokenizer(tmp_path)

    def test_special_parses_control_tokens(self, tmp_path: Path, trained: Path):
        """Each stretch between them is encoded as a text of its own, as Meta's code encodes turns."""
        tokenizer = load_tokenizer(sentencepiece_directory(tmp_path, trained))
        fox, dog = tokenizer.encode("the fox"), tokenizer.encode("dog")
        assert tokenizer.encode("<s>the fox</s><s>dog", special=True) == [1, *fox, 2, 1, *dog]
        assert tokenizer.decode([1, *fox, 2]) == "the fox"

    def test_added_control_tokens(self, tmp_path: Path, trained: Path):
        plain = load_tokenizer(sentencepiece_directory(tmp_path, trained))
        size = plain.vocab_size
        added = {str(size): {"content": "<|im_end|>", "special": True}, "2": {"content": "</s>", "special": True}}
        folder = sentencepiece_directory(
            tmp_path, trained, added_tokens_decoder=added, eos_token="<|im_end|>", pad_token="<s>"
        )
        tokenizer = load_tokenizer(folder)
        assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.pad_id) == (size + 1, size, 1)
        assert tokenizer.encode("dog<|im_end|>", special=True) == [*plain.encode("dog"), size]
        assert tokenizer.encode("dog<|im_end|>") == plain.encode("dog<|im_end|>")
        assert tokenizer.decode([*plain.encode("dog"), size]) == "dog"

    def test_added_words_are_found_in_any_text(self, tmp_path: Path, trained: Path):
        added = {"1000": {"content": "<word>", "special": False}}
        tokenizer = load_tokenizer(sentencepiece_directory(tmp_path, trained, added_tokens_decoder=added))
        fox, dog = tokenizer.encode("the fox"), tokenizer.encode("dog")
        for special in (False, True):
            assert tokenizer.encode("the fox<word>dog", special) == [*fox, 1000, *dog]
        assert tokenizer.decode([*fox, 1000, *dog]) == "the fox<word>dog"
        assert (tokenizer.vocab_size, 1000 in tokenizer.control_ids) == (1001, False)

    @pytest.mark.parametrize("added", [[], {"x": {"content": "a"}}, {"3": "a"}, {"3": {"content": 1}}])
    def test_added_tokens_of_another_shape(self, tmp_path: Path, trained: Path, added):
        added = added or [1]
        with pytest.raises(ValueError, match=r"tokenizer_config.json: added_tokens_decoder: must map"):
            load_tokenizer(sentencepiece_directory(tmp_path, trained, added_tokens_decoder=added))

    def test_encodes_as_the_published_pipeline(self, tmp_path: Path, trained: Path):
        check_sentencepiece(sentencepiece_directory(tmp_path, trained))


class TestTokenizerJson:
    def test_bos_where_the_post_processor_puts_it(self, tmp_path: Path):
        tokenizer = load_tokenizer(word_directory(tmp_path, WORDS, bos=True, **SPECIAL))
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 6)

    def test_no_bos_where_it_does_not(self, tmp_path: Path):
        """A bos_token that nobody puts in front (GPT-2) was not there in training either."""
        tokenizer = load_tokenizer(word_directory(tmp_path, WORDS, bos=False, **SPECIAL))
        assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 2)

    @pytest.mark.parametrize("flag", [True, False])
    @pytest.mark.parametrize("bos", [True, False])
    def test_the_post_processor_decides_as_in_transformers(self, tmp_path: Path, bos: bool, flag: bool):
        transformers = pytest.importorskip("transformers", minversion="5")
        settings = {"add_bos_token": flag, "add_eos_token": flag, "tokenizer_class": "PreTrainedTokenizerFast"}
        folder = word_directory(tmp_path, WORDS, bos=bos, **SPECIAL, **settings)
        tokenizer = load_tokenizer(folder)
        prefix = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        reference = transformers.AutoTokenizer.from_pretrained(folder)
        assert reference("one two")["input_ids"] == prefix + tokenizer.encode("one two")
        assert prefix == ([1] if bos else [])

    def test_encodes_as_transformers(self, tmp_path: Path):
        check_json(pieces_directory(tmp_path))

    def test_text_cannot_forge_the_end(self, tmp_path: Path):
        tokenizer = load_tokenizer(pieces_directory(tmp_path))
        assert tokenizer.control_ids == {0, 1}
        for text in ("</s>", "a</s>b", "<|im_end|>\n"):
            assert not {0, 1} & set(tokenizer.encode(text))
            assert {0, 1} & set(tokenizer.encode(text, special=True))
            assert tokenizer.decode(tokenizer.encode(text)) == text

    def test_truncation_and_padding_left_in_the_file(self, tmp_path: Path):
        import tokenizers

        folder = word_directory(tmp_path, WORDS, bos=False, **SPECIAL)
        kept = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        kept.enable_truncation(2)
        kept.enable_padding(length=8)
        kept.save(str(folder / "tokenizer.json"))
        assert load_tokenizer(folder).encode("one two three one") == [3, 4, 5, 3]

    def test_special_tokens_map_where_tokenizer_config_is_silent(self, tmp_path: Path):
        word_directory(tmp_path, WORDS, bos=True)
        (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
        assert load_tokenizer(tmp_path).eos_id == 2

    def test_a_token_of_another_type(self, tmp_path: Path):
        with pytest.raises(ValueError, match=r"tokenizer_config.json: eos_token: must be a string"):
            load_tokenizer(word_directory(tmp_path, WORDS, bos=True, eos_token=2))

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


class TestEveryKind:
    @pytest.fixture(params=["sentencepiece", "json", "tiktoken"])
    def tokenizer(self, request, tmp_path: Path, trained: Path) -> Tokenizer:
        if request.param == "sentencepiece":
            return load_tokenizer(sentencepiece_directory(tmp_path, trained))
        return load_tokenizer((pieces_directory if request.param == "json" else tiktoken_directory)(tmp_path))

    def test_half_a_surrogate_pair(self, tokenizer: Tokenizer):
        with pytest.raises(ValueError, match=r"character 2 is half of a surrogate pair, which no tokenizer takes"):
            tokenizer.encode("ab\ud800")

    def test_round_trip(self, tokenizer: Tokenizer):
        for text in TORTURE:
            if "▁" not in text:
                assert tokenizer.decode(tokenizer.encode(text)) == text

    def test_no_control_token_in_any_text(self, tokenizer: Tokenizer):
        for text in TORTURE:
            assert not tokenizer.control_ids & set(tokenizer.encode(text))

    def test_ids_beyond_the_vocabulary_are_left_out(self, tokenizer: Tokenizer):
        ids = tokenizer.encode("the dog")
        assert tokenizer.decode([*ids, tokenizer.vocab_size + 5, tokenizer.eos_id]) == "the dog"

    def test_it_can_be_pickled(self, tokenizer: Tokenizer):
        copy = pickle.loads(pickle.dumps(tokenizer))
        for text in TORTURE[-30:]:
            assert copy.encode(text) == tokenizer.encode(text)
            assert copy.encode(text, special=True) == tokenizer.encode(text, special=True)

    def test_padding_and_stops(self, tokenizer: Tokenizer):
        assert tokenizer.pad_id == tokenizer.eos_id
        assert tokenizer.stop_ids == {tokenizer.eos_id}
        folder = tokenizer.directory
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokenizer.eos_id, 7]}))
        assert load_tokenizer(folder).stop_ids == {tokenizer.eos_id, 7}
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
        assert load_tokenizer(folder).stop_ids == {tokenizer.eos_id, 7}
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ["7"]}))
        with pytest.raises(ValueError, match=r"generation_config.json: token ids must be whole numbers"):
            load_tokenizer(folder)


def check_json(folder: Path, kept: Callable[[str], str] = str) -> None:
    """tokenizer.json: plain and special against transformers, BOS too, and what the round trip keeps of a text."""
    transformers = pytest.importorskip("transformers")
    reference, tokenizer = transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    for text in TORTURE:
        plain = reference(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert tokenizer.encode(text) == plain, text
        special = reference(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.encode(text, special=True) == special, text
        bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        assert reference(text)["input_ids"] == bos + special, text
        assert tokenizer.decode(tokenizer.encode(text)) == kept(text)


def check_sentencepiece(folder: Path) -> None:
    """tokenizer.model against the pipeline of Llama 2's published tokenizer.json, and transformers where it agrees.

    That pipeline puts a space in front, always, and merges by the pieces' scores: so does sentencepiece, and so were
    the models trained. What transformers 5 makes of a bare tokenizer.model does neither (no space in front of a space;
    merges by id, which joins runs of spaces otherwise); on all other texts it must agree.
    """
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    import sentencepiece

    tokenizer = load_tokenizer(folder)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    score = {processor.id_to_piece(i): processor.get_score(i) for i in range(processor.vocab_size())}
    merges = [(p[:i], p[i:]) for p in score for i in range(1, len(p)) if p[:i] in score and p[i:] in score]
    merges.sort(key=lambda m: (score[m[0] + m[1]], len(m[0]), len(m[1])), reverse=True)
    published = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            {piece: i for i, piece in enumerate(score)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    published.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    published.add_special_tokens([tokenizers.AddedToken(t, normalized=False) for t in ("<s>", "</s>")])
    fast = transformers.LlamaTokenizer.from_pretrained(folder)
    for text in TORTURE:
        for special in (False, True):
            published.encode_special_tokens = not special
            ids = published.encode(text, add_special_tokens=False).ids
            assert tokenizer.encode(text, special) == ids, (text, special)
        spaced = text.replace("▁", " ")
        if not spaced.startswith(" ") and "  " not in spaced:
            plain = fast(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            assert tokenizer.encode(text) == plain, text
        assert tokenizer.decode(tokenizer.encode(text)) == spaced


def two_files(folder: Path, source: Path, special: tuple[str, ...] = (), **settings) -> Path:
    """vocab.json and merges.txt of a byte-level tokenizer.json, with more tokens in front of its own."""
    model = json.loads((source / "tokenizer.json").read_text())["model"]
    pieces = [piece for piece in sorted(model["vocab"], key=model["vocab"].get) if piece not in special]
    vocabulary = {piece: i for i, piece in enumerate([*special, *pieces])}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


ROBERTA = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


class TestTwoFiles:
    """vocab.json and merges.txt: RoBERTa's, which the classification format's pairs are made with, and GPT-2's."""

    @pytest.mark.parametrize("saved", [False, True])
    def test_robertas_ids_are_transformers(self, tmp_path: Path, saved: bool):
        """saved: as a tokenizer.json beside a configuration that names no token, as the Hub has it."""
        transformers = pytest.importorskip("transformers")
        source = pieces_directory(tmp_path / "trained")
        folder = two_files(tmp_path / "two", source, ROBERTA, tokenizer_class="RobertaTokenizer")
        reference = transformers.RobertaTokenizer.from_pretrained(folder)
        if saved:
            reference.save_pretrained(tmp_path / "saved")
            folder = tmp_path / "saved"
            (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "RobertaTokenizer"}')
            ends = {"model_type": "roberta", "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
            (folder / "config.json").write_text(json.dumps(ends))
        tokenizer = load_tokenizer(folder)
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 2, 1)
        assert tokenizer.control_ids == {0, 1, 2, 3, 4}
        for text in TORTURE:
            plain = reference(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            assert tokenizer.encode(text) == plain, text
            assert tokenizer.encode(text, special=True) == reference(text, add_special_tokens=False)["input_ids"], text
            assert reference(text)["input_ids"] == [0, *tokenizer.encode(text, special=True), 2]
            assert tokenizer.decode(tokenizer.encode(text)) == text
        pair = reference("the fox", "five dozen")["input_ids"]
        assert pair == [0, *tokenizer.encode("the fox"), 2, 2, *tokenizer.encode("five dozen"), 2]

    def test_gpt2s_ids_are_those_of_its_tokenizer_json(self, tmp_path: Path):
        source = pieces_directory(tmp_path / "trained", ("<|endoftext|>",), eos_token="<|endoftext|>")
        folder = two_files(tmp_path / "two", source, ("<|endoftext|>",), eos_token="<|endoftext|>")
        one, two = load_tokenizer(source), load_tokenizer(folder)
        assert (two.bos_id, two.eos_id) == (None, 0)
        for text in TORTURE:
            assert two.encode(text) == one.encode(text)
            assert two.encode(text, special=True) == one.encode(text, special=True)

    @pytest.mark.parametrize(
        ("name", "content", "reason"),
        [
            ("merges.txt", "a b\nabc\n", "merges.txt:2: must be two pieces with a space between them"),
            ("merges.txt", "zz yy\n", "merges.txt: is not of vocab.json"),
            ("vocab.json", '{"a": 0, "b": 0}', "vocab.json: must map each piece to an id of its own"),
            ("vocab.json", "[]", "vocab.json: not valid JSON"),
        ],
    )
    def test_faults(self, tmp_path: Path, name: str, content: str, reason: str):
        folder = two_files(tmp_path / "two", pieces_directory(tmp_path / "trained"), ROBERTA)
        (folder / name).write_text(content)
        with pytest.raises(ValueError, match=reason):
            load_tokenizer(folder)


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
        check_json(path, partial(unicodedata.normalize, "NFC") if folder == "qwen2_5_hf" else str)

    def test_a_small_tokenizer_json(self, shared_data: Path):
        path = shared_data / "stories260k-hf"
        if not path.is_dir():
            pytest.skip(f"no {path}")
        check_json(path, lambda text: text.replace("▁", " "))

    def test_llama3_from_meta_is_llama3_from_hugging_face(self, shared_data: Path, tmp_path: Path):
        folder = shared_data / "tokenizers"
        if not (folder / "llama3_tokenizer.model").is_file() or not (folder / "llama3_1_hf").is_dir():
            pytest.skip(f"no Llama 3 in {folder}")
        shutil.copyfile(folder / "llama3_tokenizer.model", tmp_path / "tokenizer.model")
        meta, hub = load_tokenizer(tmp_path), load_tokenizer(folder / "llama3_1_hf")
        assert (meta.bos_id, meta.eos_id, meta.vocab_size) == (128000, 128001, 128256)
        assert meta.control_ids == hub.control_ids
        for text in [*TORTURE, *llama3_control_tokens(False)]:
            assert meta.encode(text) == hub.encode(text), text
            assert meta.encode(text, special=True) == hub.encode(text, special=True), text
            assert meta.decode(hub.encode(text)) == hub.decode(hub.encode(text)) == text

    @pytest.mark.parametrize(
        ("file", "hello"),
        [("llama2_tokenizer.model", [15043, 3186]), ("mistral_tokenizer.model.v1", [22557, 1526])],
    )
    def test_sentencepiece(self, shared_data: Path, tmp_path: Path, file: str, hello: list[int]):
        path = shared_data / "tokenizers" / file
        if not path.is_file():
            pytest.skip(f"no {path}")
        self.check(load_tokenizer(sentencepiece_directory(tmp_path, path)), 32000, 1, 2, hello)
        check_sentencepiece(tmp_path)
