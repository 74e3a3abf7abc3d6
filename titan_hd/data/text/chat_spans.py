"""Where the assistant's turns stand in a conversation that a chat template has written, in characters.

1. A template that marks what the assistant says with {% generation %} says it itself.
2. Otherwise a turn starts where the rendering of the messages before it ends, and ends where the rendering that
   includes it ends; both renderings must be prefixes of the full one. That is quadratic in the number of turns, which
   matters little: for a conversation of 100 messages it takes some 20 ms, once, because tokenized records are cached.
3. Where they are not (reasoning models' templates drop what stands in <think> from all turns but the last, others end a
   conversation with one more token), the full conversation is rendered with another text in the turn's place: what is
   in front of it and behind it stays, and so says where the turn stands.
"""

from __future__ import annotations

import bisect
import functools
import json
import re
from dataclasses import dataclass
from typing import Any

from titan_hd.data.text.chat import ChatTemplate
from titan_hd.data.text.tokenizer_base import Tokenizer
from titan_hd.errors import UserError

Message = dict[str, Any]

LEFT_OUT = (
    "hold an answer that the chat template does not write in full (those of reasoning models leave out what stands in "
    "front of </think>); what it leaves out is not trained"
)
NOT_WRITTEN = (
    "hold a message (a system's, user's or tool's) that the chat template does not write, or not in full; the model "
    "never sees what it leaves out"
)
OTHERWISE = (
    "hold an answer in the middle that the chat template writes otherwise than as the last, which is how the model "
    "will write it; it is trained as it stands in the conversation"
)
OTHER_PROMPT = (
    "hold an answer in front of which the chat template does not write its generation prompt, from which generation "
    "starts"
)
NO_PROMPT = (
    "hold an answer whose heading the chat template writes, but not as a generation prompt (add_generation_prompt); "
    "the heading is trained, and generation starts in front of it"
)
_WHAT_TO_DO = (
    "; put {% generation %} and {% endgeneration %} around what the assistant says in the chat template "
    "(chat_template.jinja), or train on all of it (data.train_on_prompt)"
)


@dataclass(frozen=True)
class Turn:
    """What is trained of an assistant's turn: characters from `start` to `end`. place: of its message; None if a
    template's marks cannot be matched with messages."""

    place: int | None
    start: int
    end: int


class TurnFinder:
    """Finds the turns of conversations that one template and one tokenizer write."""

    def __init__(self, chat: ChatTemplate, tokenizer: Tokenizer):
        self._chat, self._tokenizer = chat, tokenizer

    def turns(
        self, messages: list[Message], tools: list | None, whole: str, controls: list[tuple[int, int]]
    ) -> tuple[list[Turn], list[str]]:
        """What is trained: what the assistant says in each turn and its end-of-turn token, the last control token of
        what the template writes up to the turn's end; or what the template marks. And what there is to say about it.

        whole: the conversation as the template writes it. controls: from where to where its control tokens stand.

        Raises:
            UserError: a turn cannot be told from what is around it.
        """
        places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        if not places:
            roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
            raise UserError(f"holds no assistant turn, so that there is nothing to train on; its roles: {roles}")
        notes: dict[str, None] = {}
        if self._chat.has_marks(tools):
            turns = self._marked(places, messages, tools, whole)
        else:
            turns = [self._turn(place, messages, tools, whole, controls, notes) for place in places]
        return turns, list(notes | dict.fromkeys(left_out(messages, whole)))

    def _marked(self, places: list[int], messages: list[Message], tools: list | None, whole: str) -> list[Turn]:
        spans = self._chat.marks(messages, tools, whole)
        if not spans:
            raise UserError("the chat template marks nothing in it as what the assistant says ({% generation %})")
        matched = places if len(spans) == len(places) else [None] * len(spans)
        return [Turn(place, start, end) for place, (start, end) in zip(matched, spans)]

    def _turn(self, place: int, messages: list[Message], tools, whole: str, controls, notes: dict[str, None]) -> Turn:
        if place == 0:
            raise UserError("begins with an assistant turn; a system's or user's must come first")
        before = self._chat.render(messages[:place], add_generation_prompt=True, tools=tools)
        is_last = place == len(messages) - 1
        after = whole if is_last else self._chat.render(messages[: place + 1], tools=tools)
        if after.startswith(before) and whole.startswith(after):
            start, end = len(before), self._end(len(before), len(after), is_last, whole, controls)
        else:
            start, end = self._among_others(place, messages, tools, whole, before)
            if not whole.startswith(before):
                prompt = before.removeprefix(self._chat.render(messages[:place], tools=tools))
                notes[OTHERWISE if whole[:start].endswith(prompt) else OTHER_PROMPT] = None
            elif not after.startswith(whole[start:end], start):
                notes[OTHERWISE] = None
        if end is None:
            raise UserError(f"the chat template ends turn {place + 1} with no special token" + _WHAT_TO_DO)
        content = messages[place].get("content")
        # A generation prompt of "<think>" may be what it begins with.
        if isinstance(content, str) and content.strip() not in whole[max(0, start - len(content)) : end]:
            notes[LEFT_OUT] = None
        elif (
            content
            and whole.startswith(before)
            and whole[start:end].partition(content.strip())[0].strip()  # a heading
            and before == self._chat.render(messages[:place], tools=tools)
        ):
            notes[NO_PROMPT] = None
        return Turn(place, start, end)

    def _end(self, start: int, after: int, is_last: bool, whole: str, controls: list[tuple[int, int]]) -> int | None:
        """The end of the last control token of whole[start:after], but for those that end the conversation."""
        if is_last and self.end_of_turn and whole.endswith(self._end_of_chat):
            sooner = self._end(start, after - len(self._end_of_chat), False, whole, controls)
            if sooner is not None:
                return sooner
        at = bisect.bisect_right(controls, after, key=lambda control: control[1]) - 1
        return controls[at][1] if at >= 0 and controls[at][0] >= start else None

    def _among_others(
        self, place: int, messages: list[Message], tools, whole: str, before: str
    ) -> tuple[int, int | None]:
        """Where a turn stands that is written otherwise when the conversation goes on, or without generation prompt.

        before: the conversation in front of it, with the generation prompt.
        """
        start, behind = (len(before) if whole.startswith(before) else None), None
        if start is None or self.end_of_turn in str(messages[place].get("content")):
            front, behind = self._around(place, messages, tools, whole)
            start = front if start is None else start
        if start is None:
            raise UserError(
                f"the chat template writes turn {place + 1} differently when the conversation goes on, so that what is "
                "trained on cannot be told" + _WHAT_TO_DO
            )
        if not self.end_of_turn:
            return start, None
        found = whole.find(self.end_of_turn, start if behind is None else max(start, behind))
        return start, None if found < 0 else found + len(self.end_of_turn)

    def _around(self, place: int, messages: list[Message], tools, whole: str) -> tuple[int | None, int | None]:
        """Where the text of a message begins and ends in `whole`; None where that cannot be told."""
        if not messages[place].get("content"):
            return None, None
        probe = _unused_letter(whole)
        other = [*messages[:place], {**messages[place], "content": probe}, *messages[place + 1 :]]
        front, *behind = self._chat.render(other, tools=tools).split(probe)
        if len(behind) != 1:
            return None, None
        end = len(whole) - len(behind[0]) if whole.endswith(behind[0]) else None
        return len(front) if whole.startswith(front) else None, end

    @property
    def end_of_turn(self) -> str:
        """The token that ends every answer, wherever it stands; "" if there is none, or it cannot be told."""
        return self._endings[0]

    @property
    def _end_of_chat(self) -> str:
        """What the template writes behind that token at the end of a conversation alone."""
        return self._endings[1]

    @functools.cached_property
    def _endings(self) -> tuple[str, str]:
        question, answer, other = (
            {"role": role, "content": letter}
            for role, letter in (("user", "\ue000"), ("assistant", "\ue001"), ("user", "\ue002"))
        )
        try:
            alone = self._chat.render([question, answer]).split("\ue001")
            goes_on = self._chat.render([question, answer, other, {**answer, "content": "\ue003"}])
        except UserError:  # a template that wants something else; its turns then have to be told without this
            return "", ""
        within = re.search("\ue001(.*)\ue002", goes_on, re.DOTALL)
        if len(alone) != 2 or not within:
            return "", ""
        common = _common_start(alone[1], within[1])
        for names in (self._tokenizer.control_tokens, self._tokenizer.added_tokens):
            found = [(common.rfind(name) + len(name), name) for name in names if name in common]
            if found:
                return max(found)[1], alone[1][max(found)[0] :]
        return "", ""


def left_out(messages: list[Message], whole: str) -> list[str]:
    """What there is to say about messages whose text a conversation, as the template has written it, does not hold:
    many a template passes over a system's message, or over roles that it does not know."""
    notes: dict[str, None] = {}
    for message in messages:
        text = (message.get("content") or "").strip()
        # Llama 3.1 writes what tools say as JSON.
        if text not in whole and json.dumps(text, ensure_ascii=False)[1:-1] not in whole:
            notes[LEFT_OUT if message["role"] == "assistant" else NOT_WRITTEN] = None
    return list(notes)


def _common_start(one: str, other: str) -> str:
    count = next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
    return one[:count]


def _unused_letter(text: str) -> str:
    """A letter of the private use area that a text does not have."""
    return next(letter for letter in map(chr, range(0xE000, 0xF900)) if letter not in text)
