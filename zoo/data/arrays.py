"""Arrays of images or series and of their labels in .npz files; labels of any source are looked at here."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from zoo.data.folders import some, tell
from zoo.errors import UserError


@lru_cache(maxsize=4)
def picture_array(path: Path, key: str, field: str, version: str) -> np.ndarray:
    """One array of an .npz file, read-only; `version` makes a file that was rewritten a new one."""
    array = read_array(path, key, field, "images")
    if array.dtype.kind == "f":
        array = array.astype(np.float32)
    if array.size and field == "data.images" and array.dtype in (np.float32, np.uint8):
        low, high = array.min(), array.max()
        # written so that a NaN fails as well
        if array.dtype == np.float32 and not (low >= -1 and high <= 1):
            raise UserError(
                f"{path}: array {key!r} has values in [{low:g}, {high:g}]; "
                "floating-point images must lie in [-1, 1]: rescale them, or store uint8"
            )
        # of 8 bits white is 255
        if low >= 0 and 0 < high <= 1:
            raise UserError(
                f"{path}: array {key!r} has {array.dtype} values in [{low:g}, {high:g}], where [0, 1] seems to be black to white: "
                "store floats in [-1, 1] (2 x - 1), or uint8 from 0 to 255 (round(255 x))"
            )
    array.setflags(write=False)
    return array


def read_array(path: Path, key: str, field: str, what: str) -> np.ndarray:
    """One array of an .npz file as it is stored; for errors the field that names it and what the examples are called."""
    with open_npz(path) as file:
        if key not in file.files:
            other = f" (set data.labels='' for unlabelled {what})" if field == "data.labels" else ""
            raise UserError(
                f"{path} has no array {key!r}, it has {', '.join(file.files) or 'none'}; "
                f"set {field} to one of them{other}"
            )
        try:
            return file[key]
        except Exception as error:  # a pickled object array, a damaged member
            raise UserError(
                f"{path}: array {key!r} cannot be read ({error}); save plain arrays with numpy.savez"
            ) from None


def array_name(name: str, split: str, field: str) -> str:
    """The array of a split, `{split}` in its name being "train" or "test"; UserError where other braces stand in it."""
    if set("{}") & set(name.replace("{split}", "")):
        raise UserError(
            f"{field}={name!r}: of braces only {{split}} is known, which becomes 'train' or 'test'; write that, or the name of an "
            "array as it stands in the file"
        )
    return name.replace("{split}", split)


def open_npz(path: Path) -> Any:
    """An .npz file, open for reading; no pickle in it is ever loaded."""
    try:
        file = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no .npz file ({error}); write one with numpy.savez") from None
    if not hasattr(file, "files"):
        raise UserError(f"{path} is a single array; save examples and labels together with numpy.savez")
    return file


def checked_arrays(path: Path, images: np.ndarray, labels: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Images as [N, H, W, C] and labels as [N], or an error that names the array."""
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise UserError(
            f"{path}: images have shape {list(images.shape)}; expected [N, H, W], [N, H, W, 1] or [N, H, W, 3]"
        )
    if images.dtype not in (np.uint8, np.float32):
        raise UserError(f"{path}: images are {images.dtype}; store uint8, or floats in [-1, 1]")
    if labels is not None:
        check_labels(path, labels, len(images), "image")
    return images, labels


def check_labels(path: Path, labels: np.ndarray, count: int, what: str) -> None:
    """Refuses labels that are not `count` integers from 0; `what` is what an example is called."""
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise UserError(
            f"{path}: labels are {labels.dtype}{list(labels.shape)}; expected one integer per {what}: [{count}]"
        )
    if labels.size and labels.min() < 0:
        raise UserError(f"{path}: labels go down to {labels.min()}; number classes from 0")


def class_names(classes: Sequence[str], labels: np.ndarray | None) -> tuple[str, ...]:
    """The names of the classes: those given, which must suffice, or "0", "1", ...; () without labels."""
    if labels is None or not len(labels):
        return ()
    highest = int(labels.max())
    if classes and highest >= len(classes):
        raise UserError(
            f"data.classes names {len(classes)} classes, but the labels go up to {highest}; name {highest + 1}"
        )
    return tuple(classes) or tuple(map(str, range(highest + 1)))


def tell_classes(where: object, labels: Sequence[int] | np.ndarray, names: Sequence[str]) -> None:
    """Warns of classes without an example, such as the first one where labels begin at 1."""
    found = np.unique(np.asarray(labels, np.int64))
    missing = [names[k] for k in np.setdiff1d(np.arange(len(names)), found).tolist()]
    first = "; labels begin at 1, and classes count from 0" if len(found) and found[0] == 1 else ""
    if missing:
        tell(f"{where}: no example has the class {some(missing)}{first}")
