"""The HTTP client of TypeScore against an endpoint of every fault."""

from __future__ import annotations

import contextlib
import dataclasses
import email.utils
import io
import json
import pickle
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typescore_stub import (
    RENDERS,
    Handler,
    Stub,
    body,
    client,
    completion,
    deaf,
    hang,
    huge,
    huge_error,
    lead_to,
    oracle,
    picture,
    raw,
    reset,
    says,
    sent_image,
    status,
    trickle_body,
    trickle_error,
    trickle_headers,
)

from zoo.papers.typescore.extractors import (
    PROMPT,
    TEXT_CHUNK,
    Http,
    describe,
)


def test_oracle_through_the_wire(stub: Stub) -> None:
    """Every image comes back with its own text, whichever thread it went through, and the request is the pinned one."""
    texts = [f"text number {i} – ünïcode" for i in range(9)] + [""]
    found = client(stub, threads=1).extract([picture(text, i) for i, text in enumerate(texts)])
    assert [one.text for one in found] == texts
    assert all(one.error is None for one in found)
    asked = stub.seen[0]
    assert asked["path"] == "/v1/chat/completions"
    assert (asked["model"], asked["temperature"], asked["max_tokens"]) == ("seer", 0, 512)
    assert asked["messages"][0]["role"] == "user"
    assert asked["messages"][0]["content"][0] == {"type": "text", "text": PROMPT}
    assert set(asked) == {"model", "temperature", "max_tokens", "messages", "path"}
    assert found[0].raw == {"tries": 1, "model": "stub-1", "finish_reason": "stop", "content": texts[0]}
    assert "Authorization" not in stub.headers[0]
    json.dumps(found[0].record())


def test_what_a_render_carries_does_not_go_to_the_endpoint(stub: Stub) -> None:
    image = picture("the wanted words")
    assert image.info[TEXT_CHUNK] == "the wanted words"
    client(stub).extract([image])
    sent = sent_image(stub.seen[0])
    assert TEXT_CHUNK not in sent.info
    assert "wanted" not in json.dumps(stub.seen[0])
    assert sent.tobytes() == image.tobytes()


def test_images_go_out_side_by_side_and_come_back_in_order(stub: Stub) -> None:
    together = threading.Barrier(4, timeout=5)  # broken unless four requests are under way at once

    def act(handler: Handler) -> None:
        together.wait()
        oracle(handler)

    stub.script = [act]
    found = client(stub, threads=4).extract([picture(str(i)) for i in range(8)])
    assert [one.text for one in found] == list("01234567")


@pytest.mark.parametrize(
    "act, text",
    [
        (says(""), ""),
        (says("NO TEXT"), ""),
        (says('"open daily"'), "open daily"),
        (says("```\nopen daily\n```"), "open daily"),
        (says([{"type": "text", "text": "open "}, {"type": "text", "text": "daily"}]), "open daily"),
        (says("open daily", finish_reason="length"), "open daily"),
        (says("half \ud800 a character"), "half ? a character"),
        (body(completion("open"), None), "open"),
        (body(completion("open"), "application/problem+json; charset=utf-8"), "open"),
    ],
)
def test_good_answers(act: Callable[[Handler], None], text: str, stub: Stub) -> None:
    stub.script = [act]
    found = client(stub).extract([picture("x")])[0]
    assert (found.text, found.error) == (text, None)
    json.dumps(found.record()).encode()
    found.text.encode()


@pytest.mark.parametrize(
    "act, said, tries",
    [
        (status(500), "HTTP 500 Internal Server Error: not now (5 tries)", 5),
        (status(503, b"busy"), "HTTP 503 Service Unavailable: busy (5 tries)", 5),
        (status(429), "HTTP 429 Too Many Requests: not now (5 tries)", 5),
        (status(400), "HTTP 400 Bad Request: not now", 1),
        (status(401, b'{"error": "no such key"}'), "HTTP 401 Unauthorized: no such key", 1),
        (status(422, b'{"detail": "\\u00fcber"}'), f"HTTP 422 {HTTPStatus(422).phrase}: \u00fcber", 1),
        (status(400, b'{"error": {"message": "\\ud800"}}'), "HTTP 400 Bad Request: ?", 1),
        (status(400, b'{"error": {"code": "a\\/b"}}'), 'HTTP 400 Bad Request: {"code": "a/b"}', 1),
        (status(404, b""), "HTTP 404 Not Found", 1),
        (status(302, b"", Location="/v1/elsewhere"), "the endpoint lies elsewhere", 1),
        (status(307, b"", Location="http://127.0.0.1:9/"), "the endpoint lies elsewhere", 1),
        (body(b'{"choices": [{"message": '), "no JSON", 1),
        (body(b""), "no JSON", 1),
        (body(b"\xff\xfe\x00"), "no JSON", 1),
        (body(b"[" * 100_000), "no JSON", 1),
        (body(b"1" * 10_000), "no JSON", 1),
        (body(b"<html>hello</html>", "text/html"), "'text/html', not application/json", 1),
        (body(b"data: {}", "text/event-stream"), "'text/event-stream'", 1),
        (body(b"[]"), "choices[0].message.content", 1),
        (body(b'{"choices": []}'), "choices[0].message.content", 1),
        (body(b'{"choices": [{"message": "hi"}]}'), "choices[0].message.content", 1),
        (body(b'{"error": {"message": "model not loaded"}}'), "reports an error: model not loaded", 1),
        (says(None), "NoneType, not text", 1),
        (says(7), "int, not text", 1),
        (says("", finish_reason="length"), "raise max_tokens", 1),
        (says("a", finish_reason="content_filter"), "content filter", 1),
        (body(b'{"choices": [{"message": {"content": null, "refusal": "I must not"}}]}'), "refuses: I must not", 1),
        (body(b'"' + b"a" * 5_000_000 + b'"'), "more than 4000000 bytes", 1),
        (huge, "more than 4000000 bytes", 1),
        (huge_error, "HTTP 400 Bad Request: aaaa", 1),
        (reset, "the connection broke", 5),
        (raw(b"SSH-2.0-server\r\n"), "is no HTTP", 1),
        (raw(b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70_000 + b"\r\n\r\n"), "is no HTTP", 1),
        (
            raw(b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{"choices"'),
            "broke off within the answer",
            5,
        ),
        (
            raw(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n{"),
            "the connection broke",
            5,
        ),
    ],
)
def test_every_fault_ends_as_an_error_record_in_time(
    act: Callable[[Handler], None], said: str, tries: int, stub: Stub
) -> None:
    stub.script = [act]
    start = time.monotonic()
    found = client(stub).extract([picture("x")])[0]
    assert time.monotonic() - start < 20
    assert said in (found.error or ""), found.error
    assert found.text == ""
    assert len(found.error) <= 300
    assert len(stub.seen) == tries == found.raw["tries"]
    json.dumps(found.record())


@pytest.mark.parametrize("act", [hang, trickle_headers, trickle_body])
def test_an_endpoint_that_hangs_or_trickles_is_left_in_time(act: Callable[[Handler], None], stub: Stub) -> None:
    stub.script = [act]
    start = time.monotonic()
    found = client(stub, timeout_s=0.15, total_s=0.4, retries=9, threads=2).extract([picture("x"), picture("y")])
    assert time.monotonic() - start < 8
    assert all(one.error and "no whole answer within" in one.error for one in found)
    assert 1 <= found[0].raw["tries"] <= 4


def test_an_error_whose_words_trickle_keeps_its_status(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zoo.papers.typescore.extractors.endpoint._ERROR_S", 0.1)
    stub.script = [trickle_error]
    found = client(stub).extract([picture("x")])[0]
    assert found.error == "HTTP 400 Bad Request"
    assert found.seconds < 8


def test_a_server_that_takes_bytes_a_few_at_a_time_is_left_in_time() -> None:
    """Every single send goes through before long, and sending as a whole must end too."""
    over = threading.Event()

    def sip(server: socket.socket) -> None:
        taken = server.accept()[0]
        while not over.wait(0.02):
            taken.recv(4096)
        taken.close()

    noise = Image.frombytes("RGB", (1500, 1500), np.random.default_rng(0).bytes(1500 * 1500 * 3))
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        server.bind(("127.0.0.1", 0))
        server.listen()
        thread = threading.Thread(target=sip, args=(server,), daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/v1"
        start = time.monotonic()
        found = Http(base_url=url, model="m", timeout_s=0.5, total_s=10, retries=0).extract([noise])[0]
        over.set()
        thread.join()
    assert re.match(r"no whole answer within 0\.[45]", found.error or ""), found.error
    assert time.monotonic() - start < 20  # most of it the making of the PNG


def test_several_addresses_that_do_not_answer_share_the_time(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    with deaf() as port:
        lead_to(monkeypatch, *[port] * 12)
        start = time.monotonic()
        found = client(stub, timeout_s=0.4, retries=0).extract([picture("x")])[0]
        assert re.match(r"no whole answer within 0\.[34]", found.error or ""), found.error
        assert time.monotonic() - start < 4
        lead_to(monkeypatch, port, stub.server_address[1])  # and the last still gets its turn
        assert client(stub, timeout_s=2, retries=0).extract([picture("x")])[0].text == "x"


def test_a_slow_resolver_is_left_in_time(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    lead_to(monkeypatch, stub.server_address[1], after=6.0)
    start = time.monotonic()
    found = client(stub, timeout_s=0.2, retries=0).extract([picture("x")])[0]
    assert re.match(r"no whole answer within 0\.[12]", found.error or ""), found.error
    assert time.monotonic() - start < 5


def test_hosts_that_are_not_found_are_said_at_once(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    def getaddrinfo(*_: Any, **__: Any) -> list[Any]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    found = client(stub).extract([picture("x")])[0]
    assert found.error == "the host of base_url is not found (Name or service not known)"
    assert found.raw == {"tries": 1}
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [])
    assert "no address" in (client(stub, retries=0).extract([picture("x")])[0].error or "")


# ------------------------------------------------------------------------------------------------------------------ giving up


@pytest.mark.parametrize(
    "act, said",
    [
        (hang, "no whole answer within 0."),
        (reset, "the connection broke"),
        (status(500), "HTTP 500"),
        (status(401), "HTTP 401"),
        (status(429), "HTTP 429"),
    ],
)
def test_an_endpoint_out_of_order_is_not_asked_on_and_on(act: Callable[[Handler], None], said: str, stub: Stub) -> None:
    stub.script = [act]
    extractor = client(stub, give_up=3, threads=2, retries=1, timeout_s=0.5)
    kept: list[int] = []
    found = extractor.extract([picture(str(i)) for i in range(30)], lambda i, _: kept.append(i))
    asked = [i for i, one in enumerate(found) if one.raw["tries"]]
    assert asked in ([0, 1, 2, 29], [0, 1, 2, 3, 29])  # one may have been under way
    assert found[29].raw["tries"] == 1
    assert sorted(kept) == list(range(30))
    left = [one.error for one in found if not one.raw["tries"]]
    assert len(set(left)) == 1
    assert left[0].startswith(f"not asked: the endpoint failed {len(asked)} times in a row; the last: ")
    assert said in left[0]
    sent = len(stub.seen)
    again = extractor.extract([picture(str(i)) for i in range(9)])  # the first and the last, one try each
    assert len(stub.seen) == sent + 2
    assert [one.raw["tries"] for one in again] == [1] + [0] * 7 + [1]
    assert f"failed {len(asked) + 2} times" in again[-2].error
    stub.script = [oracle]
    assert [one.text for one in extractor.extract([picture("a"), picture("b"), picture("c")])] == ["a", "b", "c"]


def sick(*texts: str) -> Callable[[Handler], None]:
    """Fails at these pictures, and reads all others."""

    def act(handler: Handler) -> None:
        render = Image.open(io.BytesIO(RENDERS[sent_image(handler.asked).tobytes()]))
        (status(500) if render.info[TEXT_CHUNK] in texts else oracle)(handler)

    return act


def test_pictures_that_fail_side_by_side_do_not_keep_the_others_from_being_asked(stub: Stub) -> None:
    """Left unasked they would be so in every rerun: the same ones stand first."""
    texts = [str(i) for i in range(16)]
    stub.script = [sick(*texts[:12])]
    found = client(stub, backoff_s=0.0).extract([picture(text) for text in texts])
    assert [one.text for one in found] == [""] * 12 + texts[12:]
    assert all("HTTP 500" in (one.error or "") for one in found[:12])


def test_each_time_an_endpoint_seems_out_of_order_one_more_picture_decides(stub: Stub) -> None:
    stub.script = [sick(*"abcdef")]
    extractor = client(stub, threads=1, give_up=2, retries=0)
    found = extractor.extract([picture(text) for text in "abcdefghi"])
    assert [one.text for one in found] == [""] * 6 + list("ghi")
    assert all(one.raw["tries"] == 1 for one in found)
    stub.script = [sick(*"abcz")]
    found = extractor.extract([picture(text) for text in "abcdefghz"])
    assert [one.raw["tries"] for one in found] == [1, 1, 0, 0, 0, 0, 0, 0, 1]


def test_a_last_picture_that_fails_by_itself_decides_nothing(stub: Stub) -> None:
    stub.script = [status(500), status(500), status(400), oracle]
    found = client(stub, threads=1, give_up=2, retries=0).extract([picture(text) for text in "abcdef"])
    assert [one.text for one in found] == ["", "", "c", "d", "e", ""]
    assert "HTTP 400" in (found[5].error or "")


def test_after_the_last_picture_is_read_the_others_have_their_retries(stub: Stub) -> None:
    stub.script = [status(500)] * 4 + [oracle, status(500), oracle]
    start = time.monotonic()
    found = client(stub, threads=1, give_up=2, retries=1, backoff_s=0.1, longest_wait_s=9).extract(
        [picture(text) for text in "abcd"]
    )
    assert [(one.text, one.raw["tries"]) for one in found] == [("", 2), ("", 2), ("c", 2), ("d", 1)]
    assert stub.times[6] - stub.times[5] >= 0.075
    assert time.monotonic() - start < 9


def test_an_endpoint_that_is_given_up_has_its_waits_ended(stub: Stub) -> None:
    stub.script = [status(503, Retry_After="30"), status(401)]
    start = time.monotonic()
    found = client(stub, give_up=2, threads=2, total_s=60).extract([picture(str(i)) for i in range(9)])
    assert time.monotonic() - start < 15
    assert all(one.error for one in found)
    assert len(stub.seen) <= 4


@pytest.mark.parametrize("act", [status(400), status(404), says(None), body(b"no JSON")])
def test_answers_that_are_about_the_image_give_nothing_up(act: Callable[[Handler], None], stub: Stub) -> None:
    stub.script = [act]
    client(stub, give_up=1).extract([picture(str(i)) for i in range(9)])
    assert len(stub.seen) == 9


def test_a_reading_in_between_clears_the_count_and_0_gives_nothing_up(stub: Stub) -> None:
    broken, good = status(500), oracle
    stub.script = [broken, broken, good, broken, broken, good]
    extractor = client(stub, give_up=3, threads=1, retries=0)
    found = extractor.extract([picture(str(i)) for i in range(8)])
    assert [one.error is None for one in found] == [False, False, True, False, False, True, True, True]
    stub.script = [broken]
    client(stub, give_up=0, threads=1, retries=0).extract([picture("x")] * 12)
    assert len(stub.seen) == 8 + 12


def test_what_is_remembered_of_an_endpoint_is_no_part_of_the_extractor(stub: Stub) -> None:
    stub.script = [status(401)]
    used = client(stub, give_up=1)
    used.extract([picture("x")])
    assert used == client(stub, give_up=1)
    assert pickle.loads(pickle.dumps(used)) == used
    assert dataclasses.asdict(used) == dataclasses.asdict(client(stub, give_up=1))
    assert describe(used) == describe(client(stub))


@contextlib.contextmanager
def refusing() -> Iterator[int]:
    """A port that refuses connections: bound, and not listening."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def test_refused_connections_are_tried_again_until_the_endpoint_is_given_up(stub: Stub) -> None:
    said = "the connection was refused: is the endpoint of base_url running?"
    with refusing() as port:
        extractor = client(stub, base_url=f"http://127.0.0.1:{port}/v1", threads=1, give_up=2, retries=2)
        found = extractor.extract([picture(text) for text in "abcd"])
        assert [one.raw["tries"] for one in found] == [3, 3, 0, 1]
        assert [found[0].error, found[3].error] == [f"{said} (3 tries)", said]
        again = extractor.extract([picture(text) for text in "abcd"])  # no waits any more
        assert [one.raw["tries"] for one in again] == [1, 0, 0, 1]


@pytest.mark.parametrize("gone", ["server", "names"])
def test_a_server_or_a_name_service_that_comes_back_costs_no_reading(
    gone: str, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []
    with refusing() as port:

        def getaddrinfo(*_: Any, **__: Any) -> list[Any]:
            asked.append(time.monotonic())
            if gone == "names" and len(asked) < 4:
                raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
            to = port if len(asked) < 4 else stub.server_address[1]
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", to))]

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
        found = client(stub, threads=1, backoff_s=0.02, longest_wait_s=9).extract([picture("x"), picture("y")])
    assert [(one.text, one.raw["tries"]) for one in found] == [("x", 4), ("y", 1)]
    waits = np.diff(asked)
    assert all(wait >= 0.015 * 2**i for i, wait in enumerate(waits[:3])), waits


def test_after_a_passing_fault_the_reading_comes(stub: Stub) -> None:
    stub.script = [status(429), status(502), reset, oracle]
    found = client(stub).extract([picture("at last")])[0]
    assert (found.text, found.error, found.raw["tries"]) == ("at last", None, 4)


def test_waits_grow(stub: Stub) -> None:
    stub.script = [status(500)]
    client(stub, retries=3, backoff_s=0.05, longest_wait_s=9).extract([picture("x")])
    waits = np.diff(stub.times)
    assert len(waits) == 3
    assert 0.037 <= waits[0] < 2
    assert waits[1] >= 0.075
    assert waits[2] >= 0.15


def test_retry_after_is_kept_to_whatever_the_longest_wait_of_ours(stub: Stub) -> None:
    """Without the header, or with the cap on our own waits, there would be no wait to speak of."""
    stub.script = [status(429, Retry_After="0.3"), oracle]
    found = client(stub, backoff_s=0.0, longest_wait_s=0.01).extract([picture("x")])[0]
    assert found.text == "x"
    assert 0.29 <= stub.times[1] - stub.times[0] < 5


def test_retry_after_may_be_a_date(stub: Stub) -> None:
    stub.script = [status(429, Retry_After=email.utils.formatdate(time.time() + 3600, usegmt=True))]
    found = client(stub).extract([picture("x")])[0]
    assert re.search(r"it asks for a wait of 3[56]\d\d s, more than is left of total_s=10$", found.error or "")


def test_our_own_waits_are_capped(stub: Stub) -> None:
    stub.script = [status(429), status(429, Retry_After="0"), oracle]
    assert client(stub, backoff_s=30.0, longest_wait_s=0.05, total_s=60).extract([picture("x")])[0].text == "x"
    assert 0.1 <= stub.times[2] - stub.times[0] < 15


@pytest.mark.parametrize(
    "value", ["0", "-5", "soon", "nan", "inf", "1e9", "", "9" * 40, "Wed, 99 Foo 2020 00:00:00 GMT"]
)
def test_a_nonsensical_retry_after_changes_nothing(value: str, stub: Stub) -> None:
    stub.script = [status(503, Retry_After=value), oracle]
    start = time.monotonic()
    assert client(stub, longest_wait_s=60).extract([picture("x")])[0].text == "x"
    assert time.monotonic() - start < 20


def test_a_wait_beyond_the_time_of_an_image_is_not_begun(stub: Stub) -> None:
    stub.script = [status(429, Retry_After="30")]
    start = time.monotonic()
    found = client(stub, total_s=5, longest_wait_s=60).extract([picture("x")])[0]
    assert time.monotonic() - start < 4.5
    assert len(stub.seen) == 1
    asks = "it asks for a wait of 30 s, more than is left of total_s=5"
    assert found.error == f"HTTP 429 Too Many Requests: not now; {asks}"
    stub.script = [status(500)]
    found = client(stub, total_s=5, backoff_s=60, longest_wait_s=60).extract([picture("x")])[0]
    assert found.error == "HTTP 500 Internal Server Error: not now; 5 s for this image are over"


def test_fields_of_the_request_follow_the_config(stub: Stub) -> None:
    client(stub, token_field="max_completion_tokens", max_tokens=9, temperature=None).extract([picture("x")])
    assert stub.seen[0]["max_completion_tokens"] == 9
    assert "temperature" not in stub.seen[0]
    assert "max_tokens" not in stub.seen[0]


def test_questions_are_asked_as_they_are(stub: Stub) -> None:
    stub.script = [says(' "Yes." ')]
    image = picture("x")
    found = client(stub).ask([image, image], ["Is it red?", "Is it blue?"])
    assert [one.text for one in found] == ['"Yes."', '"Yes."']
    assert sorted(asked["messages"][0]["content"][0]["text"] for asked in stub.seen) == ["Is it blue?", "Is it red?"]
