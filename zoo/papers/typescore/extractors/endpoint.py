"""Any OpenAI-compatible endpoint that sees images, over HTTP. What it may do wrong ends as that image's error, in time.

The key is taken from the environment for each call and put into one header. Whatever comes back is cleared of it, since some
servers repeat it in their answers.
"""

from __future__ import annotations

import base64
import contextlib
import email.utils
import functools
import http.client
import io
import json
import logging
import os
import random
import re
import socket
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

from PIL import Image

from zoo.errors import UserError
from zoo.papers.typescore.extractors.base import REVISION, Extraction, aside, failed, flat, need, shorten
from zoo.papers.typescore.extractors.chat import PROMPT, clean

_log = logging.getLogger("zoo")
_PIECE = 1 << 16  # bytes sent or read between two looks at the clock
_ERROR_BYTES, _ERROR_S = 1 << 16, 5.0  # what is read of an answer that tells of an error, and for how long
_AGAIN = {408, 425, 429}  # and 5xx


@dataclass(frozen=True)
class Http:
    """POST {base_url}/chat/completions with the image and `PROMPT`, several images at a time.

    Tried again after HTTP 408, 425, 429 and 5xx, time limits and broken connections; waits grow twofold, and a Retry-After of
    the server's is kept to, both up to `longest_wait_s`. Redirects are not followed: they would carry the key elsewhere.
    """

    base_url: str = ""  # up to /chat/completions, such as http://127.0.0.1:8000/v1
    model: str = ""  # as the endpoint calls it
    api_key_env: str = aside(
        ""
    )  # the NAME of the environment variable that holds the key; empty where none is asked for
    max_tokens: int = 512  # of an answer
    temperature: float | None = 0.0  # None where the endpoint refuses to be told
    token_field: str = "max_tokens"  # what the endpoint calls that limit: max_tokens or max_completion_tokens
    timeout_s: float = aside(60.0)  # for one try, from connecting to the last byte
    total_s: float = aside(300.0)  # for one image: all tries and waits
    retries: int = aside(4)  # tries after the first
    backoff_s: float = aside(1.0)  # the first wait
    longest_wait_s: float = aside(30.0)  # of one wait
    threads: int = aside(4)  # images under way at once
    max_bytes: int = aside(4_000_000)  # of an answer

    name: ClassVar[str] = "http"
    prompt: ClassVar[str] = PROMPT

    def __post_init__(self) -> None:
        say = functools.partial(need, name=self.name)
        if self.base_url:
            _check_url(self.base_url)
        if self.api_key_env and not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,63}", self.api_key_env):
            raise UserError(  # without the value: it may be the key
                "extractor http: api_key_env is no name of an environment variable in capitals; put the key into a variable, "
                "and give the variable's name, such as api_key_env=VISION_API_KEY"
            )
        for field in ("max_tokens", "threads", "max_bytes"):
            value = getattr(self, field)
            say(value >= 1, field=field, value=value, expected="a number of at least 1")
        for field in ("timeout_s", "total_s"):
            value = getattr(self, field)
            say(0 < value <= 86400, field=field, value=value, expected="seconds above 0, at most a day")
        for field in ("retries", "backoff_s", "longest_wait_s"):
            value = getattr(self, field)
            say(0 <= value <= 86400, field=field, value=value, expected="a number of at least 0")
        known = ("max_tokens", "max_completion_tokens")
        say(self.token_field in known, field="token_field", value=self.token_field, expected=" or ".join(known))

    @property
    def batch(self) -> int:
        return 4 * self.threads

    def version(self) -> str:
        return str(REVISION)

    def check(self) -> None:
        """UserError without an address, a model or the key. Sends nothing."""
        need(bool(self.base_url), self.name, "base_url", self.base_url, "an address such as http://127.0.0.1:8000/v1")
        need(bool(self.model), self.name, "model", self.model, "the model's name at the endpoint")
        _key(self.api_key_env)

    def extract(self, images: Sequence[Image.Image]) -> list[Extraction]:
        return self._all(images, [PROMPT] * len(images), cleaned=True)

    def ask(self, images: Sequence[Image.Image], questions: Sequence[str]) -> list[Extraction]:
        """A question on each image; the answers as they come."""
        return self._all(images, questions, cleaned=False)

    def _all(self, images: Sequence[Image.Image], questions: Sequence[str], cleaned: bool) -> list[Extraction]:
        self.check()
        secret = Secret(_key(self.api_key_env))
        for (
            image
        ) in images:  # here, since Pillow's reading of a file is not made for threads, and an image may come twice
            with contextlib.suppress(Exception):  # `_one` tells of it
                image.load()
        stop = threading.Event()
        context = ssl.create_default_context() if self.base_url.lower().startswith("https:") else None
        pool = ThreadPoolExecutor(max(1, min(self.threads, len(images))), "typescore")
        one = functools.partial(self._one, secret=secret, context=context, cleaned=cleaned, stop=stop)
        try:
            return list(pool.map(one, images, questions))
        finally:  # also on Ctrl-C, when waits must end and images that have not begun must not
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _one(
        self,
        image: Image.Image,
        question: str,
        *,
        secret: Secret,
        context: ssl.SSLContext | None,
        cleaned: bool,
        stop: threading.Event,
    ) -> Extraction:
        start = time.monotonic()
        raw: dict[str, Any] = {"tries": 0}
        try:
            body = self._body(image, question)
            answer = self._tries(body, secret, context, start + self.total_s, raw, stop)
            text = clean(answer) if cleaned else answer.strip()
            return Extraction(text, (), raw, round(time.monotonic() - start, 4))
        except _Fault as fault:
            said = fault.said
        except Exception as error:  # a broken image, or a fault nobody thought of: no image may stop the others
            said = f"{type(error).__name__}: {error}"
        return failed(secret.out_of(said), round(time.monotonic() - start, 4), raw)

    def _body(self, image: Image.Image, question: str) -> bytes:
        png = io.BytesIO()
        flat(image).save(png, "png")  # Pillow does not hand on the text chunks, so what is wanted does not go along
        url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
        content = [{"type": "text", "text": question}, {"type": "image_url", "image_url": {"url": url}}]
        asked: dict[str, Any] = {"model": self.model, self.token_field: self.max_tokens}
        if self.temperature is not None:
            asked["temperature"] = self.temperature
        return json.dumps({**asked, "messages": [{"role": "user", "content": content}]}).encode()

    def _tries(
        self,
        body: bytes,
        secret: Secret,
        context: ssl.SSLContext | None,
        until: float,
        raw: dict[str, Any],
        stop: threading.Event,
    ) -> str:
        """The answer's text. What the tries were goes into `raw`."""
        while True:
            raw["tries"] += 1
            try:
                clock = Clock(min(time.monotonic() + self.timeout_s, until))
                data = _post(
                    f"{self.base_url.rstrip('/')}/chat/completions", body, secret, context, clock, self.max_bytes
                )
                return _content(data, secret, raw)
            except _Fault as fault:
                said = secret.out_of(fault.said)
                if fault.status:
                    raw["status"] = fault.status
                tries = "" if raw["tries"] == 1 else f" ({raw['tries']} tries)"
                if not fault.again or raw["tries"] > self.retries or stop.is_set():
                    raise _Fault(said + tries) from None
                wait = self.backoff_s * 2 ** min(raw["tries"] - 1, 30) * random.uniform(0.75, 1.25)
                wait = min(max(wait, fault.after), self.longest_wait_s)
                if time.monotonic() + wait >= until:
                    raise _Fault(f"{said}{tries}; {self.total_s:g} s for this image are over") from None
                _log.info("http: %s; try %d of %d in %.1f s", said, raw["tries"] + 1, self.retries + 1, wait)
                if stop.wait(wait):
                    raise _Fault(said + tries) from None


class Secret:
    """A key that shows itself nowhere. `header` gives it to the one header, `out_of` clears texts of it."""

    def __init__(self, key: str) -> None:
        self._key = key
        forms = {key, urllib.parse.quote(key, safe=""), json.dumps(key)[1:-1], base64.b64encode(key.encode()).decode()}
        words = sorted((re.escape(form) for form in forms if form), key=len, reverse=True)
        self._seen = re.compile("|".join(words), re.IGNORECASE) if key else None

    def __repr__(self) -> str:
        return "Secret()"

    def header(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._key}"} if self._key else {}

    def out_of(self, text: str, cut: bool = False) -> str:
        """`text` without the key. `cut`: it may end within one."""
        if self._seen is None:
            return text
        text = re.sub(r"\\u00([0-9a-fA-F]{2})", lambda found: chr(int(found.group(1), 16)), text)
        text = self._seen.sub("[key]", text)
        return text[: -4 * len(self._key)] if cut else text

    def out_of_reading(self, text: str) -> str:
        """`text` without the key, unless that is as short as a word: local servers are given keys such as EMPTY."""
        return self.out_of(text) if len(self._key) >= 8 else text


class Clock:
    """A moment by which something has to be over."""

    def __init__(self, at: float) -> None:
        self.at = at

    def left(self) -> float:
        """Seconds, above 0. TimeoutError when there are none."""
        left = self.at - time.monotonic()
        if left <= 0:
            raise TimeoutError("the time is over")
        return left


class _Fault(Exception):
    """Why there is no reading; whether another try may help, and after how many seconds at the earliest."""

    def __init__(self, said: str, again: bool = False, after: float = 0.0, status: int = 0) -> None:
        super().__init__(said)
        self.said, self.again, self.after, self.status = said, again, after, status


# A socket's timeout is for one read. Against an endpoint that sends a byte now and then only a clock for the whole helps.
class _Incoming(io.RawIOBase):
    def __init__(self, sock: socket.socket, clock: Clock) -> None:
        self._sock, self._clock = sock, clock
        self._raw = sock.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(self._clock.left())
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Socket:
    """What http.client needs of a socket."""

    def __init__(self, sock: socket.socket, clock: Clock) -> None:
        self._sock, self._clock = sock, clock

    def makefile(self, *args: Any, **kwargs: Any) -> io.BufferedReader:
        return io.BufferedReader(_Incoming(self._sock, self._clock))

    def sendall(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            self._sock.settimeout(self._clock.left())
            view = view[self._sock.send(view[:_PIECE]) :]

    def close(self) -> None:
        self._sock.close()


class _Connection(http.client.HTTPConnection):
    def __init__(self, *args: Any, clock: Clock, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._clock = clock

    def connect(self) -> None:
        super().connect()
        self.sock: Any = _Socket(self.sock, self._clock)


class _TlsConnection(http.client.HTTPSConnection):
    def __init__(self, *args: Any, clock: Clock, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._clock = clock

    def connect(self) -> None:
        super().connect()
        self.sock: Any = _Socket(self.sock, self._clock)


class _Plain(urllib.request.HTTPHandler):
    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(functools.partial(_Connection, clock=self._clock), request)


class _Tls(urllib.request.HTTPSHandler):
    def __init__(self, clock: Clock, context: ssl.SSLContext) -> None:
        super().__init__()
        self._clock, self._own = clock, context

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(functools.partial(_TlsConnection, clock=self._clock, context=self._own), request)


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _post(url: str, body: bytes, secret: Secret, context: ssl.SSLContext | None, clock: Clock, largest: int) -> bytes:
    """The body of an answer that is JSON by its own word. Raises _Fault."""
    handlers: list[Any] = [_Stay, _Plain(clock), *([_Tls(clock, context)] if context else [])]
    headers = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
    request = urllib.request.Request(url, body, {**headers, "User-Agent": "zoo-typescore"}, method="POST")
    for name, value in secret.header().items():
        request.add_unredirected_header(name, value)
    allowed = clock.at - time.monotonic()
    try:
        with urllib.request.build_opener(*handlers).open(request, timeout=clock.left()) as answer:
            return _body(answer, clock, largest)
    except urllib.error.HTTPError as error:
        raise _refusal(error, secret, clock) from None
    except urllib.error.URLError as error:
        cause = error.reason if isinstance(error.reason, Exception) else error
        raise _broken(cause, allowed, secret) from None
    except (OSError, http.client.HTTPException) as error:
        raise _broken(error, allowed, secret) from None


def _body(answer: http.client.HTTPResponse, clock: Clock, largest: int) -> bytes:
    said = answer.headers.get("Content-Type")
    kind = answer.headers.get_content_type()
    if said is not None and kind != "application/json" and not kind.endswith("+json"):
        raise _Fault(f"the answer is {kind!r}, not application/json: is base_url the address of an API?")
    too_large = _Fault(f"the answer has more than {largest} bytes, which no transcription has")
    if (answer.length or 0) > largest:
        raise too_large
    pieces: list[bytes] = []
    while piece := answer.read(min(_PIECE, largest + 1)):
        pieces.append(piece)
        if sum(map(len, pieces)) > largest:
            raise too_large
    if answer.length:  # less came than was announced, which `read` of a size does not say
        raise _Fault("the connection broke off within the answer", again=True)
    return b"".join(pieces)


def _refusal(error: urllib.error.HTTPError, secret: Secret, clock: Clock) -> _Fault:
    """What an answer other than 200 says."""
    said = ""
    try:
        clock.at = min(clock.at, time.monotonic() + _ERROR_S)
        data = error.read(_ERROR_BYTES)
        text = data.decode("utf-8", "replace")
        try:
            found = json.loads(text)
            found = found.get("error", found) if isinstance(found, dict) else found
            text = str(found["message"]) if isinstance(found, dict) and "message" in found else text
        except (ValueError, RecursionError):
            pass
        said = shorten(secret.out_of(text, cut=len(data) == _ERROR_BYTES))
    except (OSError, http.client.HTTPException):
        pass  # the status says enough
    finally:
        error.close()
    status = error.code
    words = f"HTTP {status} {http.client.responses.get(status, '')}".strip() + (f": {said}" if said else "")
    if 300 <= status < 400:
        words = f"HTTP {status}: the endpoint lies elsewhere, and a key is not carried along; give the new address as base_url"
    return _Fault(words, status in _AGAIN or status >= 500, _retry_after(error.headers.get("Retry-After")), status)


def _retry_after(value: str | None) -> float:
    """Seconds, of a number or a date; 0 where there is neither."""
    value = (value or "").strip()
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", value):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError, IndexError):
        return 0.0


def _broken(error: BaseException, allowed: float, secret: Secret) -> _Fault:
    """What went wrong below HTTP, and whether it may pass. An address that nobody answers at is no such thing."""
    if isinstance(error, TimeoutError):
        return _Fault(f"no whole answer within {allowed:.3g} s", again=True)
    if isinstance(error, ConnectionRefusedError):
        return _Fault("the connection was refused: is the endpoint of base_url running?")
    if isinstance(error, socket.gaierror):
        return _Fault(f"the host of base_url is not found ({error.strerror})")
    if isinstance(error, ssl.SSLCertVerificationError):
        return _Fault(f"the endpoint's certificate does not hold ({error.verify_message})")
    said = secret.out_of(str(error)) or type(error).__name__
    if isinstance(error, OSError | http.client.IncompleteRead):
        return _Fault(f"the connection broke ({shorten(said)})", again=True)
    return _Fault(f"the answer is no HTTP ({type(error).__name__}: {shorten(said)})")


def _content(data: bytes, secret: Secret, raw: dict[str, Any]) -> str:
    """choices[0].message.content, and what else is worth keeping into `raw`. Raises _Fault."""
    try:
        answer = json.loads(data)
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, no UTF-8, an endless number
        raise _Fault(f"the answer is no JSON ({shorten(secret.out_of(str(error)))})") from None
    if isinstance(answer, dict) and answer.get("error"):
        problem = answer["error"]
        said = problem.get("message") if isinstance(problem, dict) else problem
        raise _Fault(f"the endpoint reports an error: {shorten(secret.out_of(str(said)))}")
    try:
        choice = answer["choices"][0]
        message = choice["message"]
        content = message["content"]
        refusal, ended = message.get("refusal"), choice.get("finish_reason")
        if isinstance(content, list):  # some answer in parts
            content = "".join(part["text"] for part in content if part["type"] == "text")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise _Fault("the answer has no choices[0].message.content") from None
    for key, value in (("model", answer.get("model")), ("finish_reason", ended)):
        if isinstance(value, str):
            raw[key] = secret.out_of(value)[:200]
    if refusal:
        raise _Fault(f"the model refuses: {shorten(secret.out_of(str(refusal)))}")
    if ended == "content_filter":
        raise _Fault("the endpoint's content filter held the answer back")
    if not isinstance(content, str):
        raise _Fault(f"choices[0].message.content is {type(content).__name__}, not text")
    if not content.strip() and ended == "length":
        raise _Fault("the answer ended before its first word; raise max_tokens")
    content = content.encode("utf-8", "replace").decode()  # JSON can hold halves of characters, files cannot
    raw["content"] = secret.out_of_reading(content)
    return str(raw["content"])


def _key(name: str) -> str:
    """The key in the environment variable `name`; "" where no name is given. Errors never show it."""
    if not name:
        return ""
    key = os.environ.get(name, "").strip()
    if not key:
        raise UserError(
            f"extractor http: api_key_env is {name!r}, and no such environment variable is set; export it with the key, or "
            'give api_key_env="" where the endpoint asks for none'
        )
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        raise UserError(
            f"extractor http: the key in the environment variable {name} has spaces or characters outside ASCII; export it anew"
        )
    return key


def _check_url(url: str) -> None:
    """UserError unless `url` is a plain address. Not shown where it may hold a secret."""
    try:
        parts = urllib.parse.urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise UserError(f"extractor http: base_url is {url!r}, which is no address; {_ADDRESS}") from None
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UserError(
            "extractor http: base_url holds a name, a password or a query; give the address alone, and the key by api_key_env"
        )
    if parts.scheme not in ("http", "https") or not host or re.search(r"[\s\x00-\x1f\x7f]", url) or not url.isascii():
        raise UserError(f"extractor http: base_url is {url!r}; {_ADDRESS}")
    if parts.path.rstrip("/").endswith("/chat/completions"):
        raise UserError(f"extractor http: base_url is {url!r}; leave /chat/completions off, it is added")


_ADDRESS = "give http:// or https://, the host and the path before /chat/completions, such as http://127.0.0.1:8000/v1"
