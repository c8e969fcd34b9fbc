"""Images drawn from a list of prompts and scored: how well a text-to-image model does what it is asked for.

What is asked for and how images are scored is a scorer's own matter. While a run trains it is looked at
every so many steps, so the list and the scorer are those of the finished model from the first look on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, runtime_checkable

import jax
import numpy as np
from PIL import Image

from zoo import hosts
from zoo.data.images.captions import as_tokens, framed
from zoo.errors import UserError
from zoo.fields import Count, Whole
from zoo.metrics.drawing import rgb
from zoo.metrics.samples import drawer, image_shape
from zoo.task import Metric, Options, Params, Samples, options_of

Encode: TypeAlias = Callable[[Sequence[str], int], tuple[np.ndarray, Any]]  # (texts, S) -> ids [N, S], what did not fit


@runtime_checkable
class Scorer(Protocol):
    """What knows the prompts and judges the images."""

    def check(self) -> None:
        """UserError when it could score nothing: a package, a file, a key is missing."""
        ...

    def prompts(self) -> dict[str, str]:
        """Texts by id; never empty."""
        ...

    def score(self, images: Mapping[str, Sequence[Image.Image]]) -> dict[str, Any]:
        """Figures of the images drawn from each prompt, by its id: always of the same names, NaN where there is none.

        Under `failed` the number of images that could not be judged.
        """
        ...


@dataclass(frozen=True)
class Prompted(Metric):
    """The figures that a scorer gives images of its prompts; for tasks whose captions are tokens or letters."""

    scorer: Any = None  # a paper's; a config sets it
    images: Count = 1  # of each prompt
    options: Options = field(default_factory=dict)  # of the task's `sample`
    tokenizer: str = ""  # file of the tokeniser; empty: the one beside the model or its text encoder
    batch: Count = 16  # images drawn at once
    every: Whole = 0  # steps between measurements while training; 0: at the end only

    name = "prompted"
    needs = (Samples,)
    captions = True
    uses_data = False

    def check(self, task: Any) -> None:
        """UserError where nothing could be drawn or scored; asked before a run's first step."""
        self._check(task)
        given = {key: leaf for key, leaf in task.spec(self.batch).items() if key in task.about.conditions}
        if image_shape(task, self.options, self.batch, given) is None:
            raise UserError(
                f"the metric prompted scores images, and {type(task).__name__} draws none; give a task that holds an "
                "autoencoder, task.vae"
            )
        self.scorer.check()

    def _check(self, task: Any) -> None:
        if not isinstance(self.scorer, Scorer):
            raise UserError(
                "the metric prompted has no scorer, which knows the prompts and judges the images; name one in a config "
                "file, config = Prompted(SCORER)"
            )
        kind, given = type(task).__name__, task.about.conditions
        if "text" in given:
            raise UserError(
                f"the metric prompted writes captions, and this {kind} takes stored features of them "
                "(task.captions='features'); give it a text encoder, task.text and captions='tokens'"
            )
        if "tokens" not in given:
            raise UserError(f"the metric prompted needs a task that takes captions, and this {kind} takes none")
        options_of(task, self.options, "options of the metric prompted")

    def check_captions(self, task: Any, encode: Encode) -> None:
        """UserError for a prompt that letters do not spell, or not in so many."""
        self._conditions(task, encode, list(self.scorer.prompts().values()))

    def _conditions(self, task: Any, encode: Encode, texts: Sequence[str]) -> dict[str, np.ndarray]:
        return as_tokens(task, encode, texts, len(texts), framed(task, self.options.get("grid")))

    def __call__(self, task: Any, params: Params, data: Any, rng: jax.Array, encode: Encode) -> dict[str, Any]:
        """What the scorer measures. Sample i depends on (rng, i) and its prompt alone; those not finite are left out.

        Among several processes all draw and process 0 scores.

        Args:
            encode: what makes numbers of captions.
        """
        self._check(task)
        prompts = self.scorer.prompts()
        ids = [one for one in prompts for _ in range(self.images)]
        texts = [prompts[one] for one in ids]
        conditions = self._conditions(task, encode, texts)
        batches = drawer(task, self.options).batches(
            params, rng, len(texts), self.batch, lambda rows: {k: x[rows % len(texts)] for k, x in conditions.items()}
        )
        pixels = np.concatenate([drawn for drawn, *_ in batches])
        good = np.isfinite(pixels).all((1, 2, 3))
        images: dict[str, list[Image.Image]] = {one: [] for one in prompts}
        for one, image, fine in zip(ids, pixels, good):
            if fine:
                images[one].append(rgb(image))
        scored = hosts.run_on_main(lambda: self.scorer.score({one: some for one, some in images.items() if some}))
        figures: dict[str, Any] = hosts.broadcast_from_main(lambda: scored)
        return {**figures, "prompted_images": len(pixels), "prompted_left_out": int((~good).sum())}
