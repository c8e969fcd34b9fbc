"""The HTTP client of TypeScore against an endpoint of every fault; its key is shown nowhere."""

from __future__ import annotations

import asyncio
import base64
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
from mistakes import told
from typescore_stub import (
    DRAWN,
    TEXT_CHUNK,
    Act,
    Handler,
    Stub,
    client,
    completion,
    oracle,
    picture,
    raw,
    says,
    sent_image,
    status,
)

from zoo.errors import Retryable
from zoo.papers.typescore.extractors import PROMPT, describe
from zoo.papers.typescore.extractors.base import Key, Readings

KEY = "sk-Very+Secret/Key=0123456789"


def test_every_image_comes_back_with_its_own_text_and_the_request_is_the_pinned_one(stub: Stub) -> None:
    """Four are under way at once."""
    together = threading.Barrier(4, timeout=5)  # broken unless four requests are under way at once

    def act(handler: Handler) -> None:
        together.wait()
        oracle(handler)

    stub.script = [act] * 4 + [oracle]
    texts = [f"text number {i} – ünïcode" for i in range(9)] + [""]
    images = [picture(text) for text in texts]
    kept: dict[int, str] = {}
    found = client(stub, threads=4).extract(images, lambda i, one: kept.update({i: one.text}))
    assert [one.text for one in found] == texts == [kept[i] for i in range(10)]
    assert all(one.error is None for one in found)
    (asked,) = [one for one in stub.seen if sent_image(one).tobytes() == images[0].tobytes()]
    assert TEXT_CHUNK not in sent_image(asked).info  # what is wanted does not go along
    assert "number" not in json.dumps(asked)
    asked["messages"][0]["content"].pop()
    assert asked == {
        "path": "/v1/chat/completions",
        "model": "seer",
        "temperature": 0,
        "max_tokens": 512,
        "messages": [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}],
    }
    assert "Authorization" not in stub.headers[0]
    client(stub, token_field="max_completion_tokens", max_tokens=9, temperature=None).extract(images[:1])
    assert stub.seen[-1]["max_completion_tokens"] == 9
    assert not {"temperature", "max_tokens"} & set(stub.seen[-1])


@pytest.mark.parametrize(
    "answer, text",
    [
        ("open daily", "open daily"),
        ("“open daily”", "open daily"),
        ("'it's open'", "it's open"),
        ('"open" and "closed"', '"open" and "closed"'),
        ('""open""', '""open""'),
        ("```text\n'open\ndaily'\n```", "open daily"),
        ("```open```", "open"),
        ("```\nNO TEXT\n```", ""),
        ("NO TEXT HERE", "NO TEXT HERE"),
        ("", ""),
    ],
)
def test_answers_are_cleaned_of_their_wrapping(answer: str, text: str, stub: Stub) -> None:
    async def cell() -> Any:  # of a notebook, whose loop runs
        return client(stub).extract([picture("x")])[0]

    stub.script = [says(answer, finish_reason="length" if answer else "stop")]
    found = asyncio.run(cell())
    assert (found.text, found.error) == (text, None)


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
BAD = b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\n\r\n"
MANY = [b"a" * 1_000_000] * 50  # 50 MB, without saying so before
SLOW = [b" "] * 5000
LATE: dict[str, Any] = {"timeout_s": 0.15, "total_s": 0.4, "retries": 9}


def body(data: bytes) -> Act:
    return status(200, data)


@pytest.mark.parametrize(
    "act, said, tries",
    [
        (status(500), 'HTTP 500: {"error": {"message": "not now"}} (5 tries)', 5),
        (status(429), "HTTP 429: ", 5),
        (status(400), "HTTP 400: ", 1),
        (status(302, b"", Location="/v1/elsewhere"), "HTTP 302", 1),
        (body(b'{"choices": [{"message": '), 'no choices[0].message.content, it is: {"choices": [{"message":', 1),
        (body(b"\xff\xfe\x00"), "no choices", 1),
        (body(b"[" * 100_000), "no choices", 1),
        (body(b'{"choices": []}'), "no choices", 1),
        (says(None), "no choices", 1),
        (says(["text"]), "no choices", 1),
        (body(b'[{"message": "text"}]'), "no choices", 1),
        (says("half \ud800 a character"), "no choices", 1),
        (says("", finish_reason="length"), "raise max_tokens", 1),
        (says("a", finish_reason="content_filter"), "content filter", 1),
        (body(completion("")[:-4] + b', "refusal": "I must not"}}]}'), "refuses: I must not", 1),
        (raw(HEAD + b'\r\n{"choices": "', *MANY), "more than 4000000 bytes", 1),
        (raw(BAD, *MANY), "HTTP 400", 1),
        (raw(BAD, *SLOW, pause=0.02), "HTTP 400", 1),
        (raw(), "the connection broke", 5),
        (raw(b"SSH-2.0-server\r\n"), "is no HTTP", 1),
        (raw(HEAD + b"X: " + b"a" * 70_000 + b"\r\n\r\n"), "is no HTTP", 1),
        (raw(HEAD + b'Content-Length: 99\r\n\r\n{"choices"'), "the connection broke", 5),
        (raw(HEAD + b"Transfer-Encoding: chunked\r\n\r\nff\r\n{"), "the connection broke", 5),
        (raw(b"", pause=20), "no whole answer within", None),
        (raw(*(bytes([byte]) for byte in HEAD), pause=0.02), "no whole answer within", None),
        (raw(HEAD + b"\r\n", *SLOW, pause=0.02), "no whole answer within", None),
    ],
)
def test_every_fault_ends_as_an_error_record_in_time(act: Act, said: str, tries: int | None, stub: Stub, monkeypatch):
    monkeypatch.setattr("zoo.papers.typescore.extractors.endpoint._ERROR_S", 2.0)
    stub.script = [act]
    start = time.monotonic()
    found = client(stub, **({} if tries else LATE)).extract([picture("x")])[0]
    assert time.monotonic() - start < (20 if tries else 8)
    assert said in (found.error or ""), found.error
    assert found.text == ""
    assert len(found.error or "") < 500
    assert len(stub.seen) == tries or not tries


def test_after_a_passing_fault_the_reading_comes_and_retry_after_is_kept_to(stub: Stub) -> None:
    """Without the header there would be no wait to speak of."""
    stub.script = [status(429, Retry_After="0.3"), status(502), raw(), status(503, Retry_After="soon"), oracle]
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


@pytest.mark.parametrize("act", [raw(b"", pause=20), status(500), status(401)])
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
    asked = [DRAWN[sent_image(one).tobytes()] for one in stub.seen[-25:]]
    assert asked[-8:] == [str(i) for i in range(5, 13)]  # what failed comes last
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
    stub.script = [raw(b"", pause=20), status(500, Retry_After="20")]
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
        echo(lambda key: f'{{"error": "wrong key {key} given"}}', 200),
        echo(lambda key: base64.b64encode(key.encode())),
        echo(lambda key: urllib.parse.quote(urllib.parse.quote(key, safe=""), safe="")),
        echo(lambda key: json.dumps(json.dumps(key.replace("/", "\\/")))),
        echo(lambda key: html.escape(key.replace("/", "&#x2F;").replace("=", "&#x3D;").replace("+", "&plus;"))),
        echo(lambda key: "".join(f"&#{ord(c)};" for c in key)),
        echo(lambda key: "".join(f"\\u{ord(c):04X}" for c in key)),
        echo(lambda key: completion(f"open {key}"), 200),
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
        ("Donaudampfschifffahrt", "Donaudampfschifffahrt", True),
        (KEY, rf"C:\u0041 &amp; %41 \/ sk-Very, in other letters {KEY.upper()}", True),
        (KEY, f"open {KEY} daily", False),
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
        with told(said) as caught:
            client(stub, **fields).extract([picture("x")])
        assert "secret" not in str(caught.value).lower()
    assert not stub.seen
    for good in ("http://127.0.0.1:8000/v1", "https://[::1]:8000/v1/", "HTTP://example.org"):
        assert client(stub, base_url=good).base_url == good
