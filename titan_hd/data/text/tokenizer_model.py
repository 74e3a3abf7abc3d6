"""tokenizer.model: SentencePiece (Llama 2, Mistral) and tiktoken (Llama 3).

Directories in the layout of the models' makers, and older ones of Hugging Face, have no tokenizer.json. What they have
is read by the libraries that the models were trained with, so that ids are theirs; converting it into a tokenizer.json
at load time would need transformers, whose conversion changed from version to version.
"""

from __future__ import annotations

import base64
import binascii
import re
from pathlib import Path

from titan_hd.data.text.tokenizer_base import Settings, Tokenizer, read_json
from titan_hd.errors import UserError

# tiktoken's time grows with the square of a piece's length; Meta's tokenizer cuts texts and runs of white space or of
# anything else at these lengths, and the ids of such texts depend on it.
_MAX_TEXT = 400_000
_MAX_RUN = 25_000
_RUNS = re.compile(r"\s+|\S+")
# How Llama 3 cuts a text into pieces before merging; a fact of the vocabulary, found in its tokenizer.json too.
_LLAMA3_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class SentencePieceTokenizer(Tokenizer):
    """Encodes as the sentencepiece library does, which is what Llama 2 and Mistral were trained with.

    A space is put in front of the text ("dummy prefix"); with `special`, in front of every stretch between two control
    tokens, as Meta's and Mistral's own code and transformers' `legacy = true` have it. (`legacy = false`, and
    LlamaTokenizer of transformers 5, put it in front of the first stretch alone, and not before a leading space.)
    """

    def __init__(self, path: Path, settings: Settings):
        import sentencepiece

        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError):
            raise UserError(f"{path}: is neither a SentencePiece model nor tiktoken's ranks") from None
        size = self._processor.vocab_size()
        self.control_tokens = {self._processor.id_to_piece(i): i for i in range(size) if self._processor.is_control(i)}
        self.control_tokens |= self._added(path, settings, size)
        self.control_ids = frozenset((*self.control_tokens.values(), self._processor.unk_id()))
        self.vocab_size = max((size - 1, *self.control_tokens.values())) + 1
        eos_id = self._id(settings, "eos_token", self._processor.eos_id())
        if eos_id is None:
            raise UserError(f"{path}: has no end-of-sequence token")
        bos_id = self._id(settings, "bos_token", self._processor.bos_id())
        with_bos = settings.values.get("add_bos_token", True)
        self._set_ends(settings, bos_id if with_bos else None, eos_id, self._id(settings, "pad_token", -1))
        self._splitter = re.compile(f"({'|'.join(map(re.escape, sorted(self.control_tokens, key=len, reverse=True)))})")

    def _added(self, path: Path, settings: Settings, size: int) -> dict[str, int]:
        """Control tokens that tokenizer_config.json adds behind the model's own."""
        added = {i: token for i, token in settings.added_tokens.items() if i >= size}
        for token in added.values():
            if not token.get("special"):
                raise UserError(
                    f"{path}: tokenizer_config.json adds {token['content']!r}, which is not marked special; save the "
                    "tokenizer as tokenizer.json"
                )
        return {token["content"]: i for i, token in added.items()}

    def _id(self, settings: Settings, name: str, default: int) -> int | None:
        """The token that the settings name, else the model's own (and then its text is noted)."""
        token = settings.special_tokens.get(name)
        if token in self.control_tokens:
            return self.control_tokens[token]
        found = self._processor.piece_to_id(token) if token else self._processor.unk_id()
        if found != self._processor.unk_id():
            return found
        if default < 0:
            return None
        settings.special_tokens[name] = self._processor.id_to_piece(default)
        return default

    def _encode(self, text: str, special: bool) -> list[int]:
        if not special:
            return self._processor.encode(text)
        ids: list[int] = []
        for place, part in enumerate(self._splitter.split(text)):
            ids += [self.control_tokens[part]] if place % 2 else self._processor.encode(part)
        return ids

    def decode(self, ids: list[int]) -> str:
        size = self._processor.vocab_size()
        return self._processor.decode([i for i in ids if 0 <= i < size and i not in self.control_ids])


class TiktokenTokenizer(Tokenizer):
    """Llama 3's file from Meta: merge ranks, behind which stand 256 control tokens that the file does not name."""

    def __init__(self, path: Path, settings: Settings):
        import tiktoken

        ranks = _read_ranks(path)
        names = llama3_control_tokens(_is_llama_3_1(path, settings))
        control = {name: len(ranks) + i for i, name in enumerate(names)}
        # tokenizer_config.json has the last word: Hugging Face renamed some reserved ones.
        renamed = {i: token["content"] for i, token in settings.added_tokens.items()}
        control = {renamed.get(i, name): i for name, i in control.items()}
        self._encoding = tiktoken.Encoding(
            path.stem, pat_str=_LLAMA3_PIECES, mergeable_ranks=ranks, special_tokens=control
        )
        self._ranks, self.control_tokens, self.control_ids = len(ranks), control, frozenset(control.values())
        self.vocab_size = len(ranks) + len(control)
        tokens = settings.special_tokens
        named = {key: control[text] for key, text in tokens.items() if text in control}
        bos_id = named.get("bos_token", len(ranks))
        eos_id = named.get("eos_token", settings.first_id("eos_token_id"))
        eos_id = len(ranks) + names.index("<|end_of_text|>") if eos_id is None else eos_id
        text_of = {i: text for text, i in control.items()}
        if eos_id not in text_of:
            raise UserError(f"{settings.directory / 'config.json'}: eos_token_id: {eos_id} is no control token")
        tokens.update(bos_token=text_of[bos_id], eos_token=text_of[eos_id])
        with_bos = settings.values.get("add_bos_token", True)
        self._set_ends(settings, bos_id if with_bos else None, eos_id, named.get("pad_token"))

    def _encode(self, text: str, special: bool) -> list[int]:
        ids: list[int] = []
        for part in _bounded_parts(text):
            # Without disallowed_special tiktoken refuses a text in which a control token is spelled.
            ids += self._encoding.encode(part, allowed_special="all" if special else set(), disallowed_special=())
        return ids

    def decode(self, ids: list[int]) -> str:
        return self._encoding.decode([i for i in ids if 0 <= i < self._ranks], errors="replace")


def llama3_control_tokens(llama_3_1: bool) -> list[str]:
    """The 256 control tokens in the order of their ids, as Meta's code names them for Llama 3 and for 3.1 and later."""
    third, last = "reserved reserved", "reserved eot_id"
    if llama_3_1:
        third, last = "finetune_right_pad_id step_id", "eom_id eot_id python_tag"
    head = f"begin_of_text end_of_text reserved reserved {third} start_header_id end_header_id {last}"
    names, reserved = [], 0
    for name in head.split() + ["reserved"] * 256:
        if name == "reserved":
            name, reserved = f"reserved_special_token_{reserved}", reserved + 1
        names.append(f"<|{name}|>")
    return names[:256]


def _is_llama_3_1(path: Path, settings: Settings) -> bool:
    """Llama 3 and 3.1 share the file; only 3.1 and later scale RoPE (config.json, or params.json of Meta)."""
    if read_json(path.parent / "params.json").get("use_scaled_rope"):
        return True
    rope = settings.values.get("rope_scaling") or settings.values.get("rope_parameters") or {}
    return "llama3" in (rope.get("rope_type"), rope.get("type")) if isinstance(rope, dict) else False


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Token bytes -> rank, one per line, ranks counting from 0."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            token = base64.b64decode(token, validate=True)
            if int(rank) != len(ranks) or token in ranks:
                raise ValueError
        except (ValueError, binascii.Error):
            raise UserError(f"{path}:{number}: must be a new token in base64 and rank {len(ranks)}") from None
        ranks[token] = len(ranks)
    if not all(bytes([i]) in ranks for i in range(256)):
        raise UserError(f"{path}: must hold each of the 256 bytes as a token")
    return ranks


def _bounded_parts(text: str) -> list[str]:
    """The text, cut where Meta's tokenizer cuts long texts and long runs."""
    parts = []
    for start in range(0, len(text), _MAX_TEXT):
        window = text[start : start + _MAX_TEXT]
        cuts = [cut for run in _RUNS.finditer(window) for cut in range(run.start() + _MAX_RUN, run.end(), _MAX_RUN)]
        parts += [window[a:b] for a, b in zip([0, *cuts], [*cuts, len(window)])]
    return parts
