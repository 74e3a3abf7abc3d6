"""tokenizer.model: SentencePiece (Llama 2, Mistral) and tiktoken (Llama 3).

Directories in the layout of the models' makers, and older ones of Hugging Face, have no tokenizer.json. What they have
is read by the libraries that the models were trained with, so that ids are theirs; converting it into a tokenizer.json
at load time would need transformers, whose conversion changed from version to version.
"""

from __future__ import annotations

import base64
import binascii
import itertools
import re
from pathlib import Path

from titan_hd.data.text.tokenizer_base import Settings, Tokenizer, encode_behind_anchor, read_json, splitter
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
    LlamaTokenizer of transformers 5, put it in front of the first stretch alone, and not before a leading space.) With
    add_prefix_space = false in tokenizer_config.json none is put anywhere.
    """

    def __init__(self, path: Path, settings: Settings):
        import sentencepiece

        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError):
            raise UserError(f"{path}: is neither a SentencePiece model nor tiktoken's ranks") from None
        size = self._processor.vocab_size()
        self.learned_size = size
        self._with_prefix = settings.values.get("add_prefix_space") is not False
        self._every_stretch = self._with_prefix and settings.values.get("legacy") is not False
        # What stands behind the model's own pieces, or has another name than these.
        added = {
            i: t for i, t in settings.added_tokens.items() if i >= size or self._processor.id_to_piece(i) != t.content
        }
        control = {self._processor.id_to_piece(i): i for i in range(size) if self._processor.is_control(i)}
        control |= {token.content: i for i, token in added.items() if token.special}
        words = {token.content: i for i, token in added.items() if not token.special}
        self.vocab_size = max((size - 1, *control.values(), *words.values())) + 1
        control |= self._named(settings, control, words)
        self.vocab_size = max((self.vocab_size - 1, *control.values())) + 1
        self.control_tokens, self.added_tokens = control, {**words, **control}
        self.control_ids = frozenset((*control.values(), self._processor.unk_id()))
        eos_id = self._id(path, settings, "eos_token", self._processor.eos_id())
        if eos_id is None:
            raise UserError(f"{path}: has no end-of-sequence token")
        bos_id = self._id(path, settings, "bos_token", self._processor.bos_id())
        with_bos = settings.values.get("add_bos_token", True)
        self._set_ends(settings, bos_id if with_bos else None, eos_id, self._id(path, settings, "pad_token", -1))
        self._words = {i: text for text, i in words.items()}
        self._splitters = {False: splitter(words), True: splitter(self.added_tokens)}

    def _named(self, settings: Settings, control: dict[str, int], words: dict[str, int]) -> dict[str, int]:
        """The tokens that the settings name as special: pieces of the model, words that were added, or new ones behind
        all others, as transformers adds them. BOS and EOS are never new: the model has no embedding for them."""
        found = {}
        ends = [settings.special_tokens.get(name) for name in ("bos_token", "eos_token")]
        for text in settings.named:
            piece = self._processor.piece_to_id(text)
            if text in words:
                found[text] = words.pop(text)
            elif text not in control and (
                piece != self._processor.unk_id() or text == self._processor.id_to_piece(piece)
            ):
                found[text] = piece
            elif text not in control and text not in ends:
                found[text] = max((self.vocab_size - 1, *found.values())) + 1
        return found

    def _id(self, path: Path, settings: Settings, name: str, default: int) -> int | None:
        """The token that the settings name, else the model's own (and then its text is noted)."""
        token = settings.special_tokens.get(name)
        if token in self.control_tokens:
            return self.control_tokens[token]
        if token:
            raise UserError(
                f"{path}: {name}: {token!r} is none of its tokens; name it with its id in added_tokens.json"
            )
        if default < 0:
            return None
        settings.special_tokens[name] = self._processor.id_to_piece(default)
        return default

    def _encode(self, text: str, special: bool) -> list[int]:
        first, *rest = self._splitters[special].split(text)  # added tokens in turn with what is between them
        ids = self._plain(first, self._with_prefix)
        for token, part in zip(rest[::2], rest[1::2]):
            ids += [self.added_tokens[token], *self._plain(part, self._every_stretch)]
        return ids

    def _plain(self, text: str, with_prefix: bool) -> list[int]:
        """Ids of a text without added tokens."""
        encode = self._processor.encode
        return encode(text) if with_prefix or not text else encode_behind_anchor(encode, text)

    def decode(self, ids: list[int]) -> str:
        words, size = self._words, self._processor.vocab_size()
        kept = [i for i in ids if i in words or (0 <= i < size and i not in self.control_ids)]
        parts = []
        for is_word, group in itertools.groupby(kept, words.__contains__):
            run = list(group)
            parts.append("".join(words[i] for i in run) if is_word else self._text(run))
        return "".join(parts)

    def _text(self, ids: list[int]) -> str:
        """Text of the model's own pieces; the library takes one space away in front of it."""
        if self._with_prefix:
            return self._processor.decode(ids)
        return self._processor.decode([*self._processor.encode("|"), *ids])[1:]


class TiktokenTokenizer(Tokenizer):
    """Llama 3's file from Meta: merge ranks, behind which stand 256 control tokens that the file does not name."""

    def __init__(self, path: Path, settings: Settings):
        import tiktoken

        ranks = _read_ranks(path)
        names = llama3_control_tokens(_is_llama_3_1(path, settings))
        control = {name: len(ranks) + i for i, name in enumerate(names)}
        # tokenizer_config.json has the last word: Hugging Face renamed some reserved ones.
        renamed = {i: token for i, token in settings.added_tokens.items() if i >= len(ranks)}
        for i, token in renamed.items():
            if not token.special and i >= len(ranks) + len(names):
                raise UserError(
                    f"{path}: the files beside it add {token.content!r}, which is not marked special; save the "
                    "tokenizer as tokenizer.json"
                )
        text_of = {i: name for name, i in control.items()} | {i: token.content for i, token in renamed.items()}
        control = {text: i for i, text in text_of.items()}
        self._encoding = tiktoken.Encoding(
            path.stem, pat_str=_LLAMA3_PIECES, mergeable_ranks=ranks, special_tokens=control
        )
        self._ranks, self.control_tokens, self.control_ids = len(ranks), control, frozenset(control.values())
        self.added_tokens, self.vocab_size = control, max(control.values()) + 1
        self.learned_size = len(ranks)
        tokens = settings.special_tokens
        for key in ("bos_token", "eos_token"):
            if tokens.get(key, next(iter(control))) not in control:
                raise UserError(f"{settings.directory}: {key}: {tokens[key]!r} is no control token of {path.name}")
        named = {key: control[text] for key, text in tokens.items() if text in control}
        bos_id = named.get("bos_token", len(ranks))
        eos_id = named.get("eos_token", settings.first_id("eos_token_id"))
        eos_id = len(ranks) + names.index("<|end_of_text|>") if eos_id is None else eos_id
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
