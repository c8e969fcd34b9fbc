"""What a model of images takes in: pixels, or latents of a frozen autoencoder; a class, or a caption of a frozen text encoder.

A task that inherits `Inputs` has these fields, the batch that they say, and what they make of it. B examples, H x W numbers a
channel of C, T = rows x columns tokens of D = C P P numbers, S condition tokens of E numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from zoo.encoders import text as text_encoder
from zoo.encoders import vae as autoencoder
from zoo.encoders.text import T5
from zoo.encoders.vae import AutoEncoder
from zoo.errors import UserError
from zoo.fields import Below1, Side, Size, SizeOr0, check_fields
from zoo.task import Batch, Captions, Decodes, Grid, Network, Params, Reads

_EMPTY = 1  # the token that ends a caption, which is all there is of an empty one


@dataclass(frozen=True)
class Inputs:
    """Base of tasks on pixels or latents, with a class, a caption or neither."""

    latent: tuple[Side, Side] = (32, 32)  # rows and columns of what is modelled: latents, or pixels
    channels: Size = 4
    patch: Side = 1
    classes: SizeOr0 = 0  # class-conditional: a one-hot vector, with one more for "no class"
    text_tokens: SizeOr0 = 0  # S, length of a caption; 0: no captions
    text_width: Size = 2048  # E, numbers per caption token; of letters: of how many, and one more for "no caption"
    drop: Below1 = 0.1  # probability that class or caption is dropped in training
    inputs: Literal["latents", "images", "pixels"] = "latents"  # what a batch holds; images are encoded in the step
    captions: Literal["tokens", "features", "letters"] = (
        "tokens"  # what a batch holds of a caption; tokens are encoded in the step, letters need no encoder
    )
    template: Literal["plain", "aspect"] = "plain"  # whether captions name the aspect ratio, as they did in training
    vae: AutoEncoder | None = None  # held; decodes samples, and encodes images
    text: T5 | None = None  # held; encodes tokens

    def __post_init__(self) -> None:
        check_fields(self, "task.")
        vae, text = self.vae, self.text
        if any(n % self.patch for n in self.latent):
            raise UserError(
                f"task.latent={self.latent} must be two sizes that task.patch={self.patch} divides, e.g. task.latent=32,32"
            )
        if self.classes and self.text_tokens:
            raise UserError(
                f"task.classes={self.classes} and task.text_tokens={self.text_tokens}: a model is conditioned on one of them; "
                "set the other to 0"
            )
        if self.inputs == "images" and vae is None:
            raise UserError(
                "task.inputs='images' needs an autoencoder to encode them; set task.vae, or inputs='latents'"
            )
        if self.inputs == "pixels" and vae is not None:
            raise UserError("task.inputs='pixels' models the pixels themselves; leave task.vae out")
        if vae is not None and vae.latent != self.channels:
            raise UserError(
                f"task.channels={self.channels}, but the latents of task.vae have {vae.latent}; set task.channels={vae.latent}"
            )
        if text is not None and (text.tokens, text.width) != (self.text_tokens, self.text_width):
            raise UserError(
                f"task.text gives {text.tokens} x {text.width} numbers, but the task takes {self.text_tokens} x "
                f"{self.text_width}; set task.text_tokens={text.tokens} and task.text_width={text.width}"
            )
        if self.text_tokens and self.captions == "tokens" and text is None:
            raise UserError("task.captions='tokens' needs a text encoder; set task.text, or task.captions='features'")
        if self.captions == "letters" and (text is not None or self.template != "plain"):
            raise UserError(
                "task.captions='letters' are put plain, without an encoder; leave task.text and task.template out"
            )

    # --- what the house is told ---------------------------------------------------------------------

    @property
    def told(self) -> dict[str, Any]:
        """What of `About` follows from these fields: the encoders are frozen."""
        networks, captions = {}, None
        if self.vae:
            networks["vae"] = Network(self.vae, Decodes, how=autoencoder.HOW)
        if self.text:
            networks["text"] = Network(self.text, Reads, how=text_encoder.HOW)
        if self.text_tokens:
            captions = Captions(self.text_tokens, self.text.vocab if self.text else None, self.template)
        letters = self.text_width - 1 if self.text_tokens and self.captions == "letters" else None
        told = {"classes": self.classes, "conditions": self.given, "networks": networks, "captions": captions}
        return {**told, "vocabulary": letters}

    @property
    def trained_grid(self) -> Grid:
        """`About.grid` of a task that draws other shapes too."""
        return Grid(self.latent, self.factor, self.factor * self.patch)

    @property
    def rows(self) -> int:
        """Rows of tokens."""
        return self.latent[0] // self.patch

    @property
    def columns(self) -> int:
        """Columns of tokens."""
        return self.latent[1] // self.patch

    @property
    def dims(self) -> int:
        """D, numbers per token."""
        return self.channels * self.patch**2

    @property
    def prefix(self) -> int:
        """S, tokens of the condition."""
        return 1 if self.classes else self.text_tokens

    @property
    def condition_width(self) -> int:
        """E, numbers per condition token."""
        return self.classes + 1 if self.classes else self.text_width

    @property
    def factor(self) -> int:
        """Pixels a side per latent."""
        return self.vae.factor if self.vae else 1

    @property
    def given(self) -> tuple[str, ...]:
        """Keys of a batch that the sampler can be conditioned on, besides classes."""
        if not self.text_tokens:
            return ()
        both = ("text", "null_text") if self.captions == "features" else ("tokens", "null_tokens")
        return both[: 1 if self.captions == "letters" else 2]

    # --- a batch ------------------------------------------------------------------------------------

    def spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        """What `inputs` and `captions` say.

        `latent` and `latent_std` [B, H, W, C] (mean and spread of the autoencoder's posterior, scaled), or `image`
        [B, S, S, C] in [-1, 1]; `label` [B]; `tokens` and `null_tokens` [B, S], or `text` and `null_text` [B, S, E]: the
        caption, and what stands for its absence.
        """

        def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((batch, *shape), dtype)

        height, width = (n * self.factor for n in self.latent)
        if self.inputs == "latents":
            spec = {key: array(*self.latent, self.channels) for key in ("latent", "latent_std")}
        else:
            spec = {"image": array(height, width, self.vae.channels if self.vae else self.channels)}
        if self.classes:
            spec["label"] = array(dtype=jnp.int32)
        for key in self.given:
            if self.captions == "features":
                spec[key] = array(self.text_tokens, self.text_width)
            else:
                spec[key] = array(self.text_tokens, dtype=jnp.int32)
        return spec

    def encoders(self, rng: jax.Array) -> Params:
        """Fresh parameters of the encoders, `vae` and `text`, where there are any."""
        one, two = jax.random.split(rng)
        params: Params = {"vae": self.vae.init(one)} if self.vae else {}
        return {**params, "text": self.text.init(two)} if self.text else params

    def posterior(self, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array | None]:
        """Mean and standard deviation of the autoencoder's posterior [B, H, W, C]; of pixels, and of latents without it, None."""
        if self.inputs == "pixels":
            return batch["image"], None
        if self.inputs == "images":
            assert self.vae is not None
            return jax.lax.stop_gradient(self.vae.encode(params["vae"], batch["image"]))
        return batch["latent"], batch.get("latent_std")

    def clean(self, params: Params, batch: Batch, rng: jax.Array) -> jax.Array:
        """What is modelled before noise is added [B, H, W, C]: a draw from the autoencoder's posterior, or the pixels.

        Args:
            rng: one key, or one for each example.
        """
        mean, std = self.posterior(params, batch)
        if std is None:
            return mean
        if not jnp.ndim(rng):
            return mean + std * jax.random.normal(rng, mean.shape)
        return mean + std * jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(rng)

    def conditions(self, params: Params, batch: Batch, drop: jax.Array | None = None) -> jax.Array | None:
        """The condition tokens [B, S, E]: one-hot classes or letters, or the features of captions; None for an unconditional model.

        Examples without `label`, `tokens` or `text` get what stands for none.

        Args:
            drop: bool [B], of whom class or caption is dropped.
        """
        if not self.prefix:
            return None
        rows = next(iter(batch.values())).shape[0]
        drop = jnp.zeros(rows, bool) if drop is None else drop
        if self.classes:
            label = batch.get("label", jnp.full(rows, -1))
            known = jnp.where(drop | (label < 0), self.classes, label)
            return jax.nn.one_hot(known, self.classes + 1)[:, None]
        if self.captions == "features":
            if "null_text" not in batch:
                raise UserError(
                    "task.captions='features': what stands for no caption is not known without `null_text`; give it, or "
                    "use a model with captions='tokens'"
                )
            null = batch["null_text"]
            return jnp.where(drop[:, None, None], null, batch.get("text", null))
        if self.captions == "letters":
            none = jnp.full((rows, self.text_tokens), self.text_width - 1)
            return jax.nn.one_hot(jnp.where(drop[:, None], none, batch.get("tokens", none)), self.text_width)
        assert self.text is not None
        empty = jnp.zeros((rows, self.text_tokens), jnp.int32).at[:, 0].set(_EMPTY)
        null = batch.get("null_tokens", empty)
        known = jnp.where(drop[:, None], null, batch.get("tokens", null))
        return jax.lax.stop_gradient(self.text.encode(params["text"], known))

    def asked(self, conditions: Batch | None) -> bool:
        """Whether conditions hold a class or a caption, and not only what stands for none."""
        return bool({"label", "tokens", "text"} & set(conditions or {}))

    def drawn(self, params: Params, x: jax.Array, conditions: Batch | None) -> dict[str, jax.Array]:
        """Of samples x [n, H, W, C] what a sampler gives: `latent`, `image` clipped to [-1, 1], and `label` where given.

        A model of pixels gives `image` alone, one of latents without an autoencoder `latent` alone. NaN where x overflowed.
        """
        drawn = {} if self.inputs == "pixels" else {"latent": x}
        if self.inputs == "pixels" or self.vae:
            image = self.vae.decode(params["vae"], x) if self.vae else x
            drawn["image"] = jnp.where(jnp.isfinite(image), jnp.clip(image, -1, 1), jnp.nan)
        label = (conditions or {}).get("label") if self.classes else None
        return drawn if label is None else {**drawn, "label": label}
