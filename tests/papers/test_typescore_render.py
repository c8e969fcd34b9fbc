"""Pictures with known faults: shares of faults, ink, colour, place and case as told, notes in the picture, mistakes refused."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from mistakes import told
from PIL import Image
from typescore_stub import LIST, listed

from zoo.papers.typescore.extractors.base import TEXT_CHUNK
from zoo.papers.typescore.instructions import Instruction
from zoo.papers.typescore.render import COLOURS, STYLES, Corruption, Render, corrupt, drawn_style, plain, render, save

LONG = "The kettle is on, bread costs 4 pennies and Nora's Inn opens at 18 hours for all who sailed on HMS Plover today"
SIZE = 256
STYLE = {name: values[1] for name, values in STYLES.items()}


def wanted(text: str = LONG, id: str = "x-1", **style: str) -> Instruction:
    return Instruction(id, f'A sign says "{text}".', text, style, "shop")


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_faults_are_of_their_share_and_a_higher_share_makes_the_same_ones_and_more() -> None:
    text, before = LONG * 3, set[tuple[int, str, str]]()
    for share in (0.1, 0.25, 0.5, 1.0):
        found = corrupt(text, Corruption(p_char=share), rng(1))
        assert len(found) == len(text)
        changed = {(i, a, b) for i, (a, b) in enumerate(zip(text, found)) if a != b}
        assert abs(len(changed) - share * sum(c.isalnum() for c in text)) < 1
        for _, a, b in changed:
            assert a.casefold() != b.casefold()
            assert (a.isdigit(), a.isupper(), a.islower()) == (b.isdigit(), b.isupper(), b.islower())
        assert before < changed
        before = changed
    words = corrupt(LONG, Corruption(p_drop=0.4), rng(2)).split()
    assert abs(len(words) - 0.6 * len(LONG.split())) < 1
    rest = iter(LONG.split())
    assert all(word in rest for word in words)  # a subsequence
    assert corrupt(LONG, Corruption(p_drop=1), rng()) == ""
    assert corrupt("  two \n words ", Corruption(), rng()) == "two words"
    for seed in range(5):  # surplus words leave the text in one piece
        found = corrupt(LONG, Corruption(p_surplus=0.4), rng(seed))
        assert LONG in found
        assert abs(len(found.split()) - 1.4 * len(LONG.split())) < 1


def test_a_picture_follows_from_its_arguments_and_its_note_travels_with_the_file(tmp_path: Path) -> None:
    faults = Corruption(0.1, 0.1, 0.1)
    one, same = (render(wanted(), faults, 0.5, seed=3, size=SIZE) for _ in range(2))
    assert (one.size, one.mode, one.info, one.tobytes()) == ((SIZE, SIZE), "RGB", same.info, same.tobytes())
    assert render(wanted(), faults, 0.5, seed=4, size=SIZE).tobytes() != one.tobytes()
    assert render(wanted(id="x-2"), faults, 0.5, seed=3, size=SIZE).tobytes() != one.tobytes()
    picture = render(wanted("Café Größe Ωmega Привет “ja” – 5 €", mood="grim"), seed=1, size=SIZE)
    save(picture, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as opened:
        opened.load()
        assert opened.tobytes() == picture.tobytes()
        assert opened.info[TEXT_CHUNK] == "Café Größe Ωmega Привет “ja” – 5 €"


@pytest.mark.parametrize("text", ["Open", LONG])
@pytest.mark.parametrize("placement", STYLES["placement"])
def test_the_box_lies_in_the_third_asked_for(placement: str, text: str) -> None:
    def third(picture: Image.Image) -> set[str]:
        """Of the centre of the box around what is far from the ground's colour."""
        pixels = np.asarray(picture, np.float32)
        far = np.linalg.norm(pixels - np.median(pixels, (0, 1)), axis=-1)
        y, x = ((at.min() + at.max() + 1) / 2 / SIZE for at in np.nonzero(far > 0.8 * np.quantile(far, 0.999)))
        return {("left", "", "right")[int(3 * x)], ("top", "", "bottom")[int(3 * y)]} - {""} or {"centre"}

    asked = wanted(text, placement=placement)
    assert third(render(asked, seed=5, size=SIZE)) == {placement}
    assert third(render(asked, style_skill=0, seed=5, size=SIZE)) != {placement}
    assert third(plain(text, placement=placement, points=20, size=SIZE)) == {placement}


@pytest.mark.parametrize("font", STYLES["font"])
@pytest.mark.parametrize("rotation", [0, 30])
def test_no_text_is_clipped(font: str, rotation: float) -> None:
    for placement in ("top", "right", "centre"):
        picture = plain(LONG, font=font, weight="italic", points=90, rotation=rotation, placement=placement, size=SIZE)
        pixels = np.asarray(picture)
        rows, columns = np.nonzero((pixels != pixels[0, 0]).any(-1))
        edge = int(0.04 * SIZE)
        assert min(rows.min(), columns.min()) >= edge
        assert max(rows.max(), columns.max()) < SIZE - edge
        assert len(rows) > 1000  # and it is there


def test_style_and_faults_are_independent_and_skill_is_the_share_of_attributes_honoured() -> None:
    clean, faulty = (render(wanted(**STYLE), Corruption(p), 0.5, seed=2, size=SIZE) for p in (0, 0.3))
    assert np.array_equal(np.asarray(clean)[-8:], np.asarray(faulty)[-8:])  # the ground with its noise too
    one, other = (render(wanted(**STYLE), Corruption(0.2), skill, seed=2, size=SIZE) for skill in (0, 1))
    assert one.info[TEXT_CHUNK].casefold() == other.info[TEXT_CHUNK].casefold()
    assert one.tobytes() != other.tobytes()

    def honoured(skill: float, seed: int) -> set[str]:
        return {name for name, value in drawn_style(STYLE, skill, rng(seed)).items() if STYLE[name] == value}

    low, high = ([honoured(skill, seed) for seed in range(80)] for skill in (0.3, 0.7))
    assert sum(map(len, low)) / 480 == pytest.approx(0.3, abs=0.07)
    assert sum(map(len, high)) / 480 == pytest.approx(0.7, abs=0.07)
    assert all(few <= more for few, more in zip(low, high))  # more skill honours the same and more
    assert drawn_style({"colour": "mauve"}, 1, rng())["colour"] in COLOURS  # an unknown value is passed over


def test_pictures_in_a_folder_are_drawn_all_or_none(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "made"
    listed(tmp_path / "wanted.jsonl", [LIST[0], dataclasses.replace(LIST[1], text="茶")])
    made = Render(str(out), str(tmp_path / "wanted.jsonl"), size=64, each=2)
    with told("no font at hand shows '茶'"):
        made.run()
    with told("a text of 27999 characters finds no room"):
        plain("a word " * 4000, size=SIZE)
    assert not out.exists()
    listed(tmp_path / "wanted.jsonl", LIST[:2])
    assert made.run() == {"pictures": 4, "instructions": 2, "out": str(out)}
    assert sorted(path.name for path in out.iterdir()) == ["t-0_0.png", "t-0_1.png", "t-1_0.png", "t-1_1.png"]
    assert len({path.read_bytes() for path in out.iterdir()}) == 4
    with told("is there and not empty; name a new folder"):
        made.run()
