"""The key of an endpoint is shown nowhere; what is stopped keeps what was read."""

from __future__ import annotations

import base64
import html
import json
import logging
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typescore_stub import (
    KEY,
    Handler,
    Stub,
    client,
    deaf,
    hang,
    lead_to,
    oracle,
    picture,
    says,
    status,
)

from zoo.errors import UserError
from zoo.papers.typescore.extractors import (
    Cached,
    Extraction,
    Http,
    describe,
    get_extractor,
)
from zoo.papers.typescore.extractors.endpoint import Secret

# ---------------------------------------------------------------------------------------------------------------------- key


def echo(code: int, form: Callable[[str], str] = str) -> Callable[[Handler], None]:
    """Repeats the key in the body."""

    def act(handler: Handler) -> None:
        key = handler.headers["Authorization"].removeprefix("Bearer ")
        handler.send(code, json.dumps({"error": {"message": f"wrong key {form(key)} given"}}).encode())

    return act


def echo_plain(handler: Handler) -> None:
    """So much of it that what is shown, and what is read, ends within a key."""
    handler.send(403, ("x" * 262 + handler.headers["Authorization"] * 3000).encode(), "text/plain")


def echo_kind(handler: Handler) -> None:
    handler.send(200, b"", f"text/{handler.headers['Authorization'].removeprefix('Bearer ')}")


def echo_reading(handler: Handler) -> None:
    key = handler.headers["Authorization"]
    handler.send(200, json.dumps({"model": key, "choices": [{"message": {"content": f"open {key}"}}]}).encode())


def echo_escaped(handler: Handler) -> None:
    key = handler.headers["Authorization"]
    handler.send(400, ("oops " + "".join(f"\\u{ord(c):04x}" for c in key)).encode(), "text/plain")


def echo_as(form: Callable[[str], str], kind: str = "text/html") -> Callable[[Handler], None]:
    """Repeats the key as pages and other servers write it."""

    def act(handler: Handler) -> None:
        key = handler.headers["Authorization"].removeprefix("Bearer ")
        handler.send(401, f'{{"error": "wrong key {form(key)} given"}}'.encode(), kind)

    return act


def slashed(key: str) -> str:
    return key.replace("/", "\\/")


def entities(key: str) -> str:
    return key.replace("/", "&#x2F;").replace("=", "&#x3D;").replace("+", "&plus;")


def numbered(key: str) -> str:
    return "".join(f"&#{ord(c)};" for c in key)


def percented(key: str) -> str:
    return "".join(f"%{ord(c):02x}" for c in key)


def in_unicode(key: str) -> str:
    return "".join(f"\\u{ord(c):04X}" for c in key)


def echo_status_line(handler: Handler) -> None:
    handler.wfile.write(f"{handler.headers['Authorization']} is no status\r\n\r\n".encode())


@pytest.mark.parametrize(
    "act",
    [
        echo(401),
        echo(500),
        echo(200),
        echo(401, str.upper),
        echo(401, lambda key: base64.b64encode(key.encode()).decode()),
        echo(401, lambda key: urllib.parse.quote(key, safe="")),
        echo(401, lambda key: urllib.parse.quote(urllib.parse.quote(key, safe=""), safe="")),
        echo(401, entities),
        echo(401, lambda key: html.escape(entities(key))),
        echo(401, in_unicode),
        echo_as(slashed, "application/json"),
        echo_as(slashed),
        echo_as(lambda key: json.dumps(slashed(key))[1:-1]),
        echo_as(entities),
        echo_as(numbered),
        echo_as(percented),
        echo_as(in_unicode),
        echo_as(lambda key: "".join(f"\\x{ord(c):x}" for c in key)),
        echo_plain,
        echo_kind,
        echo_reading,
        echo_escaped,
        echo_status_line,
        status(401),
        says("fine"),
    ],
)
def test_the_key_is_nowhere_but_in_its_header(
    act: Callable[[Handler], None],
    stub: Stub,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("SEER_KEY", KEY + "\n")
    stub.script = [act]
    extractor = client(stub, api_key_env="SEER_KEY", retries=1)
    with caplog.at_level(logging.DEBUG):
        found = Cached(extractor, tmp_path).extract([picture("x")])[0]
    assert stub.headers[0]["Authorization"] == f"Bearer {KEY}"
    files = "".join(path.read_text() for path in tmp_path.rglob("*.json"))
    out = "".join(capfd.readouterr())
    everything = (
        json.dumps(found.record()) + str(found) + repr(extractor) + str(describe(extractor)) + caplog.text + files + out
    )
    forms = [KEY, KEY[:7], base64.b64encode(KEY.encode()).decode()[:16], "sk-Very%2B", json.dumps(KEY)[1:-1]]
    forms += ["Secret/Key", "Key=0", "0123456789", "Key\\", "Key&", "Key%"]
    for text in (everything, html.unescape(html.unescape(everything)), urllib.parse.unquote(everything)):
        assert not [form for form in forms if form.lower() in text.lower()], text
    plain = re.sub(r"\\+(?:u00|x)([0-9a-fA-F]{2})", lambda found: chr(int(found[1], 16)), everything)
    assert not [form for form in forms if form.lower() in plain.lower()], plain


def test_a_text_that_was_cut_does_not_end_in_a_piece_of_the_key() -> None:
    secret = Secret(KEY)
    for end in range(1, len(KEY) + 1):
        assert KEY[:3] not in secret.out_of("a" * 500 + KEY + KEY[:end], cut=True)
    assert KEY not in repr(secret)


@pytest.mark.parametrize(
    "key, text",
    [
        ("EMPTY", "EMPTY shop"),
        ("password", "Forgot your PASSWORD?"),
        ("password", "Forgot your password?"),
        ("local-key-1234", "the local-key-1234"),
        ("Donaudampfschifffahrt", "Donaudampfschifffahrt"),
        (KEY, f"in other letters {KEY.upper()}"),
        (KEY, f"escaped {urllib.parse.quote(KEY, safe='')}"),
    ],
)
def test_a_key_spoils_no_reading(key: str, text: str, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Local servers are given keys such as EMPTY, and EMPTY may be what a sign says."""
    monkeypatch.setenv("SEER_KEY", key)
    found = client(stub, api_key_env="SEER_KEY").extract([picture(text)])[0]
    assert (found.text, found.error, found.raw["content"]) == (text, None, text)


@pytest.mark.parametrize("key", [KEY, "0123456789abcdef", "no-key-needed-here"])
def test_a_reading_that_holds_the_key_is_an_error_and_not_another_text(
    key: str, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEER_KEY", key)
    stub.script = [says(f"open {key} daily")]
    extractor = client(stub, api_key_env="SEER_KEY", give_up=1)
    for found in (*extractor.extract([picture("x"), picture("y")]), *extractor.ask([picture("x")], ["Is it red?"])):
        assert (found.error or "").startswith("the answer repeats the key of api_key_env; ")
        assert not (found.error or "").endswith("...")
        assert found.text == ""
        assert found.raw["tries"] == 1
        assert key not in json.dumps(found.record())


def test_a_key_changes_nothing_else_in_a_reading(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEER_KEY", KEY)
    said = r"C:\u0041 &amp; %41 &#47; \/ sk-Very"
    stub.script = [says(said)]
    assert client(stub, api_key_env="SEER_KEY").extract([picture("x")])[0].text == said


@pytest.mark.parametrize("piece", ["\\", "&amp;", "&#0", "%25", "\\u", "s", KEY[:-1]])
def test_an_answer_of_many_pieces_is_searched_in_no_time(piece: str) -> None:
    start = time.monotonic()
    Secret(KEY).out_of(piece * (60_000 // len(piece)))
    assert time.monotonic() - start < 6


@pytest.mark.parametrize("value", ["AKIA1234SECRET", "AKIA_SECRET_1", "SECRETKEY", "SECRETTOKEN"])
def test_a_key_in_place_of_its_name_is_not_shown(value: str, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(value, raising=False)
    with pytest.raises(
        UserError, match=r"api_key_env is a name not shown here, .* give the NAME of a variable"
    ) as caught:
        client(stub, api_key_env=value).check()
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize("value", [None, "", "  "])
def test_without_the_key_nothing_is_sent(value: str | None, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SEER_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("SEER_KEY", value)
    with pytest.raises(UserError, match="api_key_env is 'SEER_KEY', and no such environment variable is set"):
        client(stub, api_key_env="SEER_KEY").extract([picture("x")])
    assert not stub.seen


def test_errors_about_keys_do_not_show_them(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEER_KEY", "secret\nX-Evil: yes")
    cases: list[Callable[[], Any]] = [
        lambda: client(stub, api_key_env="SEER_KEY").extract([picture("x")]),
        lambda: get_extractor("http", api_key_env="sk-secret-itself"),
        lambda: get_extractor("http", base_url="https://me:secret@host/v1"),
        lambda: get_extractor("http", base_url="https://host/v1?key=secret"),
    ]
    for case in cases:
        with pytest.raises(UserError) as caught:
            case()
        assert "secret" not in str(caught.value)
        assert caught.value.__cause__ is None
    assert not stub.seen


def test_a_redirect_takes_the_key_nowhere(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEER_KEY", KEY)
    stub.script = [status(303, b"", Location=f"{stub.url}/elsewhere")]
    assert client(stub, api_key_env="SEER_KEY").extract([picture("x")])[0].error
    assert len(stub.headers) == 1


def test_nothing_is_sent_without_address_and_model() -> None:
    for fields in ({"model": "m"}, {"base_url": "http://127.0.0.1:1"}):
        with pytest.raises(UserError, match="is ''"):
            Http(**fields).extract([picture("x")])


def test_stopping_ends_waits_and_requests(stub: Stub) -> None:
    """Ctrl-C while one image waits for its answer and another for its next try: the program ends at once."""
    stub.script = [hang, status(500)]
    code = (
        "import os, signal, threading; from PIL import Image\n"
        "from zoo.papers.typescore.extractors import Http\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # what runs in the background is not given one
        "threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        f"Http(base_url={stub.url!r}, model='m', backoff_s=30, threads=2).extract([Image.new('RGB', (4, 4))] * 6)\n"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert "KeyboardInterrupt" in done.stderr
    assert time.monotonic() - start < 18  # most of it the start of Python; the answer would take 20 s


@pytest.fixture
def interrupted() -> Iterator[Callable[[Handler], None]]:
    """An answer that never comes: instead, the main thread gets Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever runs the tests may have changed it
    main = threading.get_ident()

    def act(handler: Handler) -> None:
        signal.pthread_kill(main, signal.SIGINT)
        hang(handler)

    yield act
    signal.signal(signal.SIGINT, before)


def test_readings_that_are_done_are_kept_when_the_batch_is_stopped(
    stub: Stub, tmp_path: Path, interrupted: Callable[[Handler], None]
) -> None:
    stub.script = [hang, oracle, oracle, oracle, status(400), interrupted]
    texts = list("abcdefgh")
    kept: dict[int, str] = {}
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        Cached(client(stub, threads=2), tmp_path).extract(
            [picture(text) for text in texts], lambda i, one: kept.update({i: one.error or one.text})
        )
    assert time.monotonic() - start < 10
    assert len(list(tmp_path.rglob("*.json"))) == 3
    assert sorted(kept) in ([0, 2, 3, 4], [1, 2, 3, 4])  # whichever of the first two came first hangs
    assert all("HTTP 400" in kept[i] if i == 4 else kept[i] == texts[i] for i in kept)
    deadline = time.monotonic() + 10
    while any(thread.name == "typescore" for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "a request goes on"
        time.sleep(0.01)
    stub.script = [oracle]
    sent = len(stub.seen)
    assert [one.text for one in Cached(client(stub), tmp_path).extract([picture(text) for text in texts])] == texts
    assert len(stub.seen) == sent + 5


def test_a_reading_whose_keeping_is_stopped_is_kept_all_the_same(stub: Stub) -> None:
    kept: list[int] = []

    def keep(i: int, one: Extraction) -> None:
        kept.append(i)
        if len(kept) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        client(stub, threads=1).extract([picture(text) for text in "abc"], keep)
    assert kept[:3] == [0, 1, 1]


@pytest.mark.parametrize("end", ["refused", "deaf", "slow names"])
def test_stopping_ends_what_has_no_connection_yet(
    end: str, stub: Stub, monkeypatch: pytest.MonkeyPatch, interrupted: Callable[[Handler], None]
) -> None:
    main = threading.get_ident()
    with deaf() as port:
        lead_to(monkeypatch, port, after=9.0 if end == "slow names" else 0.0)
        fields = {"backoff_s": 30.0, "longest_wait_s": 30.0} if end == "refused" else {}
        if end == "refused":
            stub.script = [status(500)]
            lead_to(monkeypatch, stub.server_address[1])
        start = time.monotonic()
        timer = threading.Timer(0.2, signal.pthread_kill, (main, signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            client(stub, timeout_s=20, total_s=60, **fields).extract([picture("x")] * 3)
        assert time.monotonic() - start < 5
        while any(thread.name == "typescore" for thread in threading.enumerate()):
            assert time.monotonic() - start < 8, "a request goes on"
            time.sleep(0.01)
