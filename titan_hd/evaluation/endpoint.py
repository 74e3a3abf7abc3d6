"""A chat model behind an OpenAI-compatible URL.

In words: one request, one answer. What may pass by itself (429, 5xx, a time-out, a broken connection) is tried again
after a pause that doubles, or that the server names; what will not pass (a wrong key, URL or model) ends with a line.

The key comes from a file or from OPENAI_API_KEY and goes into one header. It is in no message: what a server says is
cleared of it before anybody sees it; redirects, which would take it elsewhere, are not followed; a key in the URL is
refused.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from titan_hd.errors import UserError
from titan_hd.files import read_small_text

logger = logging.getLogger("titan_hd")

KEY_VARIABLE = "OPENAI_API_KEY"
_PASSING = (408, 409, 425, 429)  # and 500 to 599
_LONGEST_PAUSE = 120.0  # seconds; whatever a server asks for
_CHECK_TIMEOUT = 30.0  # seconds
_SHOWN = 300  # letters of what a server says
_SHORTEST_KEY = 8  # letters; what is shorter is no secret (EMPTY, for a server of one's own), but may be in any text
_LOCAL = ("localhost", "127.0.0.1", "::1")


def read_key(file: Path | None) -> str:
    """The key in a file, else in the environment; empty where there is neither (a server of one's own needs none).

    Raises:
        UserError: the file cannot be read, or what is there is no key; does not say what it is.
    """
    if file is None:
        name, key = KEY_VARIABLE, os.environ.get(KEY_VARIABLE, "").strip()
    else:
        name = f"--judge-key-file: {file}"
        try:
            key = read_small_text(file).strip() or "is empty"
        except OSError as error:
            raise UserError(f"{name}: cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            key = "no text"
    if not re.fullmatch(r"[!-~]*", key):
        raise UserError(f"{name}: must be one line of letters, digits and signs without spaces, as keys are")
    return key


class _Passing(Exception):
    """What may go otherwise the next time. pause: seconds that the server asks for."""

    def __init__(self, reason: str, pause: float | None = None):
        super().__init__(reason)
        self.pause = pause


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


@dataclass
class Endpoint:
    """Where a model answers.

    url: as OpenAI's clients have it, .../v1. Options are logged, so nothing secret can stand in it.
    key: of the service; it is not shown.
    attempts: of one request before it is given up; pause: seconds before the second one, then twice as long each time.
    timeout: seconds without a sign of the server.

    Several threads may ask at the same time. `stop` ends the pauses of all.

    Raises:
        UserError: this is no URL of http or https, or a key stands in it.
    """

    url: str
    model: str
    key: str = field(repr=False, default="")
    attempts: int = 8
    pause: float = 1.0
    timeout: float = 300.0

    def __post_init__(self) -> None:
        parts = _split(self.url)
        path = parts.path.rstrip("/").removesuffix("/chat/completions")
        self._parts = parts._replace(path=path, fragment="")
        self._shown = parts._replace(path=path, query="", fragment="").geturl()
        self._opener = urllib.request.build_opener(_NoRedirects)
        self._reached, self._stop, self._lock = False, threading.Event(), threading.Lock()
        self._settings: dict[str, Any] = {}
        if self.key and parts.scheme == "http" and parts.hostname not in _LOCAL:
            logger.warning("--judge-url: the key goes to %s without encryption; https would hide it", self._shown)

    def stop(self) -> None:
        """No thread asks again."""
        self._stop.set()

    def check(self) -> None:
        """See that somebody is there who takes the key, at no cost: by the list of models, where the service has one.

        Raises:
            UserError: nobody is, or the key is refused.
        """
        with contextlib.suppress(_Passing):  # it is tried again when there is something to ask
            self._request("/models", None)

    def chat(self, messages: Sequence[Mapping[str, str]], temperature: float, max_tokens: int) -> str:
        """The model's answer; empty where it gave none.

        Raises:
            UserError: the service refuses, or did not answer in `attempts` attempts.
        """
        with self._lock:
            self._settings = self._settings or {"temperature": temperature, "max_tokens": max_tokens}
        pause, reason, attempt = 0.0, "", 0
        while attempt < self.attempts and not self._stop.wait(pause):
            attempt += 1
            try:
                body = {"model": self.model, "messages": list(messages), **self._settings}
                return self._answer(self._request("/chat/completions", body))
            except _Passing as error:
                reason = str(error)
                pause = min(self.pause * 2 ** (attempt - 1) if error.pause is None else error.pause, _LONGEST_PAUSE)
        raise UserError(f"--judge-url: {self._shown} did not answer in {attempt} attempts; at last: {reason}")

    def _answer(self, reply: bytes) -> str:
        try:
            content = json.loads(reply)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError):
            raise UserError(
                f"--judge-url: {self._shown} answers, but not with choices, as /chat/completions does: is it the URL "
                "of an OpenAI-compatible service, .../v1?"
            ) from None
        return self._cleared(content) if isinstance(content, str) else ""

    def _request(self, path: str, body: Mapping[str, Any] | None) -> bytes:
        """What the service replies. Exceptions go on without those that they come from: these may hold headers."""
        try:
            timeout = min(self.timeout, _CHECK_TIMEOUT) if body is None else self.timeout
            with self._opener.open(self._to(path, body), timeout=timeout) as response:
                content = response.read()
            self._reached = True
            return content
        except urllib.error.HTTPError as error:
            with error:
                failure = self._failure(error, body)
        except (OSError, http.client.HTTPException) as error:
            failure = self._no_reply(error)
        raise failure from None

    def _to(self, path: str, body: Mapping[str, Any] | None) -> urllib.request.Request:
        url = self._parts._replace(path=self._parts.path + path).geturl()
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "titan_hd"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        return urllib.request.Request(url, data, headers)

    def _no_reply(self, error: Exception) -> Exception:
        """There was no reply, or only a part of one."""
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        reason = self._cleared(" ".join(str(cause).split())) or type(cause).__name__
        if not self._reached and isinstance(error, urllib.error.URLError):  # no connection, not even at first
            return UserError(f"--judge-url: {self._shown} cannot be reached: {reason}")
        return _Passing(reason)

    def _failure(self, error: urllib.error.HTTPError, body: Mapping[str, Any] | None) -> Exception:
        """What a status other than 200 means."""
        self._reached = True
        said, code, parameter = self._said(error)
        status = f"{error.code} {said}".strip()
        out_of_credit = code == "insufficient_quota"  # also a 429, which no pause mends
        if error.code in (401, 403):
            key = (
                f"the key is refused; it is taken from {KEY_VARIABLE} or --judge-key-file"
                if self.key
                else (f"it wants a key: put it into {KEY_VARIABLE} or a file for --judge-key-file")
            )
            return UserError(f"--judge-url: {self._shown}: {key} ({status})")
        if body is None:  # a service without a list of models
            return _Passing(status)
        if (error.code in _PASSING or error.code >= 500) and not out_of_credit:
            return _Passing(status, _seconds(error.headers.get("Retry-After")))
        if error.code == 400 and self._settle_without(parameter):
            return _Passing(status, 0.0)
        hint = ""
        if error.code in (404, 405):
            hint = f"; is there a model {self.model!r} (--judge-model), and does the URL end as OpenAI's, in /v1?"
        elif 300 <= error.code < 400:
            hint = "; name the address that it sends to"
        return UserError(f"--judge-url: {self._shown} refuses: {status}{hint}")

    def _said(self, error: urllib.error.HTTPError) -> tuple[str, Any, Any]:
        """The message, code and parameter of an error."""
        try:
            text = error.read(65536).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            text = ""
        try:
            reply = json.loads(text)
        except ValueError:
            reply = None
        about = reply.get("error", reply) if isinstance(reply, dict) else None
        if isinstance(about, dict):
            text = str(about.get("message") or text)
            code, parameter = about.get("code"), about.get("param")
        else:
            code = parameter = None
        return " ".join(self._cleared(text or str(error.reason)).split())[:_SHOWN], code, parameter

    def _settle_without(self, parameter: Any) -> bool:
        """Models that reason take neither a temperature nor, under its old name, the limit; the rest stays as it is."""
        with self._lock:
            if parameter not in ("temperature", "max_tokens"):
                return False
            if parameter not in self._settings:
                return True  # another thread was first
            settings = dict(self._settings)
            value = settings.pop(parameter)
            if parameter == "max_tokens":
                settings["max_completion_tokens"] = value
            else:
                logger.warning("--judge-model: %s takes no temperature; it is asked without", self.model)
            self._settings = settings
            return True

    def _cleared(self, text: str) -> str:
        return text.replace(self.key, "[key]") if len(self.key) >= _SHORTEST_KEY else text


def _split(url: str) -> SplitResult:
    example = "--judge-url: must be a URL such as https://api.openai.com/v1 or http://127.0.0.1:8000/v1"
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise UserError(example) from None
    if not host or parts.scheme not in ("http", "https") or not re.fullmatch(r"[!-~]+", url):
        raise UserError(example)
    if parts.username or parts.password or not re.fullmatch(r"(api-version=[\w.-]{1,30})?", parts.query):
        raise UserError(f"--judge-url: has a name or a key in it (or ?...); put the key into {KEY_VARIABLE}")
    return parts


def _seconds(text: str | None) -> float | None:
    """Of a Retry-After header; its other form, a date, is not heeded."""
    return float(text) if text and re.fullmatch(r"\d{1,9}(\.\d+)?", text.strip(), re.ASCII) else None
