"""Style of drawn text: what is measured in a picture with boxes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typescore_stub import Fake, line

from zoo.papers.typescore import style
from zoo.papers.typescore.instructions import listed
from zoo.papers.typescore.render import COLOURS, plain


def test_the_colour_of_the_ink_is_seen_in_the_box() -> None:
    look: dict[str, Any] = {"size": 256, "points": 28, "rotation": 4, "noise": 8, "texture": True}
    for colour in COLOURS:
        ground = "cloth" if colour in ("red", "purple") else "stone"
        picture = plain("Open daily", colour=colour, material=ground, **look)
        found = Fake().extract([picture])[0]
        told = {other: style.measured({"colour": other}, picture, found.lines)["colour"].followed for other in COLOURS}
        assert told == {other: other == colour for other in COLOURS}


@pytest.mark.parametrize(
    "attribute, value, text, box, followed",
    [
        ("placement", "top", "OPEN", (10, 10, 90, 30), True),
        ("placement", "centre", "OPEN", (110, 110, 190, 190), True),
        ("placement", "right", "OPEN", (210, 110, 290, 190), True),
        ("placement", "nowhere", "OPEN", (10, 10, 90, 30), None),
        ("case", "capitals", "12", (10, 10, 90, 30), None),
        ("font", "serif", "OPEN", (10, 10, 90, 30), None),
        ("colour", "mauvish", "OPEN", (10, 10, 90, 30), None),
        ("colour", "red", "OPEN", (10, 10, 90, 30), None),  # no ink on plain white
    ],
)
def test_place_is_seen_and_what_boxes_do_not_tell_is_not_evaluated(attribute, value, text, box, followed):
    found = style.measured({attribute: value}, Image.new("RGB", (300, 300), "white"), [line(text, box)])
    assert found[attribute].followed is followed


@pytest.mark.parametrize(
    "text, capitals, lowercase",
    [
        ("OPEN DAILY", True, False),
        ("Stay Curious", False, False),
        ("Come early and bring a blanket for the show", False, False),  # one capital among 34 letters
        ("C", True, False),
        # as readers err
        ("sSsing it daily", False, True),
        ("oPen Xylophone cOncerts", False, False),
        ("all yOu kNow of Bread", False, False),
        ("send an sOs, aII of you, 2O times", False, True),
        ("vitamin C for all", False, True),  # the letter alone does not tell
        ("cOME EARLY", True, False),
        ("don't go past Nora's", False, False),
    ],
)
def test_case_is_told_by_the_letters_that_tell(text: str, capitals: bool, lowercase: bool) -> None:
    assert style._case("capitals", text).followed is capitals
    assert style._case("lowercase", text).followed is lowercase


def test_the_case_of_all_shipped_texts_is_told_however_they_are_drawn() -> None:
    for text in [
        drawn(one.text) for one in listed("typeinst_synth") for drawn in (str, str.upper, str.lower, str.title)
    ]:
        cased = text.upper() != text.lower()
        for value, right in (("capitals", text.upper()), ("lowercase", text.lower())):
            found = style._case(value, text)
            assert (found and found.followed) is ((text == right) if cased else None), (value, text)


def test_boxes_and_ink_are_of_the_picture_as_it_is_seen(tmp_path: Path) -> None:
    seen = plain("Open", colour="red", placement="top", size=240).crop((0, 0, 240, 150))
    exif = Image.Exif()
    exif[0x0112] = 8  # to be turned by a quarter
    seen.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as turned:
        turned.load()
    assert turned.size == (150, 240)
    lines = [line("Open", (60, 15, 180, 65))]  # around the ink's middle, by the renderer
    for picture in (seen, turned):
        found = style.measured({"placement": "top", "colour": "red"}, picture, lines)
        assert found["placement"] == style.Verdict(True, "centre at 50%, 27%")
        assert found["colour"].followed


def test_style_shares_and_colours() -> None:
    assert style.share([True, False, None]) == 50
    assert style.share([None]) is None
    np.testing.assert_allclose(style.lab([255, 255, 255]), [100, 0, 0], atol=0.02)
    np.testing.assert_allclose(style.lab([255, 0, 0]), [53.24, 80.09, 67.2], atol=0.05)
