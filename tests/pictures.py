"""Draws the samples that README.md and the papers' pages show, from the weights that come with the package.

python tests/pictures.py    # configs/samples.png, a row for each model; configs/PAPER/samples.png, a sheet of one
"""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import zoo
from zoo.diffusion.solvers import UniPC

CONFIGS = Path(__file__).parent.parent / "configs"
# of the strip: shipped model, options of its sampler
STRIP: dict[str, dict[str, Any]] = {
    "tarflow-digits": {},
    "itarflow-digits": {"level": 0.35, "nfe": 10},
    "edm-digits": {"guidance": 1.0},
    "dart-digits": {"guidance": 1.0},
    "energy-digits": {"solver": UniPC(), "nfe": 17},
}
SHEETS = ("tarflow-digits", "energy-digits")
SCALE, GAP, LABEL, COLUMNS = 4, 4, 96, 20


def tiles(images: np.ndarray) -> Image.Image:
    """A picture [N, H, W, 1] in [-1, 1], COLUMNS to a row, on a white page."""
    _, height, width, _ = images.shape
    grey = np.asarray((images[..., 0].clip(-1, 1) + 1) * 127.5, np.uint8).repeat(SCALE, 1).repeat(SCALE, 2)
    high, wide = height * SCALE + GAP, width * SCALE + GAP
    page = Image.new("L", (COLUMNS * wide, -(-len(grey) // COLUMNS) * high), 255)
    for i, tile in enumerate(grey):
        page.paste(Image.fromarray(tile), (i % COLUMNS * wide, i // COLUMNS * high))
    return page


def main() -> None:
    rows = {}
    for name, options in STRIP.items():
        images = np.asarray(zoo.load(name).sample(4 * COLUMNS, seed=0, **options)["image"])
        rows[name] = tiles(images[:COLUMNS])
        if name in SHEETS:
            tiles(images).save(CONFIGS / name.partition("-")[0] / "samples.png", optimize=True)
    high = max(row.height for row in rows.values())
    strip = Image.new("L", (LABEL + max(row.width for row in rows.values()), len(rows) * high), 255)
    draw, font = ImageDraw.Draw(strip), ImageFont.load_default(13)
    for i, (name, row) in enumerate(rows.items()):
        draw.text((0, i * high + high // 2), name, fill=0, font=font, anchor="lm")
        strip.paste(row, (LABEL, i * high))
    strip.save(CONFIGS / "samples.png", optimize=True)


if __name__ == "__main__":
    main()
