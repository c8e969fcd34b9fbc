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
import functools
import io
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
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from zoo import files, paths
from zoo.errors import UserError
from zoo.paths import Folder
from zoo.train.tracking import Tracker

Record = dict[str, Any]

_log = logging.getLogger("zoo")

_HELD = ("#d1571b", "#2f8f4e", "#7a4fb0", "#8c6d1f")  # lines of held-out bits
_PAGE, _INK, _NAN = (244, 244, 244), (40, 40, 40), (255, 0, 255)
_PAD, _FONT, _CAPTION = 4, 12, 16  # pixels: between pictures, letter height, room for one line of caption
_EVENTS = 8 << 20  # bytes of an event file that is sent to a bucket as a whole whenever it grows
_SIDE = 64  # pixels: pictures smaller than this are enlarged on a sheet
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}  # JSON has no numbers for these


_writing = functools.partial(
    files.writing, way="free some space, mend its permissions or choose another folder with workdir=PATH"
)


def _write(path: Folder, data: bytes, sync: bool = False) -> None:
    """`paths.write`, with a sentence where it fails; without `sync` what is easily made again may not outlive a power cut."""
    with _writing(path):
        paths.write(path, data, sync)


# ---------------------------------------------------------------------------------------------------------- pictures


def _pixels(images: Any) -> np.ndarray:
    """Images [N, H, W, C] in [-1, 1] to uint8 [N, H, W', 3]; raises UserError for another shape or for integers."""
    x = np.asarray(images)
    if x.ndim != 4 or 0 in x.shape or np.issubdtype(x.dtype, np.integer):
        raise UserError(
            f"images have shape {x.shape} and type {x.dtype}; expected floats in [-1, 1] of shape [N, H, W, C]; "
            "add the missing axes, or rescale whole numbers from [0, 255]"
        )
    n, h, w, c = x.shape
    group = 3 if c % 3 == 0 else 1
    x = x.astype(np.float32).reshape(n, h, w, c // group, group).swapaxes(2, 3).reshape(n, h, w * (c // group), group)
    broken = np.isnan(x).any(-1)
    rgb = np.rint((np.clip(np.where(np.isnan(x), 0, x), -1, 1) + 1) * 127.5).astype(np.uint8)
    rgb = np.broadcast_to(rgb, (*rgb.shape[:3], 3)).copy()
    rgb[broken] = _NAN
    return rgb


def grid(
    images: Any, captions: Sequence[str] | None = None, columns: int | None = None, scale: int | None = None
) -> Image.Image:
    """One sheet of all images [N, H, W, C], floats in [-1, 1] (clipped), row by row, each above its caption.

    Grey and RGB images are shown as they are; channels in another multiple of three as RGB pictures side by side, any
    other number as grey ones. A pixel with a NaN is magenta. `columns` is about sqrt(N) and `scale` (whole-number
    enlargement, without smoothing) brings small images to about 64 pixels unless given. Too long captions are cut.
    Raises UserError for another shape and when captions do not match the images.
    """
    pixels = _pixels(images)
    n = len(pixels)
    if captions is not None and len(captions) != n:
        raise UserError(f"{len(captions)} captions for {n} images; expected as many; give one per image or none")
    scale = scale if scale is not None else max(1, _SIDE // pixels.shape[1])
    columns = columns if columns is not None else math.ceil(math.sqrt(n))
    if columns < 1 or scale < 1:
        raise UserError(f"columns={columns}, scale={scale}; expected whole numbers from 1; leave them out to choose")
    columns = min(columns, n)

    pixels = pixels.repeat(scale, 1).repeat(scale, 2)
    height, width = pixels.shape[1:3]
    row = height + _PAD + (_CAPTION if captions is not None else 0)
    sheet = Image.new("RGB", (_PAD + columns * (width + _PAD), _PAD + math.ceil(n / columns) * row), _PAGE)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT)
    for i, picture in enumerate(pixels):
        x, y = _PAD + i % columns * (width + _PAD), _PAD + i // columns * row
        sheet.paste(Image.fromarray(picture), (x, y))
        if captions is not None:
            text = _fit(str(captions[i]), font, width)
            draw.text((x + width / 2, y + height + _CAPTION / 2), text, _INK, font, anchor="mm")
    return sheet


def class_name(names: Sequence[str], label: int) -> str:
    """Caption of a class number: its name where it has one, `none` for the negative "no label"."""
    return "none" if label < 0 else names[label] if label < len(names) else str(label)


def _fit(text: str, font: Any, width: float) -> str:
    """`text` on one line, cut to `width` pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..." if text else ""


def _png(image: Image.Image, metadata: Mapping[str, str] | None) -> bytes:
    info = PngImagePlugin.PngInfo()
    for key, value in (metadata or {}).items():
        info.add_text(key, str(value))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def save_png(path: Folder | str, image: Any, metadata: Mapping[str, str] | None = None) -> None:
    """Writes one picture, an `Image` or an array [H, W, C] in [-1, 1], whole or not at all.

    `metadata` (seed, guidance, ...) goes into the file's text chunks: `Image.open(path).text` gives it back. The file
    is RGB; channels are treated as by `grid`. Raises UserError when it cannot be written.
    """
    if not isinstance(image, Image.Image):
        image = Image.fromarray(_pixels(np.asarray(image)[None])[0])
    _write(paths.parse_path(path), _png(image, metadata))


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
    _write(paths.parse_path(path), f"{text}\n".encode("utf-8", "replace"))


# ----------------------------------------------------------------------------------------------------------- metrics


def read_metrics(path: Folder | str) -> list[Record]:
    """All whole records of a metrics.jsonl, in file order; a missing file has none.

    The line torn by a killed run, and any other that is no JSON object with a whole-number `step`, is passed over.
    """
    try:
        file = paths.parse_path(path)
        with paths.sentence(file):
            lines = file.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror or error}; expected a metrics.jsonl; mend its permissions"
        ) from error
    records = []
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
    return record["step"], " ".join(sorted(record.keys() - {"step", "time"})), _part(record)


def _part(record: Record) -> str:
    """What tells a metric's record from those of others of its kind."""
    return " ".join(str(record[key]) for key in ("split", "eval") if key in record)


def _number(value: Any) -> bool | int | float | str:
    if isinstance(value, str):
        return value
    value = np.asarray(value)
    kind = value.dtype.kind
    return bool(value) if kind == "b" else int(value) if kind in "iu" else float(value)


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
        record |= {key: _number(value) for key, value in metrics.items() if key not in record}
        train, eta = "loss" in record, None
        if train:
            rate, eta = self._clock(step)
            if rate is not None:
                record["rate"] = round(rate, 3)

        if _identity(record) in self._known:
            kept = {_identity(r): r for r in read_metrics(self._metrics)}
            kept.pop(_identity(record), None)
            self._keep(kept)
        with _writing(self._metrics), open(self._metrics, "ab") as file:
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

    def sheet(
        self,
        name: str,
        images: Any,
        labels: Sequence[Any] | np.ndarray | None = None,
        *,
        step: int | None = None,
        columns: int | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """Saves images [N, H, W, C] as `samples/NAME-STEP.png` (`NAME.png` without a step), captioned with `labels`.

        See `grid` for the looks. TensorBoard shows the sheets of one name as one series over steps.
        """
        if not self.main:
            return
        captions = None if labels is None else [str(label) for label in labels]
        self.picture(name, grid(images, captions, columns), step=step, metadata=metadata)

    def picture(
        self, name: str, image: Image.Image, *, step: int | None = None, metadata: Mapping[str, str] | None = None
    ) -> None:
        """Saves one picture as `samples/NAME-STEP.png` (`NAME.png` without a step), and shows it where sheets are shown."""
        if not self.main:
            return
        file = name if step is None else f"{name}-{step:07d}"
        data = _png(image, metadata)
        _write(self.folder / "samples" / f"{file}.png", data)
        at = step if step is not None else self._start
        self._event(at, {name: (data, image.size)})
        if self._tracker is not None:
            self._tracker.image(at, name, image)

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
            data = _curve(read_metrics(self._metrics), self._name, "token" if self.unit == "sequences" else "dimension")
            if data is not None:
                _write(self.folder / "curve.png", data)
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
            with _writing(self.folder / "tensorboard"):
                events.close()
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            tracker.close(failed)
        mirror, self._mirror = self._mirror, None
        return mirror.close() if mirror is not None else None

    def _keep(self, records: dict[tuple[int, str, str], Record]) -> None:
        _write(self._metrics, b"".join(_line(r) for r in records.values()), sync=True)
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
        with _writing(self.folder / "tensorboard"):
            restart = SessionLog(status=SessionLog.START)
            self._events.write_event(Event(wall_time=time.time(), step=self._start + 1, session_log=restart))
            self._events.flush()

    def _next_events(self) -> None:
        from tensorboardX.event_file_writer import EventsWriter

        folder = self.folder / "tensorboard"
        with _writing(folder):
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
        with _writing(self.folder / "tensorboard"):
            self._events.write_event(Event(wall_time=time.time(), step=step, summary=summary))
            self._events.flush()
            if self._mirror is not None and self._events_file.stat().st_size > _EVENTS:
                self._events.close()
                self._next_events()


def _series(records: list[Record], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and finite values of `key`, in order of step."""
    points = sorted((r["step"], r[key]) for r in records if isinstance(r.get(key), (int, float)))
    x, y = np.array(points, np.float64).reshape(-1, 2).T
    return x[np.isfinite(y)], y[np.isfinite(y)]


def _curve(records: list[Record], title: str, per: str) -> bytes | None:
    """A PNG of training and held-out figures against step, bits being `per` what; None when there is no point to draw.

    Held-out figures of several splits are a line each.
    """
    train = [r for r in records if "loss" in r]
    key = "bits" if any("bits" in r for r in train) else "loss"
    held = [r for r in records if "loss" not in r]
    held_key = "bpd" if any("bpd" in r for r in held) else "bits_per_token"
    parts = sorted({_part(r) for r in held if held_key in r})
    lines_of = {part: _series([r for r in held if _part(r) == part], held_key) for part in parts}
    held_out = {part: points for part, points in lines_of.items() if len(points[0])}
    x, y = _series(train, key)
    if not len(x) and not held_out:
        return None
    # the figure is built without pyplot: no window system is asked for and no global state is left behind
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    held_axes = axes.twinx() if key == "loss" and len(x) and held_out else axes
    lines: list[Any] = []
    if len(x):
        window = max(1, len(x) // 50)
        name = "training bits" if key == "bits" else "training loss"
        if window > 1:
            axes.plot(x, y, color="#9ec5e8", lw=0.8)
            middle = x[(window - 1) // 2 :][: len(x) - window + 1]
            smooth = np.convolve(y, np.full(window, 1 / window), "valid")
            lines += axes.plot(middle, smooth, color="#1f6fb4", lw=1.8, label=f"{name}, mean of {window} records")
        else:
            lines += axes.plot(x, y, color="#1f6fb4", lw=1.8, marker=".", label=name)
    for i, (part, (held_x, held_y)) in enumerate(held_out.items()):
        name = f"held-out bits{f', {part}' if part and len(held_out) > 1 else ''} (last: {held_y[-1]:.3f})"
        colour = _HELD[i % len(_HELD)]
        lines += held_axes.plot(held_x, held_y, color=colour, marker="o", ms=5, lw=1, ls="--", label=name)
    if held_out:
        held_axes.set_ylabel(f"bits per {per}")
    if len(x):
        axes.set_ylabel(f"bits per {per}" if key == "bits" else "loss")

    late = 0.05 * max(steps.max(initial=0) for steps in (x, *(points[0] for points in held_out.values())))
    tail, held_tails = y[x >= late], [held_y[held_x >= late] for held_x, held_y in held_out.values()]
    if held_axes is axes:
        _zoom(axes, tail, *held_tails)
    else:
        _zoom(axes, tail)
        _zoom(held_axes, *held_tails)
    axes.set_xlim(left=0)
    axes.set_xlabel("step")
    axes.set_title(title)
    axes.grid(color="#e4e4e4")
    axes.set_axisbelow(True)
    axes.legend(handles=lines, loc="upper right")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _zoom(axes: Any, *curves: np.ndarray) -> None:
    """Fits the vertical axis to late values: a few wild ones, at the start or in between, would flatten all others."""
    ends = [(v.min(), np.quantile(v, 0.995) if len(v) > 50 else v.max()) for v in curves if len(v)]
    if ends:
        low, high = min(a for a, _ in ends), max(b for _, b in ends)
        margin = 0.06 * (high - low) or 0.1 * abs(high) or 0.1
        axes.set_ylim(low - margin, high + margin)
