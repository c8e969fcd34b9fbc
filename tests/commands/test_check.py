"""`zoo check` finds what was planted, and nothing in what is whole."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from zoo import cli
from zoo.data.prepare import prepare
from zoo.data.text.prepare import prepare_text


def checked(capsys, *words):
    """The exit code and what was found."""
    capsys.readouterr()
    code = cli.main(["check", *map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


def picture(seed, size=24):
    return np.random.default_rng(seed).integers(0, 255, (size, size, 3), np.uint8)


@pytest.fixture
def images(tmp_path):
    """Two classes in two splits, eight images each, all different."""
    for n, (split, name) in enumerate((s, c) for s in ("train", "test") for c in ("cat", "dog")):
        folder = tmp_path / "f" / split / name
        folder.mkdir(parents=True)
        for i in range(8):
            smooth = Image.fromarray(picture(100 * n + i, 4)).resize((24, 24), Image.Resampling.BICUBIC)
            smooth.save(folder / f"{i}.png")
    return tmp_path / "f"


def test_a_whole_folder_has_nothing_wrong(images, capsys):
    code, found = checked(capsys, images)
    assert code == 0
    assert found["wrong"] == []
    assert found["counts"] == {split: {"all": 16, "cat": 8, "dog": 8} for split in ("train", "test")}
    assert found["figures"]["sizes"] == {"24x24": 32}
    assert found["figures"]["modes"] == {"RGB": 32}


def test_faults_of_images_are_named(images, capsys):
    pytest.importorskip("imagehash")
    same = (images / "train/cat/0.png").read_bytes()
    (images / "test/cat/same.png").write_bytes(same)
    (images / "train/dog/other.png").write_bytes(same)
    with Image.open(images / "train/dog/3.png") as image:
        image.resize((48, 48), Image.Resampling.BICUBIC).save(images / "test/dog/near.jpg", quality=90)
    (images / "train/cat/broken.png").write_bytes(b"no image")
    Image.new("RGB", (24, 24), "red").save(images / "train/cat/flat.png")
    Image.fromarray(picture(7)[..., 0]).save(images / "train/cat/grey.png")
    (images / "train/cat/notes.doc").write_bytes(b"")
    code, found = checked(capsys, images)
    assert code == 1
    said = "\n".join(found["wrong"])
    for fault in (
        "1 cannot be used: train/cat/broken.png",
        "1 grey among colour ones (convert=true takes both): train/cat/grey.png",
        "1 of one colour alone: train/cat/flat.png",
        "1 in test and in train: test/cat/same.png = train/dog/other.png",
        "1 in test look as one in train does: test/dog/near.jpg ~ train/dog/3.png",
    ):
        assert fault in said
    assert "same image in several classes: train/cat/0.png, train/dog/other.png" in said
    assert "1 .doc" in "\n".join(found["left_out"])


def test_captions_series_texts_and_weights(tmp_path, capsys):
    for i, text in enumerate(("a cat", "", "x" * 40)):
        Image.fromarray(picture(i)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(text)
    code, found = checked(capsys, tmp_path, "--tokenizer", "bytes", "--tokens", 20)
    assert (code, found["figures"]["captions"]["most tokens"]) == (1, 40)
    assert found["wrong"] == ["1 empty captions: 1.png", "1 captions of more than 20 tokens: 2.png"]

    values = np.random.default_rng(0).normal(size=(3, 9, 2))
    values[1, :, 1] = 4
    np.savez(tmp_path / "a.npz", train_series=values, test_series=values[:1])
    code, found = checked(capsys, tmp_path / "a.npz")
    assert (code, found["counts"]) == (1, {"train": 3, "test": 1})
    assert found["wrong"] == [
        "1 channels are constant in series of train: channel 1 of 1",
        "1 in test and in train: test 0 = train 0",
    ]
    (tmp_path / "a.csv").write_text("a,b\n1,2\n3,nan\n")
    code, found = checked(capsys, tmp_path / "a.csv")
    assert code == 1
    assert "line 3, column 2: 'nan'" in found["wrong"][0]

    for split, lines in (("train", ("one", "two", "two", "")), ("test", ("two", "three"))):
        (tmp_path / "t").mkdir(exist_ok=True)
        (tmp_path / "t" / f"{split}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    code, found = checked(capsys, tmp_path / "t")
    assert (code, found["counts"]) == (1, {"train": 3, "valid": 0, "test": 2})
    assert found["wrong"] == ["1 in test and in train: test.jsonl 1 = train.jsonl 3"]
    assert found["figures"]["duplicates within a split"] == 1
    (tmp_path / "none.txt").write_text("")
    assert checked(capsys, tmp_path / "none.txt")[1]["wrong"] == ["there is no text in it"]

    save_file({"w": np.array([1, np.nan], np.float32), "b": np.zeros(3, np.float32)}, tmp_path / "w.safetensors")
    code, found = checked(capsys, tmp_path / "w.safetensors")
    assert (code, found["counts"]) == (1, {"tensors": 2, "parameters": 5})
    assert found["wrong"] == ["1 tensors are not finite: w"]


def test_sets_are_compared_with_what_was_written(images, tmp_path, capsys):
    made = {"images": tmp_path / "images", "tokens": tmp_path / "tokens"}
    (tmp_path / "a.txt").write_text("to be or not to be " * 99)
    prepare(str(images), str(made["images"]), progress=False)
    prepare_text(str(tmp_path / "a.txt"), str(made["tokens"]), "chars", progress=False)
    for kind, damaged in (("images", "train-00000.array_record"), ("tokens", "train.bin")):
        assert checked(capsys, made[kind])[0] == 0
        whole = (made[kind] / damaged).read_bytes()
        (made[kind] / damaged).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        code, found = checked(capsys, made[kind])
        assert (code, found["kind"]) == (1, kind)
        assert damaged in found["wrong"][0]
        (made[kind] / "info.json").rename(made[kind] / "progress.jsonl")
        code, found = checked(capsys, made[kind])
        assert code == 1
        assert "is not finished; run the same `zoo prepare` again" in found["wrong"][0]


def test_published_weights_with_a_config_of_their_library_are_weights(tmp_path, capsys):
    save_file({"w": np.ones(2, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert checked(capsys, tmp_path)[1]["counts"] == {"tensors": 1, "parameters": 2}
    (tmp_path / "config.json").write_text('{"format": 1')  # an export's, damaged
    code, found = checked(capsys, tmp_path)
    assert (code, "config.json cannot be read" in found["wrong"][0]) == (1, True)
