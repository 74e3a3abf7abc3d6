"""The messages of a chat record: {"role", "content"} as OpenAI has them, or ShareGPT's {"from", "value"}."""

from __future__ import annotations

from typing import Any

from titan_hd.data.sources import Record
from titan_hd.errors import UserError

# ShareGPT's names of who speaks -> roles of chat templates.
_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_SPEAKERS |= {"tool": "tool", "observation": "tool"}


def read_messages(record: Record) -> list[dict[str, Any]]:
    """The conversation in the field `messages` or `conversations`, with every key that a chat template may read.

    Raises:
        UserError: it is no list of messages, one has no text, or the assistant says nothing.
    """
    name = "conversations" if "messages" not in record and "conversations" in record else "messages"
    messages = record.get(name)
    if not isinstance(messages, list) or not messages:
        raise UserError(f"{name}: must be a list of messages, and not empty")
    return [_message(message, f"{name}[{place}]") for place, message in enumerate(messages)]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise UserError(f"{where}: must be an object with role and content, not {type(message).__name__}")
    if "from" in message and "role" not in message:
        message = {"role": _role(message["from"], where), "content": message.get("value")}
    if not isinstance(message.get("role"), str):
        raise UserError(f"{where}.role: must be a string")
    content = message.get("content")
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise UserError(f"{where}.content: must be a string")
    if message["role"] == "assistant" and not (content or "").strip() and not message.get("tool_calls"):
        raise UserError(f"{where}.content: is empty")
    # In Parquet every message has all keys; templates ask whether tool_calls is there.
    return {key: value for key, value in message.items() if value is not None or key == "content"}


def _role(speaker: Any, where: str) -> str:
    if not isinstance(speaker, str) or speaker not in _SPEAKERS:
        raise UserError(f"{where}.from: must be one of {', '.join(_SPEAKERS)}, not {speaker!r}")
    return _SPEAKERS[speaker]


def read_tools(record: Record) -> list[Any] | None:
    """The field `tools`, which some templates write in front of the conversation."""
    tools = record.get("tools")
    if not isinstance(tools, (list, type(None))):
        raise UserError("tools: must be a list")
    return tools or None
