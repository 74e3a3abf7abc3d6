"""Tokenizers of tiktoken's files, as Llama 3 came with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.kit.tokenizers import TINY, tiktoken_directory, tiktoken_lines
from tests.kit.torture import TORTURE
from titan_hd.data.text.tokenizer import load_tokenizer
from titan_hd.data.text.tokenizer_model import llama3_control_tokens


class TestTiktoken:
    def test_ids(self, tmp_path: Path):
        tokenizer = load_tokenizer(tiktoken_directory(tmp_path))
        size = len(TINY)
        assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (size, size + 1, size + 256)
        assert tokenizer.encode("the the") == [257, 258]
        assert tokenizer.special_tokens == {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}

    def test_encodes_as_transformers(self, tmp_path: Path):
        """The same ranks and pieces as a tokenizer.json, by the tokenizers library."""
        tokenizers = pytest.importorskip("tokenizers")
        pytest.importorskip("transformers")
        from transformers.convert_slow_tokenizer import TikTokenConverter

        tokenizer = load_tokenizer(tiktoken_directory(tmp_path))
        names = llama3_control_tokens(False)
        reference = TikTokenConverter(str(tmp_path / "tokenizer.model"), extra_special_tokens=names).converted()
        assert isinstance(reference, tokenizers.Tokenizer)
        for text in TORTURE:
            for special in (False, True):
                reference.encode_special_tokens = not special
                assert tokenizer.encode(text, special) == reference.encode(text, add_special_tokens=False).ids
            assert tokenizer.decode(tokenizer.encode(text)) == text

    def test_control_tokens_are_text_unless_special(self, tmp_path: Path):
        """tiktoken itself raises on a text that spells one."""
        tokenizer = load_tokenizer(tiktoken_directory(tmp_path))
        end = len(TINY) + 9
        assert tokenizer.encode("<|eot_id|>", special=True) == [end]
        assert tokenizer.decode(tokenizer.encode("<|eot_id|>")) == "<|eot_id|>"
        assert not tokenizer.control_ids & set(tokenizer.encode("a<|eot_id|>"))
        assert tokenizer.decode([257, end, 10**9, -1]) == "the"

    def test_256_control_tokens(self):
        """Meta's order: ids 128000, ... in Llama 3 and in 3.1."""
        old, new = llama3_control_tokens(False), llama3_control_tokens(True)
        for names in (old, new):
            assert len(names) == len(set(names)) == 256
            assert names[:4] == [
                "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"
            ]  # fmt: skip
            assert names[6:8] == ["<|start_header_id|>", "<|end_header_id|>"]
            assert names[9] == "<|eot_id|>"
        assert (old[4], old[8], old[10]) == tuple(f"<|reserved_special_token_{i}|>" for i in (2, 4, 5))
        assert old[255] == "<|reserved_special_token_250|>"
        assert new[4:6] == ["<|finetune_right_pad_id|>", "<|step_id|>"]
        assert (new[8], new[10], new[11]) == ("<|eom_id|>", "<|python_tag|>", "<|reserved_special_token_2|>")

    @pytest.mark.parametrize(
        ("file", "content"),
        [
            ("config.json", {"rope_scaling": {"rope_type": "llama3"}}),
            ("config.json", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5}}),
            ("params.json", {"use_scaled_rope": True}),
        ],
    )
    def test_llama_3_1_is_seen_by_its_rope(self, tmp_path: Path, file: str, content: dict):
        python = len(TINY) + 10
        assert load_tokenizer(tiktoken_directory(tmp_path)).encode("<|python_tag|>", special=True) != [python]
        (tmp_path / file).write_text(json.dumps(content))
        assert load_tokenizer(tmp_path).encode("<|python_tag|>", special=True) == [python]

    def test_tokenizer_config_renames(self, tmp_path: Path):
        added = {str(len(TINY) + 5): {"content": "<|mine|>", "special": True}}
        folder = tiktoken_directory(tmp_path, added_tokens_decoder=added, eos_token="<|eot_id|>", pad_token="<|mine|>")
        tokenizer = load_tokenizer(folder)
        assert tokenizer.encode("<|mine|>", special=True) == [len(TINY) + 5]
        assert (tokenizer.eos_id, tokenizer.pad_id) == (len(TINY) + 9, len(TINY) + 5)

    def test_metas_folder(self, tmp_path: Path):
        (tmp_path / "original").mkdir()
        tiktoken_directory(tmp_path / "original")
        assert load_tokenizer(tmp_path).bos_id == len(TINY)

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            (tiktoken_lines(TINY) + b"IQ== 5\n", r"tokenizer.model:265: must be a new token in base64 and rank 264"),
            (tiktoken_lines(TINY) + b"IQ== 264\n", r"tokenizer.model:265: must be a new token"),
            (tiktoken_lines(TINY) + b"I!Q== 264\n", r"tokenizer.model:265: must be a new token"),
            (tiktoken_lines(TINY) + b"nothing\n", r"tokenizer.model:265: must be a new token"),
            (tiktoken_lines(TINY[1:]), r"tokenizer.model: must hold each of the 256 bytes"),
        ],
    )
    def test_broken_ranks(self, tmp_path: Path, content: bytes, says: str):
        with pytest.raises(ValueError, match=says):
            load_tokenizer(tiktoken_directory(tmp_path, content))

    def test_long_runs_are_cut_as_metas_tokenizer_cuts_them(self, tmp_path: Path):
        """At 25,000 characters of a run, counted anew in every 400,000 of the text: "aa" is never across a cut."""
        tokenizer = load_tokenizer(tiktoken_directory(tmp_path, tiktoken_lines([*TINY, b"aa", b"aaaa"])))
        pair, four = len(TINY), len(TINY) + 1
        assert tokenizer.encode("a" * 25_002) == [four] * 6_250 + [pair]
        assert tokenizer.encode("b" + "a" * 25_001) == [98] + [four] * 6_249 + [pair, 97] + [pair]
        text = "b " * 199_999 + "baa"  # the 400,000th character is the first a
        assert tokenizer.encode(text)[-3:] == [98, 97, 97]
        assert tokenizer.decode(tokenizer.encode(text)) == text

    def test_a_million_equal_characters_take_no_time(self, tmp_path: Path):
        tokenizer = load_tokenizer(tiktoken_directory(tmp_path))
        for character in ("a", " ", "é"):
            assert tokenizer.decode(tokenizer.encode(character * 200_000)) == character * 200_000
