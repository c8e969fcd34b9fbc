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
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

from PIL import Image

from zoo import files
from zoo.errors import Retryable, UserError
from zoo.fields import Count, NonNegative, NotEmpty, Seed, Whole, check_fields
from zoo.papers.typescore import metric, report
from zoo.papers.typescore import style as styles
from zoo.papers.typescore.extractors import Extraction, RapidOcr, TextExtractor, base, clean, describe
from zoo.papers.typescore.extractors.base import Key, Readings, failed
from zoo.papers.typescore.instructions import SHIPPED, Instruction, content, listed

Record: TypeAlias = dict[str, Any]
Ask: TypeAlias = Callable[[Sequence[str]], list[Extraction]]

SETTING = "setting.json"  # of a folder of results: what they were made with
RECORDS, SUMMARY, REPORT, READINGS = "records.jsonl", "summary.json", "report.html", "readings.jsonl"
NOTE = (
    "not comparable with the scores of arXiv:2411.02437, nor with those of another extractor, normalisation, list of "
    "instructions or spec_version"
)
NAMED = 5  # of a long list, how many are named
_WAY = "free some space, or name another folder with out=FOLDER"
_log = logging.getLogger("zoo")


@dataclass(frozen=True)
class TypeScore:
    """The text fidelity of a model's pictures, and how well they follow the style that was asked for."""

    wanted: NotEmpty = SHIPPED  # a file of JSON lines with id, instruction and perhaps text, style; or typeinst_synth
    images: str = ""  # a folder with {id}_{k}.png, or {id}.png; also .jpg and .webp
    extractor: TextExtractor = RapidOcr()
    case_sensitive: bool = False  # whether "Open" for "open" is an error
    ignore_punct: bool = False  # whether punctuation is left out of the comparison
    piece_mode: Literal["join", "set"] = "join"  # set: several quoted texts may stand in any order
    weights: tuple[NonNegative, NonNegative, NonNegative] = (1.0, 1.0, 1.0)  # of NED, NLCS and SW
    kind: metric.Kind = "similarity"
    style: bool = True  # whether style following is evaluated; models that see are asked once per attribute
    resamples: Count = 1000  # of the bootstrap over instructions
    seed: Seed = 0  # of the bootstrap
    limit: Whole = 0  # the first so many instructions of the list; 0 for all
    out: str = ""  # a folder for the results; empty for IMAGES-typescore (IMAGES-typescore-first10 with limit=10)

    replaced: ClassVar[dict[str, str]] = {"cache": f"readings are kept in {READINGS} of the results; leave it out"}

    def __post_init__(self) -> None:
        check_fields(self)
        metric.typescore(metric.Parts(1, 1, 1), self.weights, self.kind)

    @property
    def normalisation(self) -> metric.Normalisation:
        return metric.Normalisation(self.case_sensitive, self.ignore_punct)

    # --- one picture ------------------------------------------------------------------------------

    def compared(self, instruction: Instruction, extraction: Extraction) -> tuple[str, str]:
        """What was wanted and what was read, as they are compared.

        In mode "set" each line that was read goes to the quoted text that it fits best.
        """
        normalise = self.normalisation
        if self.piece_mode == "join":
            return normalise(instruction.text), normalise(extraction.text)
        pieces = [piece for piece in map(normalise, instruction.pieces) if piece]
        reads = metric.assign(pieces, [line for line in map(normalise, _lines(extraction)) if line])
        return " ".join(pieces), " ".join(read for read in reads if read)

    def judge(self, instruction: Instruction, picture: Any, extraction: Any, ask: Ask | None = None) -> Record:
        """What a record tells of one picture, as JSON values; of a failed extraction one without a score.

        `ask` puts questions of style to a model that sees the picture.
        """
        boxes = [dataclasses.asdict(line) for line in extraction.lines]
        record: Record = {"boxes": boxes, "seconds": extraction.seconds, "error": extraction.error, "style": {}}
        if extraction.error is not None:
            return record | dict.fromkeys(("read", "compared", "parts", "score", "error_type"))
        reference, read = self.compared(instruction, extraction)
        found = metric.parts(reference, read)
        asked = instruction.style if self.style else {}
        verdicts = styles.evaluate(asked, picture, extraction, ask)
        return record | {
            "read": extraction.text,
            "compared": [reference, read],
            "parts": {name: round(value, 6) for name, value in found._asdict().items()},
            "score": round(metric.typescore(found, self.weights, self.kind), 4),
            "error_type": metric.error_type(reference, read),
            "style": {name: {"wanted": asked[name], **verdict._asdict()} for name, verdict in verdicts.items()},
        }

    def _judged(self, some: Sequence[File], readings: Readings) -> list[Record]:
        """The records of some pictures; what is not in `readings` is read."""
        opened = {one.key: _open(one.picture) for one in some}
        good = {key: picture for key, picture in opened.items() if isinstance(picture, Image.Image)}
        read = dict(zip(good, readings.through(self.extractor.extract, list(good), list(good.values()))))
        ask: Any = getattr(self.extractor, "ask", None)

        def record(one: File) -> Record:
            def asking(questions: Sequence[str]) -> list[Extraction]:
                keys = [one.key._replace(question=question) for question in questions]
                return readings.through(ask, keys, [good[one.key]] * len(keys), questions)

            picture, wanted = good.get(one.key), one.instruction
            extraction = opened[one.key] if picture is None else read[one.key]
            return {
                "image": one.key.image,
                "sha256": one.key.sha256,
                "k": one.k,
                "size": None if picture is None else picture.size,
                "id": wanted.id,
                "wanted": wanted.text,
                "length_bin": wanted.length_bin,
                "domain": wanted.domain,
                "content": content(wanted.text),
                **self.judge(wanted, picture, extraction, None if ask is None else asking),
            }

        return [record(one) for one in some]

    # --- as the scorer of the metric `prompted` -----------------------------------------------------

    def check(self) -> None:
        """UserError for a list with mistakes, fields that are for folders, or where the extractor lacks something."""
        for name in ("images", "out"):
            if getattr(self, name):
                raise UserError(
                    f"{name}={getattr(self, name)} is for a folder of pictures, and a model draws its own; leave it out"
                )
        self.instructions()
        self._ready()

    def prompts(self) -> dict[str, str]:
        """The instructions by their ids."""
        return {one.id: one.instruction for one in self.instructions()}

    def score(self, images: Mapping[str, Sequence[Image.Image]]) -> dict[str, Any]:
        """Figures of pictures by the ids of their instructions, NaN where nothing could be read; some are drawn with what was read."""
        instructions = self.instructions()
        some = [
            File(picture, one, k, Key(f"{one.id}_{k}", ""))
            for one in instructions
            for k, picture in enumerate(images.get(one.id, ()))
        ]
        try:
            records = self._judged(some, Readings())
        except Retryable as error:  # a run that trains goes on without the figures
            records = self._judged([one._replace(picture=failed(str(error))) for one in some], Readings())
        found = self.summarise(records, instructions)
        figures = {"typescore" + end: found[key] for end, key in (("", "score"), ("_low", "low"), ("_high", "high"))}
        figures |= {f"typescore_{name}": value for name, value in (found["parts"] | {"exact": found["exact"]}).items()}
        if found["style"] is not None:
            figures["typescore_style"] = found["style"]["score"]
        return {
            **{name: float("nan") if value is None else value for name, value in figures.items()},
            "typescore_read": found["read"],
            "typescore_failure": found["failures"][0]["error"] if found["failures"] else "",
            "typescore_extractor": f"{found['extractor']['name']} {found['extractor']['version']}",
            "failed": found["failed"],
            "pictures": {"typescore": report.sheet(records, [one.picture for one in some])},
        }

    def instructions(self) -> list[Instruction]:
        """The first `limit` of the list, in its order. UserError for a text that is nothing without its punctuation."""
        found = listed(self.wanted, self.limit)
        for one in found:
            if not self.normalisation(one.text):
                raise UserError(
                    f"instruction {one.id!r} wants {one.text!r}, which is nothing without its punctuation; leave ignore_punct "
                    "out, or take the instruction off the list"
                )
        return found

    def _ready(self) -> None:
        base.need_packages("typescore", "rapidfuzz", "jinja2")
        self.extractor.check()

    # --- all of them ------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Reads the pictures that have not been read yet, writes records, summary and report, returns the summary.

        The readings of a stopped run are kept, and failed ones are tried again. UserError, before any picture is read:
        no folder, no picture of any instruction, one of two instructions, a list with mistakes, an `out` of another setting.
        """
        instructions = self.instructions()
        folder = Path(self.images)
        way = "name the folder that holds {id}_{k}.png, images=DIR"
        with files.reading(f"images={self.images}", way):
            if not self.images or not folder.is_dir():
                raise UserError(f"images={self.images} is no folder; {way}")
            found = find(folder, instructions)
        there = {one.instruction.id for one in found}
        lacking = [one.id for one in instructions if one.id not in there]
        if not there:
            raise UserError(
                f"images={folder} holds no picture of the {len(instructions)} instructions; name the pictures by their ids, "
                f"{instructions[0].id}_0.png or {instructions[0].id}.png (also .jpg, .webp)"
            )
        if lacking:
            named = f"{', '.join(lacking[:NAMED])}{', ...' * (len(lacking) > NAMED)}"
            _log.warning("typescore: %d instructions have no picture and are in no mean: %s", len(lacking), named)
        self._ready()
        out = Path(self.out) if self.out else self._beside(folder)
        told = [[one.id, one.text, one.pieces, one.style, one.length_bin, one.domain] for one in instructions]
        own = {"wanted_sha256": files.sha256_of_json(told), "images": relative(folder, out), "style": self.style}
        with claim(out, {**self.about(), **own}, "results"):
            (out / SUMMARY).unlink(missing_ok=True)  # a run that is stopped must not pass for a finished one
            records = self._records(found, Readings(out / READINGS))
            summary = self.summarise(records, instructions) | {
                "wanted": self.wanted,
                "images": self.images,
                "missing": {"count": len(lacking), "ids": lacking[:10]},
                "out": str(out),
            }
            with files.writing(out, _WAY):
                files.write(out / RECORDS, b"".join(map(as_json, records)))
                report.write(out / REPORT, summary, records, folder)
                files.write(out / SUMMARY, as_json(summary, indent=1))
        for one in summary["failures"]:
            _log.warning("typescore: %s was not read: %s", one["image"], one["error"])
        for key, what in (("failed", "pictures were not read"), ("unanswered", "questions of style were not answered")):
            if summary[key]:
                _log.warning("typescore: %d %s and are in no mean; the same command tries again", summary[key], what)
        if summary["score"] is not None:
            told = [summary[key] for key in ("score", "low", "high", "read")]
            _log.info("typescore: %.1f (%.1f to %.1f) of %d pictures; see %s", *told, out / REPORT)
        return summary

    def about(self) -> dict[str, Any]:
        """What decides a score: results compare only where it is equal."""
        return {
            "spec_version": metric.SPEC_VERSION,
            "extractor": describe(self.extractor),
            "normalisation": dataclasses.asdict(self.normalisation),
            "piece_mode": self.piece_mode,
            "weights": list(self.weights),
            "kind": self.kind,
        }

    def summarise(self, records: Sequence[Record], instructions: Sequence[Instruction]) -> dict[str, Any]:
        """Means over pictures, then instructions, with intervals; failed extractions are counted and in no mean."""
        read = [record for record in records if record["error"] is None]
        lost = [record for record in records if record["error"] is not None]
        counts = Counter(record["error_type"] for record in read)
        flat = [{"id": r["id"], **r["parts"], "exact": r["error_type"] == "none"} for r in read]
        means = {name: list(metric.by_instruction(flat, name).values()) for name in (*metric.Parts._fields, "exact")}
        parts_of = {name: round(statistics.fmean(values), 6) if values else None for name, values in means.items()}
        return {
            "metric": "typescore",
            "note": NOTE,
            **self.about(),
            **self._mean(read),
            "exact": parts_of.pop("exact"),
            "parts": parts_of,
            "instructions": len({record["id"] for record in read}),
            "of": len(instructions),
            "read": len(read),
            "failed": len(lost),
            "unanswered": sum(v["failed"] for record in read for v in record["style"].values()),
            "failures": [{"image": record["image"], "error": record["error"]} for record in lost[:NAMED]],
            "error_types": {name: counts[name] for name in ("none", "spelling", "missing", "surplus")},
            "by": {name: self._by(read, name) for name in ("length_bin", "domain", "content")},
            "style": self._style(read) if self.style else None,
            "seconds": round(sum(record["seconds"] for record in records), 2),
            "resamples": self.resamples,
            "seed": self.seed,
        }

    def _mean(self, records: Sequence[Record], key: str = "score") -> dict[str, Any]:
        return metric.mean_of(metric.by_instruction(records, key), self.resamples, self.seed)

    def _by(self, records: Sequence[Record], key: str) -> dict[str, Any]:
        groups: dict[str, list[Record]] = {}
        for record in records:
            groups.setdefault(record[key], []).append(record)
        return {
            name: {**self._mean(groups[name]), "instructions": len({r["id"] for r in groups[name]})}
            for name in sorted(groups, key=lambda name: ([int(n) for n in re.findall(r"\d+", name)] + [10**9], name))
            if name
        }

    def _style(self, records: Sequence[Record]) -> dict[str, Any]:
        """Share of attributes followed in 0..100, over those evaluated."""
        shares = [{"id": r["id"], "share": styles.share(v["followed"] for v in r["style"].values())} for r in records]
        by: dict[str, list[bool | None]] = {}
        for attribute, verdict in (pair for record in records for pair in record["style"].items()):
            by.setdefault(attribute, []).append(verdict["followed"])
        return {
            **self._mean([one for one in shares if one["share"] is not None], "share"),
            "by": {
                attribute: {
                    "followed": None if (share := styles.share(followed)) is None else round(share, 4),
                    "evaluated": len(followed) - followed.count(None),
                    "not_evaluated": followed.count(None),
                }
                for attribute, followed in sorted(by.items())
            },
        }

    def _beside(self, folder: Path) -> Path:
        folder = folder.resolve()  # "." has no name
        first = f"-first{self.limit}" if self.limit else ""  # a trial with few must not stand in the way of all
        return Path(os.path.relpath(folder.with_name(f"{folder.name}-typescore{first}")))

    def _records(self, found: Sequence[File], readings: Readings) -> list[Record]:
        """The records of all pictures in the order of `found`; what failed before is read last."""
        from tqdm import tqdm

        before = sum(readings.good(one.key) for one in found)
        if 0 < before < len(found):
            _log.info("typescore: %d pictures have been read before, %d are left", before, len(found) - before)
        todo = sorted(found, key=lambda one: readings.failed(one.key))
        size = max(int(self.extractor.batch), 1)
        records: dict[str, Record] = {}
        for start in tqdm(range(0, len(todo), size), unit_scale=size, disable=None):
            records |= {record["image"]: record for record in self._judged(todo[start : start + size], readings)}
        return [records[one.key.image] for one in found]


# --- the parts of a run -----------------------------------------------------------------------------


class File(NamedTuple):
    """A picture of an instruction, here or on disk: its `k`-th, or None where its name has no number."""

    picture: Path | Image.Image | Extraction  # the last: why there is none
    instruction: Instruction
    k: int | None
    key: Key


def find(folder: Path, instructions: Sequence[Instruction]) -> list[File]:
    """The pictures {id}_{k} and {id} of a folder, in the order of the instructions, then of k.

    UserError where a name is that of two instructions, or two files are one picture. Other files are passed over.
    """
    known = {one.id: one for one in instructions}
    found: dict[tuple[str, int], File] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp") or not path.is_file():
            continue
        number = re.fullmatch(r"(.+)_(\d{1,9})", path.stem, re.ASCII | re.DOTALL)
        meant = [(path.stem, -1)] if path.stem in known else []
        if number is not None and number[1] in known:
            meant.append((number[1], int(number[2])))
        twice = [found[one].key.image for one in meant if one in found]
        if len(meant) > 1 or twice:
            raise UserError(
                f"images: {path.name} is a picture of two instructions, or {', '.join(twice) or 'another'} is the same picture of one; "
                "give ids of which none is another's with _ and a number behind, and number pictures {id}_{k}"
            )
        for name, k in meant:
            key = Key(path.name, files.sha256_of_file(path) or "")
            found[name, k] = File(path, known[name], None if k < 0 else k, key)
    order = {one.id: i for i, one in enumerate(instructions)}
    return [found[one] for one in sorted(found, key=lambda one: (order[one[0]], one[1]))]


def _open(picture: Path | Image.Image | Extraction) -> Image.Image | Extraction:
    """The picture, read whole; or a failed extraction that says what is wrong with the file."""
    if not isinstance(picture, Path):
        return picture
    try:
        with Image.open(picture) as found:
            found.load()
            return found
    except Exception as error:  # decoders raise all sorts of things
        return failed(f"{picture.name} cannot be opened ({type(error).__name__}: {error})")


def _lines(extraction: Extraction) -> list[str]:
    """What was read, line by line: boxes in the order of reading, or the rows of an answer."""
    if extraction.lines:
        return [line.text for row in base.reading_order(extraction.lines) for line in row]
    if not extraction.text or not extraction.raw:
        return [extraction.text]
    return [clean(row) for row in extraction.raw.splitlines() if not row.lstrip().startswith("```")]


def relative(folder: Path, out: Path) -> str:
    """Where the pictures are, as seen from the results: both may be moved together."""
    return Path(os.path.relpath(folder.resolve(), out.resolve())).as_posix()


def as_json(value: Any, indent: int | None = None) -> bytes:
    """JSON and the end of its line, as UTF-8; halves of characters that readers hand back become question marks."""
    return (json.dumps(value, indent=indent, ensure_ascii=False) + "\n").encode("utf-8", "replace")


@contextlib.contextmanager
def claim(out: Path, setting: Mapping[str, Any], what: str) -> Iterator[None]:
    """Makes `out` the folder of `what` with this setting, which it remembers, and holds it for this process.

    UserError where it is another's or in use.
    """
    setting = json.loads(json.dumps(setting))
    file = out / SETTING
    with contextlib.ExitStack() as held:
        with files.writing(out, _WAY):
            out.mkdir(parents=True, exist_ok=True)
            held.enter_context(files.locked(out, f"out={out}", "name another folder with out=FOLDER"))
            if not file.exists():
                if files.names(out):
                    raise UserError(f"out={out} is no folder of {what}; name a new or an empty one with out=FOLDER")
                files.write(file, json.dumps(setting, indent=1) + "\n")
            data = file.read_bytes()
        try:
            apart = files.differences(json.loads(data), setting)
        except ValueError:
            raise UserError(f"{file} is damaged; name another folder with out=FOLDER, or remove this one") from None
        if apart:
            raise UserError(
                f"out={out} holds {what} of another setting ({'; '.join(map(base.shorten, apart[:3]))}); name another folder with "
                "out=FOLDER, or remove this one"
            )
        yield
