"""The tokenizer inside a GGUF file as tokenizer.json, tokenizer_config.json and generation_config.json.

GGUF keeps tokens, merges or scores, and only the *name* of the rule that splits a text before the merges. The rules
below are those of the published tokenizers; a name that is not among them is refused, because a wrong rule gives ids
that look plausible.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from titan_hd.errors import UserError
from titan_hd.files import shown
from titan_hd.models.gguf import GGUFModel

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # tokenizer.ggml.token_type

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(words: str | None = None, digits: bool = False) -> pre_tokenizers.PreTokenizer:
    """Split by a regex (None: GPT-2's own), perhaps into single digits first, then spell the bytes as characters."""
    steps = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    if words:
        steps.append(pre_tokenizers.Split(Regex(words), "isolated"))
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not words)])


def _llama3() -> dict:
    # Words that are tokens as a whole are not put together from merges, and a text begins with BOS.
    return {"splitter": _byte_level(_WORDS.format(digits=r"\p{N}{1,3}")), "ignore_merges": True, "add_bos": True}


def _qwen2() -> dict:
    return {"splitter": _byte_level(_WORDS.format(digits=r"\p{N}")), "normalizer": normalizers.NFC()}


# tokenizer.ggml.pre -> the parts of the published tokenizer. `default` is what converters wrote for GPT-2's rule.
_PRE_TOKENIZERS = {
    "smollm": lambda: {"splitter": _byte_level(digits=True)},
    "llama-bpe": _llama3,
    "qwen2": _qwen2,
    "gpt-2": lambda: {"splitter": _byte_level()},
    "default": lambda: {"splitter": _byte_level()},
}


def write_tokenizer(model: GGUFModel, folder: Path) -> None:
    """Write the three files into a folder.

    Raises:
        UserError: the kind of tokenizer or its pre-tokenizer is not supported, by name, or its parts do not fit.
    """
    kind = model.get("tokenizer.ggml.model", str)
    tokens, types = model.get_list("tokenizer.ggml.tokens", str), model.get_list("tokenizer.ggml.token_type", int)
    if kind not in ("gpt2", "llama"):
        known = "gpt2 (byte-level BPE) and llama (SentencePiece)"
        raise UserError(
            f"{model.name}: tokenizer.ggml.model: {shown(repr(kind))} is not supported; supported are {known}"
        )
    if not tokens or len(types) != len(tokens) or len(tokens) > model.config["vocab_size"]:
        rows = model.config["vocab_size"]
        raise UserError(f"{model.name}: tokenizer.ggml.tokens: must be at most {rows} tokens, each with a token_type")
    if kind == "gpt2":
        tokenizer, add_bos = _byte_level_bpe(model, tokens, types)
    else:
        tokenizer, add_bos = _sentencepiece_bpe(model, tokens, types), True
    ids = _token_ids(model, len(tokens))
    special = {name: tokens[i] for name, i in ids.items() if name != "eot"}
    add_bos = model.get("tokenizer.ggml.add_bos_token", bool, add_bos)
    add_eos = model.get("tokenizer.ggml.add_eos_token", bool, False)
    _add_tokens(tokenizer, tokens, types, set(special.values()))
    tokenizer.post_processor = _post_processor(model, tokens, ids, add_bos, add_eos)
    # Not by save(): that raises a bare Exception on a full disk.
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": token for name, token in special.items()},
        "add_bos_token": add_bos,
        "add_eos_token": add_eos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model.config["max_position_embeddings"],
    }
    if template := model.get("tokenizer.chat_template", str):
        settings["chat_template"] = template
    _write_json(folder / "tokenizer_config.json", settings)
    _write_json(folder / "generation_config.json", _generation(ids))


def _byte_level_bpe(model: GGUFModel, tokens: list[str], types: list[int]) -> tuple[Tokenizer, bool]:
    """The tokenizer, and whether its family puts BOS in front of a text where the file does not say."""
    pre = model.get("tokenizer.ggml.pre", str)
    if pre not in _PRE_TOKENIZERS:
        known = ", ".join(_PRE_TOKENIZERS)
        raise UserError(f"{model.name}: tokenizer.ggml.pre: {shown(repr(pre))} is not supported; supported are {known}")
    parts = _PRE_TOKENIZERS[pre]()
    merges = [tuple(merge.split(" ", 1)) for merge in model.get_list("tokenizer.ggml.merges", str)]
    vocabulary = _vocabulary(tokens, types)
    ignore_merges = parts.get("ignore_merges", False)
    tokenizer = Tokenizer(_bpe(model, vocabulary, merges, ignore_merges=ignore_merges))
    if "normalizer" in parts:
        tokenizer.normalizer = parts["normalizer"]
    tokenizer.pre_tokenizer = parts["splitter"]
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, parts.get("add_bos", False)


def _sentencepiece_bpe(model: GGUFModel, tokens: list[str], types: list[int]) -> Tokenizer:
    scores = model.get_list("tokenizer.ggml.scores", float)
    if len(scores) != len(tokens):
        raise UserError(f"{model.name}: tokenizer.ggml.scores: must be one number for each token")
    vocabulary = _vocabulary(tokens, types)
    pieces = {token: scores[i] for token, i in vocabulary.items() if types[i] == _NORMAL}
    unknown = next((token for token, i in vocabulary.items() if types[i] == _UNKNOWN), None)
    tokenizer = Tokenizer(
        _bpe(model, vocabulary, _merges(pieces), unk_token=unknown, fuse_unk=True, byte_fallback=_BYTE in types)
    )
    prefix = model.get("tokenizer.ggml.add_space_prefix", bool, True)
    spaces = [normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), *spaces] if prefix else spaces)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def _bpe(model: GGUFModel, vocabulary: dict[str, int], merges: list[tuple[str, str]], **settings) -> models.BPE:
    try:
        return models.BPE(vocabulary, merges, **settings)
    except Exception as error:  # the library raises bare Exceptions
        raise UserError(f"{model.name}: tokenizer.ggml: tokens and merges do not fit: {shown(str(error))}") from None


def _vocabulary(tokens: list[str], types: list[int]) -> dict[str, int]:
    """Ids by token, without the rows that only pad the embedding."""
    return {token: i for i, token in enumerate(tokens) if types[i] != _UNUSED}


def _merges(pieces: dict[str, float]) -> list[tuple[str, str]]:
    """A ranked list: SentencePiece joins, of all neighbours that make a piece, those whose piece scores highest."""
    ranked = sorted(pieces.items(), key=lambda item: -item[1])
    return [
        (piece[:i], piece[i:])
        for piece, _ in ranked
        for i in range(1, len(piece))
        if piece[:i] in pieces and piece[i:] in pieces
    ]


def _token_ids(model: GGUFModel, count: int) -> dict[str, int]:
    """bos, eos, eot, unk, pad -> id, of those that the file names."""
    found = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("eot", "eot"), ("unk", "unknown"), ("pad", "padding")):
        index = model.get(f"tokenizer.ggml.{key}_token_id", int)
        if index is not None:
            if not 0 <= index < count:
                line = f"{index} is not below {count} and at least 0"
                raise UserError(f"{model.name}: tokenizer.ggml.{key}_token_id: {line}")
            found[name] = index
    return found


def _add_tokens(tokenizer: Tokenizer, tokens: list[str], types: list[int], special: Iterable[str]) -> None:
    """Found in a text before it is split: control tokens (left out when decoding), and user-defined ones."""
    for token, kind in zip(tokens, types):
        if kind == _CONTROL or (kind != _UNUSED and token in special):
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=False)])


def _post_processor(
    model: GGUFModel, tokens: list[str], ids: dict[str, int], add_bos: bool, add_eos: bool
) -> processors.PostProcessor | None:
    """Puts BOS before and EOS behind a text, where the model was trained so."""
    wanted = [name for name, add in (("bos", add_bos), ("eos", add_eos)) if add]
    for name in wanted:
        if name not in ids:
            raise UserError(f"{model.name}: tokenizer.ggml.add_{name}_token is set, {name}_token_id is missing")
    if not wanted:
        return None
    bos, eos = ([tokens[ids[name]]] if name in wanted else [] for name in ("bos", "eos"))
    pair = [f"{token}:{part}" for part, name in enumerate("AB") for token in (*bos, f"${name}", *eos)]
    special = [(tokens[ids[name]], ids[name]) for name in wanted]
    try:
        return processors.TemplateProcessing([*bos, "$A", *eos], pair, special)
    except ValueError as error:  # a colon in the token
        raise UserError(f"{model.name}: tokenizer.ggml.tokens: {shown(str(error))}") from None


def _generation(ids: dict[str, int]) -> dict:
    """A chat model may end its turn with another token than its text."""
    ends = list(dict.fromkeys(ids[name] for name in ("eos", "eot") if name in ids))
    values = {
        "bos_token_id": ids.get("bos"),
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": ids.get("pad"),
    }
    return {key: value for key, value in values.items() if value is not None}


def _write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
