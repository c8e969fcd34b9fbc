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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeAlias

from PIL import Image

from zoo import files
from zoo.errors import Retryable, UserError
from zoo.fields import Count, NonNegative, NotEmpty, Seed, Whole, check_fields
from zoo.papers.typescore import metric, report
from zoo.papers.typescore import style as styles
from zoo.papers.typescore.extractors import Extraction, RapidOcr, TextExtractor, base, describe
from zoo.papers.typescore.extractors.base import Key, Readings, failed
from zoo.papers.typescore.instructions import SHIPPED, Instruction, content, length_bin, listed

Record: TypeAlias = dict[str, Any]

SETTING = "setting.json"  # of a folder of results: what they were made with
RECORDS, SUMMARY, REPORT, READINGS = "records.jsonl", "summary.json", "report.html", "readings.jsonl"
NOTE = (
    "not comparable with the scores of arXiv:2411.02437, nor with those of another extractor, normalisation, list of "
    "instructions or spec_version"
)
_log = logging.getLogger("zoo")


@dataclass(frozen=True)
class TypeScore:
    """The text fidelity of a model's pictures, and how well they follow the style that was asked for."""

    wanted: NotEmpty = SHIPPED  # a file of JSON lines with id, instruction and perhaps text, style; or typeinst_synth
    images: str = ""  # a folder with {id}_{k}.png, or {id}.png; also .jpg and .webp
    extractor: TextExtractor = RapidOcr()
    case_sensitive: bool = False  # whether "Open" for "open" is an error
    ignore_punct: bool = False  # whether punctuation is left out of the comparison
    weights: tuple[NonNegative, NonNegative, NonNegative] = (1.0, 1.0, 1.0)  # of NED, NLCS and SW
    resamples: Count = 1000  # of the bootstrap over instructions
    seed: Seed = 0  # of the bootstrap
    limit: Whole = 0  # the first so many instructions of the list; 0 for all
    out: str = ""  # a folder for the results; empty for IMAGES-typescore (IMAGES-typescore-first10 with limit=10)

    replaced: ClassVar[dict[str, str]] = {
        "cache": f"readings are kept in {READINGS} of the results; leave it out",
        "piece_mode": "quoted texts are compared in their order; leave it out",
        "kind": "a dissimilarity is 100 less the score; leave it out",
        "style": "what boxes tell of the style is always measured; leave it out",
    }

    def __post_init__(self) -> None:
        check_fields(self)
        metric.typescore(metric.Parts(1, 1, 1), self.weights)

    @property
    def normalisation(self) -> metric.Normalisation:
        return metric.Normalisation(self.case_sensitive, self.ignore_punct)

    def judge(self, instruction: Instruction, picture: Any, extraction: Extraction) -> Record:
        """What a record tells of one picture, as JSON values; of a failed extraction one without a score."""
        record: Record = {"error": extraction.error, "style": {}}
        if extraction.error is not None:
            return record | dict.fromkeys(("read", "compared", "parts", "score", "error_type"))
        reference, read = self.normalisation(instruction.text), self.normalisation(extraction.text)
        found, asked = metric.parts(reference, read), instruction.style
        verdicts = styles.measured(asked, picture, extraction.lines)
        return record | {
            "read": extraction.text,
            "compared": [reference, read],
            "parts": {name: round(value, 6) for name, value in found._asdict().items()},
            "score": round(metric.typescore(found, self.weights), 4),
            "error_type": metric.error_type(reference, read),
            "style": {name: {"wanted": asked[name], **verdict._asdict()} for name, verdict in verdicts.items()},
        }

    def _records(self, some: Sequence[File], readings: Readings) -> list[Record]:
        """The records of pictures in their order; what is not in `readings` is read."""
        found, keys = {}, [one.key for one in some]
        for i, picture, read in readings.through(self.extractor, keys, lambda i: _open(some[i].picture)):
            wanted = some[i].instruction
            about = {"id": wanted.id, "wanted": wanted.text, "length_bin": length_bin(wanted.text)}
            about |= {"domain": wanted.domain, "content": content(wanted.text)}
            found[i] = {**keys[i]._asdict(), **about, **self.judge(wanted, picture, read)}
        return [found[i] for i in range(len(some))]

    # as the scorer of the metric `prompted`

    def check(self) -> None:
        """UserError for a list with mistakes, fields that are for folders, or where the extractor lacks something."""
        if folder := self.images or self.out:
            raise UserError(f"{folder}: images and out are for folders; leave them out where a model draws")
        listed(self.wanted)
        self.extractor.check()

    def prompts(self) -> dict[str, str]:
        """The instructions by their ids."""
        return {one.id: one.instruction for one in listed(self.wanted, self.limit)}

    def score(self, images: Mapping[str, Sequence[Image.Image]]) -> dict[str, Any]:
        """Figures of pictures by the ids of their instructions, NaN where nothing could be read."""
        instructions = listed(self.wanted, self.limit)
        drawn = [(one, k, picture) for one in instructions for k, picture in enumerate(images.get(one.id, ()))]
        some = [File(picture, one, Key(f"{one.id}_{k}", "")) for one, k, picture in drawn]
        try:
            records = self._records(some, Readings())
        except Retryable as error:  # a run that trains goes on without the figures
            records = self._records([one._replace(picture=failed(str(error))) for one in some], Readings())
        found = self.summarise(records, instructions)
        figures = {"": found["score"], "_low": found["low"], "_high": found["high"], "_style": found["style"]["score"]}
        figures |= {f"_{name}": value for name, value in (*found["parts"].items(), ("exact", found["exact"]))}
        return {
            **{f"typescore{name}": float("nan") if value is None else value for name, value in figures.items()},
            "typescore_read": found["read"],
            "typescore_failure": found["failures"][0]["error"] if found["failures"] else "",
            "typescore_extractor": f"{found['extractor']['name']} {found['extractor']['version']}",
            "failed": found["failed"],
        }

    # of a folder

    def run(self) -> dict[str, Any]:
        """Reads the pictures that have not been read yet, writes records, summary and report, returns the summary.

        The readings of a stopped run are kept, and failed ones are tried again. UserError, before any picture is read:
        no folder, no picture of any instruction, one of two instructions, a list with mistakes, an `out` of another setting.
        """
        instructions, folder = listed(self.wanted, self.limit), Path(self.images)
        with files.reading(f"images={self.images}", "name the folder that holds {id}_{k}.png, images=DIR"):
            found = find(folder, instructions) if self.images else []
        there = {one.instruction.id for one in found}
        lacking = [one.id for one in instructions if one.id not in there]
        if not there:
            way = f"name a folder with pictures named by id, such as {instructions[0].id}_0.png"
            raise UserError(f"images={self.images} holds no picture of {len(instructions)} instructions; {way}")
        if lacking:
            named = ", ".join(lacking[:5])
            _log.warning("typescore: %d instructions have no picture and are in no mean: %s", len(lacking), named)
        self.extractor.check()
        first = f"-first{self.limit}" if self.limit else ""  # a trial with few must not stand in the way of all
        beside = folder.resolve().with_name(f"{folder.resolve().name}-typescore{first}")  # "." has no name
        out = Path(self.out or os.path.relpath(beside))
        told = [[one.id, one.text, one.style, one.domain] for one in instructions]
        own = {"wanted_sha256": files.sha256_of_json(told), "images": relative(folder, out)}
        with claim(out, {**self.about(), **own}, "results"):
            (out / SUMMARY).unlink(missing_ok=True)  # a run that is stopped must not pass for a finished one
            records = self._records(found, Readings(out / READINGS))
            summary = self.summarise(records, instructions) | {"wanted": self.wanted, "images": self.images}
            summary |= {"missing": {"count": len(lacking), "ids": lacking[:10]}, "out": str(out)}
            with files.writing(out, base.WAY):
                files.write(out / RECORDS, b"".join(map(as_json, records)))
                report.write(out / REPORT, summary, records, folder)
                files.write(out / SUMMARY, as_json(summary, indent=1))
        for one in summary["failures"]:
            _log.warning("typescore: %s was not read: %s", one["image"], one["error"])
        if lost := summary["failed"]:
            _log.warning("typescore: %d pictures were not read and are in no mean; the same command tries again", lost)
        _log.info("typescore: %s of %d pictures; see %s", summary["score"], summary["read"], out / REPORT)
        return summary

    def about(self) -> dict[str, Any]:
        """What decides a score: results compare only where it is equal."""
        return {
            "spec_version": metric.SPEC_VERSION,
            "extractor": describe(self.extractor),
            "normalisation": dataclasses.asdict(self.normalisation),
            "weights": list(self.weights),
            "piece_mode": "join",  # earlier results may have been made otherwise in these two
            "kind": "similarity",
        }

    def summarise(self, records: Sequence[Record], instructions: Sequence[Instruction]) -> dict[str, Any]:
        """Means over pictures, then instructions, with intervals; failed extractions are counted and in no mean."""
        read = [record for record in records if record["error"] is None]
        lost = [record for record in records if record["error"] is not None]
        counts = Counter(record["error_type"] for record in read)
        flat = [{"id": r["id"], **r["parts"], "exact": r["error_type"] == "none"} for r in read]
        means = {name: list(metric.by_instruction(flat, name).values()) for name in (*metric.Parts._fields, "exact")}
        parts = {name: round(statistics.fmean(some), 6) if some else None for name, some in means.items()}
        return {
            "metric": "typescore",
            "note": NOTE,
            **self.about(),
            **self._mean(read),
            "exact": parts.pop("exact"),
            "parts": parts,
            "instructions": len({record["id"] for record in read}),
            "of": len(instructions),
            "read": len(read),
            "failed": len(lost),
            "failures": [{"image": record["image"], "error": record["error"]} for record in lost[:5]],
            "error_types": {name: counts[name] for name in ("none", "spelling", "missing", "surplus")},
            "by": {name: self._by(read, name) for name in ("length_bin", "domain", "content")},
            "style": self._style(read),
            "resamples": self.resamples,
            "seed": self.seed,
        }

    def _mean(self, records: Sequence[Record], key: str = "score") -> dict[str, Any]:
        return metric.mean_of(metric.by_instruction(records, key), self.resamples, self.seed)

    def _by(self, records: Sequence[Record], key: str) -> dict[str, Any]:
        """The means of the records alike in `key`; bins of lengths in their order."""
        found = {}
        names = {record[key] for record in records} - {""}
        for name in sorted(names, key=lambda name: (int("0" + re.split(r"\D", name)[0]), name)):
            some = [record for record in records if record[key] == name]
            found[name] = {**self._mean(some), "instructions": len({record["id"] for record in some})}
        return found

    def _style(self, records: Sequence[Record]) -> dict[str, Any]:
        """Share of attributes followed in 0..100, over those evaluated."""
        by: dict[str, list[bool | None]] = {}
        for name, verdict in (pair for record in records for pair in record["style"].items()):
            by.setdefault(name, []).append(verdict["followed"])
        shares = [{"id": r["id"], "share": styles.share(v["followed"] for v in r["style"].values())} for r in records]
        figures = {}
        for name in sorted(by):
            followed = styles.share(by[name])
            evaluated = len(by[name]) - by[name].count(None)
            figures[name] = {"followed": None if followed is None else round(followed, 4), "evaluated": evaluated}
        return {**self._mean([one for one in shares if one["share"] is not None], "share"), "by": figures}


class File(NamedTuple):
    """A picture of an instruction, here or on disk."""

    picture: Path | Image.Image | Extraction  # the last: why there is none
    instruction: Instruction
    key: Key


def find(folder: Path, instructions: Sequence[Instruction]) -> list[File]:
    """The pictures {id}_{k} and {id} of a folder, in the order of the instructions, then of k.

    UserError where a name is that of two instructions. Other files are passed over.
    """
    order = {one.id: i for i, one in enumerate(instructions)}
    found = []
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp") or not path.is_file():
            continue
        before, _, number = path.stem.rpartition("_")
        names = [(path.stem, -1)] + ([(before, int(number))] if re.fullmatch(r"[0-9]{1,9}", number) else [])
        meant = [(order[name], k) for name, k in names if name in order]
        if len(meant) > 1:
            raise UserError(f"images: {path.name} is of two instructions; end no id by another, _ and a number")
        for i, k in meant:
            found.append((i, k, File(path, instructions[i], Key(path.name, files.sha256_of_file(path) or ""))))
    return [one for _, _, one in sorted(found, key=lambda one: one[:2])]


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
    with contextlib.ExitStack() as held:
        with files.writing(out, base.WAY):
            held.enter_context(files.held(out, f"out={out}", "name another folder with out=FOLDER"))
            if not (out / SETTING).exists():
                if files.names(out):
                    raise UserError(f"out={out} is no folder of {what}; name a new or an empty one with out=FOLDER")
                files.write(out / SETTING, json.dumps(setting, indent=1) + "\n")
            apart = files.differences(json.loads((out / SETTING).read_bytes()), setting)
        if apart:
            raise UserError(
                f"out={out} holds {what} of another setting ({'; '.join(map(base.shorten, apart[:3]))}); name another folder with "
                "out=FOLDER, or remove this one"
            )
        yield
