"""What one run takes from another besides weights: its samples as data, its classifier as a reward."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import jax
import numpy as np

from zoo import config, dist, files, models, paths, weights
from zoo.data.documents import SPLITS, cuts
from zoo.data.pipeline import Data
from zoo.data.text.tokens import TokenSource, check_split, narrowest
from zoo.data.text.vocabulary import Vocabulary
from zoo.errors import UserError
from zoo.fields import Below1, Count, NotEmpty, Seed, Whole
from zoo.files import sha256, sha256_of_json
from zoo.models import Model
from zoo.rewards import Reward
from zoo.task import Classifies, Options, Samples, call, check_needs, is_text, options_of

SpecOf = Mapping[str, jax.ShapeDtypeStruct]


@lru_cache(maxsize=2)
def _opened(name: str) -> Model:
    """A model with its weights on the host, so that they follow whatever mesh is in use."""
    model = models.open_model(name, on_host=True)
    if not is_text(model.task):
        raise UserError(
            f"run={name}: {type(model.task).__name__} models {', '.join(model.task.spec(1))}; name a model of texts"
        )
    return model


def _alone() -> AbstractContextManager[Any]:
    """On one device: the same on every host, whatever its mesh."""
    return dist.use(dist.Mesh(data=1).build(jax.local_devices()[:1]), None)


# --- samples as data ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampled(Data):
    """Texts that a run or export draws, as `zoo sample` does with the same seed.

    They are drawn once and kept: in `drawn/` of the run folder, those of an export in `drawn/` here. The last ones are those
    of testing. Samples that overflowed are left out.
    """

    run: NotEmpty
    n: Count = 4_096
    seed: Seed = 0
    options: Options = field(default_factory=dict)  # of the run's sampler
    test_fraction: Below1 = 0.05

    @property
    def place(self) -> str:
        """The run."""
        return self.run

    def vocabulary(self) -> Vocabulary | None:
        """That of the run."""
        return _opened(self.run).vocabulary

    def fingerprint(self, split: str) -> str:
        """What the texts of a split are."""
        return sha256(np.ascontiguousarray(self._split(split)).data)

    def source(self, split: str, spec: SpecOf | None = None) -> TokenSource:
        """The texts of a split. UserError for a task of texts of another length."""
        tokens, vocabulary = self._split(split), self.vocabulary()
        length = None if spec is None or "tokens" not in spec else spec["tokens"].shape[1]
        if length != tokens.shape[1]:
            raise UserError(
                f"data.run={self.run} draws texts of {tokens.shape[1]} tokens; set task.length={tokens.shape[1]}"
            )
        if vocabulary is None:
            raise UserError(f"data.run={self.run} has no vocabulary.json; copy it there from the folder of the run")
        if not len(tokens):
            raise UserError(
                f"data.n={self.n} leaves no {split} texts; give more, a larger data.test_fraction, or another split"
            )
        flat = tokens.reshape(-1)
        return TokenSource(flat, tokens.shape[1], vocabulary, len(vocabulary.decode(flat)), f"data.run={self.run}")

    def _split(self, split: str) -> np.ndarray:
        check_split(split)
        tokens = _drawn(self.run, self.n, self.seed, json.dumps(config.dump(self.options), sort_keys=True))
        ends = (0, *cuts(np.arange(1, len(tokens) + 1), 0.0, self.test_fraction), len(tokens))
        i = SPLITS.index(split)
        return tokens[ends[i] : ends[i + 1]]


@lru_cache(maxsize=2)
def _drawn(run: str, n: int, seed: int, options: str) -> np.ndarray:
    """Tokens [N, T] that a model has drawn or now draws."""
    model = _opened(run)
    check_needs(model.task, (Samples,), f"data.run={run}")
    asked = config.undump(json.loads(options))
    options_of(model.task, asked, "data.options")
    about = {"n": n, "seed": seed, "options": options, "weights": weights.digest(model.params, repr(model.task))}
    path = model.samples_folder.parent / "drawn" / f"{sha256_of_json(about)[:16]}.npy"
    try:
        with paths.sentence(path):
            return np.load(io.BytesIO(path.read_bytes()))
    except FileNotFoundError:
        pass
    with _alone():
        drawn = model.sample(n, seed, **asked)["tokens"]
    tokens = drawn[(drawn >= 0).all(1)].astype(narrowest(model.task.about.vocabulary or int(drawn.max()) + 1))
    with io.BytesIO() as file, files.writing(path, "give the folder to this user, or copy the run"):
        np.save(file, tokens)
        paths.write(path, file.getvalue())
    return tokens


# --- a classifier as a reward ---------------------------------------------------------------------


@dataclass(frozen=True)
class Classifier(Reward):
    """log p(class | text) of a run or export that has `logits`; of one with a single logit, as a model of rewards is, that logit."""

    name = "classifier"

    run: NotEmpty
    label: Whole = 0
    batch: Count = 256  # texts at once

    def check(self, vocabulary: Any, length: int) -> None:
        """UserError for a model that classifies no texts of this length and vocabulary."""
        model = _opened(self.run)
        check_needs(model.task, (Classifies,), f"reward.run={self.run}")
        spec, known = model.task.spec(1), model.vocabulary
        if spec["tokens"].shape[1] != length or (known and vocabulary and known != vocabulary):
            raise UserError(
                f"reward.run={self.run} reads texts of {spec['tokens'].shape[1]} tokens of {known}, and these have {length} of "
                f"{vocabulary}; name a classifier of such texts"
            )
        classes = jax.eval_shape(partial(call, model.task, "logits"), model.params, {"tokens": spec["tokens"]}).shape[1]
        if self.label >= classes:
            raise UserError(
                f"reward.label={self.label}: reward.run={self.run} has classes 0 to {classes - 1}; choose one"
            )

    def __call__(self, tokens: np.ndarray) -> np.ndarray:
        model, found = _opened(self.run), []
        logits = _logits(self.run)
        for first in range(0, len(tokens), self.batch):
            part = np.resize(tokens[first : first + self.batch], (self.batch, tokens.shape[1]))  # one compiled shape
            with _alone():
                found.append(np.asarray(logits(model.params, {"tokens": part}), np.float32))
        values = np.concatenate(found)[: len(tokens)]
        return values[:, 0] if values.shape[1] == 1 else np.asarray(jax.nn.log_softmax(values))[:, self.label]


@lru_cache(maxsize=2)
def _logits(run: str) -> Any:
    return jax.jit(partial(call, _opened(run).task, "logits"))
