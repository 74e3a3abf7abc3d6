"""A chat service that fails in every way, and the key that nobody sees."""

from __future__ import annotations

import logging
import time
import traceback
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request

import pytest

from tests.kit.chat_service import Asked, Reply, fails, says, serve
from tests.kit.errors import message
from titan_hd.errors import UserError
from titan_hd.evaluation.endpoint import Endpoint, read_key

KEY = "sk-never-shown-0123456789"


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def ask(endpoint: Endpoint) -> str:
    return endpoint.chat([{"role": "user", "content": "Why?"}], 0.0, 2048)


def refusal(endpoint: Endpoint) -> str:
    """The line of a refusal; the key is not in its traceback either, with the values of all variables."""
    with pytest.raises(UserError) as caught:
        ask(endpoint)
    shown = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    ours = [line for line in shown.format() if "/titan_hd/" in line]
    assert ours
    assert not any(KEY in line for line in ours)
    return str(caught.value)


def test_a_question_and_its_answer():
    with serve(lambda asked: says("Because.")) as service:
        endpoint = Endpoint(f"{service.url}/", "gpt-4", KEY)
        assert ask(endpoint) == "Because."
        endpoint.check()
    first, second = service.asked
    assert (first.path, first.headers["Authorization"]) == ("/v1/chat/completions", f"Bearer {KEY}")
    messages = [{"role": "user", "content": "Why?"}]
    assert first.body == {"model": "gpt-4", "messages": messages, "temperature": 0.0, "max_tokens": 2048}
    assert (second.method, second.path) == ("GET", "/v1/models")
    assert KEY not in repr(endpoint)


def test_a_server_of_ones_own_needs_no_key():
    with serve(lambda asked: says(None)) as service:
        assert ask(Endpoint(f"{service.url}/chat/completions", "m")) == ""
    with serve(lambda asked: says("[[5]]")) as other:
        assert ask(Endpoint(other.url, "m", "5")) == "[[5]]"  # some want a key, whatever it is
    assert service.asked[0].path == "/v1/chat/completions"
    assert "Authorization" not in service.asked[0].headers


def test_what_passes_is_tried_again():
    def slow(asked: Asked) -> Reply:
        time.sleep(0.5)
        return says("late")

    first = [lambda asked: fails(429), lambda asked: fails(503), lambda asked: Reply(hang_up=True), slow]
    with serve(lambda asked: first[asked.number](asked) if asked.number < 4 else says("yes")) as service:
        assert ask(Endpoint(service.url, "m", pause=0.001, timeout=0.2)) == "yes"
        assert len(service.questions) == 5


def test_pauses_double_and_a_server_can_name_them(monkeypatch):
    replies = [fails(500), fails(500), fails(429, headers={"Retry-After": "7"}), fails(500), fails(500), says("yes")]
    with serve(lambda asked: replies[asked.number]) as service:
        endpoint, pauses = Endpoint(service.url, "m", pause=1.0), []
        monkeypatch.setattr(endpoint._stop, "wait", pauses.append)
        assert ask(endpoint) == "yes"
    assert pauses == [0, 1, 2, 7, 8, 16]


def test_attempts_come_to_an_end():
    with serve(lambda asked: fails(503, f"overloaded, {KEY}")) as service:
        text = refusal(Endpoint(service.url, "m", KEY, attempts=3, pause=0.001))
    assert text == f"--judge-url: {service.url} did not answer in 3 attempts; at last: 503 overloaded, [key]"
    assert len(service.questions) == 3


@pytest.mark.parametrize(
    ("reply", "line"),
    [
        (
            fails(401, f"Incorrect API key provided: {KEY}."),
            ": the key is refused; it is taken from OPENAI_API_KEY or --judge-key-file "
            "(401 Incorrect API key provided: [key].)",
        ),
        (Reply(403, b"<html>no"), ": the key is refused; it is taken from OPENAI_API_KEY or --judge-key-file (403 <"),
        (fails(404, "no such model"), " refuses: 404 no such model; is there a model 'm' (--judge-model), and does"),
        (fails(400, "context\nlength"), " refuses: 400 context length"),
        (fails(429, "no money", code="insufficient_quota"), " refuses: 429 no money"),
        (Reply(302, headers={"Location": "http://127.0.0.1:9/"}), " refuses: 302 Found; name the address that it"),
        (Reply(body=b"<html>Welcome"), " answers, but not with choices, as /chat/completions does: is it the URL"),
        (Reply(body=b"[]"), " answers, but not with choices"),
    ],
)
def test_what_does_not_pass_is_one_line_at_once(reply: Reply, line: str):
    with serve(lambda asked: reply) as service:
        text = refusal(Endpoint(service.url, "m", KEY))
        assert text.startswith(f"--judge-url: {service.url}{line}")
        assert "\n" not in text
        assert len(service.asked) == 1


def test_nobody_is_there():
    with serve(lambda asked: says("yes")) as service:
        pass
    assert refusal(Endpoint(service.url, "m", KEY)).startswith(f"--judge-url: {service.url} cannot be reached: ")
    assert "cannot be reached" in message(Endpoint(service.url, "m", KEY).check)


def test_an_address_that_swallows_everything(monkeypatch):
    """A firewall answers nothing: the connection itself times out, within half a minute, before a model is asked."""
    endpoint, timeouts = Endpoint("http://127.0.0.1:9/v1", "m", KEY), []

    def swallow(request: Request, timeout: float) -> None:
        timeouts.append(timeout)
        raise URLError(TimeoutError("timed out"))

    monkeypatch.setattr(endpoint._opener, "open", swallow)
    assert message(endpoint.check) == "--judge-url: http://127.0.0.1:9/v1 cannot be reached: timed out"
    assert timeouts == [30]


def test_a_refused_key_shows_before_anything_is_asked():
    def answer(asked: Asked) -> Reply:
        return fails(401, f"who is {KEY}?")

    answer.takes_get = True
    with serve(answer) as service:
        assert "who is [key]?" in message(Endpoint(service.url, "m", KEY).check)
        assert "it wants a key: put it into OPENAI_API_KEY" in message(Endpoint(service.url, "m").check)
    assert service.questions == []


def test_models_that_take_other_settings(caplog):
    def answer(asked: Asked) -> Reply:
        for name in ("max_tokens", "temperature"):
            if name in asked.body:
                return fails(400, f"Unsupported parameter: {name}", param=name)
        return says(str(asked.body.get("max_completion_tokens")))

    with serve(answer) as service, caplog.at_level(logging.WARNING, "titan_hd"):
        endpoint = Endpoint(service.url, "o9")
        assert [ask(endpoint), ask(endpoint)] == ["2048", "2048"]
        assert len(service.questions) == 4  # it is learnt once
    assert caplog.messages == ["--judge-model: o9 takes no temperature; it is asked without"]


def test_the_key_comes_from_a_file_or_the_environment(monkeypatch, tmp_path: Path):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert read_key(None) == ""
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    assert read_key(None) == KEY
    path = tmp_path / "key"
    path.write_text("sk-other\n")
    assert read_key(path) == "sk-other"
    for content in (b"", b"sk-a\nsk-b", "sk-\N{BULLET}".encode(), b"sk-\xff"):
        path.write_bytes(content)
        text = message(read_key, path)
        assert text.startswith(f"--judge-key-file: {path}: must be one line of letters, digits and signs")
        assert "sk-" not in text
    assert "cannot be read: No such file" in message(read_key, tmp_path / "none")


@pytest.mark.parametrize(
    ("url", "line"),
    [
        ("api.openai.com/v1", "--judge-url: must be a URL such as https://api.openai.com/v1"),
        ("ftp://host/v1", "--judge-url: must be a URL"),
        ("http://host:port/v1", "--judge-url: must be a URL"),
        ("http://", "--judge-url: must be a URL"),
        ("http://ho st/v1", "--judge-url: must be a URL"),
        (f"https://me:{KEY}@host/v1", "--judge-url: has a name or a key in it (or ?...); put the key into OPENAI_API"),
        (f"https://host/v1?key={KEY}", "--judge-url: has a name or a key in it (or ?...); put the key into OPENAI_API"),
        (f"https://host/v1?api-version=1&key={KEY}", "--judge-url: has a name or a key in it"),
    ],
)
def test_bad_urls(url: str, line: str):
    text = message(Endpoint, url, "m")
    assert text.startswith(line)
    assert KEY not in text


def test_a_version_in_the_address_goes_with_every_request():
    with serve(lambda asked: says("yes")) as service:
        assert ask(Endpoint(f"{service.url}?api-version=2024-10-21", "m")) == "yes"
    assert service.asked[0].path == "/v1/chat/completions?api-version=2024-10-21"


def test_a_key_without_encryption_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING, "titan_hd"):
        Endpoint("http://127.0.0.1:8000/v1", "m", KEY)
        Endpoint("https://far.example/v1", "m", KEY)
        Endpoint("http://far.example/v1", "m")
        assert not caplog.messages
        Endpoint("http://far.example/v1", "m", KEY)
    (line,) = caplog.messages
    assert line == "--judge-url: the key goes to http://far.example/v1 without encryption; https would hide it"
