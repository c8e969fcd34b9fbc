"""Pictures of a text with a known share of errors: synthetic text-to-image "models", so that all else can be tested without one.

`render` draws the text of an instruction in the style that it asks for, with faults of spelling, missing and surplus words and with
attributes of style that are not followed; `plain` draws one text in one given way; `Render` fills a folder. What was drawn is noted
in the picture, which the extractor `oracle` reads. Faces are those that come with Pillow and matplotlib, so a picture does not depend
on the fonts of the machine. Scripts whose letters join or combine are not set rightly.
"""

from __future__ import annotations

import functools
import math
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import numpy as np
from msgspec import Meta
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from zoo.errors import UserError
from zoo.fields import Count, NotEmpty, Seed, Share, Whole, check_fields
from zoo.files import filled, names, writing
from zoo.papers.typescore.extractors.base import TEXT_CHUNK
from zoo.papers.typescore.instructions import SHIPPED, Instruction, listed

# red, green and blue in 0..255 of the inks; any two are more than 40 apart in CIE Lab
COLOURS: dict[str, tuple[int, int, int]] = {
    "black": (18, 18, 20),
    "white": (246, 246, 244),
    "red": (204, 20, 32),
    "orange": (242, 128, 16),
    "yellow": (250, 222, 40),
    "green": (16, 134, 58),
    "blue": (20, 84, 200),
    "purple": (136, 28, 144),
    "pink": (246, 110, 178),
}
# material -> its light and its dark shade; the one further from the ink is taken
_SHADES: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "paper": ((240, 234, 218), (54, 48, 44)),
    "wood": ((226, 200, 164), (62, 42, 28)),
    "stone": ((214, 214, 208), (56, 60, 64)),
    "brick": ((232, 206, 194), (82, 38, 30)),
    "metal": ((216, 222, 228), (44, 50, 58)),
    "cloth": ((228, 222, 206), (30, 36, 66)),
}

# attribute of style -> its values. A placement names the third of the picture, from top to bottom or from left to right, in which
# the centre of the box around the text lies; "centre" is the middle third both ways
STYLES: dict[str, tuple[str, ...]] = {
    "font": ("sans-serif", "serif", "monospaced", "handwritten"),
    "colour": tuple(COLOURS),
    "weight": ("regular", "bold", "italic"),
    "case": ("capitals", "lowercase"),
    "placement": ("top", "bottom", "left", "right", "centre"),
    "material": tuple(_SHADES),
}
_PLAIN = {"font": "sans-serif", "weight": "regular", "colour": "black", "placement": "centre", "material": "paper"}

# the files of regular, bold and italic faces, or Pillow's own; "handwritten" is set letter by letter, unevenly
_FACES: dict[str, tuple[str, str, str]] = {
    "sans-serif": ("Pillow DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique"),
    "serif": ("DejaVuSerif STIXGeneral", "DejaVuSerif-Bold STIXGeneralBol", "DejaVuSerif-Italic STIXGeneralItalic"),
    "monospaced": ("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique"),
    "handwritten": ("Pillow", "DejaVuSans-Bold", "DejaVuSans-Oblique"),
}

_MARGIN = 0.04  # of the side: nothing is drawn nearer to the edge
_REACH = 0.56  # of the side: how far a text set at an edge may extend; its centre then lies in the outer third
_LARGEST, _SMALLEST = 0.13, 0.008  # of the side: sizes of letters that are tried, from the largest down
_FINE = 2  # letters are drawn so much larger and shrunk, which smooths them when they are turned
_LEAD = 1.3  # distance of lines in sizes of the font
# without letters that look alike in many faces (i, j, l, o, q): whether a reader saw the wrong letter must not be in doubt
_LETTERS = "abcdefghkmnprstuvwxyz"
_SURPLUS = re.findall(r"\w+", "market velvet number summer garden before Sunday studio twelve please street paper")

Font: TypeAlias = ImageFont.FreeTypeFont
Pixels: TypeAlias = Annotated[int, Meta(ge=64, le=2**14)]  # of a picture's side


@dataclass(frozen=True)
class Corruption:
    """How a drawn text differs from the wanted one: as shares of it, met exactly but for rounding, which is random and unbiased."""

    p_char: Share = 0.0  # letters and digits replaced by others, of those of the words kept
    p_drop: Share = 0.0  # words left out
    p_surplus: Annotated[float, Meta(ge=0, le=10)] = 0.0  # words added before or behind, as a share of those wanted

    def __post_init__(self) -> None:
        check_fields(self)


def corrupt(text: str, corruption: Corruption, rng: np.random.Generator) -> str:
    """The text with words left out, then letters replaced, then words added; single spaces between words.

    Letters become letters of the same case and digits digits. Surplus words, half of them the text's own over again, stand before or
    behind the text, which stays in one piece. With generators of one seed, a higher share makes the same faults and more of them.
    """
    drop, char, surplus = rng.spawn(3)  # so that one kind of fault does not move the others
    wanted = text.split()
    gone = _share(len(wanted), corruption.p_drop, drop)
    letters = list(" ".join(word for i, word in enumerate(wanted) if i not in gone))
    places = [i for i, letter in enumerate(letters) if letter.isalnum()]
    chosen = _share(len(places), corruption.p_char, char)
    for k, i in enumerate(places):
        other = _other(letters[i], char.random())  # drawn for all, so that their number does not decide which
        if k in chosen:
            letters[i] = other
    before: list[str] = []
    behind = "".join(letters).split()
    rounding = surplus.random()
    for _ in range(math.floor(len(wanted) * corruption.p_surplus + rounding)):
        front, own, which = surplus.random(3)
        words = wanted if own < 0.5 else _SURPLUS
        (before if front < 0.3 else behind).append(words[int(which * len(words))])
    return " ".join([*before, *behind])


def render(
    instruction: Instruction,
    corruption: Corruption = Corruption(),
    style_skill: float = 1.0,
    seed: int = 0,
    size: int = 512,
) -> Image.Image:
    """One picture [size, size] in RGB of the text an instruction wants, faulty as told; the same for the same arguments.

    Text, style, layout and noise are drawn from chance of their own: a change of `corruption` leaves the style, and one of
    `style_skill` (the chance in 0..1 that an attribute of style is honoured) the faults of the text. An attribute that is not
    honoured takes another value; one that is not asked for any. Pictures of different ids differ with the same seed.
    UserError for a text that no font shows or that finds no room.
    """
    words, style, layout, ground = np.random.default_rng([seed, zlib.crc32(instruction.id.encode())]).spawn(4)
    text = corrupt(instruction.text, corruption, words)
    drawn = drawn_style(instruction.style, style_skill, style)
    if drawn["case"]:
        text = text.upper() if drawn["case"] == "capitals" else text.lower()
    largest, rotation, noise = (layout.uniform(*of) for of in ((0.07, _LARGEST), (-5, 5), (0, 12)))
    return _draw(text, drawn, layout, ground, size, size * largest, rotation, noise, texture=True)


def plain(text: str, *, size: int = 512, seed: int = 0, points: float = 32, **look: Any) -> Image.Image:
    """One text drawn in one way, broken into lines; the plain defaults are the "clean" renders that extractors are tried on.

    `points` is the size of the font in pixels, made smaller where the text has no room; `look` has values of `STYLES`, and
    `rotation`, `noise` and `texture` as `_draw` takes them.
    """
    layout, ground = np.random.default_rng(seed).spawn(2)
    style = _PLAIN | {name: look.pop(name) for name in STYLES if name in look}
    return _draw(text, style, layout, ground, size, points, **look)


def save(picture: Image.Image, path: Path) -> None:
    """Writes a picture as PNG together with the note of its text, which Pillow alone would leave out."""
    notes = PngImagePlugin.PngInfo()
    notes.add_itxt(TEXT_CHUNK, picture.info[TEXT_CHUNK])
    picture.save(path, format="PNG", pnginfo=notes)


@dataclass(frozen=True)
class Render:
    """A folder of pictures with known faults, as a model of that skill would leave it, to try TypeScore on."""

    out: NotEmpty = "typescore-pictures"  # a folder for {id}_{k}.png
    wanted: NotEmpty = SHIPPED  # a file of JSON lines, or typeinst_synth
    limit: Whole = 0  # the first so many instructions of the list; 0 for all
    corruption: Corruption = Corruption()
    style_skill: Share = 1.0  # probability that an attribute of the style is as wanted
    each: Count = 1  # pictures of every instruction; the k-th are of seed + k
    size: Pixels = 512
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_fields(self)

    def run(self) -> dict[str, Any]:
        """Draws them, all or none. UserError for a folder that holds anything already, a text that cannot be drawn."""
        instructions = listed(self.wanted, self.limit)
        out = Path(self.out)
        with writing(out, "free some space, or name another folder with out=FOLDER"):
            if out.exists() and (not out.is_dir() or names(out)):
                raise UserError(f"out={out} is there and not empty; name a new folder, and nothing is overwritten")
            with filled(out) as part:
                part.mkdir(parents=True, exist_ok=True)
                for one in instructions:
                    for k in range(self.each):
                        picture = render(one, self.corruption, self.style_skill, self.seed + k, self.size)
                        save(picture, part / f"{one.id}_{k}.png")
        return {"pictures": len(instructions) * self.each, "instructions": len(instructions), "out": str(out)}


def _share(n: int, share: float, rng: np.random.Generator) -> set[int]:
    """`share` of the places 0..n-1, rounded up or down by chance; a larger share with the same generator holds a smaller one's."""
    rounding = rng.random()
    return set(rng.permutation(n)[: math.floor(n * share + rounding)].tolist())


def _other(letter: str, chance: float) -> str:
    if letter.isdigit():
        return [d for d in "0123456789" if d != letter][int(chance * 9)]
    others = [x for x in _LETTERS if x != letter.casefold()]
    other = others[int(chance * len(others))]
    return other.upper() if letter.isupper() else other


def drawn_style(asked: Mapping[str, str], skill: float, rng: np.random.Generator) -> dict[str, str]:
    """What is drawn of each attribute; "" for the case in which a text is written."""
    found = {}
    for attribute, values in STYLES.items():
        luck, which = rng.random(2)
        wanted = asked.get(attribute, "")
        others = [value for value in values if value != wanted]
        other = others[int(which * len(others))]
        if wanted in values:
            found[attribute] = wanted if luck < skill else other
        else:
            found[attribute] = {"case": "", "weight": "regular"}.get(attribute, other)
    return found


def _draw(
    text: str,
    style: Mapping[str, str],
    layout: np.random.Generator,
    ground: np.random.Generator,
    size: int,
    largest: float,
    rotation: float = 0,
    noise: float = 0,
    texture: bool = False,
) -> Image.Image:
    """A text in a style, in the largest font up to `largest` pixels in which it has room.

    It is turned counter-clockwise by `rotation` degrees, on a ground with the material's texture or of one colour; `noise` is
    the standard deviation, in 0..255, of normal noise.
    """
    text = " ".join(text.split())
    ink = np.asarray(COLOURS[style["colour"]], np.float32)
    pixels = _surface(style["material"], ink, texture, size, ground)
    if text:
        mask = _mask(text, style, layout, largest, size, rotation)
        x = _start(style["placement"], ("left", "right"), size, mask.width)
        y = _start(style["placement"], ("top", "bottom"), size, mask.height)
        cover = np.zeros((size, size, 1), np.float32)
        cover[y : y + mask.height, x : x + mask.width, 0] = np.asarray(mask, np.float32) / 255
        pixels = pixels * (1 - cover) + ink * cover
    pixels = pixels + noise * ground.standard_normal(pixels.shape, np.float32)
    picture = Image.fromarray(np.rint(np.clip(pixels, 0, 255)).astype(np.uint8))
    picture.info[TEXT_CHUNK] = text
    return picture


def _start(placement: str, ends: tuple[str, str], size: int, extent: int) -> int:
    """Where a text's box of so many pixels begins along one side, which has these two ends."""
    margin = int(size * _MARGIN)
    if placement == ends[0]:
        return max(margin, round(size / 6 - extent / 2))
    if placement == ends[1]:
        return min(size - margin - extent, round(size * 5 / 6 - extent / 2))
    return (size - extent) // 2


def _mask(
    text: str, style: Mapping[str, str], rng: np.random.Generator, largest: float, size: int, rotation: float
) -> Image.Image:
    """The text's ink in 0..255, turned and cut to its box, which is no larger than its room."""
    whole, part, place = int(size * (1 - 2 * _MARGIN)), int(size * (_REACH - _MARGIN)), style["placement"]
    room = (part if place in ("left", "right") else whole, part if place in ("top", "bottom") else whole)
    centred, choice = rng.random() < 0.5, rng.random()
    jumps = int(rng.integers(2**31))
    cos, sin = abs(math.cos(math.radians(rotation))), abs(math.sin(math.radians(rotation)))
    find = _face(style, text, choice)
    # lines cannot take up less than their length times their distance; both grow with the size of the font
    points = min(largest, math.sqrt(room[0] * room[1] / (_LEAD * max(find(100).getlength(text) / 100, 1e-6))))
    longest = min(room[0] / max(cos, 1e-6), room[1] / max(sin, 1e-6))  # a line that has room when turned
    while points >= max(size * _SMALLEST, 4):
        font = find(round(points * _FINE))
        # of a block w wide and h high the turned box is w cos + h sin wide; blocks are tried from the widest down
        for share in (1.0, 0.85, 0.7, 0.5):
            lines = wrap(text, font, longest * _FINE * share)
            width, height = max(font.getlength(line) for line in lines), len(lines) * _LEAD * points * _FINE
            if width * cos + height * sin <= room[0] * _FINE and width * sin + height * cos <= room[1] * _FINE:
                block = _block(lines, find, round(points * _FINE), centred, style["font"] == "handwritten", jumps)
                block = block.rotate(rotation, Image.Resampling.BILINEAR, expand=True).reduce(_FINE)
                box = block.getbbox()
                if box is None:  # a text of characters without ink
                    return Image.new("L", (1, 1))
                if box[2] - box[0] <= room[0] and box[3] - box[1] <= room[1]:
                    return block.crop(box)
        points *= 0.94
    raise UserError(f"a text of {len(text)} characters finds no room in {size} pixels; give a larger size")


def wrap(text: str, font: Font, width: float) -> list[str]:
    """The words of a text in lines of at most `width` pixels; a longer word has a line of its own."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _block(
    lines: list[str], find: Callable[[int], Font], points: int, centred: bool, by_hand: bool, seed: int
) -> Image.Image:
    """Lines of ink on black with room enough around them that no stroke is cut."""
    font = find(points)
    width, edge = max(font.getlength(line) for line in lines), 2 * points
    image = Image.new("L", (math.ceil(width + 2 * edge), math.ceil(len(lines) * _LEAD * points + 2 * edge)))
    draw = ImageDraw.Draw(image)
    rng = np.random.default_rng(seed)
    for row, line in enumerate(lines):
        x = edge + ((width - font.getlength(line)) / 2 if centred else 0)
        y = edge + row * _LEAD * points
        if not by_hand:
            draw.text((x, y), line, 255, font)
            continue
        slope = rng.uniform(-0.015, 0.015)
        for k, letter in enumerate(line):
            along, jump = font.getlength(line[:k]), rng.uniform(-0.05, 0.05) * points
            other = find(round(points * rng.uniform(0.88, 1.06)))
            draw.text((x + along, y + points + slope * along + jump), letter, 255, other, anchor="ls")
    return image


def _face(style: Mapping[str, str], text: str, choice: float) -> Callable[[int], Font]:
    """The face of a style as a function of the size in pixels; another of our own where it lacks a character of the text."""
    names = _FACES[style["font"]][STYLES["weight"].index(style["weight"])].split()
    first = int(choice * len(names))
    bold = "-Bold" if style["weight"] == "bold" else ""
    for name in (*names[first:], *names[:first], f"DejaVuSans{bold}"):  # the last has the most characters
        if all(c.isspace() or _shows(name, c) for c in set(text)):
            return functools.partial(_font, name)
    raise UserError(f"no font at hand shows {text!r:.120}; take the text off the list")


@functools.lru_cache(maxsize=256)
def _font(name: str, points: int) -> Font:
    # letters as they are, without ligatures, so that it does not matter what Pillow was built with
    if name == "Pillow":
        return ImageFont.load_default(points)  # type: ignore[return-value]  # Pillow's wheels have FreeType
    import matplotlib  # late: most who import this draw nothing

    file = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf")
    return ImageFont.truetype(file, points, layout_engine=ImageFont.Layout.BASIC)


@functools.lru_cache(maxsize=4096)
def _shows(name: str, character: str) -> bool:
    """Whether a face has a character: one it lacks is drawn as one that no face has."""
    font = _font(name, 24)
    return bytes(font.getmask(character)) != bytes(font.getmask("\U0010fffe"))


def _surface(material: str, ink: np.ndarray, texture: bool, size: int, rng: np.random.Generator) -> np.ndarray:
    """float32 [size, size, 3] in 0..255: the shade further from the ink, perhaps with the material's texture."""
    shade = max(_SHADES[material], key=lambda c: abs(float(np.dot((0.299, 0.587, 0.114), c - ink))))
    pixels = np.broadcast_to(np.asarray(shade, np.float32), (size, size, 3))
    return (pixels + _texture(material, size, rng)[:, :, None]).astype(np.float32) if texture else pixels


def _texture(material: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """Differences of brightness [size, size]."""

    def clouds(rows: int, columns: int = 0) -> np.ndarray:
        """Smooth noise of unit deviation from a grid."""
        grid = Image.fromarray(rng.standard_normal((rows, columns or rows)).astype(np.float32))
        found = np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC))
        return found / (found.std() + 1e-6)

    y, x = np.mgrid[:size, :size]
    if material == "paper":
        return 4 * clouds(6) + 3 * clouds(size // 2)
    if material == "wood":
        rings = np.sin(2 * math.pi * (14 * np.linspace(0, 1, size)[:, None] + 0.7 * clouds(5, 3)))
        return 6 * rings + 4 * clouds(size // 2, 6)
    if material == "stone":
        return sum((6.0 / (k + 1) * clouds(n) for k, n in enumerate((6, 24, 96))), np.zeros((size, size)))
    if material == "metal":
        sheen = 8 * np.sin(np.linspace(0, 2 * math.pi, size) + rng.uniform(0, 6))[None]
        return sheen + 4 * clouds(size, 8)
    if material == "cloth":
        return 3 * (np.sin(x * (2 * math.pi / 6)) + np.sin(y * (2 * math.pi / 6))) + 5 * clouds(4)
    high, wide, mortar = size // 10, size // 5, max(size // 128, 1)
    row = y // high
    shifted = x + (row % 2) * (wide // 2)
    tint = rng.uniform(-6, 6, (row.max() + 1, shifted.max() // wide + 1))
    bricks = np.where((y % high < mortar) | (shifted % wide < mortar), 16, tint[row, shifted // wide])
    return bricks + 3 * clouds(size // 3)
