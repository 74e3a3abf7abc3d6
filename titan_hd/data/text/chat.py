"""Chat templates: the Jinja program that comes with a model and writes a conversation as text.

A template is found where transformers looks for it, and renders what transformers' apply_chat_template renders, within
the bounds of `titan_hd.data.text.sandbox`. The text holds the template's own BOS and end-of-turn tokens, so it is
encoded with `special=True`, and nothing is put in front or behind. A message that spells a control token ("<|eot_id|>")
therefore becomes that token, as everywhere in this format: do not train on chats that others can write into.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from titan_hd.data.text.sandbox import SandboxedTemplate, TemplateFault
from titan_hd.data.text.tokenizer_base import Tokenizer, read_json
from titan_hd.errors import UserError
from titan_hd.files import read_small_text

MAX_SOURCE = 256 * 1024  # characters of a template; compiling takes about 12 us and 2 KB for each

_LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


class ChatTemplate:
    """A chat template with the special tokens that it may name.

    source: the Jinja program. where: the file it is from, for messages.
    """

    def __init__(self, source: str, where: str, special_tokens: dict[str, str]):
        self.source = source
        self._template, self._where, self._special_tokens = SandboxedTemplate(source), where, special_tokens
        if len(source) > MAX_SOURCE:
            raise UserError(f"{where}: chat template: longer than {MAX_SOURCE} characters")
        try:
            self._template.compile()
        except TemplateFault as fault:
            raise UserError(f"{where}: chat template: {fault}") from None

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
        try:
            return self._template.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except TemplateFault as fault:
            raise UserError(f"{self._where}: chat template: {fault}") from None


class ChatTurns:
    """data.template = "chat": the prompt as the user's turn, the response as the assistant's.

    tokenizer: has the template beside it, which is looked for at the first use.
    """

    def __init__(self, tokenizer: Tokenizer | None):
        self._tokenizer = tokenizer

    @functools.cached_property
    def _chat(self) -> ChatTemplate:
        assert self._tokenizer is not None, "load_template was asked to check the name alone"
        return load_chat_template(self._tokenizer)

    def write(self, prompt: str, extra: str) -> str:
        """The text in front of the response."""
        return self._chat.render([_user_turn(prompt, extra)], add_generation_prompt=True)

    def texts(self, prompt: str, extra: str, response: str) -> tuple[str, str]:
        """The text in front of the response, and the whole.

        Raises:
            UserError: the template refuses the turns, or its answer does not begin with its generation prompt.
        """
        before = self.write(prompt, extra)
        whole = self._chat.render([_user_turn(prompt, extra), {"role": "assistant", "content": response}])
        if not whole.startswith(before):
            raise UserError("data.template: chat: the template's answer does not begin with its generation prompt")
        return before, whole

    def prompt_ids(self, tokenizer: Tokenizer, prompt: str, extra: str) -> list[int]:
        return tokenizer.encode(self.write(prompt, extra), special=True)

    def encode(self, tokenizer: Tokenizer, prompt: str, extra: str, response: str) -> tuple[list[int], int, int]:
        """Ids of both turns, and from where to where they are trained on: the response and its end-of-turn token.

        The turns are encoded as one text, as generation would see it; what the template writes behind the end-of-turn
        token ("\\n" in ChatML) stays, untrained.

        Raises:
            UserError: as `texts`, or no control token ends the answer.
        """
        before, whole = self.texts(prompt, extra, response)
        start, ids = len(tokenizer.encode(before, special=True)), tokenizer.encode(whole, special=True)
        stop = next((i + 1 for i in reversed(range(start, len(ids))) if ids[i] in tokenizer.control_ids), None)
        if stop is None:
            raise UserError("data.template: chat: the template ends an answer with no special token")
        return ids, start, stop

    def stop_ids(self, tokenizer: Tokenizer) -> frozenset[int]:
        """What ends a generated response: the template's end-of-turn token, which a base model's stop_ids may lack."""
        ids, _, stop = self.encode(tokenizer, "question", "", "answer")
        return tokenizer.stop_ids | {ids[stop - 1]}


def _user_turn(prompt: str, extra: str) -> dict[str, str]:
    return {"role": "user", "content": f"{prompt}\n{extra}" if extra else prompt}


def load_chat_template(tokenizer: Tokenizer) -> ChatTemplate:
    """The chat template of the directory that a tokenizer is from.

    chat_template.jinja, chat_template.json or tokenizer_config.json (of several the one named "default"); Llama 3's
    where there is none and the tokenizer has <|start_header_id|>.

    Raises:
        UserError: there is none, or it is no Jinja.
    """
    source, where = _find(tokenizer.directory)
    if source is None:
        header = tokenizer.encode("<|start_header_id|>", special=True)
        if len(header) != 1 or header[0] not in tokenizer.control_ids:
            raise UserError(
                f"data.template: chat: {tokenizer.directory} has no chat template (chat_template.jinja, or the key "
                "chat_template in tokenizer_config.json)"
            )
        source, where = _LLAMA3, "the built-in template of Llama 3"
    return ChatTemplate(source, where, tokenizer.special_tokens)


def borrowed_template(tokenizer: Tokenizer) -> str | None:
    """The source of a tokenizer's chat template, where no file holds it that an export would copy."""
    chat = load_chat_template(tokenizer)
    return None if Path(chat._where).exists() else chat.source


def _find(directory: Path) -> tuple[str | None, str]:
    """(Source, file), or (None, "") where no file has a template."""
    path = directory / "chat_template.jinja"
    if path.exists():
        return _read_source(path), str(path)
    for name in ("chat_template.json", "tokenizer_config.json"):
        path = directory / name
        found = read_json(path).get("chat_template")
        if isinstance(found, list):
            named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
            if not isinstance(named.get("default"), str):
                raise UserError(f"{path}: chat_template: is a list without one named default")
            found = named["default"]
        if not isinstance(found, (str, type(None))):
            raise UserError(f"{path}: chat_template: must be a string, or a list of named ones")
        if found is not None:
            return found, str(path)
    return None, ""


def _read_source(path: Path) -> str:
    try:
        return read_small_text(path, MAX_SOURCE)
    except OSError as error:
        raise UserError(f"{path}: chat template: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: chat template: not valid UTF-8") from None
