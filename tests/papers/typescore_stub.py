"""An endpoint of every fault, a short list with pictures, and extractors that read them, for the tests of TypeScore."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import http.server
import io
import json
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import numpy as np
from PIL import Image

from zoo.papers.typescore.evaluate import TypeScore
from zoo.papers.typescore.extractors import Extraction, Http, Line, Oracle
from zoo.papers.typescore.extractors.base import TEXT_CHUNK, aside
from zoo.papers.typescore.instructions import Instruction
from zoo.papers.typescore.render import plain, save

DRAWN: dict[bytes, str] = {}  # texts by the pixels of their pictures


def picture(text: str) -> Image.Image:
    """A tiny image with pixels of its own that carries `text` the way a render does."""
    pixels = hashlib.shake_256(text.encode()).digest(8 * 8 * 3)
    DRAWN[pixels] = text
    made = Image.frombytes("RGB", (8, 8), pixels)
    made.info[TEXT_CHUNK] = text
    return made


def completion(content: Any, **more: Any) -> bytes:
    return json.dumps({"model": "stub-1", "choices": [{"message": {"content": content}, **more}]}).encode()


class Stub(http.server.ThreadingHTTPServer):
    """Answers each request by the next of `script`, the last over and over; without any, as `oracle` does."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[Act] = []
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

    def send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


Act: TypeAlias = Callable[[Handler], Any]


def sent_image(asked: dict[str, Any]) -> Image.Image:
    url = asked["messages"][0]["content"][1]["image_url"]["url"]
    found = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))
    assert found.format == "PNG"
    return found


def oracle(handler: Handler) -> None:
    """The text of the picture that has these pixels: the text itself never comes."""
    handler.send(200, completion(DRAWN[sent_image(handler.asked).tobytes()] or "NO TEXT", finish_reason="stop"))


def status(code: int, body: bytes = b'{"error": {"message": "not now"}}', **headers: str) -> Act:
    return lambda handler: handler.send(code, body, **headers)


def says(content: Any, **more: Any) -> Act:
    return status(200, completion(content, **more))


def raw(*pieces: bytes, pause: float = 0) -> Act:
    """Bytes as they are; with a pause before each piece the client may hang up."""

    def act(handler: Handler) -> None:
        for piece in pieces:
            if pause and handler.server.over.wait(pause):
                return
            handler.wfile.write(piece)
            handler.wfile.flush()

    return act


def client(stub: Stub, **fields: Any) -> Http:
    return Http(**{"base_url": stub.url, "model": "seer", "timeout_s": 5.0, "total_s": 10.0, **fields})


# --- a list, its pictures, and who reads them -------------------------------------------------------

TEXTS = (
    "Open daily",
    "Jazz night at nine",
    "Mind the step",
    "Fresh bread & butter",
    "No entry after 8 pm",
    "Lost? Ask us",
)
LIST = [
    Instruction(f"t-{i}", f'A sign says "{text}".', text, {"colour": "red", "font": "serif"}, "shop")
    for i, text in enumerate(TEXTS)
]


def listed(path: Path, some: Sequence[Instruction]) -> Path:
    """A file of these instructions."""
    path.write_text("".join(json.dumps(dataclasses.asdict(one)) + "\n" for one in some))
    return path


def drawn(folder: Path) -> Path:
    """In the folder a list `wanted.jsonl`, and `a`: two pictures of each instruction, of which some have faults."""
    listed(folder / "wanted.jsonl", LIST)
    (folder / "a").mkdir()
    for one in LIST:
        for k, text in enumerate((one.text, one.text.replace("e", "a"))):
            save(plain(text, size=64, points=8), folder / "a" / f"{one.id}_{k}.png")
    return folder


def score(folder: Path, images: str = "a", **fields: Any) -> TypeScore:
    fields = {"extractor": Oracle(), "resamples": 20, **fields}
    return TypeScore(wanted=str(folder / "wanted.jsonl"), images=str(folder / images), **fields)


def line(text: str, box: Sequence[float]) -> Line:
    left, top, right, bottom = map(float, box)
    return Line(text, ((left, top), (right, top), (right, bottom), (left, bottom)))


@dataclasses.dataclass(frozen=True)
class Fake(Oracle):
    """Reads what the renderer drew, with a box around the ink; may be stopped after some pictures."""

    fails: tuple[str, ...] = aside(())
    stops_after: int = aside(10**9)
    read: list[str] = dataclasses.field(default_factory=list, compare=False, metadata={"aside": True})

    name: ClassVar[str] = "fake"
    batch: ClassVar[int] = 2

    def __deepcopy__(self, memo: Any) -> Fake:
        return self

    def extract(self, images: Sequence[Image.Image], keep: Any = lambda i, one: None) -> list[Extraction]:
        found = []
        for i, image in enumerate(images):
            if len(self.read) >= self.stops_after:
                raise KeyboardInterrupt
            text = str(image.info[TEXT_CHUNK])
            self.read.append(text)
            failed = any(word in text for word in self.fails)
            found.append(Extraction("", error="no answer") if failed else self.one(image, text))
            keep(i, found[-1])
        return found

    def one(self, image: Image.Image, text: str) -> Extraction:
        pixels = np.asarray(image.convert("RGB"), float)
        far = np.linalg.norm(pixels - np.median(pixels, (0, 1)), axis=-1)
        y, x = np.nonzero(far > 0.5 * far.max())
        return Extraction(text, (line(text, (x.min() - 3, y.min() - 3, x.max() + 4, y.max() + 4)),))
