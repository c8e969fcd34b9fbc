"""A folder of pictures scored against a list of instructions: `zoo eval configs/typescore/rapidocr.py wanted=FILE images=DIR`.

Scores compare only between results with one extractor, normalisation and `SPEC_VERSION`, which every result holds; none
compares with the paper's, whose extractor was GPT-4o, and whose prompt, normalisation and instructions are not published.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from PIL import Image

from zoo.errors import UserError
from zoo.fields import Count, NonNegative, Seed, Whole, check_fields
from zoo.files import reading, sha256_of_file, sha256_of_json, write
from zoo.papers.typescore import style as styles
from zoo.papers.typescore import synth
from zoo.papers.typescore.extractors import (
    Cached,
    Extraction,
    RapidOcr,
    TextExtractor,
    clean,
    describe,
    reading_order,
)
from zoo.papers.typescore.extractors.base import failed, keeping
from zoo.papers.typescore.extractors.cache import Journal
from zoo.papers.typescore.files import NAMED, as_json, claim, relative, seen, writing
from zoo.papers.typescore.instructions import Instruction
from zoo.papers.typescore.render import render
from zoo.papers.typescore.score import (
    SPEC_VERSION,
    Kind,
    Normalisation,
    Parts,
    assign,
    batch,
    bootstrap,
    error_type,
    mean,
    parts,
    typescore,
)

Record = dict[str, Any]

RECORDS, SUMMARY, PLOT, REPORT = "records.jsonl", "summary.json", "plot.png", "report.html"
READINGS = "readings.jsonl"  # those of a stopped run that are not judged yet
NOTE = (
    "not comparable with the scores of arXiv:2411.02437, nor with those of another extractor, normalisation, list of "
    "instructions or spec_version"
)
_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
_log = logging.getLogger("zoo")


@dataclass(frozen=True)
class TypeScore:
    """The text fidelity of a model's pictures, and how well they follow the style that was asked for."""

    wanted: str = synth.SHIPPED  # a file of JSON lines with id, instruction and perhaps text, style; or typeinst_synth
    images: str = ""  # a folder with {id}_{k}.png, or {id}.png; also .jpg and .webp
    extractor: TextExtractor = RapidOcr()
    case_sensitive: bool = False  # whether "Open" for "open" is an error
    ignore_punct: bool = False  # whether punctuation is left out of the comparison
    piece_mode: Literal["join", "set"] = "join"  # set: several quoted texts may stand in any order
    weights: tuple[NonNegative, NonNegative, NonNegative] = (1.0, 1.0, 1.0)  # of NED, NLCS and SW
    kind: Kind = "similarity"
    style: bool = True  # whether style following is evaluated; models that see are asked once per attribute
    resamples: Count = 1000  # of the bootstrap over instructions
    seed: Seed = 0  # of the bootstrap
    limit: Whole = 0  # the first so many instructions of the list; 0 for all
    cache: str = ""  # a folder in which readings are kept; empty for none
    out: str = ""  # a folder for the results; empty for IMAGES-typescore (IMAGES-typescore-first10 with limit=10)

    standalone: ClassVar[bool] = True  # `zoo eval` runs it without a model

    def __post_init__(self) -> None:
        check_fields(self)
        typescore(Parts(1, 1, 1), self.weights, self.kind)

    @property
    def normalisation(self) -> Normalisation:
        return Normalisation(self.case_sensitive, self.ignore_punct)

    # --- one picture ------------------------------------------------------------------------------

    def compared(self, instruction: Instruction, extraction: Extraction) -> tuple[str, str]:
        """What was wanted and what was read, as they are compared.

        In mode "set" each line that was read goes to the quoted text that it fits best.
        """
        normalise = self.normalisation
        if self.piece_mode == "join":
            return normalise(instruction.text), normalise(extraction.text)
        pieces = [piece for piece in map(normalise, instruction.pieces) if piece]
        reads = assign(pieces, [line for line in map(normalise, _lines(extraction)) if line])
        return " ".join(pieces), " ".join(read for read in reads if read)

    def judge(
        self, instruction: Instruction, picture: Image.Image | None, extraction: Extraction, reader: Any = None
    ) -> Record:
        """The record of one picture as JSON values; of a failed extraction one without a score.

        `reader` answers questions of style, where it does; without a picture no style is evaluated.
        """
        record: Record = {
            "id": instruction.id,
            "wanted": instruction.text,
            "length_bin": instruction.length_bin,
            "domain": instruction.domain,
            "content": synth.content(instruction.text),
            "read": None,
            "compared": None,
            "parts": None,
            "score": None,
            "error_type": None,
            "style": {},
            "boxes": [dataclasses.asdict(line) for line in extraction.lines],
            "seconds": extraction.seconds,
            "error": extraction.error,
        }
        if extraction.error is not None:
            return record
        reference, read = self.compared(instruction, extraction)
        found = parts(reference, read)
        verdicts = {}
        if self.style and picture is not None and instruction.style:
            verdicts = styles.evaluate(instruction.style, picture, extraction, reader)
        return record | {
            "read": extraction.text,
            "compared": [reference, read],
            "parts": {name: round(value, 6) for name, value in found._asdict().items()},
            "score": round(typescore(found, self.weights, self.kind), 4),
            "error_type": error_type(reference, read),
            "style": {
                attribute: {"wanted": instruction.style[attribute], **verdict._asdict()}
                for attribute, verdict in verdicts.items()
            },
        }

    def measure(
        self, instructions: Sequence[Instruction], pictures: Mapping[str, Sequence[Image.Image]], reader: Any = None
    ) -> tuple[dict[str, Any], list[Record]]:
        """The summary and the records of pictures in memory, by the id of their instruction. Writes nothing."""
        self._check(instructions)
        reader = self.reader() if reader is None else reader
        known = {one.id: one for one in instructions}
        todo = [(known[name], k, picture) for name, some in pictures.items() for k, picture in enumerate(some)]
        read = reader.extract([picture for _, _, picture in todo])
        records = [
            {"image": f"{one.id}_{k}", "k": k, **self.judge(one, picture, extraction, reader)}
            for (one, k, picture), extraction in zip(todo, read, strict=True)
        ]
        return self.summarise(records, instructions, describe(reader)), records

    # --- as the scorer of the metric `prompted` -----------------------------------------------------

    def check(self) -> None:
        """UserError for a list with mistakes, fields that are for folders, or where the extractor lacks something."""
        for name in ("images", "out"):
            if getattr(self, name):
                raise UserError(
                    f"{name}={getattr(self, name)} is for a folder of pictures, and a model draws its own; leave it out"
                )
        self.instructions()
        self.reader()

    def prompts(self) -> dict[str, str]:
        """The instructions by their ids."""
        return {one.id: one.instruction for one in self.instructions()}

    def score(self, images: Mapping[str, Sequence[Image.Image]]) -> dict[str, Any]:
        """The summary's figures, NaN where nothing could be read, and some of the images with what was wanted and read."""
        found, records = self.measure(self.instructions(), images)
        told = {"typescore": found, **({} if found["style"] is None else {"typescore_style": found["style"]})}
        figures = {
            name + end: one[key]
            for name, one in told.items()
            for key, end in (("score", ""), ("low", "_low"), ("high", "_high"))
        }
        figures |= {f"typescore_{name}": value for name, value in found["parts"].items()}
        figures["typescore_exact"] = found["exact"]
        from zoo.papers.typescore import report

        return {
            **{name: float("nan") if value is None else value for name, value in figures.items()},
            "typescore_read": found["read"],
            "typescore_failure": found["failures"][0]["error"] if found["failures"] else "",
            "typescore_extractor": f"{found['extractor']['name']} {found['extractor']['version']}",
            "failed": found["failed"],
            "pictures": {"typescore": report.sheet(records, [one for some in images.values() for one in some])},
        }

    def bench(self, rounds: int = 5) -> dict[str, Any]:
        """Pairs of texts of 60 characters that the metric alone compares in a second, in one thread, and pictures that are read.

        The pictures are twelve of the list, drawn by zoo's renderer. Medians over rounds; the first, untimed, opens networks.
        """
        listed = self.instructions()
        some = [listed[i * len(listed) // 12] for i in range(12)]
        pictures = [render(one, seed=i) for i, one in enumerate(some)]
        self.extractor.check()
        rng = np.random.default_rng(0)
        left, right = (["".join(row) for row in rng.choice(list("abcdefgh "), (20_000, 60))] for _ in range(2))

        def seconds(action: Callable[[], Any]) -> float:
            action()
            taken = []
            for _ in range(rounds):
                start = time.perf_counter()
                action()
                taken.append(time.perf_counter() - start)
            return float(np.median(taken))

        one = seconds(lambda: self.extractor.extract(pictures)) / len(pictures)
        return {
            "extractor": describe(self.extractor),
            "seconds_per_image": round(one, 6),
            "images_per_second": round(1 / one, 2),
            "pairs_per_second": round(len(left) / seconds(lambda: batch(left, right))),
            "rounds": rounds,
        }

    def reader(self) -> Any:
        """The extractor, behind the cache if there is one; UserError where something that it needs is missing."""
        self.extractor.check()
        return Cached(self.extractor, self.cache) if self.cache else self.extractor

    # --- all of them ------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Reads the pictures that have no record yet, writes records, summary, plot and report, returns the summary.

        The records of a stopped run are kept, and failed extractions are tried again. UserError, before any picture is read:
        no folder, no picture of any instruction, one of two instructions, a list with mistakes, an `out` of another setting.
        """
        instructions = self.instructions()
        folder = self._folder()
        files = find(folder, instructions)
        lacking = _lacking(instructions, files, folder)
        self.extractor.check()
        described = describe(self.extractor)
        out = Path(self.out) if self.out else self._beside(folder)
        own = {"wanted_sha256": _digest(instructions), "images": relative(folder, out), "style": self.style}
        from zoo.papers.typescore import report

        with claim(out, {**self.about(described), **own}, "results"):
            reader = self.reader()  # whose cache may lie in there
            records = self._records(files, out / RECORDS, reader, described)
            summary = self.summarise(records, instructions, described) | {
                "wanted": self.wanted,
                "images": self.images,
                "missing": {"count": len(lacking), "ids": lacking[:10]},
                "out": str(out),
            }
            with writing(out):
                write(out / SUMMARY, as_json(summary, indent=1))
                write(out / PLOT, report.plot(summary, records))
                report.write(out / REPORT, summary, records, folder)
        for one in summary["failures"]:
            _log.warning("typescore: %s was not read: %s", one["image"], one["error"])
        if summary["failed"]:
            _log.warning(
                "typescore: %d of %d pictures were not read and are in no mean; the same command tries them again",
                summary["failed"],
                len(records),
            )
        if summary["unanswered"]:
            _log.warning(
                "typescore: %d questions of style were not answered and are in no mean; the same command asks them again",
                summary["unanswered"],
            )
        if summary["score"] is not None:
            _log.info(
                "typescore: %.1f (%.1f to %.1f) of %d pictures; see %s",
                *(summary[key] for key in ("score", "low", "high", "read")),
                out / REPORT,
            )
        return summary

    def about(self, described: Mapping[str, Any]) -> dict[str, Any]:
        """What decides a score: results compare only where it is equal."""
        return {
            "spec_version": SPEC_VERSION,
            "extractor": dict(described),
            "normalisation": dataclasses.asdict(self.normalisation),
            "piece_mode": self.piece_mode,
            "weights": list(self.weights),
            "kind": self.kind,
        }

    def instructions(self) -> list[Instruction]:
        """The first `limit` of the list, in its order."""
        found = synth.listed(self.wanted, self.limit)
        self._check(found)
        return found

    def summarise(
        self, records: Sequence[Record], instructions: Sequence[Instruction], described: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Means over pictures, then instructions, with intervals; failed extractions are counted and in no mean."""
        read = [record for record in records if record["error"] is None]
        lost = [record for record in records if record["error"] is not None]
        counts = Counter(record["error_type"] for record in read)
        return {
            "metric": "typescore",
            "note": NOTE,
            **self.about(described),
            **self._mean(read, "score"),
            "parts": {name: _of([{**r, name: r["parts"][name]} for r in read], name) for name in Parts._fields},
            "exact": _of([{**r, "exact": r["error_type"] == "none"} for r in read], "exact"),
            "instructions": len({record["id"] for record in read}),
            "of": len(instructions),
            "read": len(read),
            "failed": len(lost),
            "unanswered": sum(map(_unanswered, read)),
            "failures": [{"image": record["image"], "error": record["error"]} for record in lost[:NAMED]],
            "error_types": {name: counts.get(name, 0) for name in ("none", "spelling", "missing", "surplus")},
            "by": {name: self._by(read, name) for name in ("length_bin", "domain", "content")},
            "style": self._style(read),
            "seconds": round(sum(record["seconds"] for record in records), 2),
            "resamples": self.resamples,
            "seed": self.seed,
        }

    def _mean(self, records: Sequence[Record], key: str) -> dict[str, Any]:
        scores = by_instruction(records, key)
        if not scores:
            return {"score": None, "low": None, "high": None}
        low, high = bootstrap(scores, self.resamples, self.seed)
        return {"score": round(mean(scores), 4), "low": round(low, 4), "high": round(high, 4)}

    def _by(self, records: Sequence[Record], key: str) -> dict[str, Any]:
        groups: dict[str, list[Record]] = {}
        for record in records:
            if record[key]:
                groups.setdefault(record[key], []).append(record)
        return {
            name: {**self._mean(groups[name], "score"), "instructions": len({r["id"] for r in groups[name]})}
            for name in sorted(groups, key=_counted)
        }

    def _style(self, records: Sequence[Record]) -> dict[str, Any] | None:
        """Share of attributes followed in 0..100, over those evaluated; None where no style was evaluated at all."""
        if not self.style:
            return None
        shares = [{**record, "share": styles.share(_verdicts(record))} for record in records]
        by: dict[str, Counter[bool | None]] = {}
        for record in records:
            for attribute, verdict in record["style"].items():
                by.setdefault(attribute, Counter())[verdict["followed"]] += 1
        return {
            **self._mean([record for record in shares if record["share"] is not None], "share"),
            "by": {
                attribute: {
                    "followed": round(100 * n[True] / (n[True] + n[False]), 4) if n[True] + n[False] else None,
                    "evaluated": n[True] + n[False],
                    "not_evaluated": n[None],
                }
                for attribute, n in sorted(by.items())
            },
        }

    # --- files ------------------------------------------------------------------------------------

    def _beside(self, folder: Path) -> Path:
        folder = folder.resolve()  # "." has no name
        first = f"-first{self.limit}" if self.limit else ""  # a trial with few must not stand in the way of all
        return Path(os.path.relpath(folder.with_name(f"{folder.name}-typescore{first}")))

    def _check(self, instructions: Sequence[Instruction]) -> None:
        for one in instructions:
            if not self.normalisation(one.text):
                raise UserError(
                    f"instruction {one.id!r} wants {one.text!r}, which is nothing without its punctuation; leave ignore_punct "
                    "out, or take the instruction off the list"
                )

    def _folder(self) -> Path:
        if not self.images:
            raise UserError("images is empty; name the folder of the pictures, images=DIR")
        folder = Path(self.images)
        try:
            if not folder.is_dir():
                what = "is no folder" if folder.exists() else "does not exist"
                raise UserError(f"images={self.images} {what}; name the folder that holds {{id}}_{{k}}.png")
            os.listdir(folder)
        except OSError as error:
            raise UserError(
                f"images={self.images} cannot be read ({error.strerror}); name the folder that holds {{id}}_{{k}}.png"
            ) from None
        return folder

    def _records(self, files: Sequence[File], path: Path, reader: Any, described: Mapping[str, Any]) -> list[Record]:
        """The records of all pictures in the order of `files`: those on disk, and new ones, added as pictures are read.

        A reading comes into the journal beside them as soon as it is made, and is no longer needed once it is judged: judging
        may ask more questions, and a run that is stopped then must not pay for the reading again.
        """
        from tqdm import tqdm

        old = on_disk(path)
        journal = Journal(path.with_name(READINGS))
        done: dict[str, Record] = {}
        todo: list[tuple[File, str]] = []
        for one in files:
            sha = sha256_of_file(one.path) or ""  # opening it will tell
            record = old.get(one.path.name)
            if (
                record is not None
                and record["sha256"] == sha
                and record["error"] is None
                and record["id"] == one.instruction.id
                and not _unanswered(record)
            ):
                done[one.path.name] = record
            else:
                todo.append((one, sha))
        if done and todo:
            _log.info("typescore: %d pictures have been read before, %d are left", len(done), len(todo))
        # a run that is stopped must not leave a summary of other pictures, by which it would pass for finished
        if todo:
            with writing(path):
                for name in (SUMMARY, PLOT, REPORT):
                    path.with_name(name).unlink(missing_ok=True)
        size = max(int(reader.batch), 1)
        common = {
            "extractor": dict(described),
            "spec_version": SPEC_VERSION,
            "normalisation": dataclasses.asdict(self.normalisation),
        }
        with (
            writing(path),
            open(path, "ab") as file,
            tqdm(total=len(files), initial=len(done), unit=" images", disable=not seen(), file=sys.stderr) as bar,
        ):
            if file.tell() and not path.read_bytes().endswith(b"\n"):  # the last run was killed within a line
                file.write(b"\n")
            for start in range(0, len(todo), size):
                for record in self._read(todo[start : start + size], reader, journal):
                    record |= common
                    file.write(as_json(record))
                    done[record["image"]] = record
                    bar.update()
                file.flush()
        ordered = [done[one.path.name] for one in files]
        with writing(path):  # without those of pictures that were read twice
            write(path, b"".join(map(as_json, ordered)))
            if not any(_unanswered(record) for record in ordered):  # the next run asks, and need not read again
                journal.remove()
        return ordered

    def _read(self, some: Sequence[tuple[File, str]], reader: Any, journal: Journal) -> Iterator[Record]:
        pictures = [_open(one.path) for one, _ in some]
        read = {i: old for i, (one, sha) in enumerate(some) if (old := journal.get(one.path.name, sha)) is not None}
        good = [(i, p) for i, p in enumerate(pictures) if isinstance(p, Image.Image) and i not in read]

        def keep(j: int, extraction: Extraction) -> None:
            i = good[j][0]
            read[i] = extraction
            if extraction.error is None:
                one, sha = some[i]
                journal.put(one.path.name, sha, extraction)

        if good:
            keeping(reader.extract, keep, [picture for _, picture in good])
        for i, ((one, sha), picture) in enumerate(zip(some, pictures)):
            if isinstance(picture, Extraction):
                record, size = self.judge(one.instruction, None, picture), None
            else:
                record, size = self.judge(one.instruction, picture, read[i], reader), list(picture.size)
            yield {"image": one.path.name, "sha256": sha, "k": one.k, "size": size, **record}


# --- the parts of a run -----------------------------------------------------------------------------


@dataclass(frozen=True)
class File:
    """A picture of an instruction: its `k`-th, or None where its name has no number."""

    path: Path
    instruction: Instruction
    k: int | None


def find(folder: Path, instructions: Sequence[Instruction]) -> list[File]:
    """The pictures {id}_{k} and {id} of a folder, in the order of the instructions, then of k.

    UserError where a name is that of two instructions, or two files are one picture. Other files are passed over.
    """
    known = {one.id: one for one in instructions}
    taken: dict[tuple[str, int | None], Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in _ENDINGS or path.name.startswith(".") or not path.is_file():
            continue
        number = re.fullmatch(r"(.+)_(\d{1,9})", path.stem, re.ASCII | re.DOTALL)
        meant: list[tuple[str, int | None]] = [(path.stem, None)] if path.stem in known else []
        if number is not None and number[1] in known:
            meant.append((number[1], int(number[2])))
        if len(meant) > 1:
            raise UserError(
                f"images: {path.name} is a picture of {meant[0][0]!r} and number {meant[1][1]} of {meant[1][0]!r}; give these "
                "instructions ids of which none is another's with _ and a number behind"
            )
        if not meant:
            continue
        if meant[0] in taken:
            raise UserError(
                f"images: {taken[meant[0]].name} and {path.name} are one picture of {meant[0][0]!r}; remove one of them, or "
                "number them {id}_{k}"
            )
        taken[meant[0]] = path
    place = {one.id: i for i, one in enumerate(instructions)}
    order = sorted(taken, key=lambda key: (place[key[0]], -1 if key[1] is None else key[1]))
    return [File(taken[key], known[key[0]], key[1]) for key in order]


def by_instruction(records: Iterable[Record], key: str = "score") -> dict[str, list[float]]:
    """A number of each record, by the id of its instruction."""
    found: dict[str, list[float]] = {}
    for record in records:
        found.setdefault(record["id"], []).append(float(record[key]))
    return found


def _of(records: Iterable[Record], key: str) -> float | None:
    scores = by_instruction(records, key)
    return round(mean(scores), 6) if scores else None


def _lines(extraction: Extraction) -> list[str]:
    """What was read, line by line: boxes in the order of reading, or the rows of an answer."""
    if extraction.lines:
        return [line.text for row in reading_order(extraction.lines) for line in row]
    said = extraction.raw.get("content") if isinstance(extraction.raw, dict) else None
    if extraction.text and isinstance(said, str):
        rows = [clean(row) for row in said.splitlines() if not row.lstrip().startswith("```")]
        if rows := [row for row in rows if row]:
            return rows
    return [extraction.text] if extraction.text else []


def _counted(name: str) -> tuple[float, str]:
    """Sorts bins such as 4-8 and 17-30 by their numbers, and other names behind them."""
    number = re.match(r"\d+", name)
    return (float(number[0]) if number else float("inf"), name)


def _verdicts(record: Record) -> dict[str, styles.Verdict]:
    return {
        name: styles.Verdict(v["followed"], v["found"], v.get("failed", False)) for name, v in record["style"].items()
    }


def _unanswered(record: Record) -> int:
    """Questions of style that were asked in vain."""
    return sum(verdict.get("failed", False) for verdict in record["style"].values())


def _lacking(instructions: Sequence[Instruction], files: Sequence[File], folder: Path) -> list[str]:
    """Ids without a picture. UserError where that is all of them."""
    there = {one.instruction.id for one in files}
    lacking = [one.id for one in instructions if one.id not in there]
    named = ", ".join(lacking[:NAMED]) + (", ..." if len(lacking) > NAMED else "")
    if not there:
        raise UserError(
            f"images={folder} holds no picture of the {len(instructions)} instructions; name the pictures by their ids, "
            f"{instructions[0].id}_0.png or {instructions[0].id}.png (also .jpg, .webp)"
        )
    if lacking:
        _log.warning(
            "typescore: %d of %d instructions have no picture and are in no mean: %s",
            len(lacking),
            len(instructions),
            named,
        )
    return lacking


def _open(path: Path) -> Image.Image | Extraction:
    """The picture, read whole; or a failed extraction that says what is wrong with the file."""
    try:
        with Image.open(path) as picture:
            picture.load()
            return picture
    except Exception as error:  # decoders raise all sorts of things
        why = (
            "it is no picture"
            if isinstance(error, Image.UnidentifiedImageError)
            else f"{type(error).__name__}: {error}"
        )
        return failed(f"{path.name} cannot be opened ({why})")


def _digest(instructions: Sequence[Instruction]) -> str:
    told = [[one.id, one.text, one.pieces, one.style, one.length_bin, one.domain] for one in instructions]
    return sha256_of_json(told)


def on_disk(path: Path) -> dict[str, Record]:
    """Records by the name of their picture; of two the later one. A damaged line is passed over: its picture is read anew."""
    found: dict[str, Record] = {}
    lines: list[bytes] = []
    with reading(path, "name another folder with out=FOLDER"), contextlib.suppress(FileNotFoundError):
        lines = path.read_bytes().split(b"\n")
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            record = json.loads(line)
            missing = {"id", "sha256", "error", "score", "parts", "style", "seconds", "error_type"} - set(record)
            if not missing:
                found[record["image"]] = record
    return found
