"""Bucket sizes and caption templates, against the recorded ones; captions that are made of classes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from mistakes import told

from zoo.data.images import Digits
from zoo.data.images.captions import ASPECTS, Captioned, bucket, chat, nearest, ratio, template
from zoo.data.pipeline import Data, Source
from zoo.data.text.vocabulary import WORDS, text8

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "starflow" / "helpers.json").read_text())
TEXT = GOLDEN["preprocess_text"]


def test_bucket_sizes_are_the_recorded_ones():
    for target, aspect, multiple, size in GOLDEN["aspect_ratio_to_image_size"]:
        assert list(bucket(target, aspect, multiple)) == size, (target, aspect, multiple)
    assert {row[1] for row in GOLDEN["aspect_ratio_to_image_size"]} == {None, *ASPECTS}


def test_templates_are_the_recorded_ones():
    video = {"aspect": "16:9", "noise": 0.5, "fps": 16}
    assert [template("a cat")] == TEXT["plain"]
    assert [template("a cat", aspect="16:9")] == TEXT["aspect"]
    assert [template(caption, **video) for caption in ("a cat", "a dog")] == TEXT["video"]
    assert [template("a cat", noise=0.3, fps=0)] == TEXT["image_fps0"]
    assert [template("", **video)] == TEXT["null_video"]
    assert [chat("a cat")] == TEXT["template"]


def test_every_bucket_is_nearest_to_itself_and_ratios_are_compared_by_their_logarithm():
    for aspect in ASPECTS:
        height, width = bucket(512, aspect, 8)
        assert nearest(width, height) == aspect
        assert nearest(height, width) == ":".join(reversed(aspect.split(":")))  # wide and tall are alike
    assert nearest(10_000, 1) == "21:9"
    between = (ratio("5:4") * ratio("1:1")) ** 0.5
    assert nearest(round(10_000 * between) + 2, 10_000) == "5:4"
    assert nearest(round(10_000 * between) - 2, 10_000) == "1:1"


def test_unknown_aspects_and_sizes_are_refused():
    with told("aspect='16x9' is no aspect ratio", "did you mean '16:9'? choose from 21:9, 16:9"):
        bucket(256, "16x9", 8)
    with told("aspect='square'", "choose from"):
        template("a cat", aspect="square")
    with told("leaves no multiple of 64; choose a larger size"):
        bucket(32, "21:9", 64)


# --- of classes -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Latents(Data):
    """Two examples, as a prepared set with captions of its own has them."""

    path: str = "there"
    flip: bool = True
    classes: int = 3

    def made_with(self) -> dict[str, str]:
        return {"vae": "1", "tokenizer": "2", "template": "aspect"}

    def source(self, split: str, spec: Any = None) -> Source:
        return Rows(self.classes)


class Rows(Source):
    def __init__(self, classes: int) -> None:
        self.labels, self.groups, self.aspects = tuple("abc")[:classes], ((0,), (1,)), ("1:1", "2:1")
        self.augment = lambda example, rng: {**example, "mirrored": True}

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"latent": np.zeros((1, index + 1, 1)), "label": np.int32(index), "tokens": np.int32([99, 1])}


def test_a_caption_says_the_class_and_all_else_is_that_of_the_images():
    image, tokens = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32), jax.ShapeDtypeStruct((1, 9), jnp.int32)
    both = {"image": image, "tokens": tokens}
    for spec, length in ((None, 7), ({"image": image}, 7), (both, 9)):  # metrics ask for images
        source = Captioned(Digits()).source("test", spec)
        plain = Digits().source("test")
        for i in range(20):
            assert source[i]["tokens"].shape == (length,)
            assert text8().decode(source[i]["tokens"]).rstrip() == f"a {WORDS[int(plain[i]['label'])]}"
            np.testing.assert_array_equal(source[i]["image"], plain[i]["image"])
    data = Captioned(Latents(), ("One", "2", "three"), "{}, drawn")
    assert (data.place, data.mirrored, data.made_with()) == ("there", True, {"vae": "1"})
    source = data.source("train")
    assert (source.groups, source.aspects, source.labels) == (((0,), (1,)), ("1:1", "2:1"), ("a", "b", "c"))
    assert source.augment({}, None) == {"mirrored": True}
    assert [text8().decode(source[i]["tokens"]) for i in (0, 1)] == ["one drawn  ", "two drawn  "]


def test_captions_that_cannot_be_made_are_told():
    for wrong in ("a digit", "{} and {}", "a {x}{}"):
        with told(f"data.template={wrong!r}", "{}"):
            Captioned(Digits(), template=wrong)
    for data, words in (
        (Captioned(Latents(classes=0)), ("Latents has no classes", "labels")),
        (Captioned(Latents(), ("one", "two")), ("2 words for 3 classes",)),
        (Captioned(Digits()), ("'a zero' has 6 letters", "1 to 5", "task.text_tokens=7")),
    ):
        with told(*words):
            data.source("train", {"tokens": jax.ShapeDtypeStruct((1, 5), jnp.int32)})
