"""Tokenizers for tests: one id per letter, and the files of small trained ones."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from titan_hd.data.text.tokenizer import Tokenizer

TEXT = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs", "1 + 2 = 3\n"] * 5


def pieces_directory(folder: Path, special: tuple[str, ...] = ("</s>", "<|im_end|>"), **settings) -> Path:
    """A byte-level BPE tokenizer.json, trained on TEXT, with GPT-2's pieces and some special tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(special), show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(TEXT, trainer)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def llama3_directory(folder: Path) -> Path:
    """As `pieces_directory`, with the tokens of a Llama 3 base model: no chat template, and an end of text alone."""
    names = ("begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id")
    begin, end, *_ = special = tuple(f"<|{name}|>" for name in names)
    return pieces_directory(folder, special, bos_token=begin, eos_token=end)


def tiktoken_lines(tokens: list[bytes]) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


TINY = [bytes([i]) for i in range(256)] + [b"th", b"the", b" the", b"  ", b"\n\n", b"12", b"123", "é".encode()]


def tiktoken_directory(folder: Path, content: bytes = tiktoken_lines(TINY), **settings) -> Path:
    (folder / "tokenizer.model").write_bytes(content)
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_directory(folder: Path, template: str = CHATML) -> Path:
    return pieces_directory(folder, chat_template=template, bos_token="</s>")


class Letters(Tokenizer):
    """One id per letter: a is 3, b is 4, ...; everything else is 29."""

    def __init__(self, bos: int | None = 1):
        self.bos_id, self.eos_id, self.vocab_size = bos, 2, 30

    def encode(self, text: str, special: bool = False) -> list[int]:
        return [3 + ord(c) - ord("a") if "a" <= c <= "z" else 29 for c in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(ord("a") + i - 3) for i in ids if 3 <= i < 29)
