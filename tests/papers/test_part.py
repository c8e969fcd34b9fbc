"""PART: pairs, loss and the other pretexts against the paper's equations, with random weights."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from part_by_hand import (
    CLASSIFIER,
    MAE,
    PART,
    RELATION,
    SERIES,
    SMALL,
    Told,
    about_zero,
    away_from_start,
    coordinates,
    norm,
    numbers,
    signals,
)
from scipy.special import erf, softmax

from zoo import weights
from zoo.errors import UserError
from zoo.papers.part import (
    AbsolutePosition,
    MaskedAutoencoder,
    Part,
    PartClassifier,
    Vit,
)
from zoo.papers.part import task as tasks

# pairs


def test_pairs_are_drawn_as_the_paper_says() -> None:
    every = Part(**SMALL, pairs=81)
    few = Part(**SMALL, pairs=20)
    matching = Part(**SMALL, pairing="matching", pairs=7, head="pairwise")
    independent = Part(**SMALL, head="pairwise", pairs=20_000, patches=5)
    assert [task.paired for task in (every, matching, independent)] == ["distinct", "matching", "independent"]
    draw = jax.jit(lambda rng: [jnp.stack(task.draw_pairs(rng)) for task in (every, few, matching, independent)])
    whole, some, matched, free = (np.asarray(x) for x in draw(jax.random.key(0)))
    assert sorted(map(tuple, whole.T.tolist())) == [(i, j) for i in range(9) for j in range(9)]  # self-pairs too
    assert some.shape == (2, 20)
    assert len(set(map(tuple, some.T.tolist()))) == 20
    assert matched[0].tolist() == list(range(7))
    assert len(set(matched[1].tolist())) == 7
    assert 0 <= matched.min() <= matched.max() < 9
    counts = np.zeros((5, 5))
    np.add.at(counts, tuple(free), 1)
    np.testing.assert_allclose(counts / 20_000, 1 / 25, atol=0.006)
    for one, same, other in zip(
        (whole, some, matched, free), draw(jax.random.key(0)), draw(jax.random.key(1)), strict=True
    ):
        np.testing.assert_array_equal(one, same)
        assert not np.array_equal(one, other)


# the loss


@dataclasses.dataclass(frozen=True)
class Knows(Part):
    """Answers from the boxes themselves, or with reference and target swapped."""

    swapped: bool = False
    add: float = 0.0

    def crops(self, batch: Any, rng: jax.Array, *, augment: bool = True) -> tuple[jax.Array, jax.Array]:
        boxes = self.boxes(rng, len(batch[self.key]), self.count)
        return boxes, boxes

    def encode(self, params: Any, patches: jax.Array, positions: Any = None, **_: Any) -> Any:
        assert positions is None
        return patches, None

    def relate(self, params: Any, z: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
        assert i.ndim == j.ndim == 1  # one choice for the whole batch
        i, j = (j, i) if self.swapped else (i, j)
        axes = len(self.extent)
        a, b = z[:, i], z[:, j]
        middle = 0.5 if self.centred else 0.0
        shift = (b[..., 0, :] + middle * b[..., 1, :] - a[..., 0, :] - middle * a[..., 1, :]) / a[..., 1, :]
        ratio = b[..., 1, :] / a[..., 1, :]
        if self.target_norm == "log_ratio":
            ratio = jnp.log(ratio)
        found = jnp.concatenate([shift, ratio], -1) if self.sizes else shift
        assert found.shape[-1] == axes * (1 + self.sizes)
        return (found / tasks._deviations(self) if self.target_norm == "std" else found) + self.add


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"centred": False, "target_norm": "log_ratio", "dtype": "bfloat16"},
        {"sampling": "pixels", "sizes": False, "patches": 5},
        {"sampling": "grid", "head": "pairwise", "target_norm": "std"},
        {**SERIES, "target_norm": "log_ratio", "smallest": 0.5, "largest": 20},
    ],
    ids=lambda x: "-".join(str(v) for k, v in x.items() if k not in SERIES) or "paper",
)
def test_a_task_that_knows_the_answers_has_no_loss(fields: dict[str, Any]) -> None:
    """The row of a relation is its reference: in float32 the exact answer leaves nothing, and the swapped one much."""
    task = Knows(**{**SMALL, **fields, "pairs": 20, "pairing": "independent"})
    batch = signals(task)

    @jax.jit
    def run(batch: Any, rng: jax.Array) -> Any:
        swapped = dataclasses.replace(task, swapped=True).loss({}, batch, rng)[0] if not fields else None
        asked = task.target_norm != "std" and (task.sizes or not task.length)  # the others add no law
        found = task.relations({}, batch, rng) if asked else None
        return task.loss({}, batch, rng), swapped, found

    (loss, metrics), wrong, found = run(batch, jax.random.key(0))
    assert loss.dtype == jnp.float32
    assert loss < 1e-9
    assert wrong is None or wrong > 0.1
    assert set(metrics) == {"distance", *(f"mse_{name}" for name in task.relation_names)}
    assert max(metrics.values()) < 1e-5
    if found is None:
        return
    n = task.count
    assert found["true"].shape == (4, n, n, len(task.relation_names))
    np.testing.assert_allclose(found["predicted"], found["true"], rtol=1e-4, atol=1e-5)
    found = jax.tree.map(np.asarray, found)
    boxes = found["boxes"]
    for i, j in ((0, 1), (3, 2)):
        step = (boxes[:, j] - boxes[:, i])[:, 0] + (boxes[:, j] - boxes[:, i])[:, 1] / 2 * task.centred
        np.testing.assert_allclose(
            found["true"][:, i, j, : boxes.shape[-1]], step / boxes[:, i, 1], rtol=1e-4, atol=1e-5
        )
    if task.sizes:
        np.testing.assert_allclose(found["layout"], about_zero(boxes), atol=1e-3)


def test_errors_are_means_over_examples_pairs_and_numbers() -> None:
    cases = (("squared", 3.0, 9.0), ("absolute", -3.0, 3.0), ("huber", 3.0, 2.5), ("huber", 0.5, 0.125))
    known = [Knows(**SMALL, pairs=20, error=error, add=off, pairing="independent") for error, off, _ in cases]
    results = jax.jit(lambda batch: [task.loss({}, batch, jax.random.key(0)) for task in known])(signals(PART))
    for (_, off, value), (loss, metrics) in zip(cases, results, strict=True):
        assert float(loss) == pytest.approx(value, rel=1e-5)
        assert float(metrics["mse_dw"]) == pytest.approx(off**2, rel=1e-5)
        assert float(metrics["distance"]) == pytest.approx(abs(off) * np.sqrt(2), rel=1e-5)


@pytest.mark.parametrize("augment", ["none", "resized"])
def test_boxes_say_where_patches_were_taken(augment: str) -> None:
    """Images of coordinates show where a patch is. Augmentation comes first: relations of what the network sees."""
    task = Part(image=32, channels=2, patch=8, width=8, depth=1, head_dim=4, pairs=40, augment=augment)
    patches, boxes = jax.jit(lambda batch, rng: task.crops(batch, rng))(
        {"image": coordinates(32, 8)}, jax.random.key(0)
    )
    assert patches.shape == (8, 16, 8, 8, 2)
    seen, boxes = np.asarray(patches), np.asarray(boxes)
    place = seen.mean((2, 3))
    size = np.stack([seen[:, :, 0, 6, 0] - seen[:, :, 0, 1, 0], seen[:, :, 6, 0, 1] - seen[:, :, 1, 0, 1]], -1) * 8 / 5
    read = np.stack([place - size / 2, size], 2)
    of_both = [np.asarray(RELATION(x[:, :, None], x[:, None])) for x in (read, boxes)]
    error, spread = of_both[0] - of_both[1], of_both[1].std((0, 1, 2))
    assert (np.sqrt((error**2).mean((0, 1, 2))) < 0.15 * spread).all()  # borders, where pixels end
    if augment == "none":
        assert np.abs(place - (boxes[:, :, 0] + boxes[:, :, 1] / 2)).max() < 0.7
    else:  # the same boxes, of another part of each image
        assert np.abs(place - (boxes[:, :, 0] + boxes[:, :, 1] / 2)).max() > 3


@pytest.mark.parametrize(
    ("norm", "sampling", "sizes"),
    [("log_ratio", "off_grid", True), ("log_ratio", "pixels", False), ("std", "off_grid", True), ("std", "grid", True)],
)
def test_normalised_targets_have_a_way_back(norm: str, sampling: str, sizes: bool) -> None:
    task = Part(**SMALL, sampling=sampling, sizes=sizes, target_norm=norm, pairs=20)

    @jax.jit
    def run(rng: jax.Array) -> Any:
        boxes = task.boxes(rng, 3000, 9)
        some = (
            (boxes[:, np.arange(81) // 9], boxes[:, np.arange(81) % 9])
            if sampling == "grid"
            else (boxes[:, 0], boxes[:, 1])
        )
        raw = task.compared(*some)
        normal = task.normalised(raw)  # a trace is the first to ask for deviations
        return boxes, raw, normal, task.raw(normal)

    boxes, raw, normal, back = map(np.asarray, run(jax.random.key(5)))
    np.testing.assert_allclose(back, raw, rtol=1e-5, atol=1e-6)
    if norm == "std":  # on the grid sizes never differ and stay as they are
        wanted = [1, 1, 1, 1] if sampling == "off_grid" else [1, 1, 0, 0]
        np.testing.assert_allclose(normal.reshape(-1, 4).std(0), wanted, atol=0.06)
        assert sampling == "off_grid" or (normal[..., 2:] == 1).all()
    elif sizes:
        np.testing.assert_allclose(normal[:, 2:], np.log(boxes[:, 1, 1] / boxes[:, 0, 1]), atol=1e-5)
        np.testing.assert_array_equal(normal[:, :2], raw[:, :2])


# the other pretexts


def test_the_slot_of_a_patch_is_by_chance_one_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    task = AbsolutePosition(**SMALL, known=0.4)
    monkeypatch.setattr(Vit, "encoder", lambda task: Told(lambda *_: (jnp.asarray(numbers(0, 4, 9, 8)), None)))
    blind = {"encoder": None, "head": {"kernel": np.zeros((8, 9), np.float32), "bias": np.zeros(9, np.float32)}}
    loss, metrics = jax.jit(task.loss)(blind, signals(task), jax.random.key(0))
    assert float(loss) == pytest.approx(np.log(9), rel=1e-6)
    assert 0 <= float(metrics["accuracy"]) <= 1 / 5  # the first slot wins, which one of the five may have


@pytest.mark.parametrize("known", [0.0, 0.4])
def test_patches_whose_slot_is_told_are_not_asked(known: float, monkeypatch: pytest.MonkeyPatch) -> None:
    task = AbsolutePosition(**{**SMALL, "width": 12}, known=known)
    batch, told, right = signals(task), [], None

    def give(patches: Any, positions: Any, seen: Any, keep: Any) -> Any:
        if positions is None:
            given = np.zeros((4, 9), bool)
        else:
            assert positions.shape == (4, 10, 12)
            given = (positions[:, 1:] != 0).any(-1)
        told.append((given, positions))
        good, bad = np.eye(9), np.roll(np.eye(9), 1, 1)
        logits = jnp.where((given != right)[..., None], good, bad)  # of those told, the opposite of the others
        return jnp.pad(50 * logits, ((0, 0), (0, 0), (0, 3))), None

    @jax.jit
    def run(answer: jax.Array) -> Any:
        nonlocal right
        right = answer
        return *task.loss(params, batch, jax.random.key(0)), told.pop()

    monkeypatch.setattr(Vit, "encoder", lambda task: Told(give))
    params = {"encoder": None, "head": {"kernel": jnp.eye(12)[:, :9], "bias": jnp.zeros(9)}}
    loss, metrics, (given, positions) = jax.tree.map(np.asarray, run(True))
    assert float(loss) == pytest.approx(0, abs=1e-5)
    assert float(metrics["accuracy"]) == 1
    assert given.sum(1).tolist() == [round(known * 9)] * 4
    if known:
        expected = np.where(np.pad(given, ((0, 0), (1, 0)))[..., None], task.fixed_positions(), 0)
        np.testing.assert_array_equal(positions, expected)  # nothing for the class token and those that are asked
    loss, metrics, _ = run(False)
    assert float(loss) == pytest.approx(50, rel=1e-3)
    assert float(metrics["accuracy"]) == 0


@pytest.mark.parametrize("normalise", [True, False])
def test_masked_patches_are_not_read_and_visible_ones_not_scored(
    normalise: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = dataclasses.replace(MAE, normalise=normalise)
    batch, codes = signals(task), task.fixed_positions()
    patches = np.asarray(batch["image"]).reshape(4, 3, 4, 3, 4, 2).transpose(0, 1, 3, 2, 4, 5).reshape(4, 9, 32)
    answers = patches
    if normalise:
        answers = (patches - patches.mean(-1, keepdims=True)) / patches.std(-1, keepdims=True)
    read: list[Any] = []
    exact: list[Any] = []

    def give(shown: Any, positions: Any, seen: Any, keep: Any) -> Any:
        read.append((shown, positions))
        return jnp.zeros((4, 4, 8)), None

    def fill(z: Any, order: Any, codes: Any) -> Any:
        read.append(codes)
        visible = jax.vmap(lambda row: jnp.zeros(9, bool).at[row[:4]].set(True))(order)
        return jnp.where((visible == exact.pop())[..., None], answers + 7, answers)

    @jax.jit
    def run(hidden_exact: jax.Array) -> Any:
        exact.append(hidden_exact)
        return task.loss({"encoder": None, "decoder": None}, batch, jax.random.key(0))[0], read.pop(), read.pop()

    monkeypatch.setattr(Vit, "encoder", lambda task: Told(give))
    monkeypatch.setattr(MaskedAutoencoder, "_decoder", lambda task: Told(fill))
    loss, told, (shown, positions) = jax.tree.map(np.asarray, run(True))
    assert float(loss) < 1e-6
    np.testing.assert_array_equal(told, task.fixed_positions("decoder_width")[1:])
    assert shown.shape == (4, 4, 32)
    places = np.array([[int(np.abs(codes[1:] - p).sum(-1).argmin()) for p in row[1:]] for row in positions])
    assert all(len(set(row)) == 4 for row in places.tolist())
    assert len(np.unique(places, axis=0)) > 1  # each example for itself
    np.testing.assert_array_equal(shown, np.take_along_axis(patches, places[..., None], 1))
    np.testing.assert_array_equal(positions[:, 1:], codes[1:][places])
    assert not positions[:, 0].any()
    assert float(run(False)[0]) == pytest.approx(49, rel=1e-4)


def test_the_decoder_puts_tokens_in_their_places() -> None:
    params, decoder = away_from_start(MAE)["decoder"], MAE._decoder()
    z, codes = numbers(0, 3, 4, 8), np.asarray(MAE.fixed_positions("decoder_width")[1:])
    order = np.stack([np.random.default_rng(b).permutation(9) for b in range(3)])
    found = jax.jit(decoder.apply)({"params": params}, z, order, codes)
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    h = np.zeros((3, 9, 12))
    for b, n in np.ndindex(3, 9):
        token = z[b, n] @ p["in"]["kernel"] + p["in"]["bias"] if n < 4 else p["hidden"]["table"][0]
        h[b, order[b, n]] = token + codes[order[b, n]]
    layer = p["trunk"]["layer0"]
    x = norm(h, **layer["attention_norm"])
    into, last = layer["attention"]["qkv"], layer["attention"]["out"]
    q, k, v = ((x @ into["kernel"][:, s] + into["bias"][s]).reshape(3, 9, 3, 4) for s in range(3))
    y = np.einsum("bhts,bshk->bthk", softmax(np.einsum("bthk,bshk->bhts", q, k) / 2, -1), v).reshape(3, 9, 12)
    h += y @ last["kernel"] + last["bias"]
    up, down = layer["mlp"]["up"], layer["mlp"]["down"]
    x = norm(h, **layer["mlp_norm"]) @ up["kernel"] + up["bias"]
    h += (x * (1 + erf(x / np.sqrt(2))) / 2) @ down["kernel"] + down["bias"]
    out = norm(h, **p["norm"]) @ p["out"]["kernel"] + p["out"]["bias"]
    np.testing.assert_allclose(found, out, atol=2e-4)


# series


@pytest.mark.parametrize(
    "task",
    [
        Part(**SERIES, pairs=30, mask=0.5, residual=True, heads=2),
        AbsolutePosition(**SERIES, known=0.5, mask=0.5),
        MaskedAutoencoder(**SERIES, decoder_width=8, decoder_head_dim=4),
        PartClassifier(**SERIES, classes=3, mixup=0.8, smoothing=0.1, start="sincos"),
    ],
    ids=lambda task: type(task).__name__,
)
def test_series_have_losses_and_maps(task: Any) -> None:
    params, batch, key = weights.abstract(task), signals(task), jax.random.key(0)
    assert task.about.unit == "series"
    if isinstance(task, AbsolutePosition | MaskedAutoencoder):  # the others' losses on series run elsewhere
        loss, metrics = jax.jit(task.loss)(away_from_start(task), batch, key)
        assert 0 < float(loss) < 1e3
        assert np.isfinite(list(metrics.values())).all()
    else:
        assert jax.eval_shape(task.loss, params, batch, key)[0].shape == ()
    assert jax.eval_shape(task.feature_map, params, batch).shape == (4, 6, 8)
    assert [x.shape for x in jax.eval_shape(task.off_grid, params, batch, key)] == [(4, 6, 8), (4, 6, 2, 1)]
    if isinstance(task, Part):
        assert task.relation_names == ("dt", "dw")
        shapes = {name: x.shape for name, x in jax.eval_shape(task.relations, params, batch, key).items()}
        pairs = dict.fromkeys(("predicted", "true"), (4, 6, 6, 2))
        assert shapes == {"patches": (4, 6, 4, 2), "boxes": (4, 6, 2, 1), "layout": (4, 6, 2, 1), **pairs}
    with pytest.raises(UserError, match=r"task\.length=24: .*; use `zoo export` without"):
        task.import_names()


# what is refused


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (Part, {"length": 24}, "task.image=12 and task.length=24: give one of them"),
        (Part, {"patch": 5}, "task.patch=5 does not divide task.image=12; choose a divisor, e.g. task.patch=4"),
        (Part, {"head_dim": 3}, "task.head_dim=3 does not divide task.width=8; .* task.head_dim=2"),
        (Part, {**SERIES, "augment": "pad"}, "task.augment='pad' is for images; set task.augment=none"),
        (Part, {"largest": 13}, "task.largest=13 is larger than task.image=12: .* set task.largest=12 or less"),
        (Part, {"patch": 12, "patches": 4}, "two patches, 24, is larger than task.image=12: .* set task.largest=12 or less"),
        (Part, {"smallest": 5, "largest": 3}, "task.smallest=5 and task.largest=3 leave no size; choose 0 < "),
        (Part, {"sampling": "pixels", "smallest": 2.5}, "task.smallest=2.5 and .* must be whole .*; round them"),
        (Part, {"patches": 1}, "task.patches=1"),
        (Part, {"mask": 0.9}, "task.mask=0.9 leaves none of 9 patches; choose a smaller share"),
        (Part, {"mask": 0.5, "attention": "splash"}, "task.attention='splash' cannot leave out keys .*; set"),
        (Part, {"patches": 8, "sampling": "grid"}, "task.patches=8: the regular grid has 9; leave task.patches out"),
        (Part, {"pairs": 82}, "task.pairs=82 is more than the 81 distinct pairs of 9 patches; choose 81 or fewer"),
        (Part, {"pairs": 10, "pairing": "matching"}, "task.pairs=10 is more than the 9 matching .* task.pairing=indep"),
        (Part, {"width": 6, "head_dim": 2, "query": "positional"}, "task.width=6 is not divisible by 4, .* change it"),
        (Part, {"head": "pairwise", "residual": True}, "task.residual=True belongs to task.head=cross_attention"),
        (AbsolutePosition, {"known": 0.99}, "task.known=0.99 leaves no patch to ask for: there are 9; choose a share"),
        (AbsolutePosition, {"width": 6, "head_dim": 2, "known": 0.5}, "task.width=6 is not divisible by 4, .* choose 8"),
        (AbsolutePosition, {"patch": 12}, "task.patch=12 makes one patch of the whole input"),
        (MaskedAutoencoder, {"mask": 0.0}, "task.mask=0.0 hides none of 9 patches; choose a share in between, e.g. 0.5"),
        (MaskedAutoencoder, {"decoder_width": 6, "decoder_head_dim": 3}, "task.decoder_width=6 is not divisible by 4, "),
        (MaskedAutoencoder, {"decoder_head_dim": 5}, "task.decoder_head_dim=5 does not divide task.decoder_width=32"),
        (PartClassifier, {"width": 6, "head_dim": 2, "start": "sincos"}, "task.width=6 is not divisible by 4"),
        (PartClassifier, {**SERIES, "cutmix": 1.0}, "task.cutmix=1.0 is for images; set task.cutmix=0"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_a_sentence(kind: type, fields: dict[str, Any], message: str) -> None:
    pairs = {"pairs": 9} if kind is Part else {}
    kind(**{**SMALL, **pairs})  # the others are fine
    with pytest.raises(UserError, match=re.sub(r"(?<!\\)\.(?!\*)", r"\.", message)):
        kind(**{**SMALL, **pairs, **fields})


def test_a_batch_of_another_shape_fails_while_tracing() -> None:
    for task in (PART, AbsolutePosition(**SMALL), MAE, CLASSIFIER):
        batch = {**signals(task), "image": jnp.zeros((4, 16, 16, 2))}
        with pytest.raises(AssertionError, match="16"):
            jax.eval_shape(task.loss, weights.abstract(task), batch, jax.random.key(0))
