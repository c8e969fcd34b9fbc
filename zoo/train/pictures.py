"""Pictures of a run and of `zoo sample`: arrays as PNG files, and many of them on one captioned sheet."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from zoo import paths
from zoo.errors import UserError
from zoo.paths import Folder

_PAGE, _INK, _NAN = (244, 244, 244), (40, 40, 40), (255, 0, 255)
_PAD, _FONT, _CAPTION = 4, 12, 16  # pixels: between pictures, letter height, room for one line of caption
_SIDE = 64  # pixels: pictures smaller than this are enlarged on a sheet


def _pixels(images: Any) -> np.ndarray:
    """Images [N, H, W, C] in [-1, 1] to uint8 [N, H, W', 3]; raises UserError for another shape or for integers."""
    x = np.asarray(images)
    if x.ndim != 4 or 0 in x.shape or np.issubdtype(x.dtype, np.integer):
        raise UserError(
            f"images have shape {x.shape} and type {x.dtype}; expected floats in [-1, 1] of shape [N, H, W, C]; "
            "add the missing axes, or rescale whole numbers from [0, 255]"
        )
    n, h, w, c = x.shape
    group = 3 if c % 3 == 0 else 1
    x = x.astype(np.float32).reshape(n, h, w, c // group, group).swapaxes(2, 3).reshape(n, h, w * (c // group), group)
    broken = np.isnan(x).any(-1)
    rgb = np.rint((np.clip(np.where(np.isnan(x), 0, x), -1, 1) + 1) * 127.5).astype(np.uint8)
    rgb = np.broadcast_to(rgb, (*rgb.shape[:3], 3)).copy()
    rgb[broken] = _NAN
    return rgb


def grid(
    images: Any, captions: Sequence[str] | None = None, columns: int | None = None, scale: int | None = None
) -> Image.Image:
    """One sheet of all images [N, H, W, C], floats in [-1, 1] (clipped), row by row, each above its caption.

    Grey and RGB images are shown as they are; channels in another multiple of three as RGB pictures side by side, any
    other number as grey ones. A pixel with a NaN is magenta. `columns` is about sqrt(N) and `scale` (whole-number
    enlargement, without smoothing) brings small images to about 64 pixels unless given. Too long captions are cut.
    Raises UserError for another shape.
    """
    pixels = _pixels(images)
    n = len(pixels)
    scale = scale if scale is not None else max(1, _SIDE // pixels.shape[1])
    columns = columns if columns is not None else math.ceil(math.sqrt(n))
    columns = min(columns, n)

    pixels = pixels.repeat(scale, 1).repeat(scale, 2)
    height, width = pixels.shape[1:3]
    row = height + _PAD + (_CAPTION if captions is not None else 0)
    sheet = Image.new("RGB", (_PAD + columns * (width + _PAD), _PAD + math.ceil(n / columns) * row), _PAGE)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT)
    for i, picture in enumerate(pixels):
        x, y = _PAD + i % columns * (width + _PAD), _PAD + i // columns * row
        sheet.paste(Image.fromarray(picture), (x, y))
        if captions is not None:
            text = _fit(captions[i], font, width)
            draw.text((x + width / 2, y + height + _CAPTION / 2), text, _INK, font, anchor="mm")
    return sheet


def class_name(names: Sequence[str], label: int) -> str:
    """Caption of a class number: its name where it has one, `none` for the negative "no label"."""
    return "none" if label < 0 else names[label] if label < len(names) else str(label)


def _fit(text: str, font: Any, width: float) -> str:
    """`text` on one line, cut to `width` pixels."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..." if text else ""


def png(image: Image.Image, metadata: Mapping[str, str] | None) -> bytes:
    """A PNG file whose text chunks are the metadata."""
    info = PngImagePlugin.PngInfo()
    for key, value in (metadata or {}).items():
        info.add_text(key, str(value))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def save_png(path: Folder | str, image: Any, metadata: Mapping[str, str] | None = None) -> None:
    """Writes one picture, an `Image` or an array [H, W, C] in [-1, 1], whole or not at all.

    `metadata` (seed, guidance, ...) goes into the file's text chunks: `Image.open(path).text` gives it back. The file
    is RGB; channels are treated as by `grid`. Raises UserError when it cannot be written.
    """
    if not isinstance(image, Image.Image):
        image = Image.fromarray(_pixels(np.asarray(image)[None])[0])
    paths.save(path, png(image, metadata))
