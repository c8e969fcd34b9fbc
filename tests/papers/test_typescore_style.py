"""Style of drawn text: what is measured in a picture, and what a model that sees is asked."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typescore_stub import Asked, Fake, line, score

from zoo.papers.typescore import render as drawing
from zoo.papers.typescore import style
from zoo.papers.typescore.extractors import Extraction
from zoo.papers.typescore.instructions import listed
from zoo.papers.typescore.render import plain


@pytest.mark.parametrize("colour", drawing.COLOURS)
def test_the_colour_of_the_ink_is_seen_in_the_box(colour: str) -> None:
    ground = "cloth" if colour in ("red", "purple") else "stone"
    picture = plain(
        "Open daily", colour=colour, size=256, points=28, rotation=4, noise=8, texture=True, material=ground
    )
    found = Fake().extract([picture])[0]
    for other in drawing.COLOURS:
        verdict = style.measured({"colour": other}, picture, found.lines)["colour"]
        assert verdict.followed is (other == colour), (other, verdict)


def test_case_and_place_are_seen_and_what_boxes_do_not_tell_is_not_evaluated() -> None:
    picture = Image.new("RGB", (300, 300), "white")

    def followed(attribute: str, value: str, text: str = "OPEN DAILY", box: Sequence[float] = (10, 10, 90, 30)) -> Any:
        return style.measured({attribute: value}, picture, [line(text, box)])[attribute].followed

    assert followed("case", "capitals")
    assert not followed("case", "lowercase")
    assert followed("case", "lowercase", "sSsing it daily")  # S and s look alike
    assert not followed("case", "lowercase", "The bread is here")
    assert followed("case", "capitals", "12") is None
    assert followed("case", "sarcastic") is None
    assert followed("placement", "top")
    assert followed("placement", "left")
    assert not followed("placement", "centre")
    assert not followed("placement", "bottom")
    assert followed("placement", "centre", box=(110, 110, 190, 190))
    assert followed("placement", "right", box=(210, 110, 290, 190))
    assert followed("placement", "nowhere") is None
    assert followed("font", "serif") is None
    assert followed("colour", "mauvish") is None
    assert followed("colour", "red") is None  # no ink on plain white
    assert style.measured({"case": "capitals"}, picture, [])["case"].followed is None


@pytest.mark.parametrize(
    "text, capitals, lowercase",
    [
        ("Stay Curious", False, False),
        ("Come early and bring a blanket for the show", False, False),  # one capital among 34 letters
        ("LP", True, False),
        ("Lp", False, False),
        ("C", True, False),
        # as readers err
        ("oPen Xylophone cOncerts", False, False),
        ("all yOu kNow of Bread", False, False),
        ("all yOu kNow of the bread", False, True),  # N once
        ("send an sOs, aII of you, 2O times", False, True),
        ("vitamin C for all", False, True),  # the letter alone does not tell
        ("for 5O crowns or O5", False, True),
        ("cOME EARLY", True, False),
        ("don't go past Nora's", False, False),
    ],
)
def test_case_is_told_by_the_letters_that_tell(text: str, capitals: bool, lowercase: bool) -> None:
    assert style._case("capitals", text).followed is capitals
    assert style._case("lowercase", text).followed is lowercase


@pytest.mark.parametrize("drawn", [str, str.upper, str.lower, str.title])
def test_the_case_of_all_shipped_texts_is_told_however_they_are_drawn(drawn: Callable[[str], str]) -> None:
    for one in listed("typeinst_synth"):
        text = drawn(one.text)
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
    x, y = 120, 40  # of the ink's middle, by the renderer
    lines = [line("Open", (x - 60, y - 25, x + 60, y + 25))]
    for picture in (seen, turned):
        found = style.measured({"placement": "top", "colour": "red"}, picture, lines)
        assert found["placement"] == style.Verdict(True, "centre at 50%, 27%")
        assert found["colour"].followed


def test_a_model_that_sees_is_asked_for_the_rest_without_a_word_of_the_text(folder: Path) -> None:
    for answer, followed in (("Yes.", True), ("**No**, it is not", False), ("It may be", None)):
        asked = Asked(answer=answer)
        found = score(folder, out=str(folder / f"out{followed}"), extractor=asked).run()
        assert asked.asked == ["Is the text in this image drawn in a serif typeface? Answer yes or no."] * 12
        by = found["style"]["by"]
        assert by["colour"]["followed"] == 0  # measured: they are drawn in black
        assert (by["font"]["evaluated"], by["font"]["not_evaluated"]) == ((12, 0) if followed is not None else (0, 12))
        assert found["style"]["score"] == (50 if followed else 0)
        assert found["score"] > 80  # of another matter
    without = Asked(answer="Yes.")
    found = score(folder, out=str(folder / "bare"), style=False, extractor=without).run()
    assert found["style"] is None
    assert not without.asked
    blank = style.evaluate({"font": "serif"}, Image.new("RGB", (9, 9)), Extraction(""), lambda _: pytest.fail("asked"))
    assert blank["font"].followed is None


def test_questions_that_were_not_answered_are_counted_and_asked_again(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = score(folder, extractor=Asked()).run()
    assert (found["failed"], found["unanswered"], found["style"]["by"]["font"]["evaluated"]) == (0, 12, 0)
    assert "12 questions of style were not answered" in caplog.text
    for times in (12, 0):
        asked = Asked(answer="Yes.")
        found = score(folder, extractor=asked).run()
        assert (found["unanswered"], found["style"]["by"]["font"]["evaluated"]) == (0, 12)
        assert (len(asked.asked), asked.read) == (times, [])


def test_style_shares() -> None:
    assert style.share([True, False, None]) == 50
    assert style.share([None]) is None
    np.testing.assert_allclose(style.lab([255, 255, 255]), [100, 0, 0], atol=0.02)
    np.testing.assert_allclose(style.lab([255, 0, 0]), [53.24, 80.09, 67.2], atol=0.05)
