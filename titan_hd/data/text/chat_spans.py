"""Where the assistant's turns stand in a conversation that a chat template has written, in time linear in its length.

A turn is defined by what the template writes up to it and up to its end: both must be how the whole conversation
begins. Rendering both for every turn would take time quadratic in the number of turns. So only the first and the last
turn are looked for in that way; for those between, the template is run once more on contents between two marks, which
show where each content stands in the whole. A turn counts as found if the text around it, from the last control token
in front to the end of the turn, is that of the first turn; whatever is not found so is looked for in the slow way.
Tokens are counted from the control tokens, which cut a text for every tokenizer.
"""

from __future__ import annotations

import bisect
import functools
import re
from typing import Any

from titan_hd.data.text.chat import ChatTemplate
from titan_hd.data.text.tokenizer_base import Tokenizer
from titan_hd.errors import UserError

_MARKS = "\ue000\ue001"  # private use: no template has a meaning for them


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

        Raises:
            UserError: a turn cannot be told from what is around it.
        """
        places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        if not places:
            raise UserError("holds no assistant turn, so that there is nothing to train on")
        conversation = _Conversation(self._chat, messages, tools, whole)
        borders = {place: conversation.borders(place) for place in {places[0], places[-1]}}
        if len(places) > 2:
            self._find_between(conversation, places, borders)
        controls = self._controls(whole, ids)
        return [self._tokens(place, *borders[place], whole, ids, controls) for place in places]

    def _find_between(self, conversation: _Conversation, places: list[int], borders: dict) -> None:
        contents, whole = conversation.contents(places), conversation.whole
        before, after = borders[places[0]]
        begin, end = contents.get(places[0], (before, after))
        front, back = self._heading(whole, before) + whole[before:begin], whole[end:after]
        for place in places[1:-1]:
            start, stop = contents.get(place, (0, 0))
            if whole.startswith(back, stop) and start >= len(front) and whole.endswith(front, 0, start):
                borders[place] = start - (begin - before), stop + len(back)
            else:
                borders[place] = conversation.borders(place)

    def _heading(self, whole: str, end: int) -> str:
        """The text from the last control token in front of `end`."""
        starts = [match.start() for match in self._control.finditer(whole, 0, end)] if self._control else []
        return whole[starts[-1] if starts else 0 : end]

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


class _Conversation:
    def __init__(self, chat: ChatTemplate, messages: list[dict[str, Any]], tools: list | None, whole: str):
        self._chat, self._messages, self._tools, self.whole = chat, messages, tools, whole

    def borders(self, place: int) -> tuple[int, int]:
        """Where the text ends that stands in front of a turn, and where the turn ends, by what the template writes."""
        if place == 0:
            raise UserError("begins with an assistant turn; a system's or user's must come first")
        before = self._chat.render(self._messages[:place], add_generation_prompt=True, tools=self._tools)
        after = self.whole
        if place < len(self._messages) - 1:
            after = self._chat.render(self._messages[: place + 1], tools=self._tools)
        if not (after.startswith(before) and self.whole.startswith(after)):
            raise UserError(
                f"the chat template writes turn {place + 1} differently when the conversation goes on, so that what is "
                "trained on cannot be told"
            )
        return len(before), len(after)

    def contents(self, places: list[int]) -> dict[int, tuple[int, int]]:
        """From where to where the contents of turns stand in the whole; none, if the template does more to a content
        than to write it."""
        begin, end = _MARKS
        marked, texts = list(self._messages), {place: self._messages[place]["content"] or "" for place in places}
        chosen = [place for place in places if texts[place].strip()]
        if any(mark in self.whole for mark in _MARKS):
            return {}
        for place in chosen:
            text = texts[place].strip()
            content = texts[place].replace(text, f"{begin}{text}{end}", 1)
            marked[place] = {**marked[place], "content": content}
        try:
            written = self._chat.render(marked, tools=self._tools)
        except UserError:
            return {}
        parts = re.split(f"([{_MARKS}])", written)
        if "".join(parts[::2]) != self.whole or "".join(parts[1::2]) != _MARKS * len(chosen):
            return {}
        sizes, ends = [len(part) for part in parts[::2]], []
        for size in sizes[:-1]:
            ends.append((ends[-1] if ends else 0) + size)
        return {place: (ends[2 * i], ends[2 * i + 1]) for i, place in enumerate(chosen)}
