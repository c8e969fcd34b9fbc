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

    # of lines: what the classifier says, and how surely they are read as they stand and turned by 180 degrees
    seen: dict[str, Any] = {"found": None, "labels": [], "sure": {}}

    class RapidOCR:
        def __init__(self, params: dict[str, Any]) -> None:
            seen["params"] = params

        def cls_and_rotate(self, crops: list[np.ndarray]) -> tuple[list[np.ndarray], Any]:
            flipped = [c[::-1, ::-1] if "180" in label else c for c, (label, _) in zip(crops, seen["labels"])]
            return flipped, types.SimpleNamespace(cls_res=seen["labels"])

        def recognize_txt(self, crops: list[np.ndarray]) -> Any:
            way = {1: "upright", 2: "turned"}[int(crops[0][0, 0])]  # the corners of a crop tell which way it stands
            assert all(crop[0, 0] == crops[0][0, 0] for crop in crops)
            seen["read"] = [*seen.get("read", ()), way]
            return types.SimpleNamespace(scores=seen["sure"].get(way, (0.9,) * len(crops)), way=way)

        def __call__(self, image: np.ndarray) -> Any:
            seen["image"] = image
            boxes, txts, scores = seen["found"] or (None, None, None)
            if boxes is not None:
                crops = [np.array([[1, 0], [0, 2]]) for _ in boxes]
                crops, _ = self.cls_and_rotate(crops)
                seen["way"] = self.recognize_txt(crops).way
            return types.SimpleNamespace(boxes=boxes, txts=txts, scores=scores)

    module = types.ModuleType("rapidocr")
    module.RapidOCR = RapidOCR  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "rapidocr", module)
    monkeypatch.setitem(sys.modules, "onnxruntime", types.ModuleType("onnxruntime"))
    ocr._rapidocr.cache_clear()
    yield seen
    ocr._rapidocr.cache_clear()
