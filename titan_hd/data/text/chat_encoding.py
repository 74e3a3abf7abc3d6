"""Conversations, as their chat template writes them, as token ids, and which of these are trained on.

A conversation is encoded as one text, as transformers' apply_chat_template does it, but that a token ends where an
answer begins (`titan_hd.data.text.borders`). Encoding the text up to every turn would take twenty times as long. So
tokens are counted from the last control token in front: there the text falls apart for every tokenizer.
"""

from __future__ import annotations

import bisect
import copy
import functools
import itertools
import re
from dataclasses import dataclass, field
from typing import Any

from titan_hd.data.text.borders import CUT, SHARED, Encoded, encode_with_borders
from titan_hd.data.text.chat import ChatTemplate, load_chat_template
from titan_hd.data.text.chat_spans import LEFT_OUT, NOT_WRITTEN, Turn, TurnFinder, left_out
from titan_hd.data.text.tokenizer_base import Tokenizer
from titan_hd.errors import UserError

Message = dict[str, Any]

ENDLESS = "hold no token that ends an answer: the chat template writes none, and the model will learn no end"


@dataclass(frozen=True)
class Trained:
    """ids: of a record. spans: from where to where they are trained on. notes: what there is to say about it, each a
    line that follows "so many records". places: for each span, which message of a conversation it is of; None where
    that cannot be told."""

    ids: list[int]
    spans: list[tuple[int, int]]
    notes: tuple[str, ...] = ()
    places: list[int | None] = field(default_factory=list)


@dataclass(frozen=True)
class _Control:
    """A control token in a text: its characters, and its place among the ids."""

    start: int
    end: int
    place: int


class ConversationEncoder:
    """Encodes conversations that one template and one tokenizer write.

    joint: what answer and heading share as one text stays one token, untrained.
    """

    def __init__(self, chat: ChatTemplate, tokenizer: Tokenizer, joint: bool = False):
        self._chat, self._tokenizer, self._joint = chat, tokenizer, joint
        self._turns = TurnFinder(chat, tokenizer)
        self._short = functools.lru_cache(maxsize=256)(lambda text: tokenizer.encode(text, special=True))

    def __reduce__(self):  # the cache of a method cannot be pickled
        return ConversationEncoder, (self._chat, self._tokenizer, self._joint)

    def encode(self, messages: list[Message], tools: list | None = None) -> Trained:
        """Ids of a conversation. The spans are what the assistant says in each turn and its end-of-turn token, or what
        the template marks by {% generation %}.

        Raises:
            UserError: the template refuses the conversation, or a turn cannot be told from what is around it.
        """
        whole = self._chat.render(messages, tools=tools)
        controls = [(m.start(), m.end()) for m in self._pattern.finditer(whole)] if self._pattern else []
        turns, notes = self._turns.turns(messages, tools, whole, controls)
        cuts = sorted({cut for turn in turns for cut in (turn.start, turn.end)})
        encoded = self._with_cuts(whole, cuts)
        place_of = dict(zip(cuts, encoded.places))
        spans = [(place_of[turn.start], place_of[turn.end]) for turn in turns]
        for turn, (start, stop) in zip(turns, spans):
            self._check(turn, encoded.ids[start:stop], self._chat.has_marks(tools))
        if encoded.shared:
            notes.append(SHARED if self._joint else CUT)
        return Trained(encoded.ids, spans, tuple(notes), [turn.place for turn in turns])

    def encode_all(self, messages: list[Message], tools: list | None = None) -> Trained:
        """Ids of a conversation that is trained on as a whole: cut as `encode` cuts it, where turns can be told."""
        try:
            trained = self.encode(messages, tools)
            ids, notes = trained.ids, [note for note in trained.notes if note in (CUT, SHARED, LEFT_OUT, NOT_WRITTEN)]
        except UserError:
            whole = self._chat.render(messages, tools=tools)
            ids, notes = self._tokenizer.encode(whole, special=True), left_out(messages, whole)
            notes += [ENDLESS] if self._stops.isdisjoint(ids) else []
        return Trained(ids, [(0, len(ids))], tuple(notes))

    def stop_ids(self) -> frozenset[int]:
        """What ends a generated response: the template's end-of-turn token, which a base model's stop_ids may lack."""
        question, answer = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
        try:
            trained = self.encode([question, answer])
        except UserError:  # a template that wants something else, or ends its answers with no token of its own
            return self._tokenizer.stop_ids
        start, stop = trained.spans[-1]
        controls = [i for i, token in enumerate(trained.ids) if i >= start and token in self._names.values()]
        # Marks may stand around the answer alone.
        ends = [i for i in controls if i < stop][-1:] or controls[:1]
        return self._tokenizer.stop_ids | {trained.ids[i] for i in ends}

    @functools.cached_property
    def _stops(self) -> frozenset[int]:
        return self.stop_ids()

    def _check(self, turn: Turn, ids: list[int], marked: bool) -> None:
        if not ids or not (marked or ids[-1] in self._names.values()):
            where = "an answer" if turn.place is None else f"turn {turn.place + 1}"
            raise UserError(f"the tokenizer makes no special token of what the chat template ends {where} with")

    @functools.cached_property
    def _names(self) -> dict[str, int]:
        """Tokens that split a text for every tokenizer: the control tokens, and what ends an answer."""
        names, end = dict(self._tokenizer.control_tokens), self._turns.end_of_turn
        return names | ({end: self._tokenizer.added_tokens[end]} if end and end not in names else {})

    @functools.cached_property
    def _pattern(self) -> re.Pattern[str] | None:
        names = sorted(self._names, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names))) if names else None

    def _controls(self, whole: str, ids: list[int]) -> list[_Control] | None:
        """The control tokens of a text, or None if text and tokens do not tell the same."""
        if not self._pattern:
            return None
        wanted = set(self._names.values())
        found = list(self._pattern.finditer(whole))
        places = [place for place, i in enumerate(ids) if i in wanted]
        if [self._names[m[0]] for m in found] != [ids[place] for place in places]:
            return None
        return [_Control(m.start(), m.end(), place) for m, place in zip(found, places)]

    def _with_cuts(self, whole: str, cuts: list[int]) -> Encoded:
        """Ids of a text in which a token ends at each cut, and how many of them stand in front of it."""
        ids = self._tokenizer.encode(whole, special=True)
        controls = self._controls(whole, ids)
        if controls is None:
            return encode_with_borders(self._tokenizer, whole, cuts, True, self._joint)
        stretches = [_Control(0, 0, 0), *controls, _Control(len(whole), len(whole), len(ids))]
        ends = [stretch.end for stretch in stretches[:-1]]
        out: list[int] = []
        places: list[int] = []
        done, shared = 0, False  # how many of ids are in out
        for at, group in itertools.groupby(cuts, lambda cut: bisect.bisect_right(ends, cut) - 1):
            here, following = stretches[at], stretches[at + 1]
            text, borders = whole[here.start : following.start], [cut - here.start for cut in group]
            encoded = self._stretch(text, borders, ids[here.place : following.place])
            out += ids[done : here.place]
            places += [len(out) + place for place in encoded.places]
            out += encoded.ids
            done, shared = following.place, shared or encoded.shared
        return Encoded(out + ids[done:], places, shared)

    def _stretch(self, text: str, borders: list[int], ids: list[int]) -> Encoded:
        """As `encode_with_borders` of a stretch from one control token to the next, of which the ids are known."""
        fronts = [self._short(text[:border]) for border in borders]
        if all(ids[: len(front)] == front for front in fronts):
            return Encoded(ids, [len(front) for front in fronts], False)
        return encode_with_borders(self._tokenizer, text, borders, True, self._joint)


class ChatTurns:
    """data.template = "chat": the prompt as the user's turn, the response as the assistant's.

    tokenizer: has the template beside it, which is looked for at the first use. joint: as ConversationEncoder has it.
    """

    writes_system = writes_input = True

    def __init__(self, tokenizer: Tokenizer | None, joint: bool = False):
        self._tokenizer, self._joint, self._system = tokenizer, joint, ""

    def under(self, system: str) -> ChatTurns:
        """The same with a system's turn in front; without a system text itself."""
        if not system:
            return self
        assert self._encoder, "it is made once, and then copied too"
        turns = copy.copy(self)
        turns._system = system
        return turns

    @functools.cached_property
    def _chat(self) -> ChatTemplate:
        assert self._tokenizer is not None, "load_template was asked to check the name alone"
        return load_chat_template(self._tokenizer)

    @functools.cached_property
    def _encoder(self) -> ConversationEncoder:
        assert self._tokenizer is not None
        return ConversationEncoder(self._chat, self._tokenizer, self._joint)

    def write(self, prompt: str, extra: str) -> str:
        """The text in front of the response."""
        return self._chat.render(self._turns(prompt, extra, "")[:-1], add_generation_prompt=True)

    def prompt_ids(self, tokenizer: Tokenizer, prompt: str, extra: str) -> list[int]:
        return tokenizer.encode(self.write(prompt, extra), special=True)

    def encode(self, tokenizer: Tokenizer, prompt: str, extra: str, response: str) -> Trained:
        """Both turns; trained are the response and its end-of-turn token. What the template writes behind that ("\\n"
        in ChatML) stays, untrained.

        Raises:
            UserError: as ConversationEncoder.encode.
        """
        return self._encoder.encode(self._turns(prompt, extra, response))

    def encode_all(self, tokenizer: Tokenizer, prompt: str, extra: str, response: str) -> Trained:
        """Both turns, for a record that is trained on as a whole."""
        return self._encoder.encode_all(self._turns(prompt, extra, response))

    def stop_ids(self, tokenizer: Tokenizer) -> frozenset[int]:
        """What ends a generated response."""
        return self._encoder.stop_ids()

    def _turns(self, prompt: str, extra: str, response: str) -> list[Message]:
        asked = f"{prompt}\n{extra}" if extra else prompt
        system = [{"role": "system", "content": self._system}] if self._system else []
        return [*system, {"role": "user", "content": asked}, {"role": "assistant", "content": response}]
