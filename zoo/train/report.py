"""What a run shows: progress bar or plain lines, metrics.jsonl, TensorBoard events, sample sheets and the loss curve.

Files in a run folder: `metrics.jsonl` (one JSON object a line), `tensorboard/` (events), `samples/*.png` or `*.txt`,
`curve.png`. A training record has the key `loss` (and, where the task knows them, `bits` per dimension or token of the
training batch); any other record is the outcome of one metric, whose `bpd` is held-out bits per dimension, and
`bits_per_token` those of texts; `split` says of which part of the data. Metrics of one kind that their split does not
tell apart have their place in the config as well, `eval`.

Of a run folder in a bucket these files are kept in a scratch folder here, and copies are sent: what grows every half
minute, all of it at saves and looks.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from zoo import files, paths
from zoo.errors import UserError
from zoo.paths import Folder
from zoo.train.curve import Record, draw, part_of
from zoo.train.pictures import png
from zoo.train.tracking import Tracker

_log = logging.getLogger("zoo")

_EVENTS = 8 << 20  # bytes of an event file that is sent to a bucket as a whole whenever it grows
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}  # JSON has no numbers for these


# ------------------------------------------------------------------------------------------------------------- texts


def spelled(ids: np.ndarray, vocabulary: Any) -> str:
    """The text of tokens [T]; their numbers where there is no vocabulary (an object with `decode`).

    Tokens below 0, which overflowed, become the replacement character.
    """
    if vocabulary is None:
        return " ".join(str(i) if i >= 0 else "\ufffd" for i in ids.tolist())
    return str(vocabulary.decode(ids))


def printable(text: str) -> str:
    """A text that a terminal can be given: what would steer it becomes the replacement character, line ends and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def save_text(path: Folder | str, text: str) -> None:
    """Writes a text and a line end in UTF-8, whole or not at all; UserError when it cannot be written."""
    paths.save(path, f"{text}\n".encode("utf-8", "replace"))


# ----------------------------------------------------------------------------------------------------------- metrics


def read_metrics(path: Folder | str) -> list[Record]:
    """All whole records of a metrics.jsonl, in file order; a missing file has none.

    The line torn by a killed run, and any other that is no JSON object with a whole-number `step`, is passed over.
    """
    file, records = paths.parse_path(path), []
    with files.reading(path, "mend its permissions"), paths.sentence(file):
        lines = file.read_bytes().split(b"\n") if file.exists() else []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append({k: _NON_FINITE.get(v, v) if isinstance(v, str) else v for k, v in record.items()})
    return records


def _line(record: Record) -> bytes:
    finite = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(finite, allow_nan=False).encode() + b"\n"


def _identity(record: Record) -> tuple[int, str, str]:
    """What may stand in the file once: a step of training, or a step's metric, told by its keys and where it looked."""
    if "loss" in record:
        return record["step"], "train", ""
    return record["step"], " ".join(sorted(record.keys() - {"step", "time"})), part_of(record)


def _short(value: float | str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.4g}"


def _on_terminal() -> bool:
    """Whether a bar on stderr can be seen; some containers' terminals are 0 columns wide, where tqdm draws nothing."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError):
        return False


class Report:
    """Everything a run says about itself, on the screen and in `folder`.

    `total` and `start` are the run's last step and the step it goes on from, `batch` the examples per step and `unit`
    their name. Records after `start` are removed from metrics.jsonl and hidden in TensorBoard: they belong to steps
    that will be taken again. With `quiet` nothing is printed; with `main=False` (the other hosts of a pod) nothing is
    printed or written. Raises UserError when the folder cannot be written.
    """

    def __init__(
        self,
        folder: Folder | str,
        *,
        total: int,
        start: int,
        batch: int,
        quiet: bool = False,
        main: bool = True,
        unit: str = "images",
    ) -> None:
        home = paths.parse_path(folder)
        self._name = home.name if paths.in_bucket(home) else home.resolve().name
        self.folder, self._mirror = paths.scratch(home, ("metrics.jsonl", "wandb.json")) if main else (Path(home), None)
        self.main, self.quiet, self.unit = main, quiet or not main, unit
        self._total, self._start, self._batch = total, start, batch
        self._metrics = self.folder / "metrics.jsonl"
        self._tracker: Tracker | None = None
        self._events: Any = None
        self._bar: Any = None
        # (time, step) after the first step, which compiles, and at the last training record
        self._warm = self._last = (0.0, -1)
        self._away = 0.0  # seconds since the last training record that were spent on other things
        if not main:
            return
        self._keep({_identity(r): r for r in read_metrics(self._metrics) if r["step"] <= start})
        self._open_events()
        if not self.quiet and _on_terminal():
            from tqdm import tqdm

            form = "{percentage:3.0f}% {bar} {n_fmt}/{total_fmt}{postfix}"
            self._bar = tqdm(total=total, initial=start, file=sys.stderr, dynamic_ncols=True, bar_format=form)

    def __enter__(self) -> Report:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        unsent = self.close(failed=kind is not None)
        if unsent and kind is None:
            raise UserError(unsent)
        if unsent:  # the failure that ends the run is the more important one
            _log.warning(unsent)

    def track(self, project: str, config: Mapping[str, Any]) -> None:
        """From now on records and sheets go to a Weights & Biases project as well; see `zoo.train.tracking`."""
        if not self.main:
            return
        folder = self.folder if self._mirror is None else None
        self._tracker = Tracker(project, config, name=self._name, file=self.folder / "wandb.json", folder=folder)
        if self._tracker.url:
            self.note(f"Weights & Biases: {self._tracker.url}")

    def tick(self, step: int) -> None:
        """Says that `step` was handed to the device: moves the bar; the clock of the warm rate starts at the first."""
        if not self.main:
            return
        if self._warm[1] < 0:
            self._warm = self._last = (time.perf_counter(), step)
            self._away = 0.0
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """Around saving, sampling and evaluating: this time does not count in the rate (it does in the ETA)."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._away += time.perf_counter() - begin

    def log(self, step: int, metrics: Mapping[str, Any], series: str = "") -> None:
        """Records scalars for `step`: a line in metrics.jsonl, TensorBoard scalars, and the bar or a printed line.

        A training record (one with `loss`) gets `rate`, examples per second since the record before it, as soon as one
        step after the first has passed. A record that is already there for this step is replaced. `series` tells curves of
        the same keys apart, in TensorBoard and beyond.
        """
        if not self.main:
            return
        record: Record = {"step": step, "time": round(time.time(), 3)}
        record |= {key: np.asarray(value).item() for key, value in metrics.items() if key not in record}
        train, eta = "loss" in record, None
        if train:
            rate, eta = self._clock(step)
            if rate is not None:
                record["rate"] = round(rate, 3)

        if _identity(record) in self._known:
            kept = {_identity(r): r for r in read_metrics(self._metrics)}
            kept.pop(_identity(record), None)
            self._keep(kept)
        with paths.writing(self._metrics), open(self._metrics, "ab") as file:
            file.write(_line(record))
        self._known.add(_identity(record))
        if self._mirror is not None:
            self._mirror.soon()
        prefix = "train/" if train else f"eval/{series}/" if series else "eval/"
        values = {prefix + k: v for k, v in record.items() if k not in ("step", "time")}
        self._event(step, {k: float(v) for k, v in values.items() if not isinstance(v, str)})
        if self._tracker is not None:
            self._tracker.log(step, values)
        self._show(record, train, eta)

    def note(self, text: str) -> None:
        """Prints a line, above the bar where there is one. A full disk or a closed pipe costs lines, and no step."""
        if self.quiet:
            return
        try:
            (print if self._bar is None else self._bar.write)(text, file=sys.stdout)
            sys.stdout.flush()
        except OSError as error:
            self.quiet = True
            _log.warning("stdout cannot be written to (%s): the run goes on without", error.strerror)

    def picture(self, name: str, image: Image.Image, *, step: int, metadata: Mapping[str, str] | None = None) -> None:
        """Saves one picture as `samples/NAME-STEP.png`. TensorBoard shows those of one name as one series over steps."""
        if not self.main:
            return
        data = png(image, metadata)
        paths.save(self.folder / "samples" / f"{name}-{step:07d}.png", data)
        self._event(step, {name: (data, image.size)})
        if self._tracker is not None:
            self._tracker.log(step, {name: image})

    def texts(self, name: str, texts: Sequence[str], *, step: int, shown: int = 2) -> None:
        """Saves texts as `samples/NAME-STEP.txt`, each below a line with its number, and prints the first ones.

        TensorBoard shows those of one name as one series over steps.
        """
        if not self.main:
            return
        whole = "\n".join(f"--- {i}\n{text}" for i, text in enumerate(texts))
        save_text(self.folder / "samples" / f"{name}-{step:07d}.txt", whole)
        for i, text in enumerate(texts[:shown]):
            self.note(f"step {step}, sample {i}: {printable(text)}")
        self._event(step, {name: whole})
        if self._tracker is not None:
            self._tracker.log(step, {name: whole})

    def curve(self) -> None:
        """Draws curve.png from metrics.jsonl: training loss (bits where known) and held-out bits against step."""
        if self.main:
            data = draw(read_metrics(self._metrics), self._name, "token" if self.unit == "sequences" else "dimension")
            if data is not None:
                paths.save(self.folder / "curve.png", data)
            self.push()

    def push(self, wait: float = 0.0) -> None:
        """Sends all that has changed to the bucket, where the run folder is in one; waits so many seconds for it."""
        if self._mirror is not None:
            with self.away():
                self._mirror.push(wait)

    def close(self, failed: bool = False) -> str | None:
        """Ends the bar and the event file and sends the rest to where it goes; may be called twice.

        Returns what to tell where not all could be sent: leaving a `with` block tells it.
        """
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        events, self._events = self._events, None
        if events is not None:
            with paths.writing(self.folder / "tensorboard"):
                events.close()
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            tracker.close(failed)
        mirror, self._mirror = self._mirror, None
        return mirror.close() if mirror is not None else None

    def _keep(self, records: dict[tuple[int, str, str], Record]) -> None:
        paths.save(self._metrics, b"".join(_line(r) for r in records.values()), sync=True)
        self._known = set(records)

    def _clock(self, step: int) -> tuple[float | None, float | None]:
        """Examples per second since the last training record and seconds to the end; None before the second step."""
        self.tick(step)
        now = time.perf_counter()
        (last, last_step), (warm, warm_step) = self._last, self._warm
        if step <= last_step:
            return None, None
        rate = (step - last_step) * self._batch / max(now - last - self._away, 1e-9)
        eta = (self._total - step) * (now - warm) / (step - warm_step)
        self._last, self._away = (now, step), 0.0
        return rate, max(eta, 0.0)

    def _show(self, record: Record, train: bool, eta: float | None) -> None:
        if self.quiet:
            return
        bar = self._bar if train else None
        if bar is not None:  # one line for everything
            keys = ["loss", "bits", "rate"] + ["skipped"] * bool(record.get("skipped"))
        elif train:
            keys = ["loss", "bits", "rate", "grad_norm", "skipped"]
        else:
            keys = [k for k in record if k not in ("step", "time")]
        shown = {k: record[k] for k in keys if k in record}
        parts = [f"{_short(v)} {self.unit}/s" if k == "rate" else f"{k} {_short(v)}" for k, v in shown.items()]
        if eta is not None:
            hours, rest = divmod(round(eta), 3600)
            parts.append(f"ETA {hours}:{rest // 60:02d}:{rest % 60:02d}")
        if bar is not None:
            bar.set_postfix_str("  ".join(parts))
        else:
            self.note(" | ".join([f"step {record['step']}/{self._total}", *parts]))

    # The events are written here and now: the library's own SummaryWriter hands them to a thread, and when the disk is
    # full that thread dies unheard and the queue to it blocks training for ever.

    def _open_events(self) -> None:
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._next_events()
        with paths.writing(self.folder / "tensorboard"):
            restart = SessionLog(status=SessionLog.START)
            self._events.write_event(Event(wall_time=time.time(), step=self._start + 1, session_log=restart))
            self._events.flush()

    def _next_events(self) -> None:
        from tensorboardX.event_file_writer import EventsWriter

        folder = self.folder / "tensorboard"
        with paths.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            # the name holds whole seconds only; a quick restart must not overwrite its predecessor
            suffix = f".{time.time_ns()}"
            self._events = EventsWriter(str(folder / "events"), suffix)
            self._events_file = next(folder.glob(f"*{suffix}"))

    def _event(self, step: int, values: Mapping[str, float | str | tuple[bytes, tuple[int, int]]]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary
        from tensorboardX.summary import text

        summary = Summary()
        for tag, value in values.items():
            if isinstance(value, str):  # read as Markdown: four blanks keep it as it is
                summary.MergeFrom(text(tag, "".join(f"    {line}\n" for line in value.split("\n"))))
            elif isinstance(value, tuple):
                data, (width, height) = value
                image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
                summary.value.append(Summary.Value(tag=tag, image=image))
            else:
                summary.value.append(Summary.Value(tag=tag, simple_value=value))
        with paths.writing(self.folder / "tensorboard"):
            self._events.write_event(Event(wall_time=time.time(), step=step, summary=summary))
            self._events.flush()
            if self._mirror is not None and self._events_file.stat().st_size > _EVENTS:
                self._events.close()
                self._next_events()
