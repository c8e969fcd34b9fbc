"""Latents on disk: what is kept of images and captions, aspect buckets, killed runs, mistakes."""

from __future__ import annotations

import itertools
import zlib

import jax
import numpy as np
import pytest
from forks import die, ended, started
from mistakes import told
from ml_dtypes import bfloat16
from PIL import Image
from texts import files

from zoo.data.images.captions import bucket, template
from zoo.data.images.latents import Latent, LatentInfo, Latents, encode_set
from zoo.data.pipeline import batches, epoch
from zoo.data.prepare import prepare
from zoo.data.records import open_shards, read_info
from zoo.errors import UserError


class Fake:
    """Averages of 4 x 4 pixels as latents; two tokens and one feature of three numbers per caption."""

    def __init__(self, batch=4, text=True, features=False, scale=1.5, vae="aa"):
        self.batch, self.with_text, self.features, self.scale = batch, text, features, scale
        self.about, self.shapes = {"vae": vae, "vae_scale": str(scale)}, set()

    def latents(self, images):
        assert images.dtype == np.uint8
        n, height, width, c = images.shape
        assert n == self.batch
        self.shapes.add((height, width))
        x = images.astype(np.float32) / 127.5 - 1
        mean = x.reshape(n, height // 4, 4, width // 4, 4, c).mean((2, 4)) * self.scale
        return mean, np.full_like(mean, 0.5)

    def text(self, captions):
        if not self.with_text:
            return None
        assert len(captions) == self.batch
        tokens = np.array([[len(c), zlib.crc32(c.encode()) % 1000] for c in captions], np.int32)
        if not self.features:
            return {"tokens": tokens}
        return {"tokens": tokens, "text": tokens[:, :1, None] * np.float32([1, 0.5, 0.25])}


def picture(seed, width=8, height=8):
    rng = np.random.default_rng(seed)  # dark or bright, so that the averages of pixels spread
    pixels = rng.integers(0, 256, (1, 1, 3)) + rng.integers(-20, 20, (height, width, 3))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def encode(source, dest, encoder=None, **kw):
    kw = {"size": 8, "batch": 4, "multiple": 4, "shard_examples": 5, "test_fraction": 0.2, **kw}
    return encode_set(str(source), str(dest), encoder or Fake(), progress=False, **kw)


@pytest.fixture
def pairs(tmp_path):
    """Twelve square images with captions, twelve of 16:9 (nearly), and one that cannot be read."""
    (tmp_path / "pairs").mkdir()
    for i in range(24):
        size = (8, 8) if i % 2 else (32, 18)
        picture(i, *size).save(tmp_path / "pairs" / f"{i:02d}.png")
        (tmp_path / "pairs" / f"{i:02d}.txt").write_text(f"number {i}")
    (tmp_path / "pairs" / "bad.png").write_bytes(b"")
    (tmp_path / "pairs" / "bad.txt").write_text("bad")
    return tmp_path / "pairs"


def test_latents_and_tokens_of_square_images(pairs, tmp_path):
    encoder = Fake()
    report = encode(pairs, tmp_path / "out", encoder)
    assert report.counts["train"] + report.counts["test"] == 24
    assert [name for name, _ in report.unreadable] == ["bad.png"]
    assert encoder.shapes == {(8, 8)}
    data = Latents(str(tmp_path / "out"))
    assert data.made_with() == {"vae": "aa", "vae_scale": "1.5", "template": "plain"}
    source = data.source("train")
    info = read_info(tmp_path / "out", LatentInfo)
    _, record = open_shards(tmp_path / "out", info.buckets["1:1"].splits["train"], "train", Latent)
    pictures, latent, tokens = 0, (np.float32, (2, 2, 3)), (np.int32, (2,))
    kinds = {"latent": latent, "latent_std": latent, "tokens": tokens, "null_tokens": tokens}
    for i in range(len(source)):
        example, kept = source[i], record(i)
        assert {k: (v.dtype, v.shape) for k, v in example.items()} == kinds
        assert kept.caption == f"number {int(kept.name[:2])}"  # without a template, which only buckets have
        np.testing.assert_array_equal(example["tokens"], Fake().text([kept.caption] * 4)["tokens"][0])
        np.testing.assert_array_equal(example["null_tokens"], Fake().text([""] * 4)["tokens"][0])
        np.testing.assert_array_equal(example["latent_std"], 0.5)
        if int(kept.name[:2]) % 2:
            pixels = np.asarray(Image.open(pairs / kept.name))
            mean = Fake().latents(np.stack([pixels] * 4))[0][0]
            np.testing.assert_array_equal(example["latent"], mean.astype(bfloat16).astype(np.float32))
            pictures += 1
    assert pictures > 5 < len(source) - pictures
    ((b, real),) = epoch(data, 64, split="test")
    assert (real, b["null_tokens"].shape) == (report.counts["test"], (64, 2))
    encode(pairs, tmp_path / "b", Fake(7), batch=7)  # the batch changes nothing
    assert files(tmp_path / "out") == files(tmp_path / "b")


def test_features_and_labels(tmp_path):
    images = np.stack([np.asarray(picture(i)) for i in range(10)])
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(10) % 3)
    encode(tmp_path / "a.npz", tmp_path / "out", Fake(text=False), test_fraction=0)
    data = Latents(str(tmp_path / "out"))
    source = data.source("train")
    assert (source.labels, set(source[0])) == (("0", "1", "2"), {"latent", "latent_std", "label"})
    assert [source[i]["label"].item() for i in range(10)] == [i % 3 for i in range(10)]
    assert source[0]["label"].dtype == np.int32
    with told("has no latents of aspect 1:1 in its test split; it has none"):
        data.source("test")
    with told("has no captions to encode; leave the text encoder out"):
        encode(tmp_path / "a.npz", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_features_of_captions_are_kept_with_those_of_the_empty_one(pairs, tmp_path):
    out = tmp_path / "out"
    encode(pairs, out, Fake(features=True), aspects=True)
    for aspect in ("1:1", "16:9"):
        example = Latents(str(out), aspect).source("train")[0]
        assert {k: v.dtype for k, v in example.items()}["text"] == np.float32
        np.testing.assert_array_equal(example["text"], [[example["tokens"][0] * x for x in (1, 0.5, 0.25)]])
        null = len(template("", aspect=aspect))
        np.testing.assert_array_equal(example["null_text"], [[null, null / 2, null / 4]])
    path = out / "null-16x9.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    with told("null-16x9.npy is missing or damaged; run the same `zoo prepare` again"):
        Latents(str(out), "16:9").source("train")
    Latents(str(out), "1:1").source("train")
    encode(pairs, out, Fake(features=True), aspects=True)
    Latents(str(out), "16:9").source("train")


def test_aspect_buckets(pairs, tmp_path):
    out, encoder = tmp_path / "out", Fake()
    report = encode(pairs, out, encoder, aspects=True)
    assert report.buckets == {"16:9": 12, "1:1": 12}
    assert "aspect ratios: 16:9 12, 1:1 12" in str(report)
    height, width = bucket(8, "16:9", 4)
    assert encoder.shapes == {(8, 8), (height, width)}
    assert Latents(str(out)).source("train")[0]["latent"].shape == (2, 2, 3)  # square by default
    wide = Latents(str(out), "16:9")
    example = wide.source("train")[0]
    assert example["latent"].shape == (height // 4, width // 4, 3)
    assert example["null_tokens"][0] == len("\n in a 16:9 aspect ratio.\n")
    info = read_info(out, LatentInfo)
    _, record = open_shards(out, info.buckets["16:9"].splits["train"], "train", Latent)
    text = template(record(0).caption, aspect="16:9")
    np.testing.assert_array_equal(example["tokens"], Fake().text([text] * 4)["tokens"][0])
    with told("data.aspect='16x9' is not in ", ", which has 16:9, 1:1; did you mean '16:9'"):
        Latents(str(out), "16x9").source("train")

    mixed = Latents(str(out), "mixed")
    source = mixed.source("train")
    assert len(source) == report.counts["train"]
    assert [source[int(g[0])]["latent"].shape[0] for g in source.groups] == [2, height // 4]  # square first
    spec = {"latent": jax.ShapeDtypeStruct((4, 2, 2, 3), np.float32)}
    first = list(itertools.islice(batches(mixed, 4, seed=1, spec=spec), 6))
    assert {b["latent"].shape[1:] for b in first} == {(2, 2, 3), (height // 4, width // 4, 3)}
    again = next(batches(mixed, 4, 5, seed=1, spec=spec))
    np.testing.assert_array_equal(again["latent"], first[5]["latent"])
    wide_spec = {"latent": jax.ShapeDtypeStruct((4, 4, 4, 3), np.float32)}
    with told("set task.latent=2,2 or another data.aspect"):
        batches(Latents(str(out)), 4, spec=wide_spec)
    with told("'latent': the data gives ", "; set task.channels=3"):
        batches(mixed, 4, spec={"latent": jax.ShapeDtypeStruct((4, 2, 2, 4), np.float32)})


def test_sets_without_square_images(pairs, tmp_path):
    for i in range(1, 24, 2):
        (pairs / f"{i:02d}.png").unlink()
    (pairs / "bad.png").unlink()
    encode(pairs, tmp_path / "one", aspects=True)
    assert Latents(str(tmp_path / "one")).source("train")[0]["latent"].shape[1] > 2  # the only one there is
    assert Latents(str(tmp_path / "one"), "mixed").source("train").groups == ()
    picture(0, 8, 14).save(pairs / "tall.png")
    (pairs / "tall.txt").write_text("tall")
    encode(pairs, tmp_path / "two", aspects=True)
    with told("has the aspect ratios 16:9, 9:16 and none is square; set data.aspect"):
        Latents(str(tmp_path / "two")).source("train")


def test_a_prepared_set_and_the_images_themselves_give_the_same(pairs, tmp_path):
    prepare(str(pairs), str(tmp_path / "images"), test_fraction=0.2, progress=False)
    encode(tmp_path / "images", tmp_path / "a", aspects=True)
    encode(pairs, tmp_path / "b", aspects=True)
    a, b = (read_info(tmp_path / x, LatentInfo).buckets["16:9"] for x in "ab")
    assert [s.sha256 for s in a.splits["test"]] == [s.sha256 for s in b.splits["test"]]


class Dying(Fake):
    left = 4

    def latents(self, images):
        self.left -= 1
        return super().latents(images) if self.left >= 0 else die()


def test_killed_run_continues_and_ends_with_the_same_bytes(pairs, tmp_path):
    encode(pairs, tmp_path / "whole", Fake(features=True), aspects=True)
    assert ended(*started(lambda: encode(pairs, tmp_path / "out", Dying(features=True), aspects=True))) is None
    with told("is not finished; run the same `zoo prepare` again"):
        Latents(str(tmp_path / "out")).source("train")
    kept = (tmp_path / "out" / "train-16x9-00000.array_record").stat().st_ino
    with told("prepared differently: encoder={'vae': 'aa'", " there, {'vae': 'bb'"):
        encode(pairs, tmp_path / "out", Fake(features=True, vae="bb"), aspects=True)
    encode(pairs, tmp_path / "out", Fake(features=True), aspects=True)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert (tmp_path / "out" / "train-16x9-00000.array_record").stat().st_ino == kept  # not made again


def test_latents_far_from_unit_variance_are_refused_before_anything_is_written(pairs, tmp_path):
    with told("standard deviation ", " scale is likely wrong; task.scale=") as error:
        encode(pairs, tmp_path / "out", Fake(scale=30.0))
    better = float(str(error.value).split("task.scale=")[1].split()[0])
    assert 0.5 < better < 2
    assert not (tmp_path / "out").exists()
    encoder = Fake(scale=30.0)
    encoder.about = {}
    with pytest.raises(UserError, match=r"a scale 0\.0\d+ times as large makes it 1"):
        encode(pairs, tmp_path / "out", encoder)
    with told("have the root mean square nan; give an autoencoder that was trained"):
        encode(pairs, tmp_path / "out", Fake(scale=float("nan")))


def test_senseless_arguments_are_refused(pairs, tmp_path):
    with told("size=9 is no multiple of 4, ", " choose size=8"):
        encode(pairs, tmp_path / "out", size=9)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"not one of \d+ images tried .* can be used; the first: 00.png is in colour"):
        encode(pairs, tmp_path / "out", channels=1)
    with told("split='valid' is unknown"):
        Latents(str(pairs)).source("valid")
