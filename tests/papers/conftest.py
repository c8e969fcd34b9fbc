"""Fixtures of several files of a paper."""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typescore_stub import Stub, drawn


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What `drawn` leaves."""
    return drawn(tmp_path)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("zoo.papers.typescore.extractors.endpoint._FIRST_WAIT", 0.005)
    monkeypatch.setattr("zoo.papers.typescore.extractors.endpoint._LONGEST_WAIT", 0.02)
    server = Stub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def rapid(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A package in place of rapidocr that finds what `found` says and notes what it is given."""
    from zoo.papers.typescore.extractors import ocr

    seen: dict[str, Any] = {"found": (None, None)}

    class RapidOCR:
        def __init__(self, params: dict[str, Any]) -> None:
            seen["params"] = params

        def __call__(self, image: np.ndarray) -> Any:
            seen["image"] = image
            boxes, txts = seen["found"]
            return types.SimpleNamespace(boxes=boxes, txts=txts)

    module = types.ModuleType("rapidocr")
    module.RapidOCR = RapidOCR  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rapidocr", module)
    monkeypatch.setitem(sys.modules, "onnxruntime", types.ModuleType("onnxruntime"))
    ocr._rapidocr.cache_clear()
    yield seen
    ocr._rapidocr.cache_clear()
