"""Pictures with known faults: shares of faults, ink, colour, place and case as told, notes in the picture, mistakes refused."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont

from zoo.errors import UserError
from zoo.papers.typescore.instructions import Instruction
from zoo.papers.typescore.render import (
    COLOURS,
    ID,
    STYLE,
    STYLES,
    TEXT,
    Corruption,
    corrupt,
    plain,
    render,
    save,
    save_all,
)

LONG = "The kettle is on, bread costs 4 pennies and Nora's Inn opens at 18 hours for all who sailed on HMS Plover today"
SIZE = 256


def wanted(text: str = LONG, id: str = "x-1", **style: str) -> Instruction:
    return Instruction(id, f'A sign says "{text}".', text, (text,), style, "17-30", "shop")


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def ink(picture: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """The pixels that are not of the ground, [S, S], and their colours [N, 3]: those far from the ground's colour."""
    pixels = np.asarray(picture, np.float32)
    far = np.linalg.norm(pixels - np.median(pixels, (0, 1)), axis=-1)
    mask = far > 0.8 * np.quantile(far, 0.999)
    return mask, pixels[mask]


def centre(mask: np.ndarray) -> tuple[float, float]:
    """Of the box around the ink: x and y as shares of the picture's side."""
    y, x = np.nonzero(mask)
    return (x.min() + x.max() + 1) / 2 / mask.shape[1], (y.min() + y.max() + 1) / 2 / mask.shape[0]


def lab(colour: Sequence[float] | np.ndarray) -> np.ndarray:
    """CIE Lab of red, green, blue in 0..255, white as of D65."""
    c = np.asarray(colour, np.float64) / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear
    f = np.cbrt(xyz / [0.9505, 1.0, 1.089])
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


# --- faults ---------------------------------------------------------------------------------------


def test_without_faults_a_text_stays() -> None:
    assert corrupt(LONG, Corruption(), rng()) == LONG
    assert corrupt("  two \n words ", Corruption(), rng()) == "two words"


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 1.0])
def test_letters_are_replaced_by_their_share(share: float) -> None:
    text = LONG * 3
    found = corrupt(text, Corruption(p_char=share), rng(1))
    assert len(found) == len(text)
    changed = [(a, b) for a, b in zip(text, found) if a != b]
    assert abs(len(changed) - share * sum(c.isalnum() for c in text)) < 1
    for a, b in changed:
        assert a.casefold() != b.casefold()
        assert (a.isdigit(), a.isupper(), a.islower()) == (b.isdigit(), b.isupper(), b.islower())


def test_shares_of_short_texts_are_met_on_average() -> None:
    found = [corrupt("ab c", Corruption(p_char=0.2), rng(s)) for s in range(600)]
    assert sum(a != b for t in found for a, b in zip("ab c", t)) / 600 == pytest.approx(0.6, abs=0.06)
    assert np.mean(
        [len(corrupt("a b c", Corruption(p_drop=0.4), rng(s)).split()) for s in range(600)]
    ) == pytest.approx(1.8, abs=0.06)


def test_more_of_the_same_faults() -> None:
    """A higher share keeps the faults of a lower one, so that scores fall text by text."""
    before: set[tuple[int, str]] = set()
    for share in (0.1, 0.2, 0.4, 0.8):
        text = corrupt(LONG, Corruption(p_char=share), rng(3))
        now = {(i, b) for i, (a, b) in enumerate(zip(LONG, text)) if a != b}
        assert before < now
        before = now


def test_dropped_words_are_gone_and_others_in_order() -> None:
    found = corrupt(LONG, Corruption(p_drop=0.4), rng(2)).split()
    assert abs(len(found) - 0.6 * len(LONG.split())) < 1
    rest = iter(LONG.split())
    assert all(word in rest for word in found)  # a subsequence
    assert corrupt(LONG, Corruption(p_drop=1), rng()) == ""


def test_surplus_words_leave_the_text_in_one_piece() -> None:
    for seed in range(5):
        found = corrupt(LONG, Corruption(p_surplus=0.4), rng(seed))
        assert LONG in found
        assert abs(len(found.split()) - 1.4 * len(LONG.split())) < 1


def test_faults_of_one_kind_do_not_move_those_of_another() -> None:
    both = corrupt(LONG, Corruption(p_char=0.3, p_surplus=0.3), rng(4))
    assert corrupt(LONG, Corruption(p_char=0.3), rng(4)) in both


# --- pictures -------------------------------------------------------------------------------------


def test_a_picture_follows_from_its_arguments() -> None:
    faults = Corruption(0.1, 0.1, 0.1)
    one, same = (render(wanted(), faults, 0.5, seed=3, size=SIZE) for _ in range(2))
    assert one.size == (SIZE, SIZE)
    assert one.mode == "RGB"
    assert one.tobytes() == same.tobytes()
    assert one.info == same.info
    assert render(wanted(), faults, 0.5, seed=4, size=SIZE).tobytes() != one.tobytes()
    assert render(wanted(id="x-2"), faults, 0.5, seed=3, size=SIZE).tobytes() != one.tobytes()


@pytest.mark.parametrize("text", [LONG, "Café Größe Ωmega Привет “ja” – 5 €"])
def test_notes_travel_with_the_file(tmp_path: Path, text: str) -> None:
    picture = render(wanted(text, colour="red", placement="top", mood="grim"), seed=1, size=SIZE)
    save(picture, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as opened:
        opened.load()
        assert opened.tobytes() == picture.tobytes()
        assert opened.info[TEXT] == text
        assert opened.info[ID] == "x-1"
        assert json.loads(opened.info[STYLE]) == {"colour": "red", "placement": "top"}


def test_the_note_is_the_text_with_its_faults() -> None:
    for case, change in (("capitals", str.upper), ("lowercase", str.lower)):
        found = render(wanted(case=case), Corruption(p_char=0.2), size=SIZE).info[TEXT]
        assert found == change(found)
        assert found.casefold() != LONG.casefold()
        assert len(found) == len(LONG)


@pytest.mark.parametrize("colour", COLOURS)
def test_the_ink_has_the_colour_asked_for(colour: str) -> None:
    for seed in range(2):
        _, pixels = ink(render(wanted("Open daily, come in", colour=colour), seed=seed, size=SIZE))
        assert np.linalg.norm(lab(np.median(pixels, 0)) - lab(COLOURS[colour])) < 15


def test_colours_are_far_apart() -> None:
    labs = [lab(c) for c in COLOURS.values()]
    assert min(np.linalg.norm(a - b) for i, a in enumerate(labs) for b in labs[:i]) > 40


@pytest.mark.parametrize("text", ["Open", LONG])
@pytest.mark.parametrize("placement", STYLES["placement"])
def test_the_box_lies_in_the_third_asked_for(placement: str, text: str) -> None:
    def third(picture: Image.Image) -> set[str]:
        x, y = centre(ink(picture)[0])
        found = {("left", "", "right")[int(3 * x)], ("top", "", "bottom")[int(3 * y)]} - {""}
        return found or {"centre"}

    asked = wanted(text, placement=placement)
    assert third(render(asked, seed=5, size=SIZE)) == {placement}
    assert third(render(asked, style_skill=0, seed=5, size=SIZE)) != {placement}
    assert third(plain(text, placement=placement, points=20, size=SIZE)) == {placement}


@pytest.mark.parametrize("font", STYLES["font"])
@pytest.mark.parametrize("rotation", [0, 30, -90])
def test_no_text_is_clipped(font: str, rotation: float) -> None:
    for placement in ("top", "right", "centre"):
        picture = plain(LONG, font=font, weight="italic", points=90, rotation=rotation, placement=placement, size=SIZE)
        pixels = np.asarray(picture)
        rows, columns = np.nonzero((pixels != pixels[0, 0]).any(-1))
        edge = int(0.04 * SIZE)
        assert min(rows.min(), columns.min()) >= edge
        assert max(rows.max(), columns.max()) < SIZE - edge
        assert len(rows) > 1000  # and it is there


def test_all_letters_are_drawn() -> None:
    """Ink of a whole text is that of its words, drawn one by one in the same size: none is cut or left out."""
    words = LONG.split()
    dark = [float((255 - np.asarray(plain(t, points=14).convert("L"), np.float64)).sum()) for t in (LONG, *words, ".")]
    ground = float((255 - np.asarray(plain("", points=14).convert("L"), np.float64)).sum())
    assert dark[0] - ground == pytest.approx(sum(d - ground for d in dark[1:-1]), rel=0.02)


def test_style_and_faults_are_independent() -> None:
    style = {
        "font": "serif",
        "colour": "blue",
        "weight": "bold",
        "case": "capitals",
        "placement": "top",
        "material": "wood",
    }
    clean, faulty = (render(wanted(**style), Corruption(p), 0.5, seed=2, size=SIZE) for p in (0, 0.3))
    assert clean.info[STYLE] == faulty.info[STYLE]
    assert np.array_equal(np.asarray(clean)[-8:], np.asarray(faulty)[-8:])  # the ground with its noise too
    one, other = (render(wanted(**style), Corruption(0.2), skill, seed=2, size=SIZE) for skill in (0, 1))
    assert one.info[TEXT].casefold() == other.info[TEXT].casefold()
    assert json.loads(one.info[STYLE]) == {}
    assert json.loads(other.info[STYLE]) == style


def test_skill_is_the_share_of_attributes_honoured() -> None:
    style = {
        "font": "serif",
        "colour": "blue",
        "weight": "bold",
        "case": "capitals",
        "placement": "top",
        "material": "wood",
    }
    honoured = [
        set(json.loads(render(wanted("", **style), style_skill=skill, seed=s, size=64).info[STYLE]))
        for skill in (0.3, 0.7)
        for s in range(80)
    ]
    assert sum(map(len, honoured[:80])) / 480 == pytest.approx(0.3, abs=0.07)
    assert sum(map(len, honoured[80:])) / 480 == pytest.approx(0.7, abs=0.07)
    assert all(low <= high for low, high in zip(honoured[:80], honoured[80:]))  # more skill honours the same and more


def test_materials_and_weights_look_different() -> None:
    seen = {plain("Open", material=m, texture=True, size=SIZE).tobytes() for m in STYLES["material"]}
    assert len(seen) == len(STYLES["material"])
    strokes = [ink(plain("Open", weight=w, size=SIZE))[0].sum() for w in ("bold", "regular")]
    assert strokes[0] > 1.2 * strokes[1]


def test_noise_and_texture_are_as_told() -> None:
    flat, noisy = (np.asarray(plain("", noise=n, size=SIZE), np.float64) for n in (0, 20))
    assert flat.std((0, 1)).max() == 0
    assert (noisy - flat).std() == pytest.approx(20, rel=0.35)  # light grounds are clipped at white


def test_nothing_is_drawn_of_an_empty_text() -> None:
    picture = render(wanted("word"), Corruption(p_drop=1), size=64)
    assert picture.info[TEXT] == ""


def test_a_font_file_may_be_named(tmp_path: Path) -> None:
    file = ImageFont.load_default(12).font_bytes
    (tmp_path / "own.ttf").write_bytes(file)
    assert plain("Open", font=str(tmp_path / "own.ttf"), size=SIZE).tobytes() == plain("Open", size=SIZE).tobytes()


def test_a_folder_of_pictures(tmp_path: Path) -> None:
    paths = save_all([wanted("Open"), wanted("Shut", id="x-2")], tmp_path / "new", each=2, size=64)
    assert [p.name for p in paths] == ["x-1_0.png", "x-1_1.png", "x-2_0.png", "x-2_1.png"]
    pixels = []
    for path, text in zip(paths, ("Open", "Open", "Shut", "Shut")):
        with Image.open(path) as picture:
            assert picture.info[TEXT] == text
            pixels.append(picture.tobytes())
    assert len(set(pixels)) == 4


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"style_skill": 1.5}, "style_skill=1.5: give a number from 0 to 1"),
        ({"seed": -1}, "seed=-1: give a whole number"),
        ({"size": 10}, "size=10: .*64 or more"),
    ],
)
def test_mistakes_of_rendering(arguments: dict[str, float], words: str) -> None:
    with pytest.raises(UserError, match=words):
        render(wanted("Open"), **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"colour": "rad"}, "colour='rad' is not known; did you mean 'red'"),
        ({"material": "mud"}, "material='mud' is not known"),
        ({"font": "serf"}, "font='serf' .*did you mean 'serif'"),
        ({"points": 0}, "points=0: give a size"),
        ({"text": "a word " * 4000}, "a text of .* characters finds no room"),
        ({"text": "茶"}, r"no font at hand shows '茶' \(U\+8336\)"),
    ],
)
def test_mistakes_of_plain_pictures(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        plain(**{"text": "Open", "size": SIZE, **arguments})  # type: ignore[arg-type]


def test_a_value_of_style_that_is_not_known_is_passed_over() -> None:
    asked = dataclasses.replace(wanted("Open"), style={"colour": "mauve", "material": "ice"})
    assert json.loads(render(asked, size=64).info[STYLE]) == {}
