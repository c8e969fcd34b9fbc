"""Bucket sizes and caption templates, against the recorded ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from zoo.data.captions import ASPECTS, bucket, chat, nearest, ratio, template
from zoo.errors import UserError

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
    with pytest.raises(
        UserError, match=r"aspect='16x9' is no aspect ratio .* did you mean '16:9'\? choose from 21:9, 16:9"
    ):
        bucket(256, "16x9", 8)
    with pytest.raises(UserError, match=r"aspect='square' .*buckets; choose from"):
        template("a cat", aspect="square")
    with pytest.raises(UserError, match="leaves no multiple of 64; choose a larger size"):
        bucket(32, "21:9", 64)
