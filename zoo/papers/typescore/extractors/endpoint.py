"""Any OpenAI-compatible endpoint that sees images, over HTTP. What it may do wrong ends as that image's error, in time.

The key is taken from the environment for each call and put into one header. Some servers repeat it in their answers, escaped or
not: what is told of errors is cleared of it, and a reading that holds it is an error.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import email.utils
import functools
import html.entities
import http.client
import io
import json
import logging
import os
import queue
import random
import re
import socket
import ssl
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from msgspec import Meta
from PIL import Image

from zoo.errors import UserError
from zoo.fields import Count, NonNegative, Whole, check_fields
from zoo.papers.typescore.extractors.base import (
    REVISION,
    Extraction,
    Keep,
    Seconds,
    Threads,
    aside,
    failed,
    flat,
    need,
    shorten,
)
from zoo.papers.typescore.extractors.chat import PROMPT, clean

_log = logging.getLogger("zoo")
_PIECE = 1 << 16  # bytes sent or read between two looks at the clock
_ERROR_BYTES, _ERROR_S = 1 << 16, 5.0  # what is read of an answer that tells of an error, and for how long
_AGAIN = {408, 425, 429}  # and 5xx
_SHUT = {401, 403}  # no other image will be let in either


Wait: TypeAlias = Annotated[float, Meta(ge=0, le=86400)]  # seconds


@dataclass(frozen=True)
class Http:
    """POST {base_url}/chat/completions with the image and `PROMPT`, several images at a time.

    Tried again after HTTP 408, 425, 429 and 5xx, time limits, refused and broken connections and a name service that is out of
    order; waits grow twofold, and a Retry-After of the server's is kept to as far as `total_s` allows. Redirects are not
    followed: they would carry the key elsewhere.

    Images that fail by what is tried again, an unknown host, a bad certificate or HTTP 401 and 403 count as failures of the
    endpoint. After `give_up` of them, with nothing read since the first, the last image of the call is asked for, with one try.
    If it is read, the endpoint is well: the count begins anew, and the other images go on. If it too fails by the endpoint, the
    images of the call that are left are errors at once. Later calls ask for one image at a time, each with one try, until one
    is read; after a failure by the endpoint the last of the call is asked for, as above.

    An answer that repeats the key is an error, and never altered: what a picture says decides its score. Keys under 16
    characters, or of letters only, may be a picture's own words ("EMPTY", "password") and are let stand in readings; errors and
    logs are cleared of every key.
    """

    base_url: str = ""  # up to /chat/completions, such as http://127.0.0.1:8000/v1
    model: str = ""  # as the endpoint calls it
    api_key_env: str = aside(
        ""
    )  # the NAME of the environment variable that holds the key; empty where none is asked for
    max_tokens: Count = 512  # of an answer
    temperature: NonNegative | None = 0.0  # None where the endpoint refuses to be told
    token_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"  # what the endpoint calls that limit
    timeout_s: Seconds = aside(60.0)  # for one try, from connecting to the last byte
    total_s: Seconds = aside(300.0)  # for one image: all tries and waits
    retries: Annotated[int, Meta(ge=0, le=86400)] = aside(4)  # tries after the first
    backoff_s: Wait = aside(1.0)  # the first wait
    longest_wait_s: Wait = aside(30.0)  # of one wait that the server has not asked for
    give_up: Whole = aside(8)  # images in a row by whose failure the endpoint counts as out of order; 0: never
    threads: Threads = aside(4)  # images under way at once
    max_bytes: Count = aside(4_000_000)  # of an answer

    name: ClassVar[str] = "http"
    prompt: ClassVar[str] = PROMPT

    def __post_init__(self) -> None:
        check_fields(self, f"extractor {self.name}: ")
        if self.base_url:
            _check_url(self.base_url)
        if self.api_key_env and not re.fullmatch(r"[A-Z_][A-Z0-9_]{0,63}", self.api_key_env):
            raise UserError(  # without the value: it may be the key
                "extractor http: api_key_env is no name of an environment variable in capitals; put the key into a variable, "
                "and give the variable's name, such as api_key_env=VISION_API_KEY"
            )

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

    def extract(self, images: Sequence[Image.Image], keep: Keep | None = None) -> list[Extraction]:
        return self._all(images, [PROMPT] * len(images), True, keep)

    def ask(
        self, images: Sequence[Image.Image], questions: Sequence[str], keep: Keep | None = None
    ) -> list[Extraction]:
        """A question on each image; the answers as they come."""
        return self._all(images, questions, False, keep)

    @functools.cached_property
    def _trouble(self) -> _Trouble:
        """What this extractor's calls remember of the endpoint: no field, since it is no part of what is asked."""
        return _Trouble()

    def _all(
        self, images: Sequence[Image.Image], questions: Sequence[str], cleaned: bool, keep: Keep | None
    ) -> list[Extraction]:
        self.check()
        if len(images) != len(questions):
            raise ValueError(f"{len(images)} images and {len(questions)} questions")
        secret = Secret(_key(self.api_key_env))
        # here, since Pillow's reading of a file is not made for threads, and an image may come twice
        for image in images:
            with contextlib.suppress(Exception):  # `_one` tells of it
                image.load()
        stop = _Stop()
        context = ssl.create_default_context() if self.base_url.lower().startswith("https:") else None
        one = functools.partial(self._one, secret=secret, context=context, cleaned=cleaned, stop=stop)
        found: dict[int, Extraction] = {}
        todo = collections.deque(range(len(images)))
        jobs: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        done: collections.deque[tuple[int, Extraction, bool]] = collections.deque()
        ready: queue.SimpleQueue[None] = queue.SimpleQueue()

        def work() -> None:
            while (i := jobs.get()) is not None:
                done.append((i, *one(images[i], questions[i])))
                ready.put(None)

        def note(i: int, extraction: Extraction) -> None:
            found[i] = extraction
            if keep is not None:
                keep(i, extraction)

        # No pool of concurrent.futures: at its end Python would wait for requests that have been given up.
        threads = min(self.threads, len(images))
        busy = 0
        # Pictures that an endpoint fails at may stand side by side, and the same ones would stand first in every rerun. So before
        # the rest is left unasked, one from the end decides whether it is the endpoint.
        from_end, probe = False, -1
        try:
            for _ in range(threads):
                threading.Thread(target=work, name="typescore", daemon=True).start()
            while todo or busy:
                while todo and busy < (1 if self._trouble.over(self.give_up) else threads):
                    i = todo.pop() if from_end else todo.popleft()
                    probe = i if from_end else -1
                    jobs.put(i)
                    busy += 1
                ready.get()
                while done:
                    i, extraction, theirs = done[0]
                    note(i, extraction)
                    done.popleft()  # after `note`: what stops that must not lose the reading
                    busy -= 1
                    self._trouble.count(extraction, theirs)
                    if not self._trouble.over(self.give_up):
                        if from_end:  # something was read: retries wait again
                            from_end = False
                            stop.allow_waits()
                    elif theirs and i != probe:
                        from_end = True  # once those under way are done, whose waits end now
                        stop.end_waits()
                    elif theirs:
                        while todo:
                            note(todo[0], failed(self._trouble.said(), raw={"tries": 0}))
                            todo.popleft()
        except BaseException:  # Ctrl-C above all: requests end now, and what has come is kept
            stop.set()
            with contextlib.suppress(Exception):
                for i, extraction, _ in tuple(done):
                    if extraction.error is None:
                        note(i, extraction)
            raise
        finally:
            stop.set()
            for _ in range(threads):
                jobs.put(None)
        return [found[i] for i in range(len(images))]

    def _one(
        self,
        image: Image.Image,
        question: str,
        *,
        secret: Secret,
        context: ssl.SSLContext | None,
        cleaned: bool,
        stop: _Stop,
    ) -> tuple[Extraction, bool]:
        """The reading, and whether that it failed is about the endpoint."""
        start = time.monotonic()
        raw: dict[str, Any] = {"tries": 0}
        theirs = False
        try:
            body = self._body(image, question)
            answer = self._tries(body, secret, context, start + self.total_s, raw, stop)
            text = clean(answer) if cleaned else answer.strip()
            return Extraction(text, (), raw, round(time.monotonic() - start, 4)), False
        except _Fault as fault:
            said, theirs = fault.said, fault.theirs
        except Exception as error:  # a broken image, or a fault nobody thought of: no image may stop the others
            said = f"{type(error).__name__}: {error}"
        return failed(secret.out_of(said), round(time.monotonic() - start, 4), raw), theirs

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
        stop: _Stop,
    ) -> str:
        """The answer's text. What the tries were goes into `raw`."""
        url = f"{self.base_url.rstrip('/')}/chat/completions"
        while True:
            raw["tries"] += 1
            try:
                clock = Clock(min(time.monotonic() + self.timeout_s, until))
                return _content(_post(url, body, secret, context, clock, stop, self.max_bytes), secret, raw)
            except _Fault as fault:
                said = secret.out_of(fault.said)
                if fault.status:
                    raw["status"] = fault.status
                tries = "" if raw["tries"] == 1 else f" ({raw['tries']} tries)"
                last = _Fault(said + tries, theirs=fault.theirs)
                no_more = raw["tries"] > self.retries or self._trouble.over(self.give_up) or stop.wait(0)
                if no_more or not fault.again:
                    raise last from None
                wait = self.backoff_s * 2 ** min(raw["tries"] - 1, 30) * random.uniform(0.75, 1.25)
                wait = max(min(wait, self.longest_wait_s), fault.after)
                if time.monotonic() + wait >= until:
                    why = f"{self.total_s:g} s for this image are over"
                    if wait == fault.after:
                        why = f"it asks for a wait of {wait:.0f} s, more than is left of total_s={self.total_s:g}"
                    raise _Fault(f"{said}{tries}; {why}", theirs=fault.theirs) from None
                _log.info("http: %s; try %d of %d in %.1f s", said, raw["tries"] + 1, self.retries + 1, wait)
                if stop.wait(wait):
                    raise last from None


@dataclass
class _Trouble:
    """How many images in a row have failed by the endpoint, and how the last did."""

    row: int = 0
    last: str = ""

    def count(self, one: Extraction, theirs: bool) -> None:
        """Failures of other kinds, such as a broken image, tell nothing of the endpoint and leave the count as it is."""
        if one.error is None:
            self.row = 0
        elif theirs:
            self.row, self.last = self.row + 1, one.error

    def over(self, limit: int) -> bool:
        return 0 < limit <= self.row

    def said(self) -> str:
        return f"not asked: the endpoint failed {self.row} times in a row; the last: {self.last}"


class _Stop:
    """Ends waits and requests under way, in whatever threads they are, at once."""

    def __init__(self) -> None:
        self._waits = threading.Event()
        self._lock = threading.Lock()
        self._over = False
        self._ends: dict[int, Callable[[], object]] = {}

    def wait(self, seconds: float) -> bool:
        """Whether the wait was ended."""
        return self._waits.wait(seconds)

    def end_waits(self) -> None:
        self._waits.set()

    def allow_waits(self) -> None:
        """Takes `end_waits` back for waits to come, and `set` never."""
        with self._lock:
            if not self._over:
                self._waits.clear()

    def set(self) -> None:
        with self._lock:
            self._over = True
            self._waits.set()
            for end in self._ends.values():
                end()

    @contextlib.contextmanager
    def ending(self, end: Callable[[], object]) -> Iterator[None]:
        """While it is open, `set` calls `end`. Raises _Fault when `set` has been called."""
        with self._lock:
            if self._over:
                raise _Fault("stopped")
            self._ends[id(end)] = end
        try:
            yield
        finally:
            with self._lock:
                del self._ends[id(end)]


class Secret:
    """A key that shows itself nowhere. `header` gives it to the one header, `out_of` clears texts of it, `within` looks for it."""

    def __init__(self, key: str) -> None:
        self._key = key
        coded = re.escape(base64.b64encode(key.encode()).decode())
        self._seen = re.compile(f"{''.join(map(_escaped, key))}|{coded}", re.IGNORECASE) if key else None

    def __repr__(self) -> str:
        return "Secret()"

    def header(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._key}"} if self._key else {}

    def out_of(self, text: str, cut: bool = False) -> str:
        """`text` without the key. `cut`: it may end within one."""
        if self._seen is None:
            return text
        text = self._seen.sub("[key]", text)
        return text[: -16 * len(self._key)] if cut else text  # of a character &amp;#x2F; and longer may stand there

    def within(self, reading: str) -> bool:
        """Whether a reading holds the key, letter for letter: escaped or in other letters it may be what the picture says.

        Never for a key under 16 characters or of letters only, which pictures may hold as well: local servers are given keys
        such as EMPTY. Keys that are worth hiding are longer, and have digits or signs.
        """
        return len(self._key) >= 16 and not self._key.isalpha() and self._key in reading


def _escaped(c: str) -> str:
    """A pattern for an ASCII character as it stands, and as JSON, HTML and addresses write it, escaped up to some times over.

    \\/ \\u002f \\x2f &#47; &#x2F; &sol; &amp;#47; %2F %252F are all a slash. Bounds, since a hostile answer may repeat a piece.
    """
    n, x = ord(c), f"{ord(c):x}"
    names = "".join(f"|{name[:-1]}" for name, text in html.entities.html5.items() if text == c and name.endswith(";"))
    return (
        rf"(?:\\{{0,8}}(?:{re.escape(c)}|u0{{2,6}}{x}|u\{{0{{0,4}}{x}\}}|x{x})"
        rf"|&(?:amp;){{0,4}}(?:#0{{0,6}}{n}|#x0{{0,6}}{x}{names});?|%(?:25){{0,4}}{x})"
    )


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
    """Why there is no reading; whether another try may help, and after how many seconds at the earliest.

    Args:
        theirs: whether it is about the endpoint, so that other images will fare no better. What may help later is.
    """

    def __init__(
        self, said: str, again: bool = False, after: float = 0.0, status: int = 0, theirs: bool = False
    ) -> None:
        super().__init__(said)
        self.said, self.again, self.after, self.status, self.theirs = said, again, after, status, theirs or again


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


def _addresses(host: str, port: int, clock: Clock, stop: _Stop) -> list[Any]:
    """`getaddrinfo`, which knows no limit of time, in a thread that is left alone when it takes too long."""
    answer: queue.SimpleQueue[list[Any] | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answer.put(socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM))
        except Exception as error:
            answer.put(error)

    with stop.ending(lambda: answer.put(_Fault("stopped"))):
        threading.Thread(target=ask, name="typescore-name", daemon=True).start()
        try:
            found = answer.get(timeout=clock.left())
        except queue.Empty:
            raise TimeoutError("the host's addresses were not told in time") from None
    if isinstance(found, Exception):
        raise found
    return found


def _connect(where: tuple[str, int], *_: Any, clock: Clock, stop: _Stop, during: contextlib.ExitStack) -> socket.socket:
    """In place of `socket.create_connection`, which gives every address the whole time: here they share what is left.

    Args:
        during: is open as long as the request; until then `stop` ends it.
    """
    found = _addresses(*where, clock, stop)
    errors: list[OSError] = []
    for i, (family, kind, protocol, _, address) in enumerate(found):
        with contextlib.ExitStack() as own:
            try:
                sock = socket.socket(family, kind, protocol)
                own.callback(sock.close)
                # one more handle on it: TLS takes the socket over, and only what is ours can be shut down from another thread
                handle = own.enter_context(sock.dup())
                own.enter_context(stop.ending(functools.partial(_shut, handle)))
                sock.settimeout(clock.left() / (len(found) - i))
                sock.connect(address)
                sock.settimeout(clock.left())  # of TLS and of a proxy's answer
            except OSError as error:
                errors.append(error)
                continue
            during.push(own.pop_all())
            return sock
    late = [error for error in errors if isinstance(error, TimeoutError)]
    raise (late or errors or [OSError("the host has no address")])[0]


def _shut(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


class _Connection(http.client.HTTPConnection):
    """Connects as it is told, and reads and sends by the clock."""

    def __init__(self, *args: Any, clock: Clock, connect: Callable[..., socket.socket], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._clock, self._create_connection = clock, connect

    def connect(self) -> None:
        super().connect()
        self.sock: Any = _Socket(self.sock, self._clock)


class _TlsConnection(_Connection, http.client.HTTPSConnection):
    """The same over TLS, which `super().connect()` has set up by then."""


class _Plain(urllib.request.HTTPHandler):
    def __init__(self, **own: Any) -> None:
        super().__init__()
        self._own = own

    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(functools.partial(_Connection, **self._own), request)


class _Tls(urllib.request.HTTPSHandler):
    def __init__(self, **own: Any) -> None:
        super().__init__()
        self._own = own

    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(functools.partial(_TlsConnection, **self._own), request)


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _post(
    url: str, body: bytes, secret: Secret, context: ssl.SSLContext | None, clock: Clock, stop: _Stop, largest: int
) -> bytes:
    """The body of an answer that is JSON by its own word. Raises _Fault."""
    headers = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "identity"}
    request = urllib.request.Request(url, body, {**headers, "User-Agent": "zoo-typescore"}, method="POST")
    for name, value in secret.header().items():
        request.add_unredirected_header(name, value)
    allowed = clock.at - time.monotonic()
    with contextlib.ExitStack() as during:
        connect = functools.partial(_connect, clock=clock, stop=stop, during=during)
        tls = [_Tls(clock=clock, connect=connect, context=context)] if context else []
        opener = urllib.request.build_opener(_Stay, _Plain(clock=clock, connect=connect), *tls)
        try:
            with opener.open(request, timeout=clock.left()) as answer:
                return _body(answer, largest)
        except urllib.error.HTTPError as error:
            raise _refusal(error, secret, clock) from None
        except urllib.error.URLError as error:
            cause = error.reason if isinstance(error.reason, Exception) else error
            raise _broken(cause, allowed, secret) from None
        except (OSError, http.client.HTTPException) as error:
            raise _broken(error, allowed, secret) from None


def _body(answer: http.client.HTTPResponse, largest: int) -> bytes:
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
            for name in ("error", "message", "detail"):  # a text as it is meant, and not as JSON writes it
                found = found.get(name, found) if isinstance(found, dict) else found
            text = found if isinstance(found, str) else json.dumps(found, ensure_ascii=False)
        except (ValueError, RecursionError):
            pass
        text = text.encode("utf-8", "replace").decode()  # as in `_content`
        said = shorten(secret.out_of(text, cut=len(data) == _ERROR_BYTES))
    except (OSError, http.client.HTTPException):
        pass  # the status says enough
    finally:
        error.close()
    status = error.code
    words = f"HTTP {status} {http.client.responses.get(status, '')}".strip() + (f": {said}" if said else "")
    if 300 <= status < 400:
        words = f"HTTP {status}: the endpoint lies elsewhere, and a key is not carried along; give the new address as base_url"
    after = _retry_after(error.headers.get("Retry-After"))
    return _Fault(words, status in _AGAIN or status >= 500, after, status, theirs=status in _SHUT)


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
    """What went wrong below HTTP, and whether it may pass: a server that is started anew refuses connections for a while."""
    if isinstance(error, TimeoutError):
        return _Fault(f"no whole answer within {allowed:.3g} s", again=True)
    if isinstance(error, ConnectionRefusedError):
        return _Fault("the connection was refused: is the endpoint of base_url running?", again=True)
    if isinstance(error, socket.gaierror):  # EAI_AGAIN: the name service did not answer; else it knows no such host
        passing = error.errno == socket.EAI_AGAIN
        return _Fault(f"the host of base_url is not found ({error.strerror})", again=passing, theirs=True)
    if isinstance(error, ssl.SSLCertVerificationError):
        return _Fault(f"the endpoint's certificate does not hold ({error.verify_message})", theirs=True)
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
    if secret.within(content):  # not cut out of it: another text would be scored than was read
        raise _Fault(
            "the answer repeats the key of api_key_env; no answer is kept that holds the key: ask an endpoint that does not repeat "
            "it, or take another key where the picture itself shows this one"
        )
    raw["content"] = content
    return content


def _key(name: str) -> str:
    """The key in the environment variable `name`; "" where no name is given. Errors never show it.

    Nor do they show a name that may be the key: some keys are capitals and digits only.
    """
    if not name:
        return ""
    key = os.environ.get(name, "").strip()
    if not key:
        shown = repr(name) if re.fullmatch(r"[A-Z0-9_]*_[A-Z0-9_]*(KEY|TOKEN)", name) else "a name not shown here"
        raise UserError(
            f"extractor http: api_key_env is {shown}, and no such environment variable is set; give the NAME of a variable, "
            'export it with the key, or give api_key_env="" where the endpoint asks for none'
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
