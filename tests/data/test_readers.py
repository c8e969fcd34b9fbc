"""What writers of the ecosystem wrote comes back value for value, or is refused in a sentence: inputs made by hypothesis."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest
from PIL import Image

from zoo.data.documents import pieces
from zoo.data.images import BadImage
from zoo.data.images.sources import open_source
from zoo.data.series import Series
from zoo.errors import UserError

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
some_texts = st.lists(texts, min_size=1, max_size=4)
_buffer = io.BytesIO()
Image.new("RGB", (4, 4), "red").save(_buffer, "PNG")
PNG = _buffer.getvalue()


def tidy(text: str) -> str:
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def captions_of(path: Path) -> list[str]:
    items = open_source(path, 0.0).splits["train"]
    return [items.caption(i) for i in range(items.count)]


def spelled(draw, text: str) -> bytes:
    """As editors write it: with a byte order mark or without, with line ends of a system."""
    mark, end = draw(st.sampled_from([b"", b"\xef\xbb\xbf"])), draw(st.sampled_from(["\n", "\r\n", "\r"]))
    return mark + text.replace("\n", end).encode()


def captions(draw, folder: Path) -> None:
    wanted = draw(some_texts)
    for i, text in enumerate(wanted):
        (folder / f"{i}.png").write_bytes(PNG)
        (folder / f"{i}.txt").write_bytes(spelled(draw, text))
    assert captions_of(folder) == [tidy(tidy(text)).strip() for text in wanted]


def tar(draw, folder: Path) -> None:
    wanted = draw(some_texts)
    with tarfile.open(folder / "a.tar", "w") as file:  # as webdataset does
        for i, text in enumerate(wanted):
            kind = draw(st.sampled_from(["txt", "json"]))
            said = spelled(draw, text) if kind == "txt" else json.dumps({"caption": text}).encode()
            for name, data in ((f"{i:06d}.png", PNG), (f"{i:06d}.{kind}", said)):
                about = tarfile.TarInfo(name)
                about.size = len(data)
                file.addfile(about, io.BytesIO(data))
    assert captions_of(folder / "a.tar") == [tidy(tidy(text)).strip() for text in wanted]


def parquet(draw, folder: Path) -> None:
    wanted = draw(some_texts)
    columns = {"image": [{"bytes": PNG, "path": None}] * len(wanted), "text": wanted}  # as datasets does
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "a.parquet", row_group_size=2)
    assert captions_of(folder / "a.parquet") == [tidy(text).strip() for text in wanted]


PACKERS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda raw: pyarrow.compress(raw, "zstd", asbytes=True),
    ".zip": None,
}


def documents(draw, folder: Path) -> None:
    wanted = draw(some_texts)
    rows = [{"id": i, "text": text} for i, text in enumerate(wanted)]
    plain = draw(st.booleans())
    form = draw(st.sampled_from(["lines", "array"]))
    data = json.dumps(rows) if form == "array" else "".join(json.dumps(row, ensure_ascii=plain) + "\n" for row in rows)
    name = draw(st.sampled_from(["a.jsonl", "a.json", "data", "a.txt"]))
    packed = draw(st.sampled_from([*PACKERS]))
    raw = spelled(draw, data) if form == "lines" and "\r" not in data else data.encode()
    if b"\r" in raw and b"\n" not in raw:  # JSON lines end with a newline
        raw = data.encode()
    path = folder / (name + packed)
    if packed == ".zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr(f"x/{name}", raw)
            file.writestr(f"__MACOSX/x/._{name}", b"\0\5")
    else:
        path.write_bytes(PACKERS[packed](raw))
    found = [""]
    for part, last in pieces(path):
        found[-1] += part
        found += [""] * last
    assert found[:-1] == [text.replace("\r\n", "\n").replace("\r", "\n") for text in wanted if text]


def csv(draw, folder: Path) -> None:
    rows, columns = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    number = st.floats(-1e6, 1e6, width=32) if draw(st.booleans()) else st.integers(-1000, 1000)
    drawn = draw(st.lists(number, min_size=rows * columns, max_size=rows * columns))
    values = np.array(drawn, np.float64).reshape(rows, columns)
    names = draw(st.sampled_from([None, [f"c{i}" for i in range(columns)], [str(i) for i in range(columns)]]))
    path = folder / "a.csv"
    writer = draw(st.sampled_from(["numpy", "pyarrow", "pandas"]))
    if writer == "numpy":
        mark = draw(st.sampled_from(["# ", ""]))
        np.savetxt(path, values, delimiter=",", header=",".join(names or []), comments=mark)
    elif writer == "pyarrow":
        options = pyarrow.csv.WriteOptions(include_header=names is not None)
        table = pyarrow.table({name: values[:, i] for i, name in enumerate(names or map(str, range(columns)))})
        pyarrow.csv.write_csv(table, path, options)
    else:  # with its index
        lines = [f"{i}," + ",".join(map(repr, row)) for i, row in enumerate(values.tolist())]
        path.write_text("\n".join([",".join(["", *(names or map(str, range(columns)))]), *lines]) + "\n")
    found = Series(str(path), length=1, standardise=False, test_fraction=0.0).part("train")
    assert len(found.series) == 1
    np.testing.assert_array_equal(found.series[0], values)


READERS = (captions, tar, parquet, documents, csv)


def run(reader, examples: int, tmp_path_factory, **how) -> None:
    refused = []

    @hypothesis.settings(max_examples=examples, deadline=None, database=None, **how)
    @hypothesis.given(st.data())
    def holds(data):
        try:
            reader(data.draw, tmp_path_factory.mktemp("x"))
        except (UserError, BadImage) as error:
            refused.append(str(error))

    holds()
    assert len(refused) <= examples / 2, refused[-3:]


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
def test_what_was_written_comes_back(reader, tmp_path_factory):
    run(reader, 20, tmp_path_factory, derandomize=True)


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
def test_what_was_written_comes_back_of_two_thousand(reader, tmp_path_factory):
    run(reader, 400, tmp_path_factory)
