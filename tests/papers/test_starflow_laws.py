"""STARFlow: the laws a flow obeys with random weights, and the tuning of a decoder."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flow_by_hand import block, forward, inverse, tokens, untokens
from fresh import noise, randomised

from zoo import dist, weights
from zoo.encoders.text import T5
from zoo.encoders.vae import AutoEncoder
from zoo.errors import UserError
from zoo.flows.inverse import Guidance, Inverted, feed
from zoo.flows.stack import Stack
from zoo.papers import starflow
from zoo.task import Denoises, sample_keys
from zoo.train.step import make_sampler

TINY = starflow.StarFlow(
    latent=(4, 4), channels=2, width=32, depths=(1, 2), head_dim=32, classes=3, reach=4.0, penalty=0.0
)
WORDS = {"classes": 0, "text_tokens": 3, "text_width": 32, "captions": "features"}
VARIANTS = {
    "start": TINY,
    "shifted": dataclasses.replace(
        TINY, start=False, scale="exp", clip=0.0, final_norm=False, condition="all", positions="learned", scan=False
    ),
    "lm": dataclasses.replace(TINY, lm=starflow.LanguageModel(32, 4, 2, 8, 48), **WORDS),
    # without a condition, and with a language model without norms
    "patch": dataclasses.replace(
        TINY, patch=2, order="R2L", classes=0, head_dim=16, lm=starflow.LanguageModel(32, 4, 4, 8, 48, False, False)
    ),
}


def latents(task, n, seed=1):
    return np.random.default_rng(seed).normal(size=(n, *task.latent, task.channels)).astype(np.float32)


def condition_of(task, n, seed=7):
    size = (n, task.prefix, task.condition_width)
    return np.random.default_rng(seed).normal(size=size).astype(np.float32) if task.prefix else None


@functools.cache
def whole(name):
    """Two latents, their z, log-dets and way back, and of one variant the Jacobian of the first."""
    task = VARIANTS[name]
    params, x, y = randomised(task), latents(task, 2), condition_of(task, 2)

    @jax.jit
    def run(params):
        def ahead(first):
            z, logdet, _ = forward(task, params, jnp.concatenate([first[None], x[1:]]), y)
            return z[0].ravel(), (z, logdet)

        jacobian, (z, logdet) = jax.jacfwd(ahead, has_aux=True)(x[0]) if name == "start" else ahead(x[0])
        return z, logdet, inverse(task, params, untokens(task, z, task.rows), y)[-1], jacobian

    return x, *jax.device_get(run(params))


@pytest.mark.parametrize("name", ["start", "patch"])
def test_the_inverse_is_the_way_back_and_the_logdet_that_of_the_jacobian(name):
    x, z, logdet, back, jacobian = whole(name)
    np.testing.assert_allclose(back, x, atol=1e-4)
    assert np.abs(z - tokens(VARIANTS[name], x)).max() > 0.1
    if name == "start":
        size = z[0].size
        np.testing.assert_allclose(np.linalg.slogdet(jacobian.reshape(size, -1))[1] / size, logdet[0], atol=1e-5)
        assert abs(float(logdet[0])) > 1e-3


@pytest.mark.filterwarnings("error")  # guidance without a caption warns
def test_letters_are_the_features_of_one_hot_vectors():
    """A caption that is dropped, or not given, is the last of the numbers; the flow behind it is the same."""
    task = dataclasses.replace(TINY, classes=0, text_tokens=3, text_width=5, captions="letters")
    same = dataclasses.replace(task, captions="features")
    assert (task.about.vocabulary, task.given, same.about.vocabulary) == (4, ("tokens",), None)
    assert (task.stack, weights.abstract(task)) == (same.stack, weights.abstract(same))
    letters, image = jnp.asarray([[0, 1, 2], [3, 3, 0]]), {"latent": latents(task, 2)}
    null = {"null_text": jnp.broadcast_to(jax.nn.one_hot(4, 5), (2, 3, 5))}
    for ours, theirs in (({"tokens": letters}, {"text": jax.nn.one_hot(letters, 5)}), ({}, {})):
        for drop in (None, jnp.asarray([True, False])):
            found = task.conditions({}, {**image, **ours}, drop)
            np.testing.assert_array_equal(found, same.conditions({}, {**image, **theirs, **null}, drop))
    drawn = jax.eval_shape(
        lambda p: task.sample(p, jax.random.key(0), 2, {"tokens": letters}, task.Sampling(guidance=1.0)),
        weights.abstract(task),
    )
    assert drawn["latent"].shape == (2, 4, 4, 2)


@pytest.mark.parametrize("name", ["shifted", "lm"])
def test_the_deep_block_is_causal_in_its_own_order_and_cached_equals_uncached(name):
    """Row 0 is of some tokens, row t + 1 of others at t, the last of another condition; in one piece, and one, five and the rest."""
    task = VARIANTS[name]
    last, params, stack = task.blocks - 1, randomised(task), task.stack
    u = np.random.default_rng(3).normal(size=(1, task.tokens, task.dims)).astype(np.float32)
    u = np.concatenate([u, u + np.eye(task.tokens, dtype=np.float32)[..., None], u])
    y = np.repeat(condition_of(task, 1), len(u), 0)
    y[-1] += 1

    @jax.jit
    def run(params):
        one = lambda row: jnp.concatenate(block(stack, params, last, *(x[None] for x in row)), -1)[0]  # noqa: E731
        stepper = stack.chain(params, len(u), y).stepper(last)
        first, rest = feed(stepper, u)
        fed, cache, parts = jnp.concatenate([first[:, None], rest[:, :-1]], 1), stepper.cache, []
        for begin, end in ((0, 1), (1, 6), (6, task.tokens)):
            scale, shift, cache = stepper.step(fed[:, begin:end], cache, begin)
            parts.append(jnp.concatenate([jnp.log(scale), shift], -1))
        return jax.lax.map(one, (u, y)), jnp.concatenate(parts, 1)

    found, cached = jax.device_get(run(params))
    np.testing.assert_allclose(cached, found[:, found.shape[1] - cached.shape[1] :], atol=1e-5)
    base, *changed, other = found
    for token, moved in enumerate(changed):
        np.testing.assert_array_equal(moved[: token + 1], base[: token + 1])
        assert token == task.tokens - 1 or np.abs(moved - base)[token + 1].max() > 0
    # the condition reaches every token that is not copied
    assert (np.abs(other - base).max(1)[0 if task.start else 1 :] > 0).all()


def test_guidance_laws():
    rule = jax.jit(lambda w, *passes: Guidance.of(w, "gaussian", annealed=False).apply(*passes, jnp.ones(1)))
    # a narrower weak pass counts as one as wide, by the plain rule of classifier-free guidance
    a, b, weak = np.zeros(3), np.arange(3.0), np.ones(3)
    for found, own in zip(rule(2.0, (a, b), (a, b)), (np.exp(a), b), strict=True):
        np.testing.assert_allclose(found, own)  # nothing to be pushed away from
    for narrower in (0, 1):
        scale, shift = rule(2.0, (a, b), (a - narrower, weak))
        np.testing.assert_allclose(scale, 1.0)
        np.testing.assert_allclose(shift, b + 2 * (b - weak), rtol=1e-6)
    # the density that it promises: log p = (1 + w) log p_strong - w log p_weak + constant
    w, *passes = 1.5, (np.full(3, 0.7), np.full(3, 0.2)), (np.full(3, 1.3), np.full(3, -0.4))
    found = map(np.asarray, rule(w, *((np.log(s), m) for s, m in passes)))
    score = lambda x, s, m: -(x - m) / s**2  # noqa: E731
    guided, strong, weak = (score(np.array([-1.0, 0.5, 2.0]), *one) for one in (found, *passes))
    np.testing.assert_allclose(guided, (1 + w) * strong - w * weak, rtol=1e-5)


WIDE = dataclasses.replace(TINY, width=64, depths=(1, 1), denoiser="decoder")  # two heads, and no step of the score


@functools.cache
def loss_and_samples():
    """A program (params, batch, key or keys), for one device or a mesh."""
    sample = make_sampler(WIDE, 6, {"guidance": 1.0})
    return jax.jit(lambda p, b, k: (WIDE.loss(p, b, jax.random.key(3))[0], sample(p, k)["latent"]))


def rows_of_latents():
    return {"latent": latents(WIDE, 8), "latent_std": np.full((8, 4, 4, 2), 0.1, np.float32), "label": np.arange(8) % 3}


def test_sample_i_depends_on_its_key_alone():
    """Wherever it stands and whatever else is drawn; labels come round after three."""
    key, run = jax.random.key(4), loss_and_samples()
    keys = sample_keys(key, 9)
    first, then = (run(randomised(WIDE), rows_of_latents(), keys[i : i + 6])[1] for i in (0, 3))
    np.testing.assert_allclose(first[3:], then[:3], atol=1e-5)
    assert np.abs(first[0] - first[3]).max() > 1e-3
    np.testing.assert_array_equal(*(jax.random.key_data(k) for k in (keys[:6], sample_keys(key, 6))))


@pytest.mark.devices8
def test_loss_and_samples_are_those_of_one_device():
    """On a mesh that six samples do not fill: two more are drawn, and left out."""
    params, key, mesh = randomised(WIDE), jax.random.key(4), dist.Mesh(data=2, fsdp=2, tensor=2).build()
    alone = loss_and_samples()(params, rows_of_latents(), sample_keys(key, 6))
    with dist.use(mesh):
        boxed = jax.eval_shape(WIDE.init, key)
        placed = jax.device_put(params, dist.shardings(boxed, mesh))
        loss, drawn = jax.jit(lambda *inputs: loss_and_samples().__wrapped__(*inputs))(placed, rows_of_latents(), key)
    np.testing.assert_allclose(loss, alone[0], rtol=1e-5)
    assert drawn.shape == (6, 4, 4, 2)
    np.testing.assert_allclose(drawn, alone[1], atol=1e-4)


def test_half_precision_keeps_scales_and_losses_in_float32():
    """bfloat16 activations: the loss stays near float32's."""
    half, (_, *exact, _, _) = dataclasses.replace(TINY, dtype="bfloat16"), whole("start")
    found = jax.jit(lambda p: forward(half, p, latents(TINY, 2), condition_of(TINY, 2))[:2])(randomised(TINY))
    assert found[0].dtype == found[1].dtype == jnp.float32
    want, loss = (0.5 * np.square(z).mean() - np.mean(logdet) for z, logdet in (exact, found))
    assert abs(loss - want) < 0.02
    assert loss != want


def test_the_likelihood_is_the_density_of_z_and_the_logdet():
    """Of latents without spread and noise; denoising is in float32 at the level of training."""
    task, x = dataclasses.replace(TINY, depths=(1, 1), noise=0.0, **WORDS), latents(TINY, 2)
    text, size = condition_of(task, 2), x[0].size
    batch = {"latent": x, "latent_std": np.zeros_like(x), "text": text, "null_text": text[::-1]}

    @jax.jit
    def run(params):
        return task.nll(params, batch, jax.random.split(jax.random.key(0), 2)), forward(task, params, x, text)

    found, (z, logdet, _) = run(randomised(task))
    wanted = 0.5 * (np.square(z).sum((1, 2)) + size * np.log(2 * np.pi)) - size * logdet
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert isinstance(TINY, Denoises)
    assert TINY.sigmas == (0.3, 0.3)
    half = jax.eval_shape(TINY.denoise, weights.abstract(TINY), jnp.zeros(x.shape, jnp.bfloat16), 0.3)
    assert half.dtype == jnp.float32


@pytest.mark.parametrize(
    ("task", "options", "strength"),
    [
        (TINY, {}, 1.0),
        (TINY, {"denoise": 0.5}, 0.5),
        (dataclasses.replace(TINY, noise=0.0), {}, None),
        (dataclasses.replace(TINY, denoiser="decoder"), {}, None),
    ],
)
def test_samples_end_with_a_step_of_the_score(task, options, strength, monkeypatch):
    """Of what the inverse gives, at the level of training; the step itself is compared with official numbers."""

    def step(self, params, x, sigma, condition, strength=1.0):
        return strength * sigma * x + condition[:, :1, :1]

    monkeypatch.setattr(Stack, "inverse", lambda self, params, z, *_, **__: Inverted([z, 2 * z], {}))
    monkeypatch.setattr(Stack, "denoise", step)
    keys, first = jax.random.split(jax.random.key(6), 2), np.array([1.0, 0.0]).reshape(2, 1, 1, 1)
    found = task.sample({}, keys, 2, {"label": np.array([0, -1])}, task.Sampling(**options))["latent"]
    z = np.stack([jax.random.normal(key, (4, 4, 2)) for key in keys])
    np.testing.assert_allclose(found, 2 * z if strength is None else strength * 0.3 * 2 * z + first, rtol=1e-6)


def test_a_dropped_class_is_none_and_a_dropped_caption_the_null():
    params, label = {}, jnp.array([0, 2])
    found = TINY.conditions(params, {"label": label})
    np.testing.assert_array_equal(found[:, 0], np.eye(4)[[0, 2]])
    for dropped in ({"label": jnp.array([-1, -1])}, {"latent": jnp.zeros((2, 1))}):
        np.testing.assert_array_equal(TINY.conditions(params, dropped)[:, 0], np.eye(4)[[3, 3]])
    task = VARIANTS["lm"]
    text, null = jnp.ones((2, 3, 32)), jnp.zeros((2, 3, 32))
    found = task.conditions({}, {"text": text, "null_text": null}, jnp.array([True, False]))
    np.testing.assert_array_equal(found, jnp.stack([null[0], text[0]]))
    with pytest.raises(UserError, match="null_text"):
        task.conditions({}, {"text": text})


def test_what_does_not_fit_a_sampler_is_told():
    task = VARIANTS["patch"]
    with pytest.raises(UserError, match=r"task.patch=2 does not divide latents of 4 x 5"):
        jax.eval_shape(lambda x: tokens(task, x), jnp.zeros((1, 4, 5, 2)))
    with pytest.raises(UserError, match=r"grid=1,8"):
        task.sample({}, jax.random.key(0), 1, None, task.Sampling(grid=(1, 8)))
    draw = lambda p: TINY.sample(p, jax.random.key(0), 2, None, TINY.Sampling(guidance=1.0))  # noqa: E731
    with pytest.warns(UserWarning, match="compares a pass with itself"):
        jax.eval_shape(draw, weights.abstract(TINY))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"width": 48}, "head_dim"),
        ({"latent": (4, 3), "patch": 2}, "task.latent"),
        ({"text_tokens": 3}, "one of them"),
        ({"head_dim": 16}, "head_dim=16 leaves no pairs"),
        ({"inputs": "images"}, "task.vae"),
        ({"classes": 0, "text_tokens": 3}, "text encoder"),
    ],
)
def test_bad_fields_are_named(fields, match):
    with pytest.raises(UserError, match=match):
        dataclasses.replace(TINY, **fields)


# --- decoder tuning ---------------------------------------------------------------------------------

SMALL = AutoEncoder(image=4, channels=1, latent=2, widths=(4,), layers=1, groups=2, scale=None)
TUNE = starflow.DecoderTune(vae=SMALL, width=4, stages=1, network=SMALL)


@pytest.fixture(scope="module")
def tuning():
    params = {**noise(TUNE, 0.3), "latents": {"square": jnp.float32(1.3)}}
    return params, {"image": np.random.default_rng(1).uniform(-1, 1, (4, 4, 4, 1)).astype(np.float32)}


def drawn_latent(params, image):
    """The noisy latent that a step with key 2 decodes."""
    mean, std = SMALL.encode(params, image)
    keys = jax.random.split(jax.random.key(2))
    return mean + std * jax.random.normal(keys[0], mean.shape) + 0.3 * jax.random.normal(keys[1], mean.shape)


def test_decoder_and_discriminator_have_gradients_of_their_own(tuning):
    """The discriminator's part leaves the decoder alone, and the decoder's part the discriminator."""
    params, batch = tuning
    assert set(params) == {"encoder", "decoder", "latents", "discriminator", "lecam", "features"}
    assert set(TUNE.about.held) == {"encoder", "latents", "lecam", "features"}
    alone = dataclasses.replace(TUNE, gan=0.0, feature=0.0)
    other = dataclasses.replace(TUNE, gan=5.0, square=3.0, feature=0.0)

    def squared(trained):
        latent = drawn_latent(params, batch["image"])
        return jnp.square(SMALL.decode({**params, **trained}, latent) - batch["image"]).mean()

    @jax.jit
    def gradients(trained):
        losses = [lambda p, t=t: t.loss({**params, **p}, batch, jax.random.key(2))[0] for t in (alone, other)]
        return [jax.grad(loss)(trained) for loss in (*losses, squared)]

    alone, other, want = gradients({k: params[k] for k in ("decoder", "discriminator")})
    near = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6)  # noqa: E731
    jax.tree.map(near, alone["decoder"], want["decoder"])
    # what the decoder is paid for does not reach the discriminator, and what the discriminator is paid for reaches it
    jax.tree.map(near, alone["discriminator"], other["discriminator"])
    assert max(np.abs(x).max() for x in jax.tree.leaves(alone["discriminator"])) > 1e-3
    apart = jax.tree.map(lambda a, b: np.abs(a - b).max(), alone["decoder"], other["decoder"])
    assert max(jax.tree.leaves(apart)) > 1e-4


def test_judgements_and_their_running_means(tuning):
    """Hinge and LeCam written out, with means that differ; afterwards the means have moved towards the batch."""
    params, batch = tuning
    params = {**params, "lecam": {"real": jnp.float32(0.7), "decoded": jnp.float32(-0.4)}}
    task = dataclasses.replace(TUNE, square=0.0, feature=0.0, gan=0.0, lecam=2.0)

    @jax.jit
    def both(params):
        latent = drawn_latent(params, batch["image"])
        judge = lambda x: task._judge().apply({"params": params["discriminator"]}, x)  # noqa: E731
        return task.loss(params, batch, jax.random.key(2)), judge(batch["image"]), judge(SMALL.decode(params, latent))

    (loss, metrics), real, fake = both(params)
    hinge = np.maximum(1 - real, 0).mean() + np.maximum(1 + fake, 0).mean()
    near = np.square(real + 0.4).mean() + np.square(fake - 0.7).mean()
    np.testing.assert_allclose(loss, hinge + 2 * near, rtol=1e-5)
    moved = task.after_step(params, metrics)
    np.testing.assert_allclose(moved["lecam"]["real"], 0.999 * 0.7 + 0.001 * real.mean(), rtol=1e-6)
    np.testing.assert_allclose(moved["lecam"]["decoded"], 0.999 * -0.4 + 0.001 * fake.mean(), rtol=1e-6)
    assert {k for k in params if moved[k] is not params[k]} == {"lecam"}


def test_a_missing_feature_network_is_said(tuning):
    params, batch = tuning
    with pytest.warns(UserWarning, match="feature loss is off.*task.network"):
        jax.eval_shape(dataclasses.replace(TUNE, network=None).loss, params, batch, jax.random.key(0))
    with pytest.raises(UserError, match=r"task.network: T5 has no features"):
        dataclasses.replace(TUNE, network=T5())
    with pytest.raises(UserError, match=r"task.network takes images of \[16, 16, 1\]"):
        dataclasses.replace(TUNE, network=dataclasses.replace(SMALL, image=16))
