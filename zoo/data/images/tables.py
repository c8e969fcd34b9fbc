"""Parquet files of images: which columns hold what, and row groups that are read once."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from zoo.data.documents import is_text
from zoo.data.images import BadImage
from zoo.errors import UserError, suggest
from zoo.files import first_line

_IMAGES = ("image", "jpg", "jpeg", "png", "webp", "img", "image_bytes", "picture", "pixels", "bytes")
_CAPTIONS = ("caption", "text", "prompt", "txt", "captions", "description", "sentence", "alt_text")
_LABELS = ("label", "labels", "cls", "class")
_KEPT = 2**29  # bytes of row groups that stay in memory


def groups(files: list[Path], columns: list[str]) -> Callable[[int, int], Any]:
    """A function that gives the table of a row group of a file and keeps the last ones, as rows are read in nearly ascending order.

    It raises BadImage where it cannot be read.
    """
    kept: OrderedDict[tuple[int, int], Any] = OrderedDict()
    lock = threading.Lock()  # several threads want the same group at once

    def rows(file: int, group: int) -> Any:
        import pyarrow.parquet

        with lock:
            if (file, group) not in kept:
                try:
                    with pyarrow.parquet.ParquetFile(files[file]) as opened:
                        kept[file, group] = opened.read_row_group(group, columns=columns)
                except (pyarrow.ArrowException, OSError) as error:
                    raise BadImage(f"cannot be read ({first_line(error)})", f"restore {files[file]}") from None
            kept.move_to_end((file, group))
            while len(kept) > 2 and sum(table.nbytes for table in kept.values()) > _KEPT:
                kept.popitem(last=False)
            return kept[file, group]

    return rows


def columns_of(path: Path, schema: Any, image: str | None, caption: str | None) -> tuple[str, str | None, str | None]:
    """The names of the columns of images, of captions (None: there is no text at all) and of labels (None: there are none)."""
    import pyarrow

    def plain(kind: Any) -> Any:
        return kind.value_type if pyarrow.types.is_dictionary(kind) else kind

    def is_bytes(kind: Any) -> bool:
        return bool(pyarrow.types.is_binary(plain(kind)) or pyarrow.types.is_large_binary(plain(kind)))

    def is_image(kind: Any) -> bool:
        if pyarrow.types.is_struct(kind):
            return any(kind.field(i).name == "bytes" and is_bytes(kind.field(i).type) for i in range(kind.num_fields))
        return is_bytes(kind)

    listed = ", ".join(f"{field.name} ({field.type})" for field in schema)

    def choose(
        fits: Callable[[Any], bool], named: str | None, usual: tuple[str, ...], what: str, flag: str
    ) -> str | None:
        fields = [field.name for field in schema if fits(field.type)]
        if named == "" and what == "captions":
            return None
        if named is not None:
            if named not in schema.names:
                raise UserError(f"{path} has no column {named!r} ({flag}); {suggest(named, schema.names)}")
            if named not in fields:
                raise UserError(f"{path}: the column {named!r} ({flag}) holds no {what}; its columns: {listed}")
            return named
        for word in usual:
            if close := [name for name in fields if name.lower() == word]:
                return close[0]
            if what == "captions" and (other := [field for field in schema if field.name.lower() == word]):
                raise UserError(
                    f"{path}: the column {other[0].name!r} holds {other[0].type} and not one text a row, so that its captions "
                    f'cannot be read; store one text a row, or say {flag}=NAME, or {flag}="" to leave captions out'
                )
        if fields and (len(fields) > 1 or what == "captions"):  # a lone text may be a file's name or a key
            none = f', or {flag}="" where none does' if what == "captions" else ""
            raise UserError(f"{path} does not tell which column holds the {what}: {listed}; say {flag}=NAME{none}")
        return fields[0] if fields else None

    found = choose(is_image, image, _IMAGES, "images", "image_column")
    if found is None:
        raise UserError(
            f"{path} has no column of images (bytes, or a struct with bytes), it has {listed}; give other files"
        )
    text = choose(lambda kind: is_text(plain(kind)), caption, _CAPTIONS, "captions", "caption_column")
    whole = [field.name for field in schema if pyarrow.types.is_integer(field.type)]
    label = next((name for word in _LABELS for name in whole if name.lower() == word), None)
    for column in (found, text, label):
        if column is not None and schema.names.count(column) > 1:
            raise UserError(f"{path} has {schema.names.count(column)} columns named {column!r}; rename all but one")
    return found, text, label


def numbers(path: Path, column: str) -> np.ndarray:
    """A column of whole numbers, -1 where there is none."""
    import pyarrow
    import pyarrow.compute
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            found = file.read(columns=[column])[column].cast(pyarrow.int64())
        return np.asarray(pyarrow.compute.fill_null(found, -1).to_numpy(), np.int64)
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: the labels in {column!r} cannot be read ({reason}); restore or remove it") from None


def class_names_of(schema: Any, column: str) -> tuple[str, ...]:
    """The names of the classes that Hugging Face's `datasets` keeps beside a column; () where there are none."""
    try:
        about = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][column]
        names = about["names"] if about["_type"] == "ClassLabel" else ()
        return tuple(names) if all(isinstance(name, str) for name in names) else ()
    except (ValueError, KeyError, TypeError):
        return ()
