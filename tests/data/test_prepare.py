"""`zoo prepare`: what it keeps and changes, killed runs, broken files and sets, and what is said about them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from zoo.data.images import Images
from zoo.data.pipeline import epoch
from zoo.data.prepare import prepare
from zoo.errors import UserError


def photo(seed, size=8):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8))


@pytest.fixture
def photos(tmp_path):
    """train: 2 classes of 6 JPEG files; test: one each."""
    for c, name in enumerate(("cat", "dog")):
        for split, count in (("train", 6), ("test", 1)):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for i in range(count):
                photo(100 * c + i + 50 * (split == "test")).save(tmp_path / "photos" / split / name / f"{i}.jpg")
    return tmp_path / "photos"


def run(source, dest, **kw):
    return prepare(str(source), str(dest), progress=False, **{"shard_examples": 5, **kw})


def files(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


def read(path, split, size=8, **kw):
    ((b, real),) = epoch(Images(str(path), size=size, **kw), 64, split=split)
    return {key: value[:real] for key, value in b.items()}


def test_prepared_set_gives_what_the_folder_gives(photos, tmp_path):
    report = run(photos, tmp_path / "out", size=8)
    assert report.ok
    assert report.counts == {"train": 12, "test": 2}
    assert report.labels == ("cat", "dog")
    shards = ["test-00000", *(f"train-{i:05d}" for i in range(3))]
    assert sorted(files(tmp_path / "out")) == ["info.json", *(f"{s}.array_record" for s in shards)]
    for split in ("train", "test"):
        a, b = read(photos, split), read(tmp_path / "out", split)
        np.testing.assert_array_equal(a["image"], b["image"])
        np.testing.assert_array_equal(a["label"], b["label"])
    assert Images(str(tmp_path / "out"), size=8).source("train").labels == ("cat", "dog")
    jpeg = (photos / "train" / "cat" / "0.jpg").read_bytes()
    assert jpeg in (tmp_path / "out" / "train-00000.array_record").read_bytes()


def test_resized_grey_and_unlabelled(photos, tmp_path):
    flat = photos / "train" / "cat"
    report = run(flat, tmp_path / "out", size=4, channels=1, convert=True, test_fraction=0.5)
    assert report.counts == {"train": 3, "test": 3}
    b = read(tmp_path / "out", "train", size=4, channels=1)
    assert set(b) == {"image"}
    assert b["image"].shape == (3, 4, 4, 1)
    with pytest.raises(UserError, match=r"1 channel\(s\), but data\.channels=3; set data\.channels=1"):
        read(tmp_path / "out", "train", size=4)


def test_arrays(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (7, 5, 5), np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(7) % 3)
    report = run(tmp_path / "a.npz", tmp_path / "out", channels=1, test_fraction=0.0)
    assert report.counts == {"train": 7, "test": 0}
    assert report.labels == ("0", "1", "2")
    b = read(tmp_path / "out", "train", size=5, channels=1)
    np.testing.assert_allclose(b["image"][..., 0], images / 127.5 - 1, atol=1e-6)
    np.testing.assert_array_equal(b["label"], np.arange(7) % 3)
    with pytest.raises(UserError, match=r"not one of \d+ images .* train row 0 is grey, but channels=3"):
        run(tmp_path / "a.npz", tmp_path / "rgb")
    assert not (tmp_path / "rgb").exists()  # so that the next try, with channels=1, meets no other settings
    np.savez(tmp_path / "f.npz", images=images / 255.0)
    with pytest.raises(UserError, match="images is float64, prepared sets hold 8-bit images"):
        run(tmp_path / "f.npz", tmp_path / "f", channels=1)
    np.savez(tmp_path / "g.npz", pictures=images)
    with pytest.raises(UserError, match="has the arrays pictures; expected train_images"):
        run(tmp_path / "g.npz", tmp_path / "g")


def test_unreadable_files_are_skipped_and_listed(photos, tmp_path):
    (photos / "train" / "cat" / "2.jpg").write_bytes(b"")
    (photos / "train" / "dog" / "5.jpg").write_bytes((photos / "train" / "dog" / "5.jpg").read_bytes()[:100])
    (photos / "test" / "cat" / "link.jpg").symlink_to("nowhere.jpg")
    with open(os.fsencode(photos / "test" / "cat") + b"/\xff.jpg", "wb") as file:  # a name that is no UTF-8
        photo(7).save(file, "JPEG")
    photo(1).convert("L").save(photos / "test" / "dog" / "grey.jpg")
    report = run(photos, tmp_path / "out", size=8)
    assert not report.ok
    assert report.counts == {"train": 10, "test": 3}
    names = [name for name, _ in report.unreadable]
    assert names == ["train/cat/2.jpg", "train/dog/5.jpg", "test/cat/link.jpg", "test/dog/grey.jpg"]
    listed = (tmp_path / "out" / "unreadable.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in listed] == names
    assert "is grey, but channels=3" in listed[3]
    assert "skipped 4" in str(report)
    assert "train/cat/2.jpg" in str(report)
    assert len(read(tmp_path / "out", "train")["label"]) == 10
    allowed = run(photos, tmp_path / "out", size=8, allow_unreadable=True)  # nothing to do, the same report
    assert allowed.ok
    assert allowed.unreadable == report.unreadable


KILLED = """
import sys, os, signal
from zoo.data import prepare as module
write, left = module._write_shard, [int(sys.argv[3])]
def dying(*args):
    if not left[0]:
        if sys.argv[4] == "before":
            module.msgspec.json.encode = lambda shard: os.kill(os.getpid(), signal.SIGKILL)  # a shard without its line
        else:
            args = (*args[:3], lambda data: os.kill(os.getpid(), signal.SIGKILL), *args[4:])  # inside a shard
    left[0] -= 1
    return write(*args)
module._write_shard = dying
module.prepare(sys.argv[1], sys.argv[2], size=8, shard_examples=5, progress=False)
"""


@pytest.mark.parametrize("shards, where", [(0, "inside"), (2, "inside"), (1, "before")])
def test_killed_run_continues_and_ends_with_the_same_bytes(photos, tmp_path, shards, where):
    (photos / "train" / "cat" / "2.jpg").write_bytes(b"")
    run(photos, tmp_path / "whole", size=8)
    killed = subprocess.run([sys.executable, "-c", KILLED, photos, tmp_path / "out", str(shards), where], timeout=60)
    assert killed.returncode == -signal.SIGKILL
    left = files(tmp_path / "out")
    assert "info.json" not in left
    with pytest.raises(UserError, match="is not finished; run the same `zoo prepare` again"):
        read(tmp_path / "out", "train")
    if shards == 2:
        with open(tmp_path / "out" / "progress.jsonl", "ab") as log:
            log.write(b'{"file": "train-00002.arr')  # a torn line
    kept = (tmp_path / "out" / "train-00000.array_record").stat().st_ino if shards else None
    time.sleep(0.01)
    run(photos, tmp_path / "out", size=8)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert kept in (None, (tmp_path / "out" / "train-00000.array_record").stat().st_ino)  # not made again


def test_damaged_sets_are_noticed_and_mended(photos, tmp_path):
    out = tmp_path / "out"
    run(photos, out, size=8)
    whole, shard = files(out), out / "train-00001.array_record"
    shard.write_bytes(whole[shard.name][:-100])
    with pytest.raises(UserError, match=rf"{shard} has .* bytes in place of .* run the same `zoo prepare` again"):
        read(out, "train")
    run(photos, out, size=8)
    assert files(out) == whole
    shard.unlink()
    with pytest.raises(UserError, match="has 0 bytes"):
        read(out, "train")
    shard.write_bytes(bytes(len(whole[shard.name])))  # another file of the same length
    with pytest.raises(UserError, match=r"damaged in its train split .*zoo prepare"):
        read(out, "train")
    flipped = bytearray(whole[shard.name])
    at = flipped.index(b"JFIF") + 200
    flipped[at] ^= 1
    shard.write_bytes(flipped)
    with pytest.raises(UserError, match=r"damaged in its train split .*zoo prepare"):
        read(out, "train")
    run(photos, out, size=8)
    assert files(out) == whole


def test_other_destinations_are_refused(photos, tmp_path):
    out = tmp_path / "out"
    run(photos, out, size=8)
    with pytest.raises(UserError, match=r"size=8 there, 4 now; choose a new folder"):
        run(photos, out, size=4)
    with pytest.raises(UserError, match="already a prepared set"):
        run(out, tmp_path / "again")
    (photos / "train" / "cat" / "0.jpg").unlink()
    with pytest.raises(UserError, match="the source has other files"):
        run(photos, out, size=8)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="not empty and no prepared set"):
        run(photos, tmp_path / "mine")
    with pytest.raises(UserError, match="is a file"):
        run(photos, tmp_path / "mine" / "thesis.txt")
    with pytest.raises(UserError, match="lies inside SOURCE"):
        run(photos, photos / "out")
    with pytest.raises(UserError, match="does not exist; did you mean"):
        run(tmp_path / "photo", tmp_path / "x")
    with pytest.raises(UserError, match=r"cannot write .*Not a directory"):
        run(photos, tmp_path / "mine" / "thesis.txt" / "out")


def test_full_disk_ends_in_a_sentence_and_can_be_continued(photos, tmp_path):
    code = (
        "import resource, sys; from zoo.data.prepare import prepare; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY)); "
        "prepare(sys.argv[1], sys.argv[2], size=8, shard_examples=5, progress=False)"
    )
    full = subprocess.run([sys.executable, "-c", code, photos, tmp_path / "out"], capture_output=True, text=True)
    assert full.returncode == 1
    assert "zoo.errors.UserError: cannot write" in full.stderr
    run(photos, tmp_path / "out", size=8)
    run(photos, tmp_path / "whole", size=8)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
