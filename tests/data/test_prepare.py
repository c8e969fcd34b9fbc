"""`zoo prepare`: what it keeps and changes, killed runs, broken files and sets, and what is said about them."""

from __future__ import annotations

import io
import json
import os
import resource
import shutil
import tarfile
import tracemalloc

import msgspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from forks import die, ended, started
from mistakes import told
from PIL import Image
from texts import files

from zoo.data import records as module
from zoo.data.images import Images
from zoo.data.images.sources import _index
from zoo.data.pipeline import epoch
from zoo.data.prepare import prepare
from zoo.data.records import Info, Record, open_shards, read_info, write_shard


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


def read(path, split, size=8, **kw):
    ((b, real),) = epoch(Images(str(path), size=size, **kw), 64, split=split)
    return {key: value[:real] for key, value in b.items()}


def test_prepared_set_gives_what_the_folder_gives(photos, tmp_path):
    report = run(photos, tmp_path / "out", size=8)
    assert (report.ok, report.counts, report.labels) == (True, {"train": 12, "test": 2}, ("cat", "dog"))
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
    assert {name: value.shape for name, value in b.items()} == {"image": (3, 4, 4, 1)}
    with told("data.channels=3", "data.channels=1"):
        read(tmp_path / "out", "train", size=4)


def test_arrays(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (7, 5, 5), np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(7) % 3)
    report = run(tmp_path / "a.npz", tmp_path / "out", channels=1, test_fraction=0.0)
    assert (report.counts, report.labels) == ({"train": 7, "test": 0}, ("0", "1", "2"))
    b = read(tmp_path / "out", "train", size=5, channels=1)
    np.testing.assert_allclose(b["image"][..., 0], images / 127.5 - 1, atol=1e-6)
    np.testing.assert_array_equal(b["label"], np.arange(7) % 3)
    with told("row ", "channels=3"):
        run(tmp_path / "a.npz", tmp_path / "rgb")
    assert not (tmp_path / "rgb").exists()  # so that the next try, with channels=1, meets no other settings
    for arrays, words in (({"images": images / 255.0}, "images float64"), ({"pictures": images}, "train_images")):
        np.savez(tmp_path / "f.npz", **arrays)
        with told("f.npz", *words.split()):
            run(tmp_path / "f.npz", tmp_path / "f", channels=1)


def test_unreadable_files_are_skipped_and_listed(photos, tmp_path):
    (photos / "train" / "cat" / "2.jpg").write_bytes(b"")
    (photos / "train" / "dog" / "5.jpg").write_bytes((photos / "train" / "dog" / "5.jpg").read_bytes()[:100])
    (photos / "test" / "cat" / "link.jpg").symlink_to("nowhere.jpg")
    with open(os.fsencode(photos / "test" / "cat") + b"/\xff.jpg", "wb") as file:  # a name that is no UTF-8
        photo(7).save(file, "JPEG")
    photo(1).convert("L").save(photos / "test" / "dog" / "grey.jpg")
    report = run(photos, tmp_path / "out", size=8)
    assert (report.ok, report.counts) == (False, {"train": 10, "test": 3})
    names = [name for name, _ in report.unreadable]
    assert names == ["train/cat/2.jpg", "train/dog/5.jpg", "test/cat/link.jpg", "test/dog/grey.jpg"]
    listed = (tmp_path / "out" / "unreadable.txt").read_text().splitlines()
    assert [line.split("\t")[0] for line in listed] == names
    assert "is grey, but channels=3" in listed[3]
    assert all(word in str(report) for word in ("skipped 4", "train/cat/2.jpg"))
    assert len(read(tmp_path / "out", "train")["label"]) == 10
    allowed = run(photos, tmp_path / "out", size=8, allow_unreadable=True)  # nothing to do, the same report
    assert allowed.ok
    assert allowed.unreadable == report.unreadable


def dying(source, dest, shards, where):
    """`run` that is killed after so many shards: inside of the next, or before that has its line."""
    write, left = write_shard, [shards]

    def counted(path, results):
        if not left[0] and where == "before":
            module.msgspec.json.encode = die
        elif not left[0]:
            results = map(die, results)
        left[0] -= 1
        return write(path, results)

    module.write_shard = counted
    run(source, dest, size=8)


@pytest.mark.parametrize("shards, where, captions", [(0, "inside", 0), (2, "inside", 0), (1, "before", 1)])
def test_killed_run_continues_and_ends_with_the_same_bytes(photos, tmp_path, shards, where, captions):
    (photos / "train" / "cat" / "2.jpg").write_bytes(b"")
    for path in sorted(photos.rglob("*.jpg")) if captions else ():
        path.with_suffix(".txt").write_text(f"the picture {path.stem} ü")
    run(photos, tmp_path / "whole", size=8)
    assert ended(*started(lambda: dying(photos, tmp_path / "out", shards, where))) is None
    left = files(tmp_path / "out")
    assert "info.json" not in left
    with told("not finished", "`zoo prepare`"):
        read(tmp_path / "out", "train")
    if shards == 2:
        with open(tmp_path / "out" / "progress.jsonl", "ab") as log:
            log.write(b'{"file": "train-00002.arr')  # a torn line
    kept = (tmp_path / "out" / "train-00000.array_record").stat().st_ino if shards else None
    run(photos, tmp_path / "out", size=8)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert kept in (None, (tmp_path / "out" / "train-00000.array_record").stat().st_ino)  # not made again


def test_damaged_sets_are_noticed_and_mended(photos, tmp_path):
    out = tmp_path / "out"
    run(photos, out, size=8)
    whole, shard = files(out), out / "train-00001.array_record"
    shard.write_bytes(whole[shard.name][:-100])
    with told(f"{shard}", "bytes", "`zoo prepare`"):
        read(out, "train")
    run(photos, out, size=8)
    assert files(out) == whole
    shard.unlink()
    with told("0 bytes"):
        read(out, "train")
    shard.write_bytes(bytes(len(whole[shard.name])))  # another file of the same length
    with told("train", "`zoo prepare`"):
        read(out, "train")
    flipped = bytearray(whole[shard.name])
    at = flipped.index(b"JFIF") + 200
    flipped[at] ^= 1
    shard.write_bytes(flipped)
    with told("train", "`zoo prepare`"):
        read(out, "train")
    run(photos, out, size=8)
    assert files(out) == whole


def test_other_destinations_are_refused(photos, tmp_path):
    out = tmp_path / "out"
    run(photos, out, size=8)
    with told("size=8", "4", "new folder"):
        run(photos, out, size=4)
    (photos / "train" / "cat" / "0.jpg").unlink()
    with told("other files"):
        run(photos, out, size=8)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    for source, dest, word in (
        (out, tmp_path / "again", "set"),
        (photos, tmp_path / "mine", "empty"),
        (photos, tmp_path / "mine" / "thesis.txt", "file"),
        (photos, tmp_path / "mine" / "thesis.txt" / "out", "directory"),
        (photos, photos / "out", "inside SOURCE"),
        (tmp_path / "photo", tmp_path / "x", "photos"),
    ):
        with told(word):
            run(source, dest)


@pytest.mark.parametrize("name, value", [("size", 0), ("channels", 2), ("test_fraction", 1.5), ("shard_examples", 0)])
def test_senseless_arguments_are_refused_before_dest_is_touched(photos, tmp_path, name, value):
    with told(f"{name}={value}", "choose"):
        run(photos, tmp_path / "out", **{name: value})
    assert not (tmp_path / "out").exists()


def test_full_disk_ends_in_a_sentence_and_can_be_continued(photos, tmp_path):
    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
        run(photos, tmp_path / "out", size=8)

    assert ended(*started(full)).startswith("cannot write ")
    run(photos, tmp_path / "out", size=8)
    run(photos, tmp_path / "whole", size=8)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


# images with captions


def jpeg(seed):
    buffer = io.BytesIO()
    photo(seed).save(buffer, "JPEG")
    return buffer.getvalue()


def records(folder):
    """What a set says of itself, and its records by split."""
    info = read_info(folder, Info)
    opened = {split: open_shards(folder, shards, split, Record) for split, shards in info.splits.items()}
    return info, {split: [read(i) for i in range(count)] for split, (count, read) in opened.items()}


def captions(folder):
    """Name and caption of every record, by split."""
    info, found = records(folder)
    assert info.captions
    return {split: [(record.name, record.caption) for record in some] for split, some in found.items()}


def tar(path, members):
    """Numbers stand for pictures, texts for links; a blank before a name is not part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            about = tarfile.TarInfo(name.lstrip())
            if isinstance(data, str):
                about.type, about.linkname, data = tarfile.LNKTYPE, data, b""
            data = jpeg(data) if isinstance(data, int) else data
            about.size = len(data)
            file.addfile(about, io.BytesIO(data))


@pytest.fixture
def pairs(tmp_path):
    """Twelve images with captions in folders of several depths, and one without."""
    for i in range(12):
        folder = tmp_path / "pairs" / "ab"[i % 2] / str(i % 3)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:02d}.jpg").write_bytes(jpeg(i))
        (folder / f"{i:02d}{('.txt', '.TXT', '.Txt')[i // 4]}").write_text(f" number {i} ü\n")
    (tmp_path / "pairs" / "b" / "mute.jpg").write_bytes(jpeg(99))
    return tmp_path / "pairs"


def test_folder_with_captions(pairs, tmp_path):
    report = run(pairs, tmp_path / "out", size=8)
    assert (report.counts, report.labels, report.ok) == ({"train": 11, "test": 1}, (), False)
    assert report.unreadable == (("b/mute.jpg", "has no caption; write it to mute.txt beside it"),)
    found = captions(tmp_path / "out")
    for name, caption in [*found["train"], *found["test"]]:
        assert caption == f"number {int(name[-6:-4])} ü"
    assert len({*found["train"], *found["test"]}) == 12
    assert set(read(tmp_path / "out", "train")) == {"image"}
    (pairs / "a" / "0" / "00.TXT").write_text("of both, the other")
    run(pairs, tmp_path / "both", size=8)
    assert captions(tmp_path / "both") == found
    (pairs / "a" / "0" / "00.TXT").unlink()
    (pairs / "a" / "0" / "00.txt").write_text(" number 9 ü\n")  # as long as before
    with told("other files"):
        run(pairs, tmp_path / "out", size=8)
    (pairs / "a" / "0" / "00.txt").write_bytes(b"\xff\xfe")
    report = run(pairs, tmp_path / "again", size=8)
    assert "a/0/00.txt" in dict(report.unreadable)["a/0/00.jpg"]
    old = write_shard(tmp_path / "0.array_record", [msgspec.msgpack.encode([b"", 1, "x"])])  # of an earlier version
    assert open_shards(tmp_path, [old], "train", Record)[1](0) == Record(b"", 1, "x", "")


def made(folder, source, test_fraction=0, **kw):
    """The captions of a set's records by name, and why the others are none, without the way out."""
    report = run(source, folder, test_fraction=test_fraction, **kw)
    info, found = records(folder)
    some = {record.name: record.caption for split in found.values() for record in split}
    return some if info.captions else None, {name: reason.partition(";")[0] for name, reason in report.unreadable}


BAD = os.fsdecode(b"\xff")  # no UTF-8


@pytest.mark.parametrize(
    "members, wanted, lost",
    [
        pytest.param(
            {"000.jpg": 0, "000.txt": b"zero", "x/000.jpg": 1, "x/000.json": b'{"caption": "one", "width": 8}',
             "x/001.json": b'{"text": "two"}', "x/001.jpg": 2, "002.seg.png": 3, "._000.jpg": b"a Mac's"},
            {"000.jpg": "zero", "x/000.jpg": "one"},
            {"x/001.jpg": 'has no caption: x/001.json has no "caption"', "002.seg.png": "has no caption"},
            id="texts and JSON",
        ),
        pytest.param({"0.jpg": 0, "1.jpg": 1}, None, {}, id="no captions"),
        pytest.param(
            {"img.0.png": 0, "img.0.txt": b"number 0", "x/7.left.png": 2, "x/7.right.JPG": 3, "x/7.TXT": b"both",
             "x/7.right.json": b'{"caption": "right"}'},
            {"img.0.png": "number 0", "x/7.left.png": "both", "x/7.right.JPG": "right"},
            {},
            id="several dots",
        ),
        pytest.param(
            {"0.jpg": b"old", "0.txt": b"old", " 0.jpg": 0, " 0.txt": b"new", "1.jpg": 1, "1.txt": "0.txt",
             "2.jpg": "0.jpg", "2.txt": b"two"},
            {"0.jpg": "new"},
            {"1.jpg": "has a caption that is a link or sparse in its tar file", "2.jpg": "is a link or sparse in its tar file"},
            id="members of one name, and links",
        ),
        pytest.param(
            {"0.jpg": 0, "0.json": rb'{"caption": "half \ud83d"}', f"{BAD}.jpg": 1, f"{BAD}.txt": b"\xfe", "2.jpg": 2,
             "2.txt": b"two"},
            {"2.jpg": "two"},
            {"0.jpg": "has a caption that is no text (0.json)", "\ufffd.jpg": "has a caption that is no UTF-8 (\ufffd.txt)"},
            id="no Unicode",
        ),
    ],
)  # fmt: skip
def test_tar_files(tmp_path, members, wanted, lost):
    tar(tmp_path / "a.tar", members)
    found, unreadable = made(tmp_path / "out", tmp_path / "a.tar")
    assert found == (wanted and {f"a.tar:{name}": caption for name, caption in wanted.items()})
    assert [*unreadable] == [f"a.tar:{name}" for name in lost]
    assert all(said.split(":")[0] in unreadable[f"a.tar:{name}"] for name, said in lost.items())


def test_tar_files_of_splits_and_labels(tmp_path):
    tar(
        tmp_path / "s" / "train-0.tar",
        {"0.jpg": 0, "0.cls": b"2\n", "0.txt": b"zero", "1.jpg": 1, "1.cls": b"0", "1.txt": b"one"},
    )
    tar(tmp_path / "s" / "test-0.tar", {"7.jpg": 4, "7.txt": b"seven", "7.cls": b"1"})
    report = run(tmp_path / "s", tmp_path / "out")
    assert (report.ok, report.captioned, report.counts) == (True, True, {"train": 2, "test": 1})
    assert captions(tmp_path / "out")["test"] == [("test-0.tar:7.jpg", "seven")]
    assert labels(tmp_path / "out")[0] == ["0", "1", "2"]
    assert read(tmp_path / "out", "train")["label"].tolist() == [2, 0]
    more = {"0.jpg": 0, "0.cls": b"1", "1.jpg": 1, "2.jpg": 2, "2.cls": b"cat"}
    tar(tmp_path / "a.tar", more)
    assert [*made(tmp_path / "bad", tmp_path / "a.tar")[1].values()] == [
        "has no label",
        "has a label that is no class number",
    ]
    tar(tmp_path / "a.tar", {**more, "1.cls": b"1", "2.cls": b"0  "})
    with told("other files"):
        run(tmp_path / "a.tar", tmp_path / "bad", test_fraction=0)
    (tmp_path / "b.tar.gz").touch()
    (tmp_path / "d.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:1000])
    for name, word in (("b.tar.gz", "unpack"), ("d.tar", "tar file")):
        with told(name, word):
            run(tmp_path / name, tmp_path / "out")


def parquet(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=3)


def test_parquet_files(tmp_path):
    hub = [{"bytes": jpeg(i), "path": None} for i in range(7)]
    parquet(
        tmp_path / "p/data/train-0.parquet", image=hub, text=[f"n{i}" for i in range(6)] + [None], id=list("abcdefg")
    )
    parquet(
        tmp_path / "p/data/test-0.parquet", image=[{"bytes": None, "path": "x"}, hub[0]], text=["t", "u"], id=["a", "b"]
    )
    report = run(tmp_path / "p", tmp_path / "out")
    assert captions(tmp_path / "out") == {
        "train": [(f"data/train-0.parquet row {i}", f"n{i}") for i in range(6)],
        "test": [("data/test-0.parquet row 1", "u")],
    }
    assert [(name, reason.partition(";")[0]) for name, reason in report.unreadable] == [
        ("data/train-0.parquet row 6", "has no caption in the column 'text'"),
        ("data/test-0.parquet row 0", "has no bytes in the column 'image'"),
    ]
    plain = tmp_path / "a.parquet"
    parquet(plain, thumb=[jpeg(0)], full=[jpeg(1)], short=["s"], long=["l"])
    for columns, words in (
        ({}, "thumb full image_column"),
        ({"image_column": "full"}, "short long caption_column"),
        ({"image_column": "ful"}, "'ful' image_column 'full'"),
        ({"image_column": "short"}, "'short' image_column thumb"),
    ):
        with told(*words.split()):
            run(plain, tmp_path / "b", **columns)
    kw = {"image_column": "full"}
    assert made(tmp_path / "b", plain, caption_column="long", **kw) == ({"a.parquet row 0": "l"}, {})
    with told("other files"):
        made(tmp_path / "b", plain, caption_column="short", **kw)
    assert made(tmp_path / "mute", plain, caption_column="", **kw) == (None, {})
    coded = pyarrow.array(["zero", "one"]).dictionary_encode()
    parquet(tmp_path / "coded.parquet", image=[jpeg(0), jpeg(1)], caption=coded)
    assert [*made(tmp_path / "coded", tmp_path / "coded.parquet")[0].values()] == ["zero", "one"]
    broken = pyarrow.Array.from_buffers(pyarrow.string(), 2, pyarrow.array([b"\xff\xfe", b"fine"]).buffers())
    parquet(tmp_path / "utf.parquet", image=[jpeg(0), jpeg(1)], text=broken)
    found, lost = made(tmp_path / "utf", tmp_path / "utf.parquet")
    assert found == {"utf.parquet row 1": "fine"}
    assert "UTF-8" in lost["utf.parquet row 0"]
    parquet(tmp_path / "c.parquet", name=["x"])
    (tmp_path / "d.parquet").write_bytes(b"PAR1")
    (tmp_path / "c.npz").touch()
    parquet(tmp_path / "e.parquet", image=[jpeg(0), jpeg(1)], captions=[["a", "b"], ["c"]], url=["x", "y"])
    table = pyarrow.table([[jpeg(0)], ["a"], ["b"]], names=["image", "caption", "caption"])
    pyarrow.parquet.write_table(table, tmp_path / "f.parquet")
    for name, column, words in (
        ("c.parquet", None, "name (string)"),
        ("d.parquet", None, "parquet"),
        ("c.npz", "x", "image_column"),
        ("e.parquet", None, "'captions' list< caption_column=\"\""),
        ("f.parquet", None, "2 'caption'"),
    ):
        with told(name, *words.split()):
            run(tmp_path / name, tmp_path / "c", image_column=column)


def labels(folder):
    """Names of the classes, and the label of every record by name."""
    info, found = records(folder)
    return info.labels, {record.name: record.label for some in found.values() for record in some}


def test_folders_of_several_kinds_are_refused(tmp_path):
    mixed = tmp_path / "mixed"
    parquet(mixed / "data/train-0.parquet", image=[jpeg(0)], text=["zero"])
    (mixed / "assets").mkdir()
    (mixed / "assets" / "preview.png").write_bytes(jpeg(1))
    with told("data/train-0.parquet", "assets/preview.png"):
        run(mixed, tmp_path / "out")
    (mixed / "assets" / "preview.png").rename(mixed / "assets" / ".preview.png")
    assert run(mixed, tmp_path / "out", test_fraction=0).counts["train"] == 1


def test_a_stray_text_does_not_make_captions_of_classes(photos, tmp_path):
    (photos / "train" / "cat" / "0.txt").write_text("notes")
    with told("1 of 14", "train/cat/0.txt"):
        run(photos, tmp_path / "out")
    for path in photos.glob("*/cat/*.jpg"):  # half of them
        path.with_suffix(".txt").write_text("a cat")
    report = run(photos, tmp_path / "out")
    assert (report.labels, report.captioned, len(report.unreadable)) == ((), True, 7)


def test_a_third_split_is_named(photos, tmp_path, caplog):
    shutil.copytree(photos / "test", photos / "val")
    (photos / "docs").mkdir()
    for said in ("the images of val", "the 2 images of val"):
        caplog.clear()
        assert run(photos, tmp_path / said).counts == {"train": 12, "test": 2}
        assert caplog.messages[0] == f"{photos}: test is the test split, and {said} are left out"
        assert len(caplog.messages) == (2 if "2" not in said else 1)  # docs
        for path in photos.glob("*/*/*.jpg"):
            path.with_suffix(".txt").write_text("a photo")


def test_the_index_of_a_tar_file_is_small(tmp_path):
    count = 3000
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        for i in range(count):
            for suffix in ("jpg", "txt"):
                file.addfile(tarfile.TarInfo(f"{i:06d}.{suffix}"))
    tracemalloc.start()
    pairs, names, _ = _index(tmp_path / "a.tar")
    kept, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(pairs) == count
    assert names[7].tolist() == [b"000007.jpg", b"000007.txt"]
    assert kept < 200 * count
    assert most < 1500 * count


def test_parquet_labels(tmp_path, caplog):
    images = [jpeg(i) for i in range(3)]
    parquet(tmp_path / "a.parquet", image=images, label=[1, None, 3], text=["a", "b", "c"])
    report = run(tmp_path / "a.parquet", tmp_path / "a", test_fraction=0)
    assert labels(tmp_path / "a") == (["0", "1", "2", "3"], {"a.parquet row 0": 1, "a.parquet row 2": 3})
    assert report.captioned
    assert "has no label in the column 'label'" in report.unreadable[0][1]
    about = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    table = pyarrow.table({"image": images, "label": [1, 0, 1]}, metadata={"huggingface": json.dumps(about)})
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    assert run(tmp_path / "b.parquet", tmp_path / "b", test_fraction=0).ok
    rows = {f"b.parquet row {i}": label for i, label in enumerate((1, 0, 1))}
    assert labels(tmp_path / "b") == (["cat", "dog"], rows)
    parquet(tmp_path / "c.parquet", image=images, label=[10**9, 0, 1])
    assert run(tmp_path / "c.parquet", tmp_path / "c", test_fraction=0).labels == ()
    assert "'label' goes up to 1000000000, which are no classes" in caplog.text


def test_a_parquet_test_split_without_labels_is_left_out(tmp_path, caplog):
    for split, label in (("train", [0, 1, 1]), ("test", [-1, -1, -1]), ("validation", [1, 0, 0])):
        parquet(tmp_path / "p" / f"{split}-0.parquet", image=[jpeg(i) for i in range(3)], label=label)
    report = run(tmp_path / "p", tmp_path / "out")
    assert (report.ok, report.counts) == (True, {"train": 3, "test": 3})
    assert labels(tmp_path / "out")[1]["validation-0.parquet row 0"] == 1
    assert caplog.messages == [f"{tmp_path}/p: test has no labels, and the 3 images of test are left out"]
    (tmp_path / "p" / "validation-0.parquet").unlink()
    report = run(tmp_path / "p", tmp_path / "held", test_fraction=0.4)
    assert (report.ok, report.counts) == (True, {"train": 2, "test": 1})


def test_many_shards_are_read_with_few_open_and_names_that_are_no_utf8_are_shown(tmp_path, monkeypatch):
    for i, name in enumerate([b"caf\xe9", b"a"]):
        folder = os.fsencode(tmp_path / "in") + b"/" + name
        os.makedirs(folder)
        for k in range(20):
            Image.new("RGB", (2, 2), (10 * k, i, 0)).save(os.path.join(os.fsdecode(folder), f"{k}.png"))
    (tmp_path / "in/a/settings.json").write_text("{}")  # as `zoo sample` leaves them
    Image.new("RGB", (9, 9)).save(tmp_path / "in/a/sheet.png")
    report = run(tmp_path / "in", tmp_path / "out", size=2, test_fraction=0, shard_examples=1)
    assert (report.counts["train"], report.labels) == (40, ("a", "caf\ufffd"))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 24, hard))
    try:
        source = Images(str(tmp_path / "out"), size=2).source("train")
        labels = [int(source[i]["label"]) for i in (*range(40), 0)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert labels == [0] * 20 + [1] * 20 + [0]
