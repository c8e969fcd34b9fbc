"""Images of prompts go to a scorer under the prompt they were drawn from."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from mistakes import told

from zoo import models
from zoo.data.images import Digits
from zoo.data.images.captions import Captioned
from zoo.data.text.vocabulary import characters
from zoo.errors import UserError
from zoo.metrics.prompted import Prompted
from zoo.task import About, Captions, Grid


@dataclass(frozen=True)
class Shape:
    grid: tuple[int, int] | None = None


@dataclass(frozen=True)
class Draws:
    """Grey images whose first pixel is the first token, the others noise; not finite where that token is 9."""

    given: tuple[str, ...] = ("tokens", "null_tokens")
    template: str = "plain"
    latent: tuple[int, int] = (2, 2)
    channels: int = 1
    image: bool = True
    letters: int | None = None

    Sampling = Shape

    @property
    def about(self):
        captions = Captions(3, None, self.template)
        return About(conditions=self.given, captions=captions, grid=Grid(self.latent), vocabulary=self.letters)

    def spec(self, batch):
        return {key: jax.ShapeDtypeStruct((batch, 3), jnp.int32) for key in self.given}

    def init(self, rng):
        return {"shift": jnp.zeros(())}

    def sample(self, params, rng, n, conditions=None, options=None):
        tokens = conditions["tokens"]
        noise = jax.vmap(lambda key: jax.random.uniform(key, (4, 4, self.channels)))(rng)
        first = tokens[:, 0, None] / 100.0 + params["shift"]
        image = noise.at[:, 0, 0].set(jnp.where(tokens[:, 0, None] == 9, jnp.nan, first))
        return {"image": image} if self.image else {"latent": image}


@dataclass(frozen=True)
class Notes:
    """Keeps what it is given."""

    asked: dict[str, str]
    seen: list[Any] = field(default_factory=list)
    missing: str = ""

    def check(self):
        if self.missing:
            raise UserError(self.missing)

    def prompts(self):
        return self.asked

    def score(self, images):
        self.seen.append({one: [np.asarray(p) for p in some] for one, some in images.items()})
        return {"count": sum(map(len, images.values()))}


def encode(texts, length):
    """Ids of a text: its number, or 0 for the empty one."""
    return np.array([[int(t or 0)] + [0] * (length - 1) for t in texts], np.int32), None


def measured(scorer, task=Draws(), seed=0, **fields):
    metric = Prompted(scorer, **fields)
    return metric(task, {"shift": jnp.zeros(())}, None, jax.random.key(seed), encode=encode)


def test_every_image_is_of_its_prompt_and_does_not_depend_on_the_batch():
    scorer = Notes({"a": "40", "b": "80", "c": "20"})
    found = [measured(scorer, images=2, batch=batch) for batch in (1, 4, 16)]
    assert [f["count"] for f in found] == [6, 6, 6]
    assert found[0]["prompted_images"] == 6
    assert found[0]["prompted_left_out"] == 0
    for seen in scorer.seen:
        assert list(seen) == ["a", "b", "c"]
        for one, level in (("a", 0.4), ("b", 0.8), ("c", 0.2)):
            assert len(seen[one]) == 2
            assert all((p[0, 0] == round((level + 1) * 127.5)).all() and p.shape == (4, 4, 3) for p in seen[one])
            assert (seen[one][0] != seen[one][1]).any()
        for one in seen:
            for p, q in zip(seen[one], scorer.seen[0][one]):
                np.testing.assert_array_equal(p, q)
    measured(scorer, images=2, seed=1)
    assert (scorer.seen[-1]["a"][0] != scorer.seen[0]["a"][0]).any()


def test_images_that_are_not_finite_are_counted_and_not_scored():
    scorer = Notes({"good": "40", "bad": "9"})
    found = measured(scorer, images=3)
    assert (found["count"], found["prompted_images"], found["prompted_left_out"]) == (3, 6, 3)
    assert list(scorer.seen[0]) == ["good"]


def test_captions_name_the_aspect_ratio_where_they_did_in_training():
    texts = []

    def noted(some, length):
        texts.extend(some)
        return np.zeros((len(some), length), np.int32), None

    for grid, words in ((None, "1:1"), ((2, 4), "16:9")):
        texts.clear()
        options = {} if grid is None else {"grid": grid}
        metric = Prompted(Notes({"a": "x"}), options=options)
        metric(Draws(template="aspect"), {"shift": jnp.zeros(())}, None, jax.random.key(0), encode=noted)
        assert texts == [f"\n in a {words} aspect ratio.\n", f"x\n in a {words} aspect ratio.\n"]


def test_prompts_of_letters_need_no_tokeniser_and_are_checked_beforehand(tmp_path):
    """By the vocabulary of the data, before which comes the one beside the model."""
    task, scorer = Draws(given=("tokens",), letters=27), Notes({"a": "B", "b": "zoo"})
    metric = Prompted(scorer)
    loaded = models.loaded_for(metric, task=task, data=Captioned(Digits()))
    metric(task, {"shift": jnp.zeros(())}, None, jax.random.key(0), **loaded)
    seen = [scorer.seen[0][one][0][0, 0, 0] for one in "ab"]
    assert seen == [round((level / 100 + 1) * 127.5) for level in (2, 26)]
    characters("BozB ").save(tmp_path)
    encode = models.loaded_for(metric, task=task, places=[tmp_path], data=Captioned(Digits()))["encode"]
    assert encode(["B", "zoo"], 3)[0].tolist() == [[1, 0, 0], [3, 2, 2]]
    for fields, data, message in (
        ({"scorer": Notes({"a": "zoos"})}, Captioned(Digits()), "'zoos' has 4 letters, and the model takes 1 to 3"),
        ({"tokenizer": "x"}, Captioned(Digits()), "captions of letters need none; leave it out"),
        ({}, Digits(), "need the vocabulary.json of the run"),
    ):
        with told(message):
            models.loaded_for(Prompted(**{"scorer": scorer, **fields}), task=task, data=data)


def test_what_cannot_be_measured_is_told_before_the_first_step():
    for task, fields, words in (
        (Draws(), {"scorer": None}, "has no scorer, which knows the prompts"),
        (Draws(given=("text", "null_text")), {}, "takes stored features of them"),
        (Draws(given=()), {}, "takes captions, and this Draws takes none"),
        (Draws(image=False), {}, "scores images, and Draws draws none"),
        (Draws(), {"options": {"gird": (1, 1)}}, "no option 'gird'; did you mean 'grid'"),
        (Draws(), {"scorer": Notes({"a": "1"}, missing="no reader here")}, "no reader here"),
    ):
        with told(words):
            Prompted(**{"scorer": Notes({"a": "1"}), **fields}).check(task)
