"""Conversations: what a record of messages says, as chat templates read it.

Both of the published forms are read: {"messages": [{"role", "content"}, ...]} (OpenAI, transformers) and
{"conversations": [{"from", "value"}, ...]} (ShareGPT), and what is written beside them: a system text, tools, calls of
tools, and flags that leave a turn out of training.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from titan_hd.data.fields import SYSTEM_FIELDS, given_field, is_given, optional_text, without_nulls
from titan_hd.data.sources import Record
from titan_hd.errors import UserError

CHAT_FIELDS = ("messages", "conversations")
TOOL_FIELDS = ("tools", "functions")
# Names of who speaks -> roles of chat templates.
_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_SPEAKERS |= {"chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "function_call": "assistant"}
_SPEAKERS |= dict.fromkeys(("tool", "observation", "function", "function_response"), "tool")
# Flags of a message -> what their 1 (or true) says of training on it.
_FLAGS = {"weight": True, "train": True, "training": True, "loss": True, "loss_scale": True, "masked": False}
_UNDERSTOOD = {"role", "content", "from", "value", "function_call", "tool_calls", "train_detail", *_FLAGS}


@dataclass(frozen=True)
class Conversation:
    """What a record says.

    messages: {"role": ..., "content": ...} with what else a template may read. tools: descriptions of functions.
    excluded: the places of messages that are not to be trained on, of any role.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    excluded: frozenset[int] = frozenset()

    @property
    def answers(self) -> list[int]:
        """The places of the assistant's turns."""
        return [place for place, message in enumerate(self.messages) if message["role"] == "assistant"]

    def question(self) -> list:
        """The messages up to the last answer that is trained on, the tools, and the text of that answer."""
        last = max((place for place in self.answers if place not in self.excluded), default=len(self.messages))
        answer = "".join(message.get("content") or "" for message in self.messages[last : last + 1])
        return [self.messages[:last], self.tools, answer]


def read_conversation(record: Record, system_field: str = "", train_on_prompt: bool = False) -> Conversation:
    """The conversation in the field `messages` or `conversations`.

    system_field: data.system_field; a system text beside the messages goes in front of them. train_on_prompt: all turns
        are trained on, so that others than the assistant's may be marked so.

    Raises:
        UserError: it is no list of messages, one has no text, the assistant says nothing, or two things that it says
            contradict each other.
    """
    name = chat_field(record)
    entries = record.get(name)
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{name}: must be a list of messages, and not empty")
    messages, excluded = [], set()
    for place, entry in enumerate(entries):
        where = f"{name}[{place}]"
        message, is_trained = _message(entry, where, record.from_table)
        if is_trained and not train_on_prompt and message["role"] != "assistant":
            raise UserError(f"{where}: is marked to be trained on, but data.train_on_prompt = false trains on answers")
        if is_trained is False:
            excluded.add(place)
        messages.append(message)
    system_name, system = optional_text(record, system_fields(system_field))
    if system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
        excluded = {place + 1 for place in excluded}
    elif system and messages[0]["content"] != system:
        raise UserError(f"{system_name}: says something else than {name}[0], which is a system message too")
    return Conversation(messages, _tools(record), frozenset(excluded))


def system_fields(name: str) -> tuple[str, ...]:
    """The fields in which a system text is looked for; name: data.system_field."""
    return (name,) if name else SYSTEM_FIELDS


def chat_field(record: Record) -> str:
    """The field with the messages."""
    there = [name for name in CHAT_FIELDS if name in record] or [CHAT_FIELDS[0]]
    return given_field(record, there) or there[0]


def keys_of_templates(record: Record) -> set[str]:
    """The keys of messages that only a chat template could use, and that say something."""
    messages = record.get(chat_field(record))
    found: set[str] = set()
    for message in messages if isinstance(messages, list) else ():
        if isinstance(message, dict):
            found |= {key for key in message.keys() - _UNDERSTOOD if is_given(message[key])}
    return found


def _message(entry: Any, where: str, from_table: bool) -> tuple[dict[str, Any], bool | None]:
    """A message as templates read it, and whether it says that it is trained on (None: nothing)."""
    if not isinstance(entry, dict):
        raise UserError(f"{where}: must be an object with role and content, not {type(entry).__name__}")
    message = {key: without_nulls(value) if from_table else value for key, value in entry.items()}
    is_trained = _is_trained(message, where)
    for flag in (*_FLAGS, "train_detail"):
        message.pop(flag, None)
    speaker, value = message.pop("from", None), message.pop("value", None)
    if message.get("role") is None and speaker is not None:
        if not isinstance(speaker, str) or speaker not in _SPEAKERS:
            raise UserError(f"{where}.from: must be one of {', '.join(_SPEAKERS)}, not {speaker!r}")
        message = {
            **message,
            "role": speaker,
            "content": value if message.get("content") is None else message["content"],
        }
    spoken = message.get("role")
    if not isinstance(spoken, str):
        raise UserError(f"{where}.role: must be a string")
    known = spoken.strip().lower()
    if known in _SPEAKERS and known != spoken:
        raise UserError(f"{where}.role: must be {known}, not {spoken!r}")
    message["role"] = _SPEAKERS.get(spoken, spoken)
    same = speaker in (None, spoken) or (isinstance(speaker, str) and _SPEAKERS.get(speaker) == message["role"])
    if not same or value not in (None, message.get("content")):
        raise UserError(f"{where}: from and value say something else than role and content")
    _read_calls(message, spoken, where)
    content = _content(message, where)
    if content is not None:
        message["content"] = content
    if message["role"] == "assistant" and not (content or "").strip() and not message.get("tool_calls"):
        raise UserError(f"{where}.content: is empty")
    # In a table every message has all keys; templates ask whether tool_calls is there.
    return {key: value for key, value in message.items() if value is not None or key == "content"}, is_trained


def _is_trained(message: dict[str, Any], where: str) -> bool | None:
    """What the flags of a message say of training on it."""
    if is_given(message.get("train_detail")):
        raise UserError(f"{where}.train_detail: a turn is trained on as a whole, or not at all")
    said: set[bool] = set()
    for name, one in _FLAGS.items():
        value = message.get(name)
        if value is None:
            continue
        if not isinstance(value, (int, float)) or value not in (0, 1):
            raise UserError(f"{where}.{name}: must be 0 or 1 (false or true), not {value!r}")
        said.add(bool(value) == one)
    if len(said) == 2:
        raise UserError(f"{where}: its flags ({', '.join(name for name in _FLAGS if name in message)}) contradict")
    return said.pop() if said else None


def _content(message: dict[str, Any], where: str) -> str | None:
    """The text of a message. Of several parts it is what templates for such parts write: one behind the other."""
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return None
    if isinstance(content, list) and content and all(isinstance(part, dict) for part in content):
        for place, part in enumerate(content):
            if part.get("type") not in ("text", "input_text", "output_text"):
                raise UserError(f"{where}.content[{place}]: is of type {part.get('type')!r}; only text can be read")
            if not isinstance(part.get("text"), str):
                raise UserError(f"{where}.content[{place}].text: must be a string")
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise UserError(f'{where}.content: must be a string, or a list of parts {{"type": "text", "text": ...}}')
    return content


def _read_calls(message: dict[str, Any], speaker: str, where: str) -> None:
    """Write a message's calls of tools as templates read them: in `tool_calls`, with arguments that are objects.

    Elsewhere they stand in ShareGPT's turns of function_call and in OpenAI's former key function_call, and arguments
    are the text of a JSON object, which a template would quote once more.
    """
    calls = message.get("tool_calls")
    if speaker == "function_call":
        calls = _listed(_json(message["content"], where))
        message["content"] = None
    elif is_given(message.get("function_call")):
        calls = [*_listed(calls or []), message["function_call"]]
    message.pop("function_call", None)
    if not is_given(calls):
        message.pop("tool_calls", None)
        return
    if message["role"] != "assistant":
        raise UserError(f"{where}.tool_calls: only the assistant can call a tool, not {speaker}")
    calls = _json(calls, f"{where}.tool_calls")
    if not isinstance(calls, list):
        raise UserError(f"{where}.tool_calls: must be a list")
    message["tool_calls"] = [_call(call, f"{where}.tool_calls[{place}]") for place, call in enumerate(calls)]


def _call(call: Any, where: str) -> dict[str, Any]:
    call = _json(call, where)
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(f'{where}: must be an object with "name" and "arguments"')
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _json(arguments, f"{where}.arguments") if arguments.strip() else {}
    if arguments is not None and not isinstance(arguments, dict):
        raise UserError(f"{where}.arguments: must be an object, or the JSON text of one")
    function = {**function, "arguments": arguments or {}}
    return {**call, "function": function} if "function" in call else {"type": "function", "function": function}


def _tools(record: Record) -> list[dict[str, Any]] | None:
    """The field `tools`, or OpenAI's former `functions`; some templates write them in front of the conversation."""
    name = next((name for name in TOOL_FIELDS if is_given(record.get(name))), None)
    if name is None:
        return None
    value = record[name]
    tools = _json(value, name) if not isinstance(value, str) or value.strip() else []
    if not isinstance(tools, list):
        raise UserError(f"{name}: must be a list, or the JSON text of one")
    tools = [_json(tool, f"{name}[{place}]") for place, tool in enumerate(tools)]
    for place, tool in enumerate(tools):
        if not isinstance(tool, dict):
            raise UserError(f"{name}[{place}]: must be an object that describes a function")
    tools = without_nulls(tools) if record.from_table else tools
    return [{"type": "function", "function": tool} for tool in tools] if name == "functions" else tools or None


def _listed(value: Any) -> list:
    return value if isinstance(value, list) else [value]


def _json(value: Any, where: str) -> Any:
    """A value, or what the text says that stands in its place."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON: {error}") from None
