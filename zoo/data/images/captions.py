"""Captions and the shapes that go with them: aspect ratios, the size of their buckets, templates around a caption."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from zoo.data.pipeline import Around, Data, Example, Source
from zoo.data.text.vocabulary import WORDS, Vocabulary, normalise, text8
from zoo.errors import UserError, suggest

ASPECTS = ("21:9", "16:9", "3:2", "5:4", "1:1", "4:5", "2:3", "9:16", "9:21")  # width : height


def ratio(aspect: str | None) -> float:
    """Width over height of one of `ASPECTS`; None is square."""
    if aspect is None:
        return 1.0
    if aspect not in ASPECTS:
        guess = suggest(aspect, ASPECTS)
        near = f"{guess} " if guess.startswith("did") else ""
        raise UserError(f"aspect={aspect!r} is no aspect ratio of the buckets; {near}choose from {', '.join(ASPECTS)}")
    width, height = map(int, aspect.split(":"))
    return width / height


def bucket(target: int, aspect: str | None, multiple: int) -> tuple[int, int]:
    """(height, width) of about target^2 pixels in this aspect ratio, both multiples of `multiple`."""
    if target < 1 or multiple < 1:
        raise UserError(f"target={target} and multiple={multiple} make no image size; choose 1 or more for both")
    area, r = target * target, ratio(aspect)
    height, width = (round(math.sqrt(x) / multiple) * multiple for x in (area / r, area * r))
    if not height or not width:
        raise UserError(
            f"size {target} in the aspect ratio {aspect or '1:1'} leaves no multiple of {multiple}; choose a larger size"
        )
    return height, width


def nearest(width: int, height: int) -> str:
    """The aspect ratio of `ASPECTS` that an image of this size is cropped to: the nearest, ratios compared by their logarithm."""
    return min(ASPECTS, key=lambda aspect: abs(math.log(width / height) - math.log(ratio(aspect))))


def template(caption: str, *, aspect: str | None = None, noise: float | None = None, fps: int | None = None) -> str:
    """A caption as the text encoder gets it; what is None is not said. The empty caption gets the same words around it.

    Args:
      aspect: one of `ASPECTS`.
      noise: standard deviation of the noise on the latents.
      fps: frames per second of a video; 0 marks an image among videos.
    """
    if fps is not None:
        caption = f"A video with {fps} fps:\n{caption}\n" if fps > 0 else f"An image:\n{caption}\n"
    if noise is not None:
        caption = f"Noise Level {int(1000 * noise)}:\n{caption}"
    if aspect is not None:
        ratio(aspect)
        caption = f"{caption}\n in a {aspect} aspect ratio.\n"
    return caption


def chat(caption: str) -> str:
    """A caption as the question that a chat model gets."""
    return f"<start_of_turn>user\nPlease generate an image about: {caption}<end_of_turn>\n<start_of_turn>model\n"


def framed(task: Any, grid: tuple[int, int] | None, aspect: str | None = None) -> str | None:
    """The aspect ratio that a task's captions must name; None where they name none.

    Args:
        grid: rows and columns of the latents that are drawn; None: those of the task.
        aspect: that of the images, where it is known.
    """
    captions, trained = task.about.captions, task.about.grid
    if captions is None or captions.template != "aspect":
        return None
    rows, columns = grid or trained.trained
    return aspect or nearest(columns, rows)


def as_tokens(
    task: Any,
    encode: Callable[[Sequence[str], int], tuple[np.ndarray, Any]],
    texts: Sequence[str] | None,
    n: int,
    aspect: str | None,
) -> dict[str, np.ndarray]:
    """What a sampler is given for n captions: `tokens` and, where it takes them, `null_tokens` [n, S] int32; without texts
    these alone.

    Sample i has text i modulo their number.

    Args:
        encode: the tokeniser, (texts, S) -> ids [N, S] and what did not fit.
        aspect: as of `framed`.
    """
    length = task.about.captions.tokens
    found: dict[str, np.ndarray] = {}
    if "null_tokens" in task.about.conditions:
        null, _ = encode([template("", aspect=aspect)], length)
        found = {"null_tokens": np.repeat(null, n, 0)}
    if texts is not None:
        ids, _ = encode([template(text, aspect=aspect) for text in texts], length)
        found = {"tokens": ids[np.arange(n) % len(texts)], **found}
    return found


def lettered(
    vocabulary: Vocabulary, texts: Sequence[str], length: int, way: str = "give another"
) -> tuple[np.ndarray, list[int]]:
    """Captions as letters [N, length] int32, filled up with blanks, and how much of each did not fit: nothing.

    UserError, which says the `way` out, for one that is longer or has no letters.
    """
    rows = []
    for text in texts:
        ids = vocabulary.encode(vocabulary.normalise(text), f"the caption {text!r}")
        if not 0 < len(ids) <= length:
            raise UserError(f"the caption {text!r} has {len(ids)} letters, and the model takes 1 to {length}; {way}")
        rows.append(np.concatenate([ids, np.tile(vocabulary.encode(" "), length - len(ids))]).astype(np.int32))
    return np.stack(rows), [0] * len(rows)


# Captions made of classes


@dataclass(frozen=True)
class Captioned(Data):
    """Images with a caption made of their class: `tokens` int32 [S] beside `image` and `label`.

    The letters are those of text8, filled up with blanks to the length S of the task's captions.
    """

    data: Data
    words: tuple[str, ...] = WORDS  # for each class
    template: str = "a {}"  # {}: the word

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.template.count("{}") != 1 or set("{}") & set(self.template.replace("{}", "")):
            raise UserError(
                f"data.template={self.template!r} has no one place for the word; write it as {{}}, e.g. 'a {{}}'"
            )

    @property
    def place(self) -> str:
        """Where the images lie."""
        return self.data.place

    @property
    def mirrored(self) -> bool:
        """Whether a random half of the images is mirrored."""
        return self.data.mirrored

    def made_with(self) -> dict[str, str]:
        """What encoders made the images' latents. Their captions are others."""
        return {key: made for key, made in self.data.made_with().items() if key not in ("tokenizer", "template")}

    def fingerprint(self, split: str) -> str | None:
        """That of the images."""
        return self.data.fingerprint(split)

    def vocabulary(self) -> Vocabulary:
        """The letters of text8."""
        return text8()

    def source(self, split: str, spec: Mapping[str, jax.ShapeDtypeStruct] | None = None) -> _Captioned:
        """The examples of a split. UserError where a caption is longer than those of the task, or a class has no word."""
        source = self.data.source(split, spec)
        texts = [normalise(self.template.format(word)) for word in self.words]
        if not source.labels:
            raise UserError(
                f"{type(self.data).__name__} has no classes to make captions of; give data.data with labels"
            )
        if len(source.labels) > len(texts):
            raise UserError(f"data.words has {len(texts)} words for {len(source.labels)} classes; give one for each")
        longest = max(map(len, texts))
        length = spec["tokens"].shape[1] if spec and "tokens" in spec else longest
        ids, _ = lettered(text8(), texts, length, f"set task.text_tokens={longest}, or other data.words")
        return _Captioned(source, ids)


class _Captioned(Around):
    def __init__(self, source: Source, ids: np.ndarray) -> None:
        super().__init__(source)
        self._ids, self.vocabulary = ids, text8()

    def __getitem__(self, index: int) -> Example:
        example = self._source[index]
        return {**example, "tokens": self._ids[int(example["label"])]}
