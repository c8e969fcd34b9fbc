"""Pictures of a text with a known share of errors: synthetic text-to-image "models", so that all else can be tested without one.

`render` draws the text of an instruction in the style that it asks for, with faults of spelling, missing and surplus words and with
attributes of style that are not followed; `plain` draws one text in one given way. Both note in the picture what they drew: `save`
writes the notes as text chunks of the PNG, from which the extractor `oracle` reads them. Faces are those that come with Pillow
and matplotlib, so a picture does not depend on the fonts of the machine. Scripts whose letters join or combine are not set rightly.
"""

from __future__ import annotations

import functools
import json
import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from msgspec import Meta
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from zoo.errors import UserError, suggest
from zoo.fields import Share, check_fields
from zoo.papers.typescore.instructions import Instruction

TEXT, STYLE, ID = (
    "typescore_text",
    "typescore_style",
    "typescore_id",
)  # keys of a picture's `info` and of its text chunks

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
"""Red, green and blue in 0..255 of the inks; any two are more than 40 apart in CIE Lab."""

# material -> its light and its dark shade; the one further from the ink is taken
_SHADES: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "paper": ((240, 234, 218), (54, 48, 44)),
    "wood": ((226, 200, 164), (62, 42, 28)),
    "stone": ((214, 214, 208), (56, 60, 64)),
    "brick": ((232, 206, 194), (82, 38, 30)),
    "metal": ((216, 222, 228), (44, 50, 58)),
    "cloth": ((228, 222, 206), (30, 36, 66)),
}

STYLES: dict[str, tuple[str, ...]] = {
    "font": ("sans-serif", "serif", "monospaced", "handwritten"),
    "colour": tuple(COLOURS),
    "weight": ("regular", "bold", "italic"),
    "case": ("capitals", "lowercase"),
    "placement": ("top", "bottom", "left", "right", "centre"),
    "material": tuple(_SHADES),
}
"""Attribute of style -> its values. A placement names the third of the picture, from top to bottom or from left to right, in which
the centre of the box around the text lies; "centre" is the middle third both ways."""

_FACES: dict[tuple[str, str], tuple[str, ...]] = {
    ("sans-serif", "regular"): ("", "DejaVuSans.ttf"),  # "" is Pillow's built-in face
    ("sans-serif", "bold"): ("DejaVuSans-Bold.ttf",),
    ("sans-serif", "italic"): ("DejaVuSans-Oblique.ttf",),
    ("serif", "regular"): ("DejaVuSerif.ttf", "STIXGeneral.ttf"),
    ("serif", "bold"): ("DejaVuSerif-Bold.ttf", "STIXGeneralBol.ttf"),
    ("serif", "italic"): ("DejaVuSerif-Italic.ttf", "STIXGeneralItalic.ttf"),
    ("monospaced", "regular"): ("DejaVuSansMono.ttf",),
    ("monospaced", "bold"): ("DejaVuSansMono-Bold.ttf",),
    ("monospaced", "italic"): ("DejaVuSansMono-Oblique.ttf",),
    # letters of these are set one by one, off the line and of uneven size
    ("handwritten", "regular"): ("",),
    ("handwritten", "bold"): ("DejaVuSans-Bold.ttf",),
    ("handwritten", "italic"): ("DejaVuSans-Oblique.ttf",),
}

_MARGIN = 0.04  # of the side: nothing is drawn nearer to the edge
_REACH = 0.56  # of the side: how far a text set at an edge may extend; its centre then lies in the outer third
_LARGEST, _SMALLEST = 0.13, 0.008  # of the side: sizes of letters that are tried, from the largest down
_FINE = 2  # letters are drawn so much larger and shrunk, which smooths them when they are turned
_LEAD = 1.3  # distance of lines in sizes of the font
# without letters that look alike in many faces (i, j, l, o, q): whether a reader saw the wrong letter must not be in doubt
_LETTERS = "abcdefghkmnprstuvwxyz"
_SURPLUS = (
    "market",
    "velvet",
    "number",
    "summer",
    "garden",
    "before",
    "Sunday",
    "studio",
    "twelve",
    "please",
    "street",
    "paper",
)


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
    gone = set(_share(len(wanted), corruption.p_drop, drop))
    letters = list(" ".join(word for i, word in enumerate(wanted) if i not in gone))
    places = [i for i, letter in enumerate(letters) if letter.isalnum()]
    chosen = set(_share(len(places), corruption.p_char, char))
    for k, i in enumerate(places):
        other = _other(
            letters[i], char.random()
        )  # drawn for all, so that those replaced do not depend on how many there are
        if k in chosen:
            letters[i] = other
    before: list[str] = []
    behind: list[str] = []
    rounding = surplus.random()
    for _ in range(math.floor(len(wanted) * corruption.p_surplus + rounding)):
        front, own, which = surplus.random(3)
        words = wanted if own < 0.5 else _SURPLUS
        (before if front < 0.3 else behind).append(words[int(which * len(words))])
    return " ".join([*before, *"".join(letters).split(), *behind])


def render(
    instruction: Instruction,
    corruption: Corruption = Corruption(),
    style_skill: float = 1.0,
    seed: int = 0,
    size: int = 512,
) -> Image.Image:
    """One picture [size, size] in RGB of the text an instruction wants, faulty as told; the same for the same arguments.

    Text, style, layout and noise are drawn from chance of their own: a change of `corruption` leaves the style, and one of
    `style_skill` the faults of the text. An attribute that is not honoured takes another value; one that the instruction does not
    ask for any. `info` (written by `save`) holds the drawn text, the honoured attributes as JSON, and the id.

    Args:
        instruction: its `text`, `style` (attribute -> value of `STYLES`; others are passed over) and `id` are read.
        corruption: shares of faulty letters and words.
        style_skill: the chance in 0..1 that each attribute asked for is honoured.
        seed: 0 or more; pictures of different ids differ with the same seed.
        size: side in pixels, 64 or more.

    Raises:
        UserError: a share, `style_skill`, `seed` or `size` out of range; a text that no font shows or that finds no room.
    """
    if not 0 <= style_skill <= 1:  # also refuses what is no number
        raise UserError(f"style_skill={style_skill}: give a number from 0 to 1")
    if not isinstance(seed, int) or seed < 0:
        raise UserError(f"seed={seed!r}: give a whole number of 0 or more")
    words, style, layout, ground = np.random.default_rng([seed, zlib.crc32(instruction.id.encode())]).spawn(4)
    text = corrupt(instruction.text, corruption, words)
    drawn = {attribute: _value(instruction.style.get(attribute), attribute, style_skill, style) for attribute in STYLES}
    if drawn["case"]:
        text = text.upper() if drawn["case"] == "capitals" else text.lower()
    picture = _draw(
        text,
        drawn,
        layout,
        ground,
        size,
        largest=size * layout.uniform(0.07, _LARGEST),
        rotation=layout.uniform(-5, 5),
        noise=layout.uniform(0, 12),
        texture=True,
    )
    asked = {k: v for k, v in instruction.style.items() if k in STYLES}
    honoured = {k: v for k, v in asked.items() if drawn[k] == v}
    picture.info |= {STYLE: json.dumps(honoured), ID: instruction.id}
    return picture


def plain(
    text: str,
    *,
    font: str = "sans-serif",
    weight: str = "regular",
    colour: str = "black",
    placement: str = "centre",
    material: str = "paper",
    points: float = 32,
    rotation: float = 0,
    noise: float = 0,
    texture: bool = False,
    size: int = 512,
    seed: int = 0,
) -> Image.Image:
    """One text drawn in one way; the plain defaults are the "clean" renders that extractors are tried on.

    Args:
        text: drawn as it is, but for line breaks at spaces.
        font: a family of `STYLES["font"]`, or a file of a font, by its path or by a name that Pillow finds among the machine's.
        weight, colour, placement, material: values of `STYLES`.
        points: size of the font in pixels; made smaller where the text has no room.
        rotation: degrees, counter-clockwise.
        noise: standard deviation of the normal noise added to the picture, in 0..255.
        texture: whether the material shows its texture, or is of one colour.
        size: side in pixels.
        seed: chooses the noise and the texture.

    Raises:
        UserError: an unknown value of style, a font that is not found, a text that finds no room.
    """
    drawn = {"font": font, "weight": weight, "colour": colour, "placement": placement, "material": material}
    for attribute, value in drawn.items():
        if value not in STYLES[attribute] and attribute != "font":
            raise UserError(f"{attribute}={value!r} is not known; {suggest(value, STYLES[attribute])}")
    if not points > 0:
        raise UserError(f"points={points}: give a size in pixels above 0")
    layout, ground = np.random.default_rng(seed).spawn(2)
    return _draw(text, drawn, layout, ground, size, points, rotation, noise, texture)


def save(picture: Image.Image, path: str | Path) -> None:
    """Writes a picture as PNG together with the notes in its `info`, which Pillow alone would leave out."""
    notes = PngImagePlugin.PngInfo()
    for key in (TEXT, STYLE, ID):
        if key in picture.info:
            notes.add_itxt(key, picture.info[key])
    picture.save(path, format="PNG", pnginfo=notes)


def save_all(
    instructions: Iterable[Instruction],
    folder: str | Path,
    corruption: Corruption = Corruption(),
    style_skill: float = 1.0,
    seed: int = 0,
    each: int = 1,
    size: int = 512,
) -> list[Path]:
    """Pictures FOLDER/{id}_{k}.png, `each` of every instruction, as an own model would leave them; k-th ones are of seed + k."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for instruction in instructions:
        for k in range(each):
            paths.append(folder / f"{instruction.id}_{k}.png")
            save(render(instruction, corruption, style_skill, seed + k, size), paths[-1])
    return paths


# --- faults ---------------------------------------------------------------------------------------


def _share(n: int, share: float, rng: np.random.Generator) -> list[int]:
    """`share` of the places 0..n-1, rounded up or down by chance; a larger share with the same generator holds a smaller one's."""
    rounding = rng.random()
    return [int(i) for i in rng.permutation(n)[: math.floor(n * share + rounding)]]


def _other(letter: str, chance: float) -> str:
    if letter.isdigit():
        return [d for d in "0123456789" if d != letter][int(chance * 9)]
    others = [x for x in _LETTERS if x != letter.casefold()]
    other = others[int(chance * len(others))]
    return other.upper() if letter.isupper() else other


def _value(asked: str | None, attribute: str, skill: float, rng: np.random.Generator) -> str:
    """What is drawn; "" for the case in which a text is written."""
    values = STYLES[attribute]
    luck, which = rng.random(2)
    if asked in values:
        if luck < skill:
            return str(asked)
        values = tuple(v for v in values if v != asked)
    elif attribute == "case":
        return ""
    elif attribute == "weight":
        return "regular"
    return values[int(which * len(values))]


# --- layout ---------------------------------------------------------------------------------------


def _draw(
    text: str,
    style: Mapping[str, str],
    layout: np.random.Generator,
    ground: np.random.Generator,
    size: int,
    largest: float,
    rotation: float,
    noise: float,
    texture: bool,
) -> Image.Image:
    """A text in a style, in the largest font up to `largest` pixels in which it has room."""
    if not isinstance(size, int) or size < 64:
        raise UserError(f"size={size!r}: give a whole number of pixels, 64 or more")
    text = " ".join(text.split())
    ink = COLOURS[style["colour"]]
    pixels = _surface(style["material"], ink, texture, size, ground)
    if text:
        room = _room(style["placement"], size)
        mask = _mask(text, style, layout, largest, size, room, rotation)
        cover = np.zeros((size, size, 1), np.float32)
        x, y = _corner(style["placement"], size, *mask.size)
        cover[y : y + mask.height, x : x + mask.width, 0] = np.asarray(mask, np.float32) / 255
        pixels = pixels * (1 - cover) + np.asarray(ink, np.float32) * cover
    pixels = pixels + noise * ground.standard_normal(pixels.shape, np.float32)
    picture = Image.fromarray(np.rint(np.clip(pixels, 0, 255)).astype(np.uint8))
    picture.info[TEXT] = text
    return picture


def _room(placement: str, size: int) -> tuple[int, int]:
    """Width and height in pixels that a text may take up."""
    whole, part = int(size * (1 - 2 * _MARGIN)), int(size * (_REACH - _MARGIN))
    return part if placement in ("left", "right") else whole, part if placement in ("top", "bottom") else whole


def _corner(placement: str, size: int, width: int, height: int) -> tuple[int, int]:
    """Where the box of a text has its upper left corner."""

    def along(extent: int, low: str, high: str) -> int:
        margin = int(size * _MARGIN)
        if placement == low:
            return max(margin, round(size / 6 - extent / 2))
        if placement == high:
            return min(size - margin - extent, round(size * 5 / 6 - extent / 2))
        return (size - extent) // 2

    return along(width, "left", "right"), along(height, "top", "bottom")


def _mask(
    text: str,
    style: Mapping[str, str],
    rng: np.random.Generator,
    largest: float,
    size: int,
    room: tuple[int, int],
    rotation: float,
) -> Image.Image:
    """The text's ink in 0..255, turned and cut to its box, which is no larger than `room`."""
    centred, choice = rng.random() < 0.5, rng.random()
    jumps = int(rng.integers(2**31))
    turn = math.radians(rotation)
    cos, sin = abs(math.cos(turn)), abs(math.sin(turn))
    find = _face(style, text, choice)
    # lines cannot take up less than their length times their distance; both grow with the size of the font
    points = min(largest, math.sqrt(room[0] * room[1] / (_LEAD * max(find(100).getlength(text) / 100, 1e-6))))
    longest = min(room[0] / max(cos, 1e-6), room[1] / max(sin, 1e-6))  # a line that has room when turned
    while points >= max(size * _SMALLEST, 4):
        font = find(round(points * _FINE))
        # of a block w wide and h high the turned box is w cos + h sin wide; blocks are tried from the widest down
        for part in (1.0, 0.85, 0.7, 0.5):
            lines = wrap(text, font, longest * _FINE * part)
            width, height = max(font.getlength(line) for line in lines), len(lines) * _LEAD * points * _FINE
            fits = width * cos + height * sin <= room[0] * _FINE and width * sin + height * cos <= room[1] * _FINE
            if fits:
                block = _block(lines, find, round(points * _FINE), centred, style["font"] == "handwritten", jumps)
                block = block.rotate(rotation, Image.Resampling.BILINEAR, expand=True).reduce(_FINE)
                box = block.getbbox()
                if box is None:  # a text of characters without ink
                    return Image.new("L", (1, 1))
                if box[2] - box[0] <= room[0] and box[3] - box[1] <= room[1]:
                    return block.crop(box)
        points *= 0.94
    raise UserError(f"a text of {len(text)} characters finds no room in a picture of {size} pixels; give a larger size")


def wrap(text: str, font: ImageFont.FreeTypeFont, width: float) -> list[str]:
    """The words of a text in lines of at most `width` pixels; a longer word has a line of its own."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _block(
    lines: list[str],
    find: Callable[[int], ImageFont.FreeTypeFont],
    points: int,
    centred: bool,
    by_hand: bool,
    seed: int,
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


# --- fonts ----------------------------------------------------------------------------------------


def _face(style: Mapping[str, str], text: str, choice: float) -> Callable[[int], ImageFont.FreeTypeFont]:
    """The face of a style as a function of the size in pixels; another of our own where it lacks a character of the text."""
    wanted = (style["font"], style["weight"])
    if wanted not in _FACES:
        name = style["font"]
        try:
            _font(name, 16)
        except OSError as error:
            raise UserError(
                f"font={name!r} is neither a file of a font nor a family; {suggest(name, STYLES['font'])}"
            ) from error
        names: tuple[str, ...] = (name,)
    else:
        names = _FACES[wanted]
        first = int(choice * len(names))
        bold = "-Bold" if style["weight"] == "bold" else ""
        names = (*names[first:], *names[:first], f"DejaVuSans{bold}.ttf")  # the last has the most characters
    lacking = ""
    for name in names:
        lacking = next((c for c in sorted(set(text)) if not c.isspace() and not _shows(name, c)), "")
        if not lacking:
            return functools.partial(_font, name)
    raise UserError(
        f"no font at hand shows {lacking!r} (U+{ord(lacking):04X}); plain(font=FILE) takes the file of one that does"
    )


@functools.lru_cache(maxsize=256)
def _font(name: str, points: int) -> ImageFont.FreeTypeFont:
    # letters as they are, without ligatures, so that it does not matter what Pillow was built with
    if not name:
        font = ImageFont.load_default(points)
        assert isinstance(font, ImageFont.FreeTypeFont), "Pillow without FreeType"
        return font
    return ImageFont.truetype(_files().get(name, name), points, layout_engine=ImageFont.Layout.BASIC)


@functools.cache
def _files() -> dict[str, str]:
    """The faces that come with matplotlib; of others Pillow looks for the name among the machine's."""
    import matplotlib  # late: most who import this draw nothing

    return {path.name: str(path) for path in Path(matplotlib.get_data_path(), "fonts", "ttf").glob("*.ttf")}


@functools.lru_cache(maxsize=4096)
def _shows(name: str, character: str) -> bool:
    """Whether a face has a character: one it lacks is drawn as one that no face has."""
    font = _font(name, 24)
    return bytes(font.getmask(character)) != bytes(font.getmask("\U0010fffe"))


# --- materials ------------------------------------------------------------------------------------


def _surface(
    material: str, ink: tuple[int, int, int], texture: bool, size: int, rng: np.random.Generator
) -> np.ndarray:
    """float32 [size, size, 3] in 0..255."""
    luma = np.asarray((0.299, 0.587, 0.114))
    shade = max(_SHADES[material], key=lambda c: abs(float(luma @ (np.asarray(c) - np.asarray(ink)))))
    pixels = np.empty((size, size, 3), np.float32)
    pixels[:] = shade
    if texture:
        pixels += _TEXTURES[material](size, rng)[:, :, None]
    return pixels


def _clouds(size: int, rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Smooth noise of unit deviation from a grid of rows x columns [size, size]."""
    grid = Image.fromarray(rng.standard_normal((max(rows, 2), max(columns, 2))).astype(np.float32))
    found = np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC))
    return found / (found.std() + 1e-6)


def _paper(size: int, rng: np.random.Generator) -> np.ndarray:
    return 4 * _clouds(size, rng, 6, 6) + 3 * _clouds(size, rng, size // 2, size // 2)


def _wood(size: int, rng: np.random.Generator) -> np.ndarray:
    y = np.linspace(0, 1, size)[:, None]
    rings = np.sin(2 * math.pi * (14 * y + 0.7 * _clouds(size, rng, 5, 3)))
    return 6 * rings + 4 * _clouds(size, rng, size // 2, 6)


def _stone(size: int, rng: np.random.Generator) -> np.ndarray:
    return sum((6.0 / (k + 1) * _clouds(size, rng, n, n) for k, n in enumerate((6, 24, 96))), np.zeros((size, size)))


def _brick(size: int, rng: np.random.Generator) -> np.ndarray:
    high, wide = size // 10, size // 5
    y, x = np.mgrid[:size, :size]
    row = y // high
    shifted = x + (row % 2) * (wide // 2)
    mortar = (y % high < max(size // 128, 1)) | (shifted % wide < max(size // 128, 1))
    tint = rng.uniform(-6, 6, (row.max() + 1, shifted.max() // wide + 1))
    return np.where(mortar, 16, tint[row, shifted // wide]) + 3 * _clouds(size, rng, size // 3, size // 3)


def _metal(size: int, rng: np.random.Generator) -> np.ndarray:
    sheen = 8 * np.sin(np.linspace(0, 2 * math.pi, size) + rng.uniform(0, 6))[None]
    return sheen + 4 * _clouds(size, rng, size, 8)


def _cloth(size: int, rng: np.random.Generator) -> np.ndarray:
    y, x = np.mgrid[:size, :size] * (2 * math.pi / 6)
    return 3 * (np.sin(x) + np.sin(y)) + 5 * _clouds(size, rng, 4, 4)


_TEXTURES: dict[str, Callable[[int, np.random.Generator], Any]] = {
    "paper": _paper,
    "wood": _wood,
    "stone": _stone,
    "brick": _brick,
    "metal": _metal,
    "cloth": _cloth,
}
