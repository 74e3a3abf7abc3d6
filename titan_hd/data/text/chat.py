"""Chat templates: the Jinja program that comes with a model and writes a conversation as text.

A template is found where transformers looks for it, and renders what transformers' apply_chat_template renders, within
the bounds of `titan_hd.data.text.sandbox`. The text holds the template's own BOS and end-of-turn tokens, so it is
encoded with `special=True`, and nothing is put in front or behind. A message that spells a control token ("<|eot_id|>")
therefore becomes that token, as everywhere in this format: do not train on chats that others can write into.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

from titan_hd.data.text.sandbox import MARKS, SandboxedTemplate, TemplateFault
from titan_hd.data.text.tokenizer_base import Tokenizer, read_json
from titan_hd.errors import UserError
from titan_hd.files import read_small_text

TOOL_TEMPLATE = "additional_chat_templates/tool_use.jinja"
MAX_SOURCE = 256 * 1024  # characters of a template; compiling takes about 12 us and 2 KB for each

_GENERATION = re.compile(r"\{%[-+]?\s*generation\b")
_MARKED = re.compile("{}(.*?){}".format(*MARKS), re.DOTALL)
_LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


class ChatTemplate:
    """A chat template with the special tokens that it may name.

    source: the Jinja program. where: the file it is from, for messages. with_tools: both of another one, for
        conversations with tools.
    """

    def __init__(
        self, source: str, where: str, special_tokens: dict[str, str], with_tools: tuple[str, str] | None = None
    ):
        self.source = source
        self._template, self._where, self._special_tokens = SandboxedTemplate(source), where, special_tokens
        self._names = frozenset(re.findall(r"\w+", source))
        self._with_tools, self._has_marks = with_tools, _GENERATION.search(source) is not None
        if len(source) > MAX_SOURCE:
            raise UserError(f"{where}: chat template: longer than {MAX_SOURCE} characters")
        try:
            self._template.compile()
        except TemplateFault as fault:
            raise UserError(f"{where}: chat template: {fault}") from None

    def reads(self, name: str, tools: list[Any] | None = None) -> bool:
        """Whether the template holds the name of a variable or of a message's key. It leaves out all others."""
        return name in self._for(tools)._names

    def render(
        self, messages: list[dict[str, Any]], add_generation_prompt: bool = False, tools: list[Any] | None = None
    ) -> str:
        """The conversation as text.

        messages: {"role": ..., "content": ...} of strings, or what else the template reads, as JSON has it.
        add_generation_prompt: end with what stands in front of the assistant's next answer.
        tools: descriptions of functions, for templates that write them.

        Raises:
            UserError: the template refuses the messages, or cannot be run within its bounds.
        """
        return self._for(tools)._render(messages, add_generation_prompt, tools)

    def has_marks(self, tools: list[Any] | None = None) -> bool:
        """Whether the template says by {% generation %} what the assistant says."""
        return self._for(tools)._has_marks

    def marks(self, messages: list[dict[str, Any]], tools: list[Any] | None, whole: str) -> list[tuple[int, int]]:
        """From where to where, in characters of `whole`, the template marks what the assistant says.

        whole: the conversation as `render` gives it.

        Raises:
            UserError: that cannot be told: the template does more with what it marks than to write it.
        """
        template = self._for(tools)
        text, spans = "", []
        pieces = _MARKED.split(template._render(messages, False, tools, marked=True))
        for place, piece in enumerate(pieces):
            if place % 2 and piece:
                spans.append((len(text), len(text) + len(piece)))
            text += piece
        if text != whole:
            raise UserError(
                f"{template._where}: chat template: what {{% generation %}} marks cannot be found again; put the marks "
                "around what is written, in no text that the template changes afterwards"
            )
        return spans

    def _for(self, tools: list[Any] | None) -> ChatTemplate:
        return self if tools is None or self._with_tools is None else self._of_tools

    @functools.cached_property
    def _of_tools(self) -> ChatTemplate:
        assert self._with_tools is not None
        return ChatTemplate(*self._with_tools, self._special_tokens)

    def _render(self, messages: list, add_generation_prompt: bool, tools: list | None, marked: bool = False) -> str:
        variables = {"messages": messages, "tools": tools, "documents": None} | self._special_tokens
        try:
            return self._template.render({**variables, "add_generation_prompt": add_generation_prompt}, marked)
        except TemplateFault as fault:
            raise UserError(f"{self._where}: chat template: {fault}") from None


def load_chat_template(tokenizer: Tokenizer) -> ChatTemplate:
    """The chat template of the directory that a tokenizer is from.

    chat_template.jinja, chat_template.json or tokenizer_config.json. Of several that have names, "tool_use" is that for
    conversations with tools, and "default" that for all others; additional_chat_templates/tool_use.jinja is another
    place for the former. Llama 3's where there is none and the tokenizer has <|start_header_id|>.

    Raises:
        UserError: there is none, or it is no Jinja.
    """
    found = _find(tokenizer.directory)
    if not found:
        header = tokenizer.encode("<|start_header_id|>", special=True)
        if len(header) != 1 or header[0] not in tokenizer.control_ids:
            raise UserError(
                f"data.template: chat: {tokenizer.directory} has no chat template (chat_template.jinja, or the key "
                "chat_template in tokenizer_config.json)"
            )
        found = {"default": (_LLAMA3, "the built-in template of Llama 3")}
    return ChatTemplate(*found["default"], tokenizer.special_tokens, found.get("tool_use"))


def borrowed_template(tokenizer: Tokenizer) -> str | None:
    """The source of a tokenizer's chat template, where no file holds it that an export would copy."""
    chat = load_chat_template(tokenizer)
    return None if Path(chat._where).exists() else chat.source


def _find(directory: Path) -> dict[str, tuple[str, str]]:
    """Name -> (source, file). Nothing, or a template named default and perhaps others."""
    more = directory / TOOL_TEMPLATE
    named = {"tool_use": (_read_source(more), str(more))} if more.exists() else {}
    path = directory / "chat_template.jinja"
    if path.exists():
        return {"default": (_read_source(path), str(path)), **named}
    for name in ("chat_template.json", "tokenizer_config.json"):
        path = directory / name
        found = read_json(path).get("chat_template")
        if isinstance(found, list):
            found = {str(entry.get("name")): entry.get("template") for entry in found if isinstance(entry, dict)}
            if not isinstance(found.get("default"), str):
                raise UserError(f"{path}: chat_template: is a list without one named default")
        elif isinstance(found, str):
            found = {"default": found}
        elif found is not None:
            raise UserError(f"{path}: chat_template: must be a string, or a list of named ones")
        if found:
            return {key: (source, str(path)) for key, source in found.items() if isinstance(source, str)} | named
    return {}


def _read_source(path: Path) -> str:
    try:
        return read_small_text(path, MAX_SOURCE)
    except OSError as error:
        raise UserError(f"{path}: chat template: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: chat template: not valid UTF-8") from None
