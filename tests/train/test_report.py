"""What a run writes and prints: every file can be read back, and nothing appears twice after a restart."""

from __future__ import annotations

import io
import json
import math
import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zoo.errors import UserError
from zoo.train import report
from zoo.train.pictures import grid, save_png
from zoo.train.report import Report, read_metrics


def lines(folder: Path) -> list[dict]:
    """Every line of metrics.jsonl as strict JSON (no NaN, no Infinity, no torn line)."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events(folder: Path) -> list:
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted((folder / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + size]))
            data = data[16 + size :]
    return found


class Clock:
    """A clock that moves only when told."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now

    def time_ns(self) -> int:
        return int(self.now * 1e9)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(report, "time", made)
    return made


# ----------------------------------------------------------------------------------------------------------- metrics


def test_a_restart_cuts_metrics_back_and_each_step_stands_once(tmp_path: Path) -> None:
    old = [
        '{"step": 1, "time": 1.0, "loss": 4.0}',
        '{"step": 2, "time": 2.0, "loss": 9.0}',
        '{"step": 2, "time": 2.1, "loss": 3.0}',
        '{"step": 2, "time": 2.2, "bpd": 2.5}',
        '{"step": 3, "time": 3.0, "loss": 2.0}',
        '{"step": 4, "time": 4.0, "lo',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(old))
    with Report(tmp_path, total=4, start=2, batch=1, quiet=True) as r:
        kept = [(x["step"], x.get("loss"), x.get("bpd")) for x in lines(tmp_path)]
        assert kept == [(1, 4.0, None), (2, 3.0, None), (2, None, 2.5)]
        r.log(3, {"loss": 1.5})
        r.log(3, {"bpd": 2.4})
        r.log(3, {"loss": 1.25})  # again: replaced
        r.log(3, {"bpd": 2.3})
    assert [(x["step"], x.get("loss"), x.get("bpd")) for x in lines(tmp_path)[3:]] == [(3, 1.25, None), (3, None, 2.3)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]  # no scraps


def test_values_come_back_as_they_are_and_splits_are_records_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Report(tmp_path, total=2, start=0, batch=1) as r:
        r.log(1, {"loss": np.float32("nan"), "up": math.inf, "down": -math.inf, "skipped": np.int32(3)})
        for bits in (3.0, 2.0):  # the second time replaced
            r.log(2, {"bits_per_token": bits, "bound": True, "exact": np.bool_(False), "split": "valid"}, "valid")
        r.log(2, {"bits_per_token": 4.0, "bound": True, "exact": False, "split": "test"}, "test")
    train, *held = lines(tmp_path)
    assert [(x["split"], x["bits_per_token"]) for x in held] == [("valid", 2.0), ("test", 4.0)]
    assert all(x["bound"] is True and x["exact"] is False for x in held)
    record, *same = read_metrics(tmp_path / "metrics.jsonl")
    assert same == held
    assert math.isnan(record["loss"])
    assert (record["up"], record["down"]) == (math.inf, -math.inf)
    assert isinstance(train["skipped"], int)
    assert "bits_per_token 4 | bound true | exact false | split test" in capsys.readouterr().out
    shown = {v.tag: v.simple_value for e in events(tmp_path) for v in e.summary.value}
    assert (shown["eval/valid/bits_per_token"], shown["eval/test/bits_per_token"]) == (2.0, 4.0)
    assert (shown["eval/test/bound"], shown["eval/test/exact"]) == (1.0, 0.0)


def test_reading_passes_over_torn_lines_and_missing_files(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n\n[1]\n{"loss": 1.0}\n{"step": 2, "loss": 1.0}\n{"step": 3, "l\xff')
    assert [r["step"] for r in read_metrics(path)] == [1, 2]


def test_rate_leaves_out_the_first_step_and_time_spent_elsewhere(tmp_path: Path, clock: Clock) -> None:
    with Report(tmp_path, total=9, start=2, batch=8, quiet=True) as r:
        clock.now += 60  # compiling
        r.tick(3)
        for step in (4, 5):
            clock.now += 0.5
            r.tick(step)
        r.log(5, {"loss": 1.0})
        with r.away():
            clock.now += 7
        r.log(5, {"bpd": 2.0})
        clock.now += 2
        r.log(6, {"loss": 1.0})
    rates = [x.get("rate") for x in lines(tmp_path)]
    assert rates == [pytest.approx(16.0), None, pytest.approx(4.0)]


# ------------------------------------------------------------------------------------------------------------ screen


def test_without_a_terminal_each_record_is_one_plain_line(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with Report(tmp_path, total=10, start=0, batch=4) as r:
        r.log(1, {"loss": 1.5, "grad_norm": 0.25, "skipped": 0})
        clock.now += 2
        r.log(2, {"loss": 1.25, "bits": 3.5, "logdet": 7.0, "grad_norm": 0.5, "skipped": 1})
        r.log(2, {"bpd": 2.25})
        r.note("saved")
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines() == [
        "step 1/10 | loss 1.5 | grad_norm 0.25 | skipped 0",
        "step 2/10 | loss 1.25 | bits 3.5 | 2 images/s | grad_norm 0.5 | skipped 1 | ETA 0:00:16",
        "step 2/10 | bpd 2.25",
        "saved",
    ]


@pytest.mark.parametrize("columns", [100, 0])
def test_on_a_terminal_there_is_a_bar_and_notes_go_above_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: int
) -> None:
    import fcntl
    import pty
    import termios

    screen, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24 if columns else 0, columns, 0, 0))
    with open(side, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        with Report(tmp_path, total=10, start=4, batch=4, unit="sequences") as r:
            r.tick(5)
            r.log(6, {"loss": 1.25, "bits": 3.5, "grad_norm": 0.5, "skipped": 2})
            r.note("saved")
        print("end", file=stderr, flush=True)
        shown = os.read(screen, 100_000).decode()
    os.close(screen)
    out = capsys.readouterr().out
    if columns:
        last = shown.split("\r")[-3]  # before the line end of the bar and that of the word after it
        assert "6/10, loss 1.25  bits 3.5" in last
        assert "sequences/s  skipped 2  ETA 0:00:" in last
        assert out == "saved\n"
    else:  # a terminal that does not know its width, as in some containers: lines instead
        assert shown == "end\r\n"
        assert out.startswith("step 6/10 | loss 1.25 | bits 3.5 |")


# ------------------------------------------------------------------------------------------------------- TensorBoard


def test_events_hold_scalars_and_sheets_and_a_restart_purges_what_comes_again(tmp_path: Path) -> None:
    for start in (0, 1):  # two starts within one second: neither file may overwrite the other
        with Report(tmp_path, total=2, start=start, batch=1, quiet=True) as r:
            r.log(2, {"loss": 0.5 + start})
            r.log(2, {"bpd": 2.0})
            r.picture("samples", grid(np.zeros((2, 8, 8, 1))), step=2)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    found = events(tmp_path)
    assert [e.step for e in found if e.HasField("session_log")] == [1, 2]
    values = [(e.step, v) for e in found for v in e.summary.value]
    assert [(s, v.tag, v.simple_value) for s, v in values if v.HasField("simple_value")] == [
        (2, "train/loss", 0.5),
        (2, "eval/bpd", 2.0),
        (2, "train/loss", 1.5),
        (2, "eval/bpd", 2.0),
    ]
    pictures = [v for _, v in values if v.HasField("image")]
    assert [v.tag for v in pictures] == ["samples", "samples"]
    with Image.open(io.BytesIO(pictures[0].image.encoded_image_string)) as picture:
        assert picture.size == (pictures[0].image.width, pictures[0].image.height)


# ---------------------------------------------------------------------------------------------------------- pictures


def test_sheet_geometry_and_values() -> None:
    images = np.full((5, 8, 8, 1), -1.0)
    images[4] = 0.0
    images[1, 2, 3] = 1.0
    sheet = np.asarray(grid(images, columns=3, scale=2))
    assert sheet.shape == (4 + 2 * 20, 4 + 3 * 20, 3)
    assert (sheet[4:20, 4:20] == 0).all()
    second = sheet[4:20, 24:40]
    assert (second[4:6, 6:8] == 255).all()  # one pixel became two by two, unsmoothed
    assert second.sum() == 4 * 3 * 255
    assert (sheet[24:40, 24:40] == 128).all()  # the fifth: second row, second column
    assert (sheet[24:40, 44:60] == sheet[0, 0]).all()  # no sixth
    assert grid(images).size == (4 + 3 * 68, 4 + 2 * 68)  # 8 x 8 enlarged to 64 x 64, three columns
    assert grid(images[:2], columns=9).size == (4 + 2 * 68, 4 + 68)
    assert grid(np.zeros((1, 100, 50, 3))).size == (58, 108)


def test_broken_large_and_many_values_are_shown_safely(recwarn: pytest.WarningsRecorder) -> None:
    images = np.zeros((1, 2, 4, 3), np.float32)
    images[0, 0, 0, 1] = np.nan
    images[0, 0, 1:] = np.array([7.0, -np.inf, np.inf])[:, None]
    row = np.asarray(grid(images, scale=1))[4, 4:8]
    assert row.tolist() == [[255, 0, 255], [255] * 3, [0] * 3, [255] * 3]
    assert not recwarn.list
    images = np.full((1, 2, 2, 6), -1.0)  # channels in threes stand side by side
    images[..., 3] = 1.0
    assert np.asarray(grid(images, scale=1))[4, 4:8].tolist() == [[0, 0, 0]] * 2 + [[255, 0, 0]] * 2


def test_captions_are_written_below_and_cut_to_the_picture() -> None:
    images = np.zeros((4, 64, 64, 3))
    bare, sheet = grid(images), np.asarray(grid(images, ["3", "", "great white shark of the seas", "a\nb"]))
    assert sheet.shape[0] == bare.size[1] + 2 * 16
    assert sheet.shape[1] == bare.size[0]
    page = sheet[0, 0]

    def ink(row: int, column: int) -> int:
        y, x = 4 + row * 84 + 64, 4 + column * 68
        return int((sheet[y : y + 16, x : x + 64] != page).any(-1).sum())

    assert ink(0, 0) > 10
    assert ink(0, 1) == 0
    assert ink(1, 0) > 100
    assert (sheet[4 + 84 + 64 : 4 + 84 + 80, 68:72] == page).all()  # nothing runs over into the gap


def test_other_arrays_are_refused() -> None:
    for bad in (np.zeros((8, 8, 1)), np.zeros((0, 8, 8, 1)), np.zeros((1, 8, 8, 1), np.uint8)):
        with pytest.raises(UserError, match="expected floats in"):
            grid(bad)


def test_png_keeps_its_settings(tmp_path: Path) -> None:
    path = tmp_path / "new" / "0.png"
    save_png(path, np.array([[[-1.0], [1.0]]]), {"seed": "3", "prompt": "ein Fuß 足"})
    with Image.open(path) as image:
        assert image.text == {"seed": "3", "prompt": "ein Fuß 足"}
        assert np.asarray(image)[0].tolist() == [[0] * 3, [255] * 3]
    save_png(path, Image.new("RGB", (5, 6)))
    with Image.open(path) as image:
        assert image.size == (5, 6)
    assert os.listdir(path.parent) == ["0.png"]


def test_sheet_and_curve_files(tmp_path: Path) -> None:
    with Report(tmp_path, total=600, start=0, batch=1, quiet=True) as r:
        r.curve()
        assert not (tmp_path / "curve.png").exists()  # nothing to draw yet
        r.picture("samples", grid(np.zeros((2, 8, 8, 1)), ["4", "7"]), step=12, metadata={"guidance": "2.0"})
        with Image.open(tmp_path / "samples" / "samples-0000012.png") as sheet:
            assert sheet.text == {"guidance": "2.0"}
            assert sheet.size == (4 + 2 * 68, 4 + 84)

        def colours() -> list[int]:
            """How many pixels of the curve are training blue and held-out orange."""
            with Image.open(tmp_path / "curve.png") as curve:
                x = np.asarray(curve.convert("RGB")).astype(int)
            return [int((abs(x - c).max(-1) < 20).sum()) for c in ((0x1F, 0x6F, 0xB4), (0xD1, 0x57, 0x1B))]

        r.log(1, {"loss": 3.0})
        r.log(2, {"loss": math.nan})
        r.curve()
        blue, orange = colours()
        assert blue > 50
        assert orange == 0
        for step in (5, 6, 7):
            r.log(step, {"loss": 3.0 / step})
            r.log(step, {"bpd": 2 + 1.0 / step})
        r.curve()  # loss in nats: bits get an axis of their own
        blue, orange = colours()
        assert blue > 200
        assert orange > 200


# ------------------------------------------------------------------------------------------------------------ faults


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_while_logging_is_a_sentence(tmp_path: Path) -> None:
    r = Report(tmp_path, total=1, start=0, batch=1, quiet=True)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"metrics\.jsonl \(No space left on device\)"):
        r.log(1, {"loss": 1.0})
    r.close()
