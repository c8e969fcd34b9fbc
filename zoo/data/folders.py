"""What lies in a folder: files by class and by split, whatever these are called, and what is passed over; who is held out."""

from __future__ import annotations

import difflib
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from zoo.errors import UserError
from zoo.files import digests, reading, settled, sha256, stamp

SPLITS = ("train", "test")
TESTS = ("test", "val", "dev", "eval")  # kinds of held-out parts; of several the first is the test split
_WORDS = {
    "train": ("train", "training", "trn"),
    "test": ("test", "tests", "testing", "tst"),
    "val": ("val", "valid", "validation"),
    "dev": ("dev", "devel", "development"),
    "eval": ("eval", "evaluation", "holdout", "heldout"),
}
# of words, kinds of splits
KINDS = {word + end: kind for kind, words in _WORDS.items() for word in words for end in ("", "set")}
_FILLERS = {"set", "sets", "split", "data", "dataset", "image", "images", "img", "imgs", "photos", "pictures"}
_JUNK = {"__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found", "thumbs.db"}
_log = logging.getLogger("zoo")


@lru_cache(maxsize=1024)
def tell(line: str) -> None:
    """Warns, once a process: a folder is opened many times."""
    _log.warning("%s", line)


def shown(name: str) -> str:
    """A name for people and for JSON; on disk it may be bytes that are no UTF-8."""
    return os.fsencode(name).decode("utf-8", "replace")


def some(names: Sequence[str], most: int = 5) -> str:
    """The first of these names, for people."""
    return ", ".join(map(shown, names[:most])) + (" ..." if len(names) > most else "")


# Words for splits


def _tokens(name: str) -> list[str]:
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]


def word_of(name: str) -> str | None:
    """The kind of split that the name of a folder is a word for ("train", or of `TESTS`): `Train`, `test_images`, `val2017`, `trainA`."""
    kinds = [KINDS.get(word) or ("" if word in _FILLERS or len(word) == 1 else None) for word in _tokens(name)]
    said = [kind for kind in kinds if kind]
    return said[0] if len(said) == 1 and None not in kinds else None


def word_in(path: str) -> str | None:
    """The kind of split that the path of a file of many examples names: `test/0.tar`, `data/Train-00000-of-00001.parquet`."""
    *folders, last = path.split(os.sep)
    words = [*map(word_of, folders), *map(KINDS.get, _tokens(last.partition(".")[0]))]
    return next(filter(None, words), None)


# Who is held out


def divide(
    count: int, test_fraction: float, labels: Sequence[int] | np.ndarray | None = None, names: Sequence[str] = ()
) -> dict[str, list[int]]:
    """Which of `count` examples are for training and which for testing: fixed, both in ascending order.

    With labels a share of every class, at least one of two; which ones follows from the name of the class and how many it has. A
    lone one is trained on, and told.
    """
    groups: list[tuple[str | None, np.ndarray]] = [(None, np.arange(count))]
    if labels is not None and len(labels):
        order = np.argsort(labels, kind="stable")
        kinds, starts = np.unique(np.asarray(labels)[order], return_index=True)
        called = [names[k] if 0 <= k < len(names) else str(k) for k in kinds.tolist()]
        groups = sorted(zip(called, np.split(order, starts[1:])), key=lambda group: str(group[0]))
    sizes = np.array([len(group) for _, group in groups])
    most = np.floor(sizes * test_fraction).astype(int)
    rest = sizes * test_fraction - most
    most[np.argsort(-rest, kind="stable")[: round(count * test_fraction) - most.sum()]] += 1
    most = np.clip(most, 1 if test_fraction else 0, np.maximum(sizes - 1, 0))
    held: list[int] = []
    for (name, group), some_of_it in zip(groups, most):
        seed = 0 if name is None else int(sha256(os.fsencode(name))[:16], 16)
        held += group[np.random.default_rng(seed).permutation(len(group))[:some_of_it]].tolist()
    # labels below 0: there are none
    lone = [name for name, group in groups if name and len(group) == 1 and np.asarray(labels)[group[0]] >= 0]
    if test_fraction and lone:
        tell(f"only one example has the class {some(lone)}: it is trained on, and none is held out")
    kept = np.ones(count, bool)
    kept[held] = False
    return {"train": np.flatnonzero(kept).tolist(), "test": sorted(held)}


# Places


def existing(path: str) -> Path:
    """The absolute form of a path that must exist."""
    full = Path(path).expanduser().absolute()
    if full.exists():
        return full
    siblings = [p.name for p in full.parent.iterdir()] if full.parent.is_dir() else []
    close = difflib.get_close_matches(full.name, siblings, n=1)
    raise UserError(
        f"{full} does not exist; "
        + (f"did you mean {full.parent / close[0]}?" if close else "give the path of a folder or file that does")
    )


def file_size(path: Path) -> int:
    """The bytes of a file; -1 where it is none, say a broken link."""
    return path.stat().st_size if path.is_file() else -1


def hashed(root: Path, paths: Sequence[str], *about: str) -> str:
    """A digest of files by their paths below a folder and all their bytes, and of what else is said `about` them."""
    parts = (f"{path}\0{digest}\0{size}\0" for path, (digest, size) in zip(paths, digests(root, paths)))
    return sha256("".join([*parts, *about]).encode("utf-8", "surrogateescape"))


_WALKED: dict[Path, tuple[dict[str, str], list[str]]] = {}  # a folder is listed many times in a run


def walk(root: Path) -> list[str]:
    """All files below a folder by path, in the order of their folders and names; those hidden and what systems put there are not."""
    stamps, found = _WALKED.get(root, ({}, []))
    if found and all(stamp(folder) == then for folder, then in stamps.items()):
        return found
    stamps, found = {}, []

    def visit(folder: str, below: str, above: tuple[str, ...]) -> None:
        if (real := os.path.realpath(folder)) in above:  # a link back to a folder above
            return
        stamps[folder] = stamp(folder)
        with reading(folder, "give a folder that you may read"):
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        drawn = any(
            entry.name == "settings.json" for entry in entries
        )  # by `zoo sample`, whose sheet is none of its samples
        for entry in entries:
            if entry.name.startswith(".") or entry.name.lower() in _JUNK or (drawn and entry.name == "sheet.png"):
                continue
            if entry.is_dir():
                visit(entry.path, f"{below}{entry.name}{os.sep}", (*above, real))
            else:
                found.append(below + entry.name)

    began = time.time_ns()
    visit(os.fspath(root), "", ())
    if settled(began, stamps.values()):
        _WALKED[root] = stamps, found
    return found


# Files by class and split


@dataclass(frozen=True)
class Files:
    """The files of one split, by path below the folder, in the order of (class, name)."""

    paths: list[str]
    labels: list[int] | None

    def part(self, members: Sequence[int]) -> Files:
        """These of them, in this order."""
        labels = self.labels
        return Files([self.paths[i] for i in members], None if labels is None else [labels[i] for i in members])


def list_folder(
    root: Path, test_fraction: float, suffixes: tuple[str, ...]
) -> tuple[dict[str, Files], tuple[str, ...]]:
    """The files of both splits of a folder of images, and the class names."""
    parts, names = find_files(root, suffixes, "image")
    if "all" in parts:
        everything = parts["all"]
        shares = divide(len(everything.paths), test_fraction, everything.labels, names)
        parts = {split: everything.part(members) for split, members in shares.items()}
    return parts, names


def find_files(root: Path, suffixes: tuple[str, ...], what: str) -> tuple[dict[str, Files], tuple[str, ...]]:
    """The files of a folder by split ("train" and "test"; "all" where its folders name none), and the class names.

    A class is a folder with such files in it or below it. One line tells what was passed over.

    Args:
      suffixes: of the files that count, in lower case.
      what: what one of them is called, for errors.
    """
    everything = walk(root)
    if (known := _FOUND.get((root, suffixes))) is not None and known[0] is everything:
        return known[1]
    names = [name for name in everything if name.lower().endswith(suffixes)]
    tops = dict.fromkeys(name.partition(os.sep)[0] for name in names if os.sep in name)
    over = _passed_over(root, everything, suffixes, names, what)
    if not names:
        raise UserError(
            f"{root} holds no {what}s{over and f' ({over})'}; expected {what} files ({some(suffixes, 12)}), folders of them by "
            "class, or train and test folders"
        )
    loose = any(os.sep not in name for name in names)
    kinds = {top: word_of(top) for top in tops}
    trains = [top for top in tops if kinds[top] == "train"]
    tests = sorted((top for top in tops if kinds[top] in TESTS), key=lambda top: TESTS.index(str(kinds[top])))
    parts: dict[str, Files]
    if trains and not loose and (tests or len(tops) == 1):
        if len(trains) > 1:
            raise UserError(f"{root} has several folders to train on ({some(trains)}); keep one, or join them")
        train, classes = _by_class(root, f"{trains[0]}{os.sep}", names, None, what)
        parts = {"all": train}
        if tests:
            test, _ = _by_class(root, f"{tests[0]}{os.sep}", names, None if train.labels is None else classes, what)
            if (train.labels is None) != (test.labels is None):
                raise UserError(
                    f"{root / trains[0]} and {root / tests[0]} differ: one has class folders, the other has not; "
                    "give both the same layout"
                )
            parts = {"train": train, "test": test}
            if others := [top for top in tops if top not in (trains[0], tests[0])]:
                tell(f"{root}: {tests[0]} is the test split, and the {what}s of {some(others)} are left out")
    else:
        deep = [
            top for top in tops if kinds[top] and any(n.startswith(top + os.sep) and n.count(os.sep) > 1 for n in names)
        ]
        if tops and not loose and (all(kinds.values()) or deep):
            raise UserError(
                f"{root}: {some(deep or [*tops])} {'is a word' if len(deep or tops) == 1 else 'are words'} for a split and no "
                f"class, and there is no train folder with a test or val folder beside it; give the folder of one split, or "
                "folders called train and test"
            )
        train, classes = _by_class(root, "", names, None, what)
        parts = {"all": train}
    if over:
        tell(f"{root}: passed over: {over}")
    labels = tuple(map(shown, classes))
    if len({*labels}) < len(labels):
        raise UserError(f"{root} has folders of classes whose names are no UTF-8 and look the same; rename them")
    _FOUND[root, suffixes] = everything, (parts, labels)
    return parts, labels


_FOUND: dict[tuple[Path, tuple[str, ...]], tuple[list[str], tuple[dict[str, Files], tuple[str, ...]]]] = {}


def _by_class(
    root: Path, below: str, names: Sequence[str], known: list[str] | None, what: str
) -> tuple[Files, list[str]]:
    """The files below root/below, labelled by its folders, which must be among those `known`; and the classes."""
    here, at = root / below, len(below)
    paths = [name for name in names if name.startswith(below)]
    folders = [name[at:].partition(os.sep) for name in paths]
    classes = dict.fromkeys(folder for folder, inside, _ in folders if inside)
    if not classes:
        return Files(paths, None), []
    if loose := [name for name, inside, _ in folders if not inside]:
        raise UserError(
            f"{here} holds {what}s ({some(loose[:1])}, ...) beside folders of {what}s ({some([*classes][:1])}, ...); "
            "move all of them into class folders, or all of them out"
        )
    nested = {path for _, _, rest in folders for path in rest.split(os.sep)[:-1]}
    said = {word_of(path) for path in nested}
    if "train" in said and said & {*TESTS}:
        way = f"give {here / next(iter(classes))}" if len(classes) == 1 else "put the splits above the classes"
        raise UserError(f"{here} holds the folders of splits inside of others ({some(sorted(nested))}); {way}")
    if (
        len(classes) == 1
        and all(os.sep in rest for _, _, rest in folders)
        and len({r.partition(os.sep)[0] for *_, r in folders}) > 1
    ):
        only = next(iter(classes))
        tell(
            f"{here} holds one folder, whose folders are taken as one class, {some([only])}; give {here / only} to tell them apart"
        )
    index = {name: i for i, name in enumerate(classes if known is None else known)}
    if unknown := [folder for folder in classes if folder not in index]:
        raise UserError(f"{here / unknown[0]} is a class without a folder in the training part; add one, or remove it")
    return Files(paths, [index[folder] for folder, *_ in folders]), [*index]


def _passed_over(
    root: Path, everything: Sequence[str], suffixes: tuple[str, ...], names: Sequence[str], what: str
) -> str:
    """What of a folder does not count and why; "" where all of it does."""
    others = Counter(
        os.path.splitext(name)[1].lower() or "without a suffix"
        for name in everything
        if not name.lower().endswith(suffixes)
    )
    counted = [f"{count:,} {suffix}" for suffix, count in others.most_common()]
    said = [f"files that are no {what}s ({some(counted)})"]
    full = {
        os.sep.join(name.split(os.sep)[:depth]) for name in names for depth in (1, 2) if name.count(os.sep) >= depth
    }
    empty = []
    for above in ("", *(f"{top}{os.sep}" for top in sorted(full) if os.sep not in top and word_of(top))):
        with os.scandir(root / above) as entries:
            inside = sorted(above + entry.name for entry in entries if entry.is_dir() and entry.name[0] != ".")
        empty += [folder for folder in inside if folder not in full]
    return " and ".join(said * bool(others) + [f"folders without {what}s ({some(empty)})"] * bool(empty))
