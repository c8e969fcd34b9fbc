"""`zoo prepare latents`: images and captions through frozen networks, once, into a set of latents."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zoo import config, dist, models, weights
from zoo.data.images.latents import encode_set
from zoo.data.prepare import Report
from zoo.encoders import text as text_encoder
from zoo.encoders import vae as autoencoder
from zoo.encoders.tokenizer import NAME, digest, held
from zoo.errors import UserError
from zoo.task import Decodes, Params, Reads

_log = logging.getLogger("zoo")
_FREE = ("class", "scale", "kl", "scan", "remat", "attention")  # scale is told by itself, the others change no latents
_HOW = {"vae": autoencoder.HOW, "text": text_encoder.HOW}  # to come by one
_BATCH, _SIDE = 64, 256  # images of this side that are encoded at a time
_SHOWN = 5  # captions that are cut off, each with a line of its own


def batch_for(size: int) -> int:
    """How many images are encoded at a time where nobody says: 64 of up to 256 pixels a side, as many pixels of larger ones."""
    return _BATCH if size <= _SIDE else max(1, _BATCH * _SIDE**2 // size**2)


def encode(
    source: str,
    dest: str,
    *,
    vae: str,
    size: int,
    text: str | None = None,
    features: bool = False,
    tokenizer: str | None = None,
    batch: int,
    multiple: int | None = None,
    raw: bool = False,
    allow: Sequence[str] = (),
    **options: Any,
) -> Report:
    """Opens the encoders and writes the set; `options` are those of `encode_set`.

    Args:
        vae: the model of the autoencoder.
        text: that of the text encoder; None: captions are left out.
        features: keep the features of captions, not their tokens alone.
        tokenizer: file of the tokeniser; None: `spiece.model` in the folder of the text encoder.
        batch: images at a time.
        multiple: what divides the sides of all images; None: the autoencoder's factor, of which it must be a multiple.

    Raises:
        UserError: a model that is missing or no encoder, and what `encode_set` refuses.
    """
    reader = None if text is None else _Text(text, features, tokenizer, batch, raw, allow)
    networks = Networks(_Vae(vae, batch, raw, allow), reader)
    task = networks.vae.task
    multiple = task.factor if multiple is None else multiple
    if multiple % task.factor:
        raise UserError(
            f"multiple={multiple} is no multiple of {task.factor}, by which the autoencoder shrinks images; give {task.factor} "
            f"times the patch of the model, e.g. multiple={2 * task.factor}"
        )
    report = encode_set(
        source, dest, networks, size=size, batch=batch, multiple=multiple, channels=task.channels, **options
    )
    if reader is not None and reader.cut:
        _log.warning("%d captions were longer than the %d tokens that are kept of each", reader.cut, reader.length)
    return report


class Networks:
    """The encoders as `zoo.data.images.latents` wants them."""

    def __init__(self, vae: _Vae, text: _Text | None) -> None:
        self.vae, self._text = vae, text
        self.about = {**vae.about, **(text.about if text is not None else {})}

    def latents(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [N, H, W, C] -> scaled mean and standard deviation, float32 [N, h, w, c] each."""
        mean, std = self.vae.net(images)
        return np.asarray(mean, np.float32), np.asarray(std, np.float32)

    def text(self, captions: Sequence[str]) -> dict[str, np.ndarray] | None:
        """`tokens` int32 [N, S], and `text` features float32 [N, S, E] where they are kept."""
        return None if self._text is None else self._text(captions)


class _Net:
    """A function of parameters and a batch, compiled once per shape, on all devices here that share the batch evenly."""

    def __init__(self, function: Any, params: Params, batch: int) -> None:
        self._mesh, self._params = dist.spread(params, batch)
        self._function = jax.jit(function)

    def __call__(self, rows: np.ndarray) -> Any:
        with dist.use(self._mesh):
            return jax.device_get(self._function(self._params, jax.device_put(rows, dist.batch_sharding(self._mesh))))


class _Vae:
    """An autoencoder: a task with `encode`, `factor`, `channels` and `scale`, or one that has such a task as `vae`.

    Of the latter, parameters lie under `vae`, or at the top level where the task is about the autoencoder itself.
    """

    def __init__(self, name: str, batch: int, raw: bool, allow: Sequence[str]) -> None:
        _find("vae", name)
        model = models.open_model(name, raw=raw, allow=allow)
        task, params = model.task, model.params
        if not isinstance(task, Decodes):
            inside = [network.task for network in task.about.networks.values() if isinstance(network.task, Decodes)]
            task, params = inside[0] if inside else task, params.get("vae", params)
        if not isinstance(task, Decodes):
            raise UserError(f"vae={name}: {type(model.task).__name__} is no autoencoder; {_HOW['vae']}")
        self.task = task
        scale = None if task.scale is None else float(task.scale)
        params = weights.encoding(params)  # what decodes need not lie on the devices
        self.about = {"vae": weights.encoder_digest(params), "vae_scale": str(scale), "vae_sizes": _sizes(task)}
        self.net = _Net(lambda p, image: task.encode(p, image.astype(jnp.float32) / 127.5 - 1), params, batch)


class _Text:
    """A tokeniser and, where features are kept, the network behind it: a task with `tokens` and `encode`."""

    def __init__(
        self, name: str, features: bool, tokenizer: str | None, batch: int, raw: bool, allow: Sequence[str]
    ) -> None:
        _find("text", name)
        task, folder = models.open_task(name, allow)
        if not isinstance(task, Reads):
            raise UserError(f"text={name}: {type(task).__name__} is no text encoder; {_HOW['text']}")
        file = Path(tokenizer) if tokenizer is not None else None
        if file is None and isinstance(folder, Path) and held(folder):
            file = folder / NAME
        if file is None:
            raise UserError(
                f"{folder} holds no {NAME}, which makes tokens of captions; copy it there from where the text encoder is "
                "published, or give it with tokenizer=FILE"
            )
        from zoo.encoders.tokenizer import Tokenizer

        self._tokenizer = Tokenizer(file)
        self._tokenizer.check(task.vocab)
        self.length, self.cut = int(task.tokens), 0
        self.about = {
            "window": str(self.length),
            "tokenizer": digest(file),
        }
        self._net: _Net | None = None
        if features:  # else the tokens say all, and the network, which may be large, is not even opened
            params = models.open_model(name, raw=raw, allow=allow).params
            self.about |= {"text": weights.encoder_digest(params), "text_sizes": _sizes(task)}
            self._net = _Net(task.encode, params, batch)

    def __call__(self, captions: Sequence[str]) -> dict[str, np.ndarray]:
        with _few_lines(_SHOWN if not self.cut else 0):
            tokens, lost = self._tokenizer(captions, self.length)
        self.cut += len({caption for caption, n in zip(captions, lost) if n})  # the last one may be there to fill up
        if self._net is None:
            return {"tokens": tokens}
        return {"tokens": tokens, "text": np.asarray(self._net(tokens), np.float32)}


@contextmanager
def _few_lines(most: int) -> Iterator[None]:
    """Lets the tokeniser warn of a few captions: it may be of millions."""
    left = [most]

    def passes(record: logging.LogRecord) -> bool:
        left[0] -= record.module == "tokenizer"
        return record.module != "tokenizer" or left[0] >= 0

    _log.addFilter(passes)
    try:
        yield
    finally:
        _log.removeFilter(passes)


def _sizes(task: Any) -> str:
    """The fields of an encoder's task that decide its numbers, some of which (groups, heads) its weights do not tell."""
    described = config.dump(task)
    # what is off is not named, so that a field which comes later changes no set that is there
    kept = {key: value for key, value in described.items() if key not in _FREE and value is not False and value != []}
    return ", ".join(f"{key}={value}" for key, value in sorted(kept.items()))


def _find(kind: str, name: str) -> None:
    """UserError with the way to get a model that is not there."""
    try:
        models.locate(name)
    except UserError as error:
        raise UserError(f"{kind}={name}: {error}; {_HOW[kind]}") from None
