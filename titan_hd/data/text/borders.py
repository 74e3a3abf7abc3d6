"""Where a token must end: between what stands in front of a response and the response.

Encoded as one text, prompt and response may share a token: with Llama 3's or Qwen's vocabulary ":" and "Natalia" become
":N" and "atalia". The model is asked with the tokens of the prompt alone, of which the last is ":", so that what it
begins with was never seen in training, and the response's first letter, being in a token with the prompt, is not
trained. So the text is cut at such a place, and what follows is encoded as the continuation that it is. Where no token
reaches across, which is nearly everywhere, the ids are those of the text as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from titan_hd.data.text.tokenizer_base import Tokenizer

CUT = (
    'are cut between prompt and response, which would share a token as one text (data.encoding = "joint" leaves it, '
    "untrained)"
)
SHARED = (
    "have a token that prompt and response share; it is not trained, and generation starts from others "
    '(data.encoding = "apart" cuts it)'
)


@dataclass(frozen=True)
class Encoded:
    """ids: of the whole text. places: for each border, how many of them stand in front of it. shared: whether a token
    of the text as a whole reaches across a border."""

    ids: list[int]
    places: list[int]
    shared: bool


def encode_with_borders(
    tokenizer: Tokenizer, text: str, borders: Sequence[int], special: bool, joint: bool = False
) -> Encoded:
    """Ids of a text, in which a token ends at each border.

    borders: places in the text, in characters, ascending. special: as Tokenizer.encode has it.
    joint: cut nothing; a token that reaches across a border counts as in front of it.
    """
    ids = tokenizer.encode(text, special)
    fixed: list[int] = []  # ids of text[:start]
    places, start, shared = [], 0, False
    for border in borders:
        encode = tokenizer.continuation if start else tokenizer.encode
        front = encode(text[start:border], special)
        if ids[: len(front)] != front:
            shared = True
            if not joint:
                fixed, start = fixed + front, border
                ids, front = tokenizer.continuation(text[border:], special), []
        places.append(len(fixed) + len(front))
    return Encoded(fixed + ids, places, shared)
