"""DART with two resolutions in one sequence (Matryoshka), and with text and image in one (Kaleido)."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dart_by_hand import NESTED, WRITES, conditions, normal, randomised
from fresh import exported
from mistakes import told

import zoo
from zoo import captions, config
from zoo.cli import main
from zoo.commands.conditions import check_form
from zoo.data.text.vocabulary import text8
from zoo.task import is_text


def test_small_copies_come_first_and_at_the_place_of_what_they_cover() -> None:
    """Sizes of blocks, rotations by hand, who sees whom, and errors and loss of both scales."""
    at, params = NESTED.layout, randomised(NESTED)
    assert at.spans == (4, 4, 16, 16, 16)
    angles = at.angles(16, 100.0)
    small, large = angles[:4].reshape(2, 2, 8), angles[8:24].reshape(4, 4, 8)
    for i, j in itertools.product(
        range(2), range(2)
    ):  # the mean over the four that a small one covers, two steps later
        np.testing.assert_allclose(
            small[i, j, 2:], large[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean((0, 1))[2:], atol=1e-6
        )
    np.testing.assert_allclose(at.angles(16, 100.0)[::4, 0], np.repeat(range(5), np.asarray(at.spans) // 4), atol=1e-6)
    assert sorted(set(at.places[:8])) == [*range(4)]
    assert sorted(set(at.places[8:])) == [*range(4, 20)]
    x = normal(2, 4, 4, 1)
    pooled = (x.reshape(2, 2, 2, 2, 2).mean((2, 4)) - 0.1) / 0.7
    np.testing.assert_allclose(NESTED.scales[0].tokens(x), pooled.reshape(2, 4, 1), atol=1e-6)
    batch = {"latent": x, "latent_std": 0 * x, "label": np.arange(2)}
    copies = [normal(2, t, k, 1, seed=t) for t, k in ((2, 4), (3, 16))]
    seen = NESTED.conditions(params, batch)
    run = jax.jit(lambda copies: [found for found, _ in NESTED.estimates(params, copies, None, seen)])
    before = jax.device_get(run(copies))
    for scale, b in ((0, 0), (0, 1), (1, 0), (1, 2)):
        changed = [copy.copy() for copy in copies]
        changed[scale][:, b, -1] += 1
        moved = [(a != b).any((0, 2, 3)) for a, b in zip(jax.device_get(run(changed)), before)]
        np.testing.assert_array_equal(np.concatenate(moved), np.arange(5) >= 2 * scale + b)
    keys = jax.random.split(jax.random.key(1), 2)
    small, large = (eps.reshape(2, -1)[:, :8] for eps in jax.device_get(jax.jit(NESTED._noise)(keys)))
    assert np.abs(small - large).min() > 1e-3
    errors = jax.jit(NESTED.errors)
    plain, swapped = (np.asarray(errors(params, batch, keys, np.asarray(swap))) for swap in (False, True))
    assert plain.shape == (2, 5)
    assert ((plain == swapped) == [True, False, False, False, False]).all()
    drawn = jax.eval_shape(lambda: NESTED.sample(params, keys, 2))
    assert {key: value.shape for key, value in drawn.items()} == {"coarse_latent": (2, 2, 2, 1), "latent": (2, 4, 4, 1)}
    zeros = [np.square(scale.tokens(x)).mean() * scale.steps for scale in NESTED.scales]
    cap = dataclasses.replace(NESTED, cap=1.0)  # all weights 1
    none = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), params)  # which tells zeros
    assert float(jax.jit(cap.loss)(none, batch, keys[0])[0]) == pytest.approx(sum(zeros) / 5, rel=1e-5)
    assert "denoise" in NESTED.about.lacks


def test_letters_see_those_before_them_and_are_written_as_the_whole_sequence_has_them() -> None:
    """Front letters 0 to 3, two blocks of four, letters behind: 12 to 15."""
    params, n, keys = randomised(WRITES), 3, jax.random.split(jax.random.key(0), 3)
    image = {"latent": normal(n, 4, 4, 1), "latent_std": np.zeros((n, 4, 4, 1), np.float32)}
    assert WRITES.about.completes == tuple(image)
    x0 = WRITES.tokens(image["latent"])
    copies = WRITES.copies(x0, jax.vmap(lambda key: jax.random.normal(key, (2, 4, 4)))(keys))
    run = jax.jit(lambda seen, copies: WRITES.read(params, [copies], None, seen))
    seen, copies = np.asarray(WRITES.conditions(params, conditions(WRITES, n))), np.asarray(copies)
    [(before, _)], letters = jax.device_get(run(seen, copies))
    assert letters.shape == (n, 8, 7)
    for j in range(8):  # in the order of the sequence
        moved = seen.copy()
        moved[:, j] = np.roll(seen[:, j], 1, -1)
        [(found, _)], other = jax.device_get(run(moved, copies))
        np.testing.assert_array_equal((other != letters).any((0, 2)), np.arange(8) >= j)
        assert (found == before).all() == (j >= 4)
    _, other = jax.device_get(run(seen, copies + (np.arange(2) == 1)[:, None, None].astype(np.float32)))
    np.testing.assert_array_equal((other != letters).any((0, 2)), np.arange(8) >= 4)
    write = jax.jit(lambda keys, image: WRITES.sample(params, keys, n, image)["tokens"])
    tokens = write(keys, image)
    drawn = {**image, "latent_std": np.ones((n, 4, 4, 1), np.float32)}  # each from its own key
    np.testing.assert_array_equal(write(keys[::-1], jax.tree.map(lambda x: x[::-1], drawn))[::-1], write(keys, drawn))
    seen = WRITES.conditions(params, {"tokens": tokens}, jnp.ones(n, bool))
    choose = jax.vmap(lambda key, row, i: jax.random.categorical(jax.random.fold_in(key, i), row), (None, 0, 0))
    again = jax.jit(jax.vmap(choose, (0, 0, None)))(keys, run(seen, copies)[1][:, 4:7], np.arange(3))
    np.testing.assert_array_equal(tokens, again)
    batch = {**image, **conditions(WRITES, n)}
    task, (_, noise, drop, _) = dataclasses.replace(WRITES, drop=0.5), jax.random.split(keys[1], 4)
    dropped = jax.random.bernoulli(drop, 0.5, (n,))
    assert 0 < dropped.sum() < n
    loss = jax.jit(task.loss)(params, batch, keys[1])[1]["letter"]
    noise = jax.random.normal(noise, (n, 8, 4)).reshape(n, 2, 4, 4)
    logits = run(WRITES.conditions(params, batch, dropped), WRITES.copies(x0, noise))[1]
    chances = jax.nn.log_softmax(jnp.where(dropped[:, None, None], logits[:, 4:7], logits[:, :3]))
    said = jnp.take_along_axis(chances, batch["tokens"][..., None], -1)
    assert float(loss) == pytest.approx(-float(said.mean()), rel=1e-4)


def test_captions_are_read_and_written(tmp_path: Path, capsys: Any) -> None:
    fields = ["task.width=16", "task.depth=1", "task.steps=2"]
    run = config.override(config.load("dart/digits_captions"), fields)
    exported(tmp_path / "run", run.task, randomised(run.task), run.data)
    for fields in (["form=text", "from=test", "n=2"], ["prompt=a 7", "n=2", "guidance=1"]):
        assert main(["sample", str(tmp_path / "run"), *fields, "--out", str(tmp_path / fields[0])]) == 0
    assert len((tmp_path / "form=text/000001.txt").read_text().rstrip("\n")) == 8
    assert (tmp_path / "prompt=a 7/000001.png").exists()
    model = zoo.load(tmp_path / "run")
    given, words, _ = captions.conditions(model, None, ["a 7", "a  two"], 3, None)
    assert given is not None
    assert words == ["a 7", "a  two", "a 7"]
    spelled = [text8().decode(row) for row in given["tokens"]]
    assert spelled == ["a seven ", "a two   ", "a seven "]
    assert not is_text(run.task)
    example = run.data.source("test", run.task.spec(1))[0]
    assert model._check("sample", {"image": example["image"][None]}, 1) == 1  # `Model.sample` takes it
    given = ["form=text", "from=test"]
    for fields, words in (
        ([*given, "guidance=1"], "leave guidance out"),
        ([*given, "--out", str(tmp_path / "prompt=a 7")], "other settings"),  # whose images are of another kind
        (["from=test"], "form=text from=SPLIT"),
        (["prompt=a very long text"], "1 to 8"),
    ):
        assert main(["sample", str(tmp_path / "run"), *fields]) == 2
        assert words in capsys.readouterr().err
    for field in ("writes=false", "drop=0.0"):  # with no image before them no letters are trained
        with told("writes none: leave them out"):
            check_form(config.override(run, [f"task.{field}"]).task, "text", "test", None)
