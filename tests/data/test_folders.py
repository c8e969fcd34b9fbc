"""What a folder of the user's is taken for: splits, classes, who is held out, what is passed over, and whether it has changed."""

from __future__ import annotations

import contextlib
import json
import os
import tarfile
import time
from types import SimpleNamespace

import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import texts
from mistakes import told
from PIL import Image

from zoo import files
from zoo.data import folders
from zoo.data.folders import divide, find_files, word_in, word_of
from zoo.data.images import SUFFIXES, Arrays, Images
from zoo.data.pipeline import named
from zoo.data.prepare import prepare
from zoo.papers.tarflow import TarFlow
from zoo.run import Run
from zoo.train.folder import claim_folder
from zoo.train.provenance import by_name, check_numbers


def tree(root, *names):
    """Files of these paths, each of which holds its name."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


def pictures(root, *names, level=0):
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4, 3), level + i, np.uint8)).save(root / name)
    return root


def found(root, what="image"):
    parts, classes = find_files(root, SUFFIXES, what)
    return {split: part.paths for split, part in parts.items()}, classes


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    folders.tell.cache_clear()


# words for splits


SPELLED = {
    "train": "train Train TRAIN training training_set trainset train2017 Train-Images images_train trainA TrainData",
    "test": "test Test TESTING testset test_set testB test-1",
    "val": "val VAL valid Validation val2017 validation_images",
    "dev": "dev Dev development devset",
    "eval": "eval Evaluation holdout evalset",
    None: "cat trainer testament valley evan device 2017 images trains_and_cars train_station testing_tools entrainment",
}
ANYWHERE = {
    "Train-0.tar": "train",
    "a/TEST/0.tar": "test",
    "data/c4-validation.00000.parquet": "val",
    "imagenet-train-03.tar": "train",
    "0001.tar": None,
}


def test_words_for_splits_are_known_whatever_their_case_and_anywhere_in_files_of_many_examples():
    for kind, names in SPELLED.items():
        assert {name: word_of(name) for name in names.split()} == dict.fromkeys(names.split(), kind)
    assert {path: word_in(path) for path in ANYWHERE} == ANYWHERE


@pytest.mark.parametrize("train, test", [("TRAIN", "VAL"), ("training_set", "dev")])
def test_split_folders_of_any_spelling(tmp_path, train, test, caplog):
    (tmp_path / train / "emu").mkdir(parents=True)
    tree(tmp_path, f"{train}/cat/0.png", f"{train}/dog/deep/1.png", f"{test}/dog/2.png")
    parts, classes = find_files(tmp_path, SUFFIXES, "image")
    assert classes == ("cat", "dog")
    assert (parts["train"].paths, parts["train"].labels) == ([f"{train}/cat/0.png", f"{train}/dog/deep/1.png"], [0, 1])
    assert (parts["test"].paths, parts["test"].labels) == ([f"{test}/dog/2.png"], [1])
    assert caplog.messages == [f"{tmp_path}: passed over: folders without images ({train}/emu)"]


@pytest.mark.parametrize(
    "names, words",
    [
        (["test/0.png", "Val/1.png"], ["Val", "test", "no class"]),  # nothing to train on
        (["trainA/0.png", "trainB/0.png", "testA/0.png", "testB/0.png"], ["trainA, trainB"]),
        (["train/cat/0.png", "rest/cat/0.png"], ["train", "no class"]),
        (["data/train/0.png", "data/test/0.png"], ["inside of others", "give", "data"]),
        (["a/train/0.png", "b/test/0.png"], ["inside of others", "above the classes"]),
        (["train/0.png", "test/cat/0.png"], ["differ"]),
        (["train/cat/0.png", "test/cat/0.png", "test/emu/0.png"], ["emu", "training part"]),
    ],
)
def test_splits_never_become_classes(tmp_path, names, words):
    with told(str(tmp_path), *words):
        found(tree(tmp_path, *names))


def test_a_class_may_be_called_like_a_split_and_folders_of_one_folder_are_told(tmp_path, caplog):
    assert found(tree(tmp_path / "a", "bus/0.png", "train/0.png"))[1] == ("bus", "train")
    assert found(tree(tmp_path / "b", "images/cat/0.png", "images/dog/0.png"))[1] == ("images",)
    assert "taken as one class" in caplog.text


# classes are folders with images


def test_what_is_no_image_is_told_and_makes_no_class(tmp_path, caplog):
    tree(
        tmp_path,
        *[
            "cat/0.png",
            "cat/a/b/1.JFIF",
            "dog/2.jpe",
            "dog/._2.jpe",
            "dog/x.heic",
            "dog/noend",
            "notes/a.txt",
            "cat/b.txt",
        ],
    )
    tree(tmp_path, "__MACOSX/cat/0.png", "@eaDir/0.png/THUMB.jpg", "cat/@eaDir/0.png/THUMB.jpg", ".git/0.png")
    (tmp_path / "empty").mkdir()
    for _ in range(2):
        assert found(tmp_path) == ({"all": ["cat/0.png", "cat/a/b/1.JFIF", "dog/2.jpe"]}, ("cat", "dog"))
    (said,) = caplog.messages  # once
    assert "passed over" in said
    for word in ("2 .txt", "1 .heic", "1 without a suffix", "notes", "empty"):
        assert word in said
    tree(tmp_path, "cat/new.png")
    assert "cat/new.png" in found(tmp_path)[0]["all"]


def test_every_suffix_that_pillow_reads_is_known():
    unread = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF", "EPS", "IPTC", "GBR"}  # other programs or no pictures
    known = Image.registered_extensions().items()
    assert {suffix for suffix, kind in known if kind in Image.OPEN and kind not in unread} <= {*SUFFIXES}


# who is held out


def test_of_every_class_a_share_is_held_out_by_its_name():
    rng = np.random.default_rng(0)
    names = ("ant", "bee", "cat", "dog", "elk")
    for fraction in (0.05, 0.1, 0.25, 0.5, 0.9):
        labels = np.concatenate([np.full(n, k) for k, n in enumerate(rng.integers(1, 40, 5))])
        rng.shuffle(labels)
        parts = divide(len(labels), fraction, labels, names)
        assert sorted(parts["train"] + parts["test"]) == [*range(len(labels))]
        train, test = (np.bincount(labels[parts[split]], minlength=5) for split in ("train", "test"))
        assert (train > 0).all()
        assert ((test > 0) | (train == 1)).all()
        share = (train + test) * fraction
        assert (np.abs(np.clip(test, 1, None) - np.clip(share, 1, None)) <= 1).all()
        turned = rng.permutation(5)  # other numbers for the same names
        again = divide(len(labels), fraction, turned[labels], tuple(np.array(names)[np.argsort(turned)]))
        assert again == parts
    assert divide(20, 0.1) == divide(20, 0.1, None)
    assert divide(4, 0.0, [0, 0, 1, 1])["test"] == []


def test_a_lone_image_is_trained_on_and_told(tmp_path, caplog):
    pictures(tmp_path, "z/0.png", *(f"b/{i}.png" for i in range(19)))
    source = Images(str(tmp_path), size=4).source("train")
    assert {int(source[i]["label"]) for i in range(len(source))} == {0, 1}
    divide(3, 0.5, [-1, 0, 0], ("a",))
    said = "only one example has the class z: it is trained on, and none is held out"
    assert caplog.messages == [said]  # not of none


# numbers that mean something else


def test_labels_from_one_are_told_and_brightness_of_other_units_is_refused(tmp_path, caplog):
    images = np.random.default_rng(0).random((6, 4, 4, 3), np.float32)
    path = str(tmp_path / "a.npz")
    for wrong in (images, np.float64(images), (images > 0.5).astype(np.uint8)):
        np.savez(path, train_images=wrong, train_labels=np.arange(6) % 3 + 1)
        with told("train_images", "[0, 1]", "2 x - 1", "uint8"):
            Arrays(path).source("train")
    np.savez(path, train_images=2 * images - 1, train_labels=np.arange(6) % 3 + 1)
    assert Arrays(path).source("train")[0]["label"] == 1
    assert "no example has the class 0; labels begin at 1" in caplog.text


# files that change


def test_a_digest_is_of_all_bytes_and_taken_once(tmp_path, monkeypatch):
    tree(tmp_path, "a/0.png", "a/1.png")
    read, real, now = [], files.sha256_of_file, time.time_ns()
    monkeypatch.setattr(files, "sha256_of_file", lambda path: read.append(path.name) or real(path))
    monkeypatch.setattr(time, "time_ns", lambda: now)
    first = files.digests(tmp_path, ["a/0.png", "a/1.png", "gone"])
    assert first == [(files.sha256(b"a/0.png"), 7), (files.sha256(b"a/1.png"), 7), (None, -1)]
    files.digests(tmp_path, ["a/0.png"])
    assert len(read) == 3  # too young to be known by its times
    now += 10**10
    with monkeypatch.context() as stopped:
        stopped.setattr(files.tqdm, "update", lambda bar, size: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            files.digests(tmp_path, ["a/0.png", "a/1.png", "gone"])
    for _ in range(2):
        assert files.digests(tmp_path, ["a/0.png", "a/1.png", "gone"]) == first
    assert read.count("0.png") == 3  # it was kept before the interruption
    assert len(read) <= 6
    times = (tmp_path / "a/0.png").stat()
    (tmp_path / "a/0.png").write_text("b/0.png")  # as long, and as old
    os.utime(tmp_path / "a/0.png", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert files.digests(tmp_path, ["a/0.png", "a/1.png"]) == [(files.sha256(b"b/0.png"), 7), first[1]]
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "a/0.png/no"))  # without a cache it goes too
    assert files.digests(tmp_path, ["a/1.png"]) == first[1:2]


@pytest.mark.parametrize("kind", ["folder", "tar", "parquet"])
def test_pictures_of_the_same_size_in_bytes_are_others(tmp_path, kind):
    def source(level):
        pictures(tmp_path / "folder", "a/0.bmp", "b/0.bmp", level=level)
        data = [(tmp_path / "folder" / name / "0.bmp").read_bytes() for name in "ab"]
        (tmp_path / kind).mkdir(exist_ok=True)
        if kind == "tar":
            with tarfile.open(tmp_path / "tar/0.tar", "w") as file:
                for name in "ab":
                    file.add(tmp_path / "folder" / name / "0.bmp", f"{name}.bmp")
        if kind == "parquet":
            plain = {"compression": "none", "use_dictionary": False, "write_statistics": False}
            pyarrow.parquet.write_table(pyarrow.table({"image": data}), tmp_path / "parquet/0.parquet", **plain)
        return str(tmp_path / kind)

    origin = source(10)
    for _ in range(2):  # once more: it is there already
        prepare(origin, str(tmp_path / "set"), test_fraction=0, progress=False)
    whole = texts.files(tmp_path / "set")
    source(200)
    with told("prepared differently", "other files"):
        prepare(origin, str(tmp_path / "set"), test_fraction=0, progress=False)
    assert texts.files(tmp_path / "set") == whole


TASK = TarFlow(image=4, channels=3, patch=2, width=8, depth=1, blocks=2, head_dim=8, classes=3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda root: pictures(root, "ant/0.png"), ["other classes", "new: ant", "cat, dog"]),
        (lambda root: (root / "dog").rename(root / "eel"), ["new: eel", "gone: dog"]),
        (lambda root: pictures(root, "dog/9.png"), ["other data", "train", "files added", "6", "7"]),
        (lambda root: pictures(root, "cat/0.png", level=99), ["other data", "changed"]),
    ],
)
def test_a_run_goes_on_with_its_data_alone(tmp_path, change, words):
    root = pictures(tmp_path / "f", *(f"{name}/{i}.png" for name in ("cat", "dog") for i in range(4)))
    run = Run(task=TASK, data=Images(str(root), size=4), steps=4, batch=2, workdir=str(tmp_path / "run"))

    def claimed():
        with contextlib.ExitStack() as held:
            return claim_folder(run, run.labels(), held)()

    for _ in range(2):
        assert claimed()["labels"] == ["cat", "dog"]
    before = texts.files(tmp_path / "run")
    change(root)
    with told(f"workdir={tmp_path / 'run'}", *words):
        claimed()
    assert texts.files(tmp_path / "run") == before


# classes by name


def test_labels_are_those_of_the_names_a_model_knows(tmp_path, caplog):
    root = pictures(tmp_path, *(f"{name}/{i}.png" for name in ("cat", "dog") for i in range(3)))
    data = Images(str(root), size=4, test_fraction=0)
    plain, names = data.source("train"), ("ant", "dog", "cat")
    ours = named(data, names).source("train")
    for i in range(6):
        assert names[ours[i]["label"]] == plain.labels[plain[i]["label"]]
    assert ours.labels == names
    assert "no example of the class ant" in caplog.text
    spec = {"image": jax.ShapeDtypeStruct((1, 4, 4, 3), np.float32)}
    assert named(data, ("emu",)).source("train", spec).labels == ("cat", "dog")  # labels are not asked for
    with told("cat, dog", "does not know", "emu"):
        named(data, ("emu",)).source("train")


def test_metrics_of_classes_go_by_name_and_probes_by_their_own(tmp_path):
    from zoo.metrics.agreement import Agreement
    from zoo.metrics.likelihood import BayesAccuracy
    from zoo.metrics.probe import Accuracy, Probe

    data = Images(str(pictures(tmp_path, "cat/0.png", "dog/0.png")), size=4)
    for metric in (BayesAccuracy(), Accuracy()):
        assert by_name(metric, data, ("ant", "cat", "dog"))[1].source("train")[1]["label"] == 2
    assert by_name(Agreement(path=data), None, ("ant", "cat", "dog"))[0].path.source("train")[1]["label"] == 2
    assert by_name(Probe(path=data), data, ("ant", "cat", "dog"))[0].path.source("train")[1]["label"] == 1
    with told("does not know"):
        by_name(BayesAccuracy(), data, ("ant",))[1].source("train")


def test_weights_that_number_classes_otherwise_are_told(tmp_path, caplog):
    def check(key, labels, classes=3):
        about = {"format": 1, "labels": ["ant", "cat", "dog"], "task": {"class": "Task", "classes": classes}}
        (tmp_path / "config.json").write_text(json.dumps(about))
        task = SimpleNamespace(about=SimpleNamespace(networks={"guide": None}))
        check_numbers(SimpleNamespace(task=task, weights={key: str(tmp_path)}), labels)

    for same in ((), ("ant", "cat"), ("ant", "cat", "dog", "emu"), ("emu", "fox")):
        check("guide", same)
    check("guide", ("cat", "dog"), classes=0)  # knows no classes
    with told("weights.guide", "cat, dog", "ant, cat, dog"):
        check("guide", ("cat", "dog"))
    assert not caplog.messages
    check("", ("ant", "dog"))
    assert "other numbers for the classes dog" in caplog.text
