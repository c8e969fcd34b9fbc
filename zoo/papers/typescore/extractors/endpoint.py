"""Any OpenAI-compatible endpoint that sees images, over HTTP. What it may do wrong ends as that image's error, in time.

The key is taken from the environment for each call and put into one header. Some servers repeat it in their answers, escaped or
not: words that hold it are told to nobody, and a reading that holds it is an error.
"""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import contextlib
import email.utils
import functools
import html
import io
import json
import logging
import os
import random
import re
import time
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import msgspec
from msgspec import Meta
from PIL import Image

from zoo.errors import Retryable, UserError
from zoo.fields import Count, NonNegative, check_fields
from zoo.papers.typescore.extractors import base
from zoo.papers.typescore.extractors.base import REVISION, Extraction, Keep, aside, failed, shorten

_log = logging.getLogger("zoo")
_GIVE_UP = 8  # images in a row by whose failure the endpoint counts as out of order
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 30.0  # seconds before another try that the server has not asked for
_LARGEST, _ERROR_S = 4_000_000, 5.0  # bytes of an answer; seconds of one that tells of an error
_ADDRESS = re.compile(r"https?://(\[[\da-f:.]+\]|[\w.-]+)(:\d{1,5})?(/[^\s?#@]*)?", re.ASCII | re.IGNORECASE)
_Seconds: TypeAlias = Annotated[float, Meta(gt=0, le=86400)]  # at most a day

# A model that is not told so repairs misspelt words, which would raise the score; the text that is wanted is never told.
PROMPT = (
    "Transcribe every piece of text that is visible in this image, exactly as it is drawn, including misspellings, in reading "
    "order. Do not correct, translate, complete or describe. Output only the transcription. If there is no text output NO TEXT."
)
_FENCE = re.compile(r"^```(?:[^\n`]*\n)?(.*?)\n?```$", re.DOTALL)
_QUOTES = {'"': '"', "“": "”", "„": "“", "«": "»", "'": "'", "‘": "’", "`": "`"}


def clean(answer: str) -> str:
    """The transcription in an answer to `PROMPT`: without a code fence, one pair of quotes around it, and NO TEXT."""
    text = answer.strip()
    if len(text) > 6 and (fenced := _FENCE.match(text)):
        text = fenced.group(1).strip()
    if len(text) > 1 and _QUOTES.get(text[0]) == text[-1]:
        inner = text[1:-1]
        apart = re.sub(r"(?<=\w)['’](?=\w)", "", inner)  # an apostrophe is no quote
        if text[0] not in apart and text[-1] not in apart:  # "open" and "closed" is no pair around the whole
            text = inner.strip()
    if re.fullmatch(r"no text\.?", text, re.IGNORECASE):
        return ""
    return base.join(text.splitlines())


@dataclass(frozen=True)
class Http:
    """POST {base_url}/chat/completions with the image and `PROMPT`, several images at a time.

    Tried again after HTTP 408, 425, 429 and 5xx, time limits and broken connections; waits grow twofold, and a Retry-After of the
    server's is kept to as far as `total_s` allows. Redirects are not followed: they would carry the key elsewhere. Where eight
    images in a row fail so, or by HTTP 401 and 403, the call ends with Retryable: what has been read is kept by then.

    An answer that repeats the key is an error, and never altered: what a picture says decides its score. Keys under 16
    characters, or of letters only, may be a picture's own words ("EMPTY", "password") and are let stand in readings.
    """

    base_url: str = ""  # up to /chat/completions, such as http://127.0.0.1:8000/v1
    model: str = ""  # as the endpoint calls it
    api_key_env: str = aside("")  # the NAME of the environment variable that holds the key; empty where none is needed
    max_tokens: Count = 512  # of an answer
    temperature: NonNegative | None = 0.0  # None where the endpoint refuses to be told
    token_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"  # what the endpoint calls that limit
    timeout_s: _Seconds = aside(60.0)  # for one try, from connecting to the last byte
    total_s: _Seconds = aside(300.0)  # for one image: all tries and waits
    retries: Annotated[int, Meta(ge=0, le=1000)] = aside(4)  # tries after the first
    threads: base.Threads = aside(4)  # images under way at once

    name: ClassVar[str] = "http"
    prompt: ClassVar[str] = PROMPT
    replaced: ClassVar[dict[str, str]] = {
        "backoff_s": "waits grow from a second, or are what the server asks for; set retries and total_s",
        "longest_wait_s": "waits grow to half a minute, or are what the server asks for; set retries and total_s",
        "give_up": "after eight failures in a row the run stops with exit code 3, and the same command goes on",
        "max_bytes": "answers may have 4 MB; set max_tokens",
    }

    def __post_init__(self) -> None:
        check_fields(self, f"extractor {self.name}: ")
        # nothing is shown that may hold a secret: a key in place of its name, a password in an address
        if not re.fullmatch(r"([A-Z_][A-Z0-9_]{0,63})?", self.api_key_env):
            raise UserError(
                "extractor http: api_key_env is no name of an environment variable in capitals; export the key in one, "
                "and give its name, such as api_key_env=VISION_API_KEY"
            )
        if self.base_url and (not _ADDRESS.fullmatch(self.base_url) or "/chat/completions" in self.base_url):
            raise UserError(
                "extractor http: base_url is no plain address; give http:// or https://, the host and the path before "
                "/chat/completions, such as http://127.0.0.1:8000/v1, without a name, a password or a query"
            )

    @property
    def batch(self) -> int:
        return 4 * self.threads

    def version(self) -> str:
        return str(REVISION)

    def check(self) -> None:
        """Sends nothing."""
        base.need_packages("aiohttp")
        if not self.base_url or not self.model:
            raise UserError("extractor http: base_url and model must be given: where the endpoint is, and its model")
        _key(self.api_key_env)

    def extract(self, images: Sequence[Image.Image], keep: Keep | None = None) -> list[Extraction]:
        self.check()
        work = self._together(images, keep, _key(self.api_key_env))
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(work)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:  # in a notebook, whose own loop runs in this thread
            return pool.submit(asyncio.run, work).result()

    @functools.cached_property
    def _lost(self) -> list[str]:
        """How images failed by the endpoint since the last that was read, over all calls."""
        return []

    async def _together(self, images: Sequence[Image.Image], keep: Keep | None, key: str) -> list[Extraction]:
        import aiohttp

        gate = asyncio.Semaphore(self.threads)
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity", "User-Agent": "zoo-typescore"}
        headers |= {"Authorization": f"Bearer {key}"} if key else {}
        limit = aiohttp.ClientTimeout(total=None, sock_connect=None)  # `asyncio.timeout` is the clock of a try
        session = aiohttp.ClientSession(headers=headers, timeout=limit, trust_env=True, auto_decompress=False)

        async def one(i: int) -> Extraction:
            async with gate:
                theirs = False
                try:
                    found = Extraction(clean(await self._tries(session, self._body(images[i]), key)))
                except _Fault as fault:
                    found, theirs = failed(fault.head), fault.theirs
                except Exception as error:  # a broken image, or a fault nobody thought of: no image may stop the others
                    found = failed(_without(f"{type(error).__name__}: {error}", key))
                if keep is not None:
                    keep(i, found)
                if found.error is None:
                    self._lost.clear()
                elif theirs:  # failures of other kinds, such as a broken image, tell nothing of the endpoint
                    self._lost.append(found.error)
                if len(self._lost) >= _GIVE_UP:
                    said = f"the endpoint failed {_GIVE_UP} images in a row, the last by: {self._lost.pop()}"
                    raise Retryable(f"{said}; what was read is kept: see to the endpoint, and the same command goes on")
                return found

        try:
            async with session, asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(i)) for i in range(len(images))]
        except ExceptionGroup as found:
            raise found.exceptions[0] from None
        return [task.result() for task in tasks]

    def _body(self, image: Image.Image) -> bytes:
        png = io.BytesIO()
        base.flat(image).save(png, "png")  # Pillow leaves the text chunks out, so what is wanted does not go along
        url = "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
        content = [{"type": "text", "text": PROMPT}, {"type": "image_url", "image_url": {"url": url}}]
        asked: dict[str, Any] = {"model": self.model, self.token_field: self.max_tokens}
        if self.temperature is not None:
            asked["temperature"] = self.temperature
        return json.dumps({**asked, "messages": [{"role": "user", "content": content}]}).encode()

    async def _tries(self, session: Any, body: bytes, key: str) -> str:
        """The answer's text: the one rule of trying again. Raises _Fault."""
        import aiohttp

        now = asyncio.get_running_loop().time
        end, tries = now() + self.total_s, 0
        while True:
            tries += 1
            allowed = min(self.timeout_s, end - now())
            try:
                async with asyncio.timeout(allowed):
                    return await self._post(session, body, key)
            except TimeoutError:
                fault = _Fault(f"no whole answer within {allowed:.3g} s", again=True)
            except aiohttp.ClientResponseError as error:
                fault = _Fault("the answer is no HTTP", error.message)
            except (aiohttp.ClientError, OSError) as error:
                lasting = isinstance(error, aiohttp.ClientSSLError | aiohttp.ClientConnectorDNSError)
                said = str(error) or type(error).__name__
                fault = _Fault("the connection broke", said, again=not lasting, theirs=True)
            except _Fault as found:
                fault = found
            said = fault.head + (f": {shorten(_without(fault.words, key))}" if fault.words else "")
            wait = min(_FIRST_WAIT * 2 ** min(tries - 1, 30) * random.uniform(0.75, 1.25), _LONGEST_WAIT)
            wait = max(wait, fault.after)
            late = fault.again and tries <= self.retries and now() + wait >= end
            if not fault.again or tries > self.retries or late:
                said += f" ({tries} tries)" * (tries > 1)
                said += f"; a wait of {wait:.0f} s is more than is left of total_s={self.total_s:g}" * late
                raise _Fault(said, theirs=fault.theirs or fault.again)
            _log.info("http: %s; try %d of %d in %.1f s", said, tries + 1, self.retries + 1, wait)
            await asyncio.sleep(wait)

    async def _post(self, session: Any, body: bytes, key: str) -> str:
        url = f"{self.base_url.rstrip('/')}/chat/completions"
        async with session.post(url, data=body, allow_redirects=False) as answer:
            code, said = answer.status, b""
            if code == 200:
                return _content(await _read(answer), key)
            with contextlib.suppress(TimeoutError, _Fault):  # the status says enough
                async with asyncio.timeout(_ERROR_S):
                    said = await _read(answer)
            after = _seconds(answer.headers.get("Retry-After", "").strip())
            words, again = said.decode("utf-8", "replace"), code in (408, 425, 429) or code >= 500
            raise _Fault(f"HTTP {code}", words, again, after, theirs=code in (401, 403))  # no image will be let in


@dataclass(eq=False)
class _Fault(Exception):
    """Why there is no reading."""

    head: str
    words: str = ""  # of the server
    again: bool = False  # whether another try may help
    after: float = 0.0  # seconds to wait before it
    theirs: bool = False  # whether it is about the endpoint, so that other images will fare no better


async def _read(answer: Any) -> bytes:
    """The body of an answer. _Fault where it has more bytes than any transcription."""
    pieces = bytearray()
    async for piece in answer.content.iter_any():
        pieces += piece
        if len(pieces) > _LARGEST:
            raise _Fault(f"the answer has more than {_LARGEST} bytes")
    return bytes(pieces)


def _seconds(after: str) -> float:
    """The wait that a Retry-After asks for: a number or a date; 0 for anything else."""
    with contextlib.suppress(ValueError, TypeError, OverflowError, IndexError):
        number = re.fullmatch(r"\d{1,9}(\.\d{1,9})?", after)
        return float(after) if number else max(email.utils.parsedate_to_datetime(after).timestamp() - time.time(), 0.0)
    return 0.0


class _Message(msgspec.Struct):
    content: str
    refusal: str | None = None


class _Choice(msgspec.Struct):
    message: _Message
    finish_reason: str | None = None


class _Answer(msgspec.Struct):
    choices: Annotated[list[_Choice], Meta(min_length=1)]


def _content(data: bytes, key: str) -> str:
    """choices[0].message.content. Raises _Fault."""
    try:
        choice = msgspec.json.decode(data, type=_Answer).choices[0]
    except (ValueError, RecursionError):  # of msgspec, or no UTF-8
        raise _Fault("the answer has no choices[0].message.content, it is", data.decode("utf-8", "replace")) from None
    content, refusal = choice.message.content, choice.message.refusal
    if refusal or choice.finish_reason == "content_filter":
        raise _Fault("the model refuses", refusal or "a content filter held the answer back")
    if not content.strip() and choice.finish_reason == "length":
        raise _Fault("the answer ended before its first word; raise max_tokens")
    if len(key) >= 16 and not key.isalpha() and key in content:  # not cut out: another text would be scored
        raise _Fault("the answer repeats the key of api_key_env, and no answer is kept that holds it; take another key")
    return content


_ESCAPED = re.compile(r"\\+(?:u\{?0*|x)([0-9a-f]{2})\}?", re.IGNORECASE)


def _without(said: str, key: str) -> str:
    """What a server says, but for words that hold the key in whatever way it may be escaped: these are told to nobody."""
    said = plain = said.encode("utf-8", "replace").decode()
    for _ in range(4):  # escaped over again
        plain = _ESCAPED.sub(lambda found: chr(int(found[1], 16)), html.unescape(urllib.parse.unquote(plain)))
    coded = base64.b64encode(key.encode()).decode()
    if key and (key.replace("\\", "").casefold() in plain.replace("\\", "").casefold() or coded in said):
        return "[words that repeat the key]"
    return said[:2000]


def _key(name: str) -> str:
    """The key in the environment variable `name`; "" where no name is given. Errors show neither: the name may be the key."""
    key = os.environ.get(name, "").strip() if name else ""
    if name and not re.fullmatch(r"[\x21-\x7e]+", key):
        what = "has spaces or characters outside ASCII" if key else "is not set"
        raise UserError(f"extractor http: the variable that api_key_env names {what}; export it with the key")
    return key
