"""Byte-level BPE from vocab.json and merges.txt (GPT-2, RoBERTa), as the pipeline that tokenizer.json would hold."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from titan_hd.data.text.tokenizer_base import Settings
from titan_hd.errors import UserError
from titan_hd.files import read_json_object, read_small_text

VOCABULARY, MERGES = "vocab.json", "merges.txt"
# What transformers takes RoBERTa's special tokens to be where no file names them.
_ROBERTA = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
    "cls_token": "<s>",
    "sep_token": "</s>",
    "mask_token": "<mask>",
}


def read_byte_level(directory: Path, settings: Settings) -> tuple[Settings, str]:
    """The settings, and a tokenizer.json of the two files. RoBERTa's (by tokenizer_class or model_type) has <s> in
    front of a text and </s> behind it, and special tokens where no file names them; others have what their files name.

    Raises:
        UserError: a file cannot be read, or a line is no merge of two pieces of the vocabulary.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors

    vocabulary, merges = _vocabulary(directory / VOCABULARY), _merges(directory / MERGES)
    try:
        tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(f"{directory / MERGES}: is not of {VOCABULARY}: {error}") from None
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if _is_roberta(settings):
        names = _ROBERTA | settings.special_tokens
        settings = dataclasses.replace(settings, special_tokens=names)
        special = [names[key] for key in dict.fromkeys(_ROBERTA) if names[key] in vocabulary]
        mask = names["mask_token"]
        # Behind a space, which belongs to it.
        added = [tokenizers.AddedToken(text, special=True, normalized=False, lstrip=text == mask) for text in special]
        tokenizer.add_special_tokens(added)
        begin, end = names["cls_token"], names["sep_token"]
        if begin in vocabulary and end in vocabulary:
            ends = (end, vocabulary[end]), (begin, vocabulary[begin])
            tokenizer.post_processor = processors.RobertaProcessing(*ends, add_prefix_space=False)
    return settings, tokenizer.to_str()


def _is_roberta(settings: Settings) -> bool:
    said = settings.values.get("tokenizer_class") or settings.values.get("model_type") or ""
    return str(said).lower().startswith("roberta")


def _vocabulary(path: Path) -> dict[str, int]:
    found: dict[str, Any] = read_json_object(path)
    if not all(type(i) is int and i >= 0 for i in found.values()) or len(set(found.values())) < len(found):
        raise UserError(f"{path}: must map each piece to an id of its own")
    return found


def _merges(path: Path) -> list[tuple[str, str]]:
    """Pairs of pieces, the most frequent first; a first line that begins with #version is a remark."""
    try:
        lines = read_small_text(path).split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    merges = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        pieces = line.rstrip("\r").split(" ")
        if len(pieces) != 2 or not all(pieces):
            raise UserError(f"{path}:{number}: must be two pieces with a space between them")
        merges.append((pieces[0], pieces[1]))
    return merges
