"""Which tokens are control tokens, as all files of a directory say it together; spaces in front of texts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.kit.errors import message
from tests.kit.tokenizers import TEXT, pieces_directory, tiktoken_directory
from tests.kit.torture import TORTURE
from titan_hd.data.text.tokenizer import load_tokenizer

CHAT = "<|im_start|>user the fox<|im_end|>"


def set_json(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**content, **values}))


def added(content: str, special: bool = True, **flags: bool) -> dict[str, Any]:
    return {"content": content, "special": special, "normalized": False, **flags}


def check_as_transformers(folder: Path, texts: tuple[str, ...] = (CHAT, "a<|im_start|>b", "</s><word> <pad>")) -> None:
    reference = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_id == reference.eos_token_id
    for text in texts:
        assert tokenizer.encode(text, special=True) == reference(text, add_special_tokens=False)["input_ids"], text


class TestTokenizerJson:
    """The vocabulary of `pieces_directory` has </s> and <|im_end|> as special tokens."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return pieces_directory(tmp_path)

    def mark(self, folder: Path, name: str, special: bool) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        for token in content["added_tokens"]:
            token["special"] = special if token["content"] == name else token["special"]
        (folder / "tokenizer.json").write_text(json.dumps(content))

    @pytest.mark.parametrize("key", ["eos_token", "pad_token", "bos_token", "cls_token"])
    def test_what_is_named_is_a_control_token(self, folder: Path, key: str):
        self.mark(folder, "<|im_end|>", False)
        assert "<|im_end|>" not in load_tokenizer(folder).control_tokens
        set_json(folder / "tokenizer_config.json", **{key: "<|im_end|>"})
        tokenizer = load_tokenizer(folder)
        end = tokenizer.control_tokens["<|im_end|>"]
        assert tokenizer.encode("a<|im_end|>", special=True)[-1] == end
        assert end not in tokenizer.encode("a<|im_end|>")  # a record cannot forge it
        assert tokenizer.decode([end]) == ""
        check_as_transformers(folder)

    @pytest.mark.parametrize("key", ["additional_special_tokens", "extra_special_tokens"])
    @pytest.mark.parametrize("value", [["<|im_end|>"], [{"content": "<|im_end|>"}], {"end_token": "<|im_end|>"}])
    def test_additional_special_tokens(self, folder: Path, key: str, value):
        self.mark(folder, "<|im_end|>", False)
        set_json(folder / "tokenizer_config.json", **{key: value})
        assert "<|im_end|>" in load_tokenizer(folder).control_tokens

    def test_a_token_that_tokenizer_config_adds(self, folder: Path):
        size = load_tokenizer(folder).vocab_size
        tokens = {str(size): added("<|im_start|>"), str(size + 1): added("<word>", special=False)}
        set_json(folder / "tokenizer_config.json", added_tokens_decoder=tokens)
        tokenizer = load_tokenizer(folder)
        assert (tokenizer.control_tokens["<|im_start|>"], tokenizer.added_tokens["<word>"]) == (size, size + 1)
        assert tokenizer.encode("<word>") == [size + 1]
        assert size not in tokenizer.encode(CHAT)
        check_as_transformers(folder)

    def test_added_tokens_json(self, folder: Path):
        size = load_tokenizer(folder).vocab_size
        (folder / "added_tokens.json").write_text(json.dumps({"<|im_start|>": size, "<word>": size + 1}))
        set_json(folder / "tokenizer_config.json", additional_special_tokens=["<|im_start|>"])
        tokenizer = load_tokenizer(folder)
        assert tokenizer.encode(CHAT, special=True)[0] == size == tokenizer.control_tokens["<|im_start|>"]
        assert tokenizer.encode("<word>") == [size + 1]

    def test_another_id_than_there(self, folder: Path):
        size = load_tokenizer(folder).vocab_size
        set_json(folder / "tokenizer_config.json", added_tokens_decoder={str(size + 7): added("<|im_start|>")})
        says = f"tokenizer.json: the id of '<|im_start|>' is {size}, in the files beside it {size + 7}"
        assert message(load_tokenizer, folder).endswith(says)

    def test_a_flag_that_is_none(self, folder: Path):
        set_json(folder / "tokenizer_config.json", added_tokens_decoder={"400": {"content": "<x>", "lstrip": "no"}})
        assert message(load_tokenizer, folder).endswith(
            'added_tokens_decoder: must map ids to {"content": text} and flags'
        )

    def test_the_flags_of_tokenizer_config(self, folder: Path):
        """Special there, and taking the white space behind it."""
        self.mark(folder, "<|im_end|>", False)
        end = load_tokenizer(folder).added_tokens["<|im_end|>"]
        set_json(folder / "tokenizer_config.json", added_tokens_decoder={str(end): added("<|im_end|>", rstrip=True)})
        tokenizer = load_tokenizer(folder)
        assert tokenizer.encode("<|im_end|>\n\na", special=True) == [end, *tokenizer.encode("a")]
        assert end in tokenizer.control_ids
        check_as_transformers(folder)

    def test_which_file_has_the_last_word(self, folder: Path):
        """special_tokens_map.json, in directories from before added_tokens_decoder; as in transformers."""
        set_json(folder / "special_tokens_map.json", eos_token="<|im_end|>")
        assert load_tokenizer(folder).eos_id == load_tokenizer(folder).control_tokens["<|im_end|>"]
        check_as_transformers(folder)
        set_json(folder / "tokenizer_config.json", added_tokens_decoder={})
        assert load_tokenizer(folder).eos_id == load_tokenizer(folder).control_tokens["</s>"]
        check_as_transformers(folder)

    def test_a_pad_token_that_is_nowhere(self, folder: Path):
        size = load_tokenizer(folder).vocab_size
        set_json(folder / "tokenizer_config.json", pad_token="<pad>")
        tokenizer = load_tokenizer(folder)
        assert (tokenizer.vocab_size, tokenizer.encode("<pad>", special=True)) == (size + 1, [size])
        check_as_transformers(folder)

    @pytest.mark.parametrize("value", ["<x>", [7], {"a": 7}])
    def test_additional_special_tokens_of_another_shape(self, folder: Path, value):
        set_json(folder / "tokenizer_config.json", additional_special_tokens=value)
        says = "must be a list of strings"
        if isinstance(value, str):
            assert "<x>" in load_tokenizer(folder).control_tokens
        else:
            assert message(load_tokenizer, folder).endswith(f"additional_special_tokens: {says}")


class TestBeyondTheEmbedding:
    """A model with fewer rows than the tokenizer has ids."""

    def test_a_token_that_no_record_spells(self, tmp_path: Path):
        size = load_tokenizer(pieces_directory(tmp_path)).vocab_size
        set_json(tmp_path / "tokenizer_config.json", pad_token="<pad>")
        tokenizer = load_tokenizer(tmp_path).fitting(size)
        assert tokenizer.encode("<pad>") == load_tokenizer(tmp_path).encode("<pad>")
        says = f"spells '<pad>', token {size}, but the model's embedding has {size} rows"
        assert message(tokenizer.encode, "a<pad>", special=True) == says

    def test_the_tokenizer_of_another_model(self, tmp_path: Path):
        tokenizer = load_tokenizer(pieces_directory(tmp_path))
        says = f"model.hf_assets_path: the tokenizer has {tokenizer.vocab_size} ids, the model's vocabulary 200"
        assert message(tokenizer.fitting, 200) == says

    def test_the_end_of_every_record(self, tmp_path: Path):
        size = load_tokenizer(pieces_directory(tmp_path)).vocab_size
        settings = {"added_tokens_decoder": {str(size): added("<end>")}, "eos_token": "<end>"}
        set_json(tmp_path / "tokenizer_config.json", **settings)
        tokenizer = load_tokenizer(tmp_path)
        assert tokenizer.fitting(size + 1).eos_id == size
        assert "the tokenizer has" in message(tokenizer.fitting, size)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A SentencePiece model with Llama 2's settings."""
    sentencepiece = pytest.importorskip("sentencepiece")
    prefix = tmp_path_factory.mktemp("spm") / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_prefix=str(prefix), vocab_size=300, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return prefix.with_suffix(".model")


class TestSentencePiece:
    @pytest.fixture
    def folder(self, tmp_path: Path, model: Path) -> Path:
        shutil.copyfile(model, tmp_path / "tokenizer.model")
        return tmp_path

    def test_added_tokens_json(self, folder: Path):
        """As fine-tunes had it before tokenizer_config.json listed added tokens."""
        plain = load_tokenizer(folder)
        size, fox = plain.vocab_size, plain.encode("user the fox")
        (folder / "added_tokens.json").write_text(json.dumps({"<|im_end|>": size, "<|im_start|>": size + 1}))
        set_json(folder / "tokenizer_config.json", eos_token="<|im_end|>", tokenizer_class="LlamaTokenizer")
        tokenizer = load_tokenizer(folder)
        assert (tokenizer.eos_id, tokenizer.vocab_size) == (size, size + 2)
        assert tokenizer.encode(CHAT, special=True) == [size + 1, *fox, size]
        # The end is a control token, because it is named; the start is an ordinary added one.
        assert tokenizer.encode(CHAT)[0] == size + 1
        assert size not in tokenizer.encode(CHAT)
        assert tokenizer.decode([size + 1, *fox, size]) == "<|im_start|>user the fox"

    @pytest.mark.parametrize("key", ["eos_token", "bos_token"])
    def test_an_end_that_is_nowhere(self, folder: Path, key: str):
        """It was silently that of the model."""
        set_json(folder / "tokenizer_config.json", **{key: "<|im_end|>"})
        says = f"{key}: '<|im_end|>' is none of its tokens; name it with its id in added_tokens.json"
        assert message(load_tokenizer, folder) == f"{folder / 'tokenizer.model'}: {says}"

    @pytest.mark.parametrize("found", [{"a": "1"}, {"a": -1}, {"a": 400, "b": 400}])
    def test_added_tokens_json_of_another_shape(self, folder: Path, found: dict):
        (folder / "added_tokens.json").write_text(json.dumps(found))
        assert message(load_tokenizer, folder).endswith("added_tokens.json: must map each token to an id of its own")

    def test_additional_special_tokens_are_new_ones(self, folder: Path):
        size = load_tokenizer(folder).vocab_size
        set_json(folder / "tokenizer_config.json", pad_token="[PAD]", additional_special_tokens=["<a>", "<b>"])
        tokenizer = load_tokenizer(folder)
        assert [tokenizer.control_tokens[name] for name in ("[PAD]", "<a>", "<b>")] == [size, size + 1, size + 2]

    def test_spaces_by_legacy(self, folder: Path):
        """false: only the first stretch has a space in front, as transformers' slow and fast classes have it then."""
        fox, dog = (load_tokenizer(folder).encode(text) for text in ("fox", "dog"))
        assert load_tokenizer(folder).encode("fox</s>dog", special=True) == [*fox, 2, *dog]
        set_json(folder / "tokenizer_config.json", legacy=False, tokenizer_class="LlamaTokenizer", eos_token="</s>")
        tokenizer = load_tokenizer(folder)
        assert tokenizer.encode("fox</s>dog", special=True) == [*fox, 2, *tokenizer.continuation("dog")]
        assert tokenizer.continuation("dog") != dog
        check_as_transformers(folder, ("fox</s>dog", "</s>the</s> fox", "fox"))

    def test_no_space_anywhere(self, folder: Path):
        plain = load_tokenizer(folder)
        set_json(folder / "tokenizer_config.json", add_prefix_space=False)
        tokenizer = load_tokenizer(folder)
        for text in TORTURE:
            assert tokenizer.encode(text) == plain.continuation(text)
            if "▁" not in text:
                assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.encode(" fox") == plain.encode("fox")


def test_an_end_that_is_no_token_of_tiktoken(tmp_path: Path):
    folder = tiktoken_directory(tmp_path, eos_token="<|im_end|>")
    assert message(load_tokenizer, folder).endswith("eos_token: '<|im_end|>' is no control token of tokenizer.model")


def test_tokens_behind_those_of_tiktoken(tmp_path: Path):
    size = load_tokenizer(tiktoken_directory(tmp_path)).vocab_size
    set_json(tmp_path / "tokenizer_config.json", added_tokens_decoder={str(size): added("<pad>")}, pad_token="<pad>")
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.encode("<pad>", special=True), tokenizer.fitting(size).pad_id) == ([size], size)
    set_json(tmp_path / "tokenizer_config.json", added_tokens_decoder={str(size): added("<x>", special=False)})
    assert "the files beside it add '<x>', which is not marked special" in message(load_tokenizer, tmp_path)


class TestClassesOfSentencePiecesKind:
    """tokenizer.json as it is, which transformers 5 does not take for LlamaTokenizer."""

    @pytest.fixture
    def folder(self, tmp_path: Path, shared_data: Path) -> Path:
        source = shared_data / "stories260k-hf"
        if not source.is_dir():
            pytest.skip(f"no {source}")
        shutil.copyfile(source / "tokenizer.json", tmp_path / "tokenizer.json")
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        set_json(tmp_path / "tokenizer_config.json", tokenizer_class="LlamaTokenizer", **names)
        return tmp_path

    def test_ids(self, folder: Path):
        library = pytest.importorskip("tokenizers").Tokenizer.from_file(str(folder / "tokenizer.json"))
        fast = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)
        tokenizer = load_tokenizer(folder)
        for text in (*TORTURE, " two", "[INST] hi [/INST] ho</s>[INST] go [/INST]"):
            assert tokenizer.encode(text, special=True) == library.encode(text, add_special_tokens=False).ids
            same = not text.startswith((" ", "▁")) and not any(name in text for name in tokenizer.control_tokens)
            if same and text:
                assert tokenizer.encode(text, special=True) == fast(text, add_special_tokens=False)["input_ids"], text

    def test_add_prefix_space_is_obeyed(self, folder: Path):
        plain = load_tokenizer(folder)
        set_json(folder / "tokenizer_config.json", add_prefix_space=False)
        tokenizer = load_tokenizer(folder)
        fast = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)
        for text in TORTURE:
            assert tokenizer.encode(text) == plain.continuation(text)
            if "▁" not in text:
                assert tokenizer.decode(tokenizer.encode(text)) == text
            assert tokenizer.encode(text, special=True) == fast(text, add_special_tokens=False)["input_ids"], text
        set_json(folder / "tokenizer_config.json", add_prefix_space=True)
        assert all(load_tokenizer(folder).encode(text) == plain.encode(text) for text in TORTURE)

    @pytest.mark.parametrize("wanted", [True, False])
    def test_a_byte_level_one_too(self, tmp_path: Path, wanted: bool):
        plain = load_tokenizer(pieces_directory(tmp_path))
        set_json(tmp_path / "tokenizer_config.json", add_prefix_space=wanted)
        assert load_tokenizer(tmp_path).encode("fox") == plain.encode(" fox" if wanted else "fox")
