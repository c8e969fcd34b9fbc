"""The HTTP client of TypeScore against an endpoint of every fault; its key is shown nowhere."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import email.utils
import html
import json
import logging
import re
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typescore_stub as wire
from typescore_stub import (
    KEY,
    Handler,
    Stub,
    client,
    hang,
    huge,
    oracle,
    picture,
    raw,
    says,
    sent_image,
    status,
    trickle,
)

from zoo.errors import Retryable, UserError
from zoo.papers.typescore.extractors import PROMPT, Http, describe
from zoo.papers.typescore.extractors.base import Key, Readings

Act = Callable[[Handler], None]


def test_oracle_through_the_wire(stub: Stub) -> None:
    """Every image comes back with its own text, in order, and the request is the pinned one."""
    texts = [f"text number {i} – ünïcode" for i in range(9)] + [""]
    images = [picture(text, i) for i, text in enumerate(texts)]
    kept: dict[int, str] = {}
    found = client(stub).extract(images, lambda i, one: kept.update({i: one.text}))
    assert [one.text for one in found] == texts == [kept[i] for i in range(10)]
    assert all(one.error is None for one in found)
    (asked,) = [one for one in stub.seen if sent_image(one).tobytes() == images[0].tobytes()]
    assert asked["path"] == "/v1/chat/completions"
    assert (asked["model"], asked["temperature"], asked["max_tokens"]) == ("seer", 0, 512)
    assert asked["messages"][0]["role"] == "user"
    assert asked["messages"][0]["content"][0] == {"type": "text", "text": PROMPT}
    assert set(asked) == {"model", "temperature", "max_tokens", "messages", "path"}
    assert "Authorization" not in stub.headers[0]
    assert wire.TEXT_CHUNK not in sent_image(asked).info  # what is wanted does not go along
    assert "number" not in json.dumps(asked)
    client(stub, token_field="max_completion_tokens", max_tokens=9, temperature=None).extract(images[:1])
    assert stub.seen[-1]["max_completion_tokens"] == 9
    assert not {"temperature", "max_tokens"} & set(stub.seen[-1])


def test_images_go_out_side_by_side(stub: Stub) -> None:
    together = threading.Barrier(4, timeout=5)  # broken unless four requests are under way at once

    def act(handler: Handler) -> None:
        together.wait()
        oracle(handler)

    stub.script = [act]
    found = client(stub, threads=4).extract([picture(str(i)) for i in range(8)])
    assert [one.text for one in found] == list("01234567")


@pytest.mark.parametrize(
    "answer, text",
    [
        ("open daily", "open daily"),
        ('"open daily"', "open daily"),
        ("“open daily”", "open daily"),
        ("'it's open'", "it's open"),
        ('"open" and "closed"', '"open" and "closed"'),
        ('""open""', '""open""'),
        ("```\nopen\ndaily\n```", "open daily"),
        ("```text\n'open daily'\n```", "open daily"),
        ("```open```", "open"),
        ("NO TEXT", ""),
        ("```\nNO TEXT\n```", ""),
        ("NO TEXT HERE", "NO TEXT HERE"),
        ("", ""),
    ],
)
def test_answers_are_cleaned_of_their_wrapping(answer: str, text: str, stub: Stub) -> None:
    stub.script = [says(answer, finish_reason="length" if answer else "stop")]
    found = client(stub).extract([picture("x")])[0]
    assert (found.text, found.error) == (text, None)


def test_a_notebook_whose_loop_runs_may_read_too(stub: Stub) -> None:
    async def cell() -> str:
        return client(stub).extract([picture("open")])[0].text

    assert asyncio.run(cell()) == "open"


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
BAD = b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\n\r\n"


@pytest.mark.parametrize(
    "act, said, tries",
    [
        (status(500), 'HTTP 500: {"error": {"message": "not now"}} (5 tries)', 5),
        (status(429), "HTTP 429: ", 5),
        (status(400), "HTTP 400: ", 1),
        (status(401), "HTTP 401: ", 1),
        (status(302, b"", Location="/v1/elsewhere"), "HTTP 302", 1),
        (wire.body(b'{"choices": [{"message": '), 'no choices[0].message.content, it is: {"choices": [{"message":', 1),
        (wire.body(b"\xff\xfe\x00"), "no choices", 1),
        (wire.body(b"[" * 100_000), "no choices", 1),
        (wire.body(b'{"choices": []}'), "no choices", 1),
        (says(None), "no choices", 1),
        (says("half \ud800 a character"), "no choices", 1),
        (wire.body(b"<html>hello</html>"), "it is: <html>hello", 1),
        (wire.body(b'{"error": {"message": "model not loaded"}}'), "model not loaded", 1),
        (says("", finish_reason="length"), "raise max_tokens", 1),
        (says("a", finish_reason="content_filter"), "content filter", 1),
        (wire.body(wire.completion("")[:-4] + b', "refusal": "I must not"}}]}'), "refuses: I must not", 1),
        (huge(HEAD + b'\r\n{"choices": "'), "more than 4000000 bytes", 1),
        (huge(BAD), "HTTP 400", 1),
        (wire.reset, "the connection broke", 5),
        (raw(b"SSH-2.0-server\r\n"), "is no HTTP", 1),
        (raw(b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70_000 + b"\r\n\r\n"), "is no HTTP", 1),
        (raw(HEAD + b'Content-Length: 99\r\n\r\n{"choices"'), "the connection broke", 5),
        (raw(HEAD + b"Transfer-Encoding: chunked\r\n\r\nff\r\n{"), "the connection broke", 5),
    ],
)
def test_every_fault_ends_as_an_error_record_in_time(act: Act, said: str, tries: int, stub: Stub) -> None:
    stub.script = [act]
    start = time.monotonic()
    found = client(stub).extract([picture("x")])[0]
    assert time.monotonic() - start < 20
    assert said in (found.error or ""), found.error
    assert found.text == ""
    assert len(found.error or "") < 500
    assert len(stub.seen) == tries


@pytest.mark.parametrize("act", [hang, trickle(HEAD, 1), trickle(HEAD + b"\r\n", 100)])
def test_an_endpoint_that_hangs_or_trickles_is_left_in_time(act: Act, stub: Stub) -> None:
    stub.script = [act]
    start = time.monotonic()
    found = client(stub, timeout_s=0.15, total_s=0.4, retries=9, threads=2).extract([picture("x"), picture("y")])
    assert time.monotonic() - start < 8
    assert all(one.error and "no whole answer within" in one.error for one in found)


def test_an_error_whose_words_trickle_keeps_its_status(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoo.papers.typescore.extractors.endpoint._ERROR_S", 0.1)
    stub.script = [trickle(BAD, 100)]
    assert client(stub).extract([picture("x")])[0].error == "HTTP 400"


def test_after_a_passing_fault_the_reading_comes_and_retry_after_is_kept_to(stub: Stub) -> None:
    """Without the header there would be no wait to speak of."""
    stub.script = [status(429, Retry_After="0.3"), status(502), wire.reset, status(503, Retry_After="soon"), oracle]
    found = client(stub).extract([picture("at last")])[0]
    assert (found.text, found.error, len(stub.seen)) == ("at last", None, 5)
    assert stub.times[1] - stub.times[0] >= 0.29
    soon = email.utils.formatdate(time.time() + 3600, usegmt=True)
    for value, wait in (("30", "30"), (soon, r"3[56]\d\d")):
        stub.script = [status(429, Retry_After=value)]
        start, sent = time.monotonic(), len(stub.seen)
        found = client(stub).extract([picture("x")])[0]
        assert re.search(rf"a wait of {wait} s is more than is left of total_s=10$", found.error or ""), found.error
        assert time.monotonic() - start < 5
        assert len(stub.seen) == sent + 1


@pytest.mark.parametrize("act", [hang, status(500), status(401)])
def test_an_endpoint_out_of_order_stops_the_run_and_what_was_read_is_kept(act: Act, stub: Stub, tmp_path: Path) -> None:
    """After eight failures in a row; the next run goes on, and what failed comes last."""
    images = [picture(str(i)) for i in range(30)]
    keys = [Key(str(i), "x") for i in range(30)]

    def through(**fields: Any) -> list[str]:
        made = client(stub, threads=1, retries=0, **fields)
        some = Readings(tmp_path / "readings.jsonl").through(made, keys, images.__getitem__)
        return [one.text for _, _, one in sorted(some, key=lambda one: one[0])]

    stub.script = [oracle] * 5 + [act]
    with pytest.raises(Retryable, match="the endpoint failed 8 images in a row, the last by: "):
        through(timeout_s=0.5)
    assert 13 <= len(stub.seen) <= 14
    stub.script = [oracle]
    assert through() == [str(i) for i in range(30)]
    asked = [wire.RENDERS[sent_image(one).tobytes()] for one in stub.seen[-25:]]
    failed = [wire.RENDERS[image.tobytes()] for image in images[5:13]]
    assert asked[-8:] == failed  # what failed comes last
    assert len(stub.seen) <= 14 + 25


def test_only_failures_by_the_endpoint_count_and_a_reading_clears_the_count(stub: Stub) -> None:
    stub.script = [status(400)]
    assert all(one.error for one in client(stub).extract([picture(str(i)) for i in range(20)]))
    stub.script = [status(500)] * 7 + [oracle] + [status(500)] * 7 + [oracle]
    made = client(stub, threads=1, retries=0)
    for some in (3, 13):  # counted over all calls
        found = made.extract([picture(str(i)) for i in range(some)])
    assert [one.error is None for one in found] == [False] * 4 + [True] + [False] * 7 + [True]
    assert made == client(stub, threads=1, retries=0)
    assert describe(made) == describe(client(stub)) != describe(client(stub, model="other"))


def test_stopping_ends_waits_and_requests(stub: Stub) -> None:
    """Ctrl-C while one image waits for its answer and another for its next try: the program ends at once."""
    stub.script = [hang, status(500, Retry_After="20")]
    code = (
        "import os, signal, threading; from PIL import Image\n"
        "from zoo.papers.typescore.extractors import Http\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # what runs in the background is not given one
        "threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        f"Http(base_url={stub.url!r}, model='m', threads=2).extract([Image.new('RGB', (4, 4))] * 6)\n"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert "KeyboardInterrupt" in done.stderr
    assert time.monotonic() - start < 18  # most of it the start of Python; the answer would take 20 s


def echo(body: Callable[[str], Any], code: int = 401) -> Act:
    """Repeats the key, as servers write it."""

    def act(handler: Handler) -> None:
        said = body(handler.headers["Authorization"].removeprefix("Bearer "))
        handler.send(code, said.encode() if isinstance(said, str) else said)

    return act


@pytest.mark.parametrize(
    "act",
    [
        echo(lambda key: f'{{"error": "wrong key {key} given"}}'),
        echo(lambda key: f'{{"error": "wrong key {key} given"}}', 200),
        echo(lambda key: base64.b64encode(key.encode())),
        echo(lambda key: urllib.parse.quote(urllib.parse.quote(key, safe=""), safe="")),
        echo(lambda key: json.dumps(json.dumps(key.replace("/", "\\/")))),
        echo(lambda key: html.escape(key.replace("/", "&#x2F;").replace("=", "&#x3D;").replace("+", "&plus;"))),
        echo(lambda key: "".join(f"&#{ord(c)};" for c in key)),
        echo(lambda key: "".join(f"\\u{ord(c):04X}" for c in key)),
        echo(lambda key: wire.completion(f"open {key}"), 200),
        echo(lambda key: "x" * 262 + key * 3000, 403),
        lambda handler: handler.wfile.write(f"{handler.headers['Authorization']} is no status\r\n\r\n".encode()),
    ],
)
def test_the_key_is_nowhere_but_in_its_header(act, stub, monkeypatch, caplog, capfd, tmp_path):
    monkeypatch.setenv("SEER_KEY", KEY + "\n")
    stub.script = [act]
    extractor = client(stub, api_key_env="SEER_KEY", retries=1)
    with caplog.at_level(logging.DEBUG):
        ((_, _, found),) = Readings(tmp_path / "r").through(extractor, [Key("a", "b")], lambda i: picture("x"))
    assert stub.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert found.error
    everything = str(found) + repr(extractor) + str(describe(extractor)) + caplog.text
    everything += (tmp_path / "r").read_text() + "".join(capfd.readouterr())
    forms = [KEY, KEY[:7], base64.b64encode(KEY.encode()).decode()[:16], "Secret/Key", "Key=0", "0123456789", "Key\\"]
    plain = re.sub(r"\\+(?:u00|x)([0-9a-fA-F]{2})", lambda found: chr(int(found[1], 16)), everything)
    for text in (everything, html.unescape(html.unescape(everything)), urllib.parse.unquote(everything), plain):
        assert not [form for form in forms if form.lower() in text.lower()], text


@pytest.mark.parametrize(
    "key, text, kept",
    [
        ("EMPTY", "EMPTY shop", True),  # local servers are given keys such as EMPTY
        ("password", "Forgot your password?", True),
        ("Donaudampfschifffahrt", "Donaudampfschifffahrt", True),
        (KEY, f"in other letters {KEY.upper()}", True),
        (KEY, r"C:\u0041 &amp; %41 &#47; \/ sk-Very", True),
        (KEY, f"open {KEY} daily", False),
        ("0123456789abcdef", "open 0123456789abcdef", False),
    ],
)
def test_a_reading_that_holds_the_key_is_an_error_and_never_another_text(key, text, kept, stub, monkeypatch):
    monkeypatch.setenv("SEER_KEY", key)
    stub.script = [says(text)]
    found = client(stub, api_key_env="SEER_KEY").extract([picture("x")])[0]
    assert (found.text, found.error is None) == ((text, True) if kept else ("", False))
    assert kept or (found.error or "").startswith("the answer repeats the key of api_key_env, ")


def test_mistakes_are_told_before_anything_is_sent_and_without_a_secret(stub, monkeypatch):
    monkeypatch.setenv("BAD_KEY", "secret\nX-Evil: yes")
    cases: list[tuple[dict[str, Any], str]] = [
        ({"api_key_env": "BAD_KEY"}, "api_key_env names has spaces"),
        ({"api_key_env": "AKIASECRET"}, "api_key_env names is not set"),
        ({"api_key_env": "sk-secret-itself"}, "api_key_env is no name"),
        ({"base_url": "https://me:secret@host/v1"}, "base_url is no plain address"),
        ({"base_url": "https://host/v1?key=secret"}, "base_url is no plain address"),
        ({"base_url": "localhost:8000"}, "give http:// or https://"),
        ({"base_url": "http://h/v1/chat/completions"}, "path before /chat/completions"),
        ({"model": ""}, "base_url and model must be given"),
    ]
    for fields, said in cases:
        with pytest.raises(UserError, match=re.escape(said)) as caught:
            client(stub, **fields).extract([picture("x")])
        assert "secret" not in str(caught.value).lower()
    assert not stub.seen
    for good in ("http://127.0.0.1:8000/v1", "https://[::1]:8000/v1/", "HTTP://example.org"):
        assert dataclasses.replace(Http(), base_url=good).base_url == good
