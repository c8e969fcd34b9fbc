"""One picture of what patches are, where they were and where a model thinks they were: images or series, row by row."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]

_PAGE, _CANVAS, _FRAME, _INK, _CURVE = (255, 255, 255), (236, 238, 241), (178, 184, 192), (45, 48, 54), (96, 102, 112)
_SIDE = 192  # pixels that an image is enlarged to, about
_GAP, _BLOCKS = 14, 44  # pixels between panels, between blocks of three
_HEAD, _FOOT = 34, 24  # pixels of a line of titles, of a line of figures
_BORDER = 6  # of an image's side: the part around it where rebuilt boxes may end
_BOXES = 36  # with more boxes than this, so many are outlined
_WIDE, _TALL, _LANE = 320, 110, 6  # pixels: a panel of a series, its curve, a window's mark below it
_FINE = 3  # lines of series are drawn so much larger and shrunk, which smooths them
_CURVES = 4  # channels of a series that are drawn at most
_TITLES = ("boxes", "true layout", "rebuilt from predicted relations")


def layouts(
    examples: np.ndarray, patches: np.ndarray, boxes: np.ndarray, rebuilt: np.ndarray, captions: Sequence[str]
) -> Image.Image:
    """Each example with its boxes outlined, its patches pasted where they were, and where they were rebuilt.

    Where patches overlap their mean is seen, in which those with more contrast weigh more. Four or more images stand in two
    blocks side by side.

    Args:
        examples: images [M, S, S, C] in [-1, 1], or series [M, L, C].
        patches: [M, N, P, P, C], or [M, N, P, C].
        boxes: true ones [M, N, 2, A], start and size in pixels of the example; the last axis is (x, y), or (t,).
        rebuilt: the same, in the same pixels.
        captions: figures below each rebuilt layout.
    """
    flat = examples.ndim == 3
    panels = [(_windows if flat else _tiles)(*row) for row in zip(examples, patches, boxes, rebuilt)]
    width, height = panels[0][0].size
    blocks = 2 if len(panels) >= 4 and not flat else 1
    rows = -(-len(panels) // blocks)
    block = 3 * width + 2 * _GAP
    sheet = Image.new(
        "RGB",
        (2 * _GAP + blocks * block + (blocks - 1) * _BLOCKS, _HEAD + rows * (height + _FOOT) + _GAP // 2),
        _PAGE,
    )
    draw = ImageDraw.Draw(sheet)
    titles = (f"{'series and windows' if flat else 'image and boxes'}", *_TITLES[1:])
    for b in range(blocks):
        left = _GAP + b * (block + _BLOCKS)
        for c, title in enumerate(titles):
            middle = left + c * (width + _GAP) + width / 2
            draw.text((middle, _HEAD / 2 + 1), title, _INK, _font(title, width), anchor="mm")
        for r, (three, caption) in enumerate(list(zip(panels, captions))[b * rows : (b + 1) * rows]):
            top = _HEAD + r * (height + _FOOT)
            for c, panel in enumerate(three):
                sheet.paste(panel, (left + c * (width + _GAP), top))
            middle = left + 2 * (width + _GAP) + width / 2
            draw.text((middle, top + height + _FOOT / 2 - 2), caption, _CURVE, _font(caption, width, 12), anchor="mm")
    return sheet


def _font(text: str, width: float, size: int = 15) -> Any:
    """The largest font up to `size` in which a text has room."""
    while size > 8 and ImageFont.load_default(size).getlength(text) > width:
        size -= 1
    return ImageFont.load_default(size)


def _colours(n: int) -> list[Colour]:
    """n colours; neighbours in the list are far apart."""
    found = []
    for k in range(n):
        red, green, blue = colorsys.hsv_to_rgb(k * 0.618034 % 1, (0.85, 0.6)[k % 2], (0.92, 0.8)[k // 2 % 2])
        found.append((round(255 * red), round(255 * green), round(255 * blue)))
    return found


# --- images ---------------------------------------------------------------------------------------


def rgb(pixels: np.ndarray) -> Image.Image:
    """[H, W, C] in [-1, 1] as 8 bits; other channels than three are shown as their mean."""
    grey = pixels if pixels.shape[-1] == 3 else np.repeat(pixels.mean(-1, keepdims=True), 3, -1)
    return Image.fromarray(np.rint((np.clip(grey, -1, 1) + 1) * 127.5).astype(np.uint8))


def _tiles(image: np.ndarray, patches: np.ndarray, boxes: np.ndarray, rebuilt: np.ndarray) -> list[Image.Image]:
    """Three panels of one image: with boxes, with patches where they were, with patches where they were rebuilt."""
    side = image.shape[0]
    scale = max(1, _SIDE // side)
    border = side * scale // _BORDER
    colours = _colours(len(boxes))
    contrast = patches.std((1, 2)).mean(-1)
    order = np.argsort(contrast, kind="stable").tolist()

    def corners(box: np.ndarray) -> list[int]:
        ends = np.concatenate([box[0], box[0] + box[1]]) * scale + border
        return np.rint(np.clip(ends, -(10**4), 10**4)).astype(int).tolist()

    def canvas() -> Image.Image:
        panel = Image.new("RGB", (side * scale + 2 * border,) * 2, _CANVAS)
        edge = (border - 1, border - 1, border + side * scale, border + side * scale)
        ImageDraw.Draw(panel).rectangle(edge, outline=_FRAME)
        return panel

    def outline(panel: Image.Image, places: np.ndarray, thick: int) -> None:
        draw = ImageDraw.Draw(panel)
        for k in order[-_BOXES:]:
            x, y, right, bottom = corners(places[k])
            draw.rectangle((x, y, max(right - 1, x), max(bottom - 1, y)), outline=colours[k], width=thick)

    whole = canvas()
    whole.paste(rgb(image).resize((side * scale,) * 2, Image.Resampling.NEAREST), (border, border))
    outline(whole, boxes, 2)
    weight = 0.02 + contrast / max(contrast.max(), 1e-9)
    pasted = []
    for places in (boxes, rebuilt):
        panel = canvas()
        total, share = np.zeros((panel.height, panel.width, 3)), np.zeros((panel.height, panel.width, 1))
        for k in order:
            x, y, right, bottom = corners(places[k])
            width, height = (min(max(n, 1), panel.width) for n in (right - x, bottom - y))
            tile = np.asarray(rgb(patches[k]).resize((width, height), Image.Resampling.NEAREST), np.float64)
            top, left = max(y, 0), max(x, 0)
            part = tile[top - y :, left - x :][: max(panel.height - top, 0), : max(panel.width - left, 0)]
            here = np.s_[top : top + part.shape[0], left : left + part.shape[1]]
            total[here] += weight[k] * part
            share[here] += weight[k]
        mixed = np.where(share > 0, total / np.maximum(share, 1e-9), np.asarray(panel))
        panel = Image.fromarray(np.rint(mixed).astype(np.uint8))
        outline(panel, places, 1)
        pasted.append(panel)
    return [whole, *pasted]


# --- series ---------------------------------------------------------------------------------------


def _windows(series: np.ndarray, patches: np.ndarray, boxes: np.ndarray, rebuilt: np.ndarray) -> list[Image.Image]:
    """Three panels of one series: with marks below it, its windows where they were, and where they were rebuilt."""
    length, channels = len(series), min(series.shape[1], _CURVES)
    count, colours = len(boxes), _colours(len(boxes))
    order = np.argsort(boxes[:, 0, 0]).tolist()
    lane = max(2, min(_LANE, 60 // count)) * _FINE
    wide, tall = _WIDE * _FINE, _TALL * _FINE
    border = wide / 10
    low, high = series[:, :channels].min(0), series[:, :channels].max(0)

    def across(t: np.ndarray) -> np.ndarray:
        return border + t * (wide - 2 * border) / length

    def curve(draw: ImageDraw.ImageDraw, t: np.ndarray, values: np.ndarray, colour: Colour, width: int) -> None:
        for c in range(channels):
            band = tall / channels
            level = (values[:, c] - low[c]) / max(high[c] - low[c], 1e-9)
            y = band * c + band * (0.92 - 0.84 * level)
            points = np.clip(np.stack([across(t), y], 1), -wide, 2 * wide)
            draw.line([(float(a), float(b)) for a, b in points], colour, width, joint="curve")

    def canvas() -> tuple[Image.Image, ImageDraw.ImageDraw]:
        panel = Image.new("RGB", (wide, tall + (count + 1) * lane), _CANVAS)
        draw = ImageDraw.Draw(panel)
        for t in (0, length):
            x = float(across(np.array(t)))
            draw.line([(x, 0), (x, panel.height)], _FRAME, _FINE)
        return panel, draw

    def marks(draw: ImageDraw.ImageDraw, places: np.ndarray) -> None:
        for row, k in enumerate(order):
            start, end = across(np.array([places[k, 0, 0], places[k].sum()])).clip(-wide, 2 * wide).tolist()
            top = tall + row * lane + lane // 2
            draw.rectangle((start, top, max(end, start + 1), top + lane - 2 * _FINE // 2), fill=colours[k])

    panels = []
    whole, draw = canvas()
    curve(draw, np.arange(length) + 0.5, series, _CURVE, _FINE)
    marks(draw, boxes)
    panels.append(whole)
    for places in (boxes, rebuilt):
        panel, draw = canvas()
        for k in order:
            steps = (np.arange(patches.shape[1]) + 0.5) / patches.shape[1]
            curve(draw, places[k, 0, 0] + steps * places[k, 1, 0], patches[k], colours[k], 2 * _FINE - 1)
        marks(draw, places)
        panels.append(panel)
    return [p.resize((p.width // _FINE, p.height // _FINE), Image.Resampling.LANCZOS) for p in panels]
