"""An endpoint of every fault, and pictures that carry their text, for the tests of TypeScore's extractors."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from zoo.papers.typescore.extractors import (
    TEXT_CHUNK,
    Http,
)

KEY = "sk-Very+Secret/Key=0123456789"


RENDERS: dict[bytes, bytes] = {}  # PNG files by their pixels


def picture(text: str, shade: int = 255) -> Image.Image:
    """A tiny image with pixels of its own, read from a PNG file that carries `text` the way a render does."""
    info = PngImagePlugin.PngInfo()
    info.add_text(TEXT_CHUNK, text)
    pixels = hashlib.shake_256(f"{shade} {text}".encode()).digest(8 * 8 * 3)
    data = io.BytesIO()
    Image.frombytes("RGB", (8, 8), pixels).save(data, "png", pnginfo=info)
    RENDERS[pixels] = data.getvalue()
    return Image.open(io.BytesIO(data.getvalue()))


# ------------------------------------------------------------------------------------------------------------------ endpoint


def completion(content: Any, **more: Any) -> bytes:
    return json.dumps({"model": "stub-1", "choices": [{"message": {"content": content}, **more}]}).encode()


class Stub(http.server.ThreadingHTTPServer):
    """Answers each request by the next of `script`, the last over and over; without any, as `oracle` does."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[Callable[[Handler], None]] = []
        self.seen: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.over = threading.Event()
        self.lock = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are what is tested."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Stub

    def log_message(self, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            self.server.times.append(time.monotonic())
            self.asked = json.loads(body) | {"path": self.path}
            self.server.seen.append(self.asked)
            self.server.headers.append(dict(self.headers))
            script = self.server.script
            act = oracle if not script else script.pop(0) if len(script) > 1 else script[0]
        act(self)

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.headers.append(dict(self.headers))
        self.send(200, completion("followed"))

    def send(self, status: int, body: bytes, kind: str | None = "application/json", **headers: str) -> None:
        self.send_response(status)
        if kind is not None:
            self.send_header("Content-Type", kind)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def sent_image(asked: dict[str, Any]) -> Image.Image:
    url = asked["messages"][0]["content"][1]["image_url"]["url"]
    return Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))


def oracle(handler: Handler) -> None:
    """Decodes the image, and answers with the text chunk of the render that has its pixels: the chunk itself never comes."""
    image = sent_image(handler.asked)
    assert image.format == "PNG"
    render = Image.open(io.BytesIO(RENDERS[image.tobytes()]))
    handler.send(200, completion(render.info[TEXT_CHUNK] or "NO TEXT", finish_reason="stop"))


def status(code: int, body: bytes = b'{"error": {"message": "not now"}}', **headers: str) -> Callable[[Handler], None]:
    return lambda handler: handler.send(code, body, **headers)


def body(data: bytes, kind: str | None = "application/json") -> Callable[[Handler], None]:
    return lambda handler: handler.send(200, data, kind)


def says(content: Any, **more: Any) -> Callable[[Handler], None]:
    return body(completion(content, **more))


def hang(handler: Handler) -> None:
    handler.server.over.wait(20)


def trickle_headers(handler: Handler) -> None:
    _drip(handler, b"HTTP/1.1 200 OK\r\nX-Padding: " + b"a" * 5000)


def trickle_body(handler: Handler) -> None:
    _drip(handler, b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n" + b" " * 5000, 55)


def trickle_error(handler: Handler) -> None:
    _drip(handler, b"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\n\r\n" + b" " * 5000, 62)


def _drip(handler: Handler, data: bytes, at_once: int = 1) -> None:
    handler.wfile.write(data[:at_once])
    for byte in data[at_once:]:
        if handler.server.over.wait(0.02):
            return
        handler.wfile.write(bytes([byte]))
        handler.wfile.flush()


def huge(handler: Handler) -> None:
    """50 MB, without saying so before."""
    handler.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n{"choices": "')
    for _ in range(50):
        handler.wfile.write(b"a" * 1_000_000)


def huge_error(handler: Handler) -> None:
    handler.wfile.write(b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\n\r\n")
    for _ in range(50):
        handler.wfile.write(b"a" * 1_000_000)


def raw(data: bytes) -> Callable[[Handler], None]:
    return lambda handler: handler.wfile.write(data) and None


def reset(handler: Handler) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


def client(stub: Stub, **fields: Any) -> Http:
    tiny = {"timeout_s": 5.0, "total_s": 10.0, "backoff_s": 0.005, "longest_wait_s": 0.02}
    return Http(**{"base_url": stub.url, "model": "seer", **tiny, **fields})


def grey(shades: Any, dtype: Any, file: str = "") -> Image.Image:
    """A grey image of these shades, through a file of the kind `file`."""
    image = Image.fromarray(np.asarray(shades, dtype))
    if not file:
        return image
    data = io.BytesIO()
    image.save(data, file)
    return Image.open(io.BytesIO(data.getvalue()))


@contextlib.contextmanager
def deaf() -> Iterator[int]:
    """A port at which connections are neither taken nor refused: its queue is full."""
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.socket())
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        for _ in range(4):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(server.getsockname())
        yield server.getsockname()[1]


def lead_to(monkeypatch: pytest.MonkeyPatch, *ports: int, after: float = 0.0) -> None:
    """Makes every host's addresses these ports here, told after so many seconds."""

    def getaddrinfo(*_: Any, **__: Any) -> list[Any]:
        time.sleep(after)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)) for port in ports]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
