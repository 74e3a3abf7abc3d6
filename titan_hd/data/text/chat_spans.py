"""Where the assistant's turns stand in a conversation that a chat template has written.

A turn starts where the rendering of the messages before it ends, and ends where the rendering that includes it ends;
both renderings must be prefixes of the full one. That is quadratic in the number of turns, which matters little: for a
conversation of 100 messages it takes some 20 ms, once, because tokenized records are cached. Encoding all these
prefixes would take twenty times as long. So their tokens are counted from the last control token in front: there the
text falls apart for every tokenizer.
"""

from __future__ import annotations

import bisect
import functools
import re
from typing import Any

from titan_hd.data.text.chat import ChatTemplate
from titan_hd.data.text.tokenizer_base import Tokenizer
from titan_hd.errors import UserError


class TurnFinder:
    """Finds the turns of conversations that one template and one tokenizer write."""

    def __init__(self, chat: ChatTemplate, tokenizer: Tokenizer):
        self._chat, self._tokenizer = chat, tokenizer
        names = sorted(tokenizer.control_tokens, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, names))) if names else None
        self._count = functools.lru_cache(maxsize=256)(lambda text: len(tokenizer.encode(text, special=True)))

    def __reduce__(self):  # the cache of a method cannot be pickled
        return TurnFinder, (self._chat, self._tokenizer)

    def spans(
        self, messages: list[dict[str, Any]], tools: list | None, whole: str, ids: list[int]
    ) -> list[tuple[int, int]]:
        """From where to where each assistant turn is trained on, in tokens of the whole conversation: what it says and
        its end-of-turn token, the last control token of what the template writes up to the turn's end. A token that
        reaches across the border between the heading and the answer counts as the heading's.

        whole, ids: the conversation as the template writes it, and its token ids.

        Raises:
            UserError: a turn cannot be told from what is around it.
        """
        places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        if not places:
            raise UserError("holds no assistant turn, so that there is nothing to train on")
        borders = [self._borders(place, messages, tools, whole) for place in places]
        controls = self._controls(whole, ids)
        return [self._tokens(place, *border, whole, ids, controls) for place, border in zip(places, borders)]

    def _borders(self, place: int, messages: list[dict[str, Any]], tools: list | None, whole: str) -> tuple[int, int]:
        """Where in `whole` the heading of a turn ends, and where the turn ends, in characters."""
        if place == 0:
            raise UserError("begins with an assistant turn; a system's or user's must come first")
        before = self._chat.render(messages[:place], add_generation_prompt=True, tools=tools)
        is_last = place == len(messages) - 1
        after = whole if is_last else self._chat.render(messages[: place + 1], tools=tools)
        if not (after.startswith(before) and whole.startswith(after)):
            raise UserError(
                f"the chat template writes turn {place + 1} differently when the conversation goes on, so that what is "
                "trained on cannot be told"
            )
        return len(before), len(after)

    def _controls(self, whole: str, ids: list[int]) -> list[tuple[int, int, int]] | None:
        """(Start, end, token) of every control token, or None if text and tokens do not tell the same."""
        if not self._control:
            return None
        known = self._tokenizer.control_tokens
        wanted = set(known.values())
        found = [(m.start(), m.end(), known[m[0]]) for m in self._control.finditer(whole)]
        tokens = [(place, i) for place, i in enumerate(ids) if i in wanted]
        if [i for _, _, i in found] != [i for _, i in tokens]:
            return None
        return [(start, end, place) for (start, end, _), (place, _) in zip(found, tokens)]

    def _tokens(
        self, place: int, before: int, after: int, whole: str, ids: list[int], controls: list | None
    ) -> tuple[int, int]:
        if controls is None:
            return self._tokens_slowly(place, before, after, whole, ids)
        at = bisect.bisect_right(controls, before, key=lambda control: control[1]) - 1
        first = controls[at] if at >= 0 else (0, 0, 0)
        start = first[2] + self._count(whole[first[0] : before])
        at = bisect.bisect_right(controls, after, key=lambda control: control[1]) - 1
        if at < 0 or controls[at][2] < start:
            raise _no_end(place)
        return start, controls[at][2] + 1

    def _tokens_slowly(self, place: int, before: int, after: int, whole: str, ids: list[int]) -> tuple[int, int]:
        start = self._count(whole[:before])
        end = self._tokenizer.encode(whole[:after], special=True)
        stop = next((i + 1 for i in reversed(range(start, len(end))) if end[i] in self._tokenizer.control_ids), None)
        if stop is None:
            raise _no_end(place)
        if ids[:stop] != end[:stop]:
            raise UserError(f"the tokenizer encodes turn {place + 1} differently when the conversation goes on")
        return start, stop


def _no_end(place: int) -> UserError:
    return UserError(f"the chat template ends turn {place + 1} with no special token")
