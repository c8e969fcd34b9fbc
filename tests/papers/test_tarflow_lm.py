"""TarFlowLM: laws of its stack with randomised weights, the bound in closed form, stages, and the discrete model beside it."""

import dataclasses
import math
import re
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy
from fresh import fresh, noise

from zoo.commands import flops
from zoo.errors import UserError
from zoo.flows.inverse import Jacobi, invert
from zoo.flows.transforms import codebook_log_prob, rosenblatt_inverse
from zoo.nn import layers
from zoo.papers.tarflow_lm import DiscreteLM, Layer, TarFlowLM
from zoo.papers.tarflow_lm import model as lm

# Left to right by tokens, right to left by channels, left to right affine; two tokens a step, so channels are mixed too.
STACK = TarFlowLM(
    vocab=5,
    length=6,
    dims=2,
    patch=2,
    layers=(Layer("mixd", depth=1, components=5), Layer("mix1", depth=1, components=3), Layer("affine", depth=1)),
    width=8,
    head_dim=8,
    scan=False,
)
ONE = dataclasses.replace(STACK, patch=1, layers=STACK.layers[:1])
FLAT = dataclasses.replace(
    STACK,
    patch=1,
    layers=(
        Layer("affine", depth=1, maf=False, reverse=True),
        Layer("mix1", depth=1, components=2, maf=False),
        Layer("mixd", depth=1, components=3, tied=False),
    ),
)


@lru_cache
def moved(task, scale=0.12):
    """Randomised parameters: fresh heads are zero or nearly so, which would hide what they do."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: (x + scale * rng.normal(size=x.shape)).astype(x.dtype), jax.device_get(fresh(task)))


@lru_cache
def forward(task):
    """Compiled once for all tests: the Jacobian of the first text, all states and log p, and log p without the last state."""

    def run(params, z):
        def ahead(first):
            states, log_p = lm.forward(task.flow, params, jnp.concatenate([first[None], z[1:]]))
            return states[-1][0].ravel(), (states, log_p)

        jacobian, (states, log_p) = jax.jacfwd(ahead, has_aux=True)(z[0])
        return jacobian.reshape(z[0].size, -1), states, (log_p, lm.forward(task.flow, params, z, last=False)[1])

    return jax.jit(run)


def texts(task, n, seed=2):
    return np.random.default_rng(seed).integers(task.vocab, size=(n, task.length)).astype(np.int32)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def vectors(task, params, n, seed=3):
    """Vectors of random texts, where data live."""
    return np.asarray(jax.jit(lm.encode)(params, texts(task, n), normal(seed, n, task.length, task.dims)))


@pytest.fixture(scope="module", params=[STACK, FLAT], ids=["stack", "flat"])
def passed(request):
    """A stack with randomised weights, vectors, and the way there."""
    task = request.param
    params = moved(task)
    z = vectors(task, params, 8)
    return task, params, z, *jax.device_get(forward(task)(params, z))


def test_inverse_undoes_forward(passed):
    task, params, z, _, states, _ = passed

    @jax.jit
    def run(params, u):
        found = invert(lm.chain(task.flow, params, 8), u).states
        return found, [lm.decode(params, x) for x in (found[-1].reshape(z.shape), z)]

    found, decoded = run(params, states[-1])
    assert len(found) == len(task.layers) + 1
    for there, back in zip([z.reshape(states[0].shape), *states], found[::-1]):
        np.testing.assert_allclose(back, there, atol=2e-3)
        assert np.median(np.abs(back - there)) < 1e-4
    np.testing.assert_array_equal(*decoded)


def test_log_density_is_that_of_the_brute_force_jacobian(passed):
    """It needs not what the last layer gives."""
    *_, jacobian, states, log_p = passed
    logdet = np.linalg.slogdet(np.asarray(jacobian, np.float64))[1]
    wanted = scipy.stats.norm.logpdf(states[-1][0]).sum() + logdet
    for found in log_p:
        np.testing.assert_allclose(found[0], wanted, rtol=1e-4, atol=2e-3)


def test_a_step_depends_on_those_before_it_alone():
    """Pitfall 1 of the objective: a step that saw itself would make the bound absurdly good."""
    for reverse in (False, True):
        task = dataclasses.replace(ONE, layers=(Layer("mix1", depth=1, components=2, reverse=reverse),))
        params, z = moved(task), normal(3, 1, task.length, task.dims)

        @jax.jit
        def numbers(h, task=task, params=params):
            """What the head of every step gets from the transformer, in the order of the text."""
            inside = lm.order(task.flow, 0, h)
            features, _ = lm.apply(task.flow.contexts[0], params["layer0"]["context"], lm.shift_right(inside))
            return features[:, ::-1] if task.flow.layers[0].reverse else features

        before = numbers(z)
        for step in range(task.length):
            other = z + (np.arange(task.length) == step)[:, None].astype(np.float32)
            changed = np.abs(np.asarray(numbers(other)) - np.asarray(before)).max((0, 2)) > 0
            expected = np.arange(task.length) < step if reverse else np.arange(task.length) > step
            np.testing.assert_array_equal(changed, expected)


def test_channels_of_a_step_follow_one_another():
    params = moved(STACK)
    head, f = lm._head(STACK.flow, 1), np.ones((1, 1, STACK.width), np.float32)
    jacobian = jax.jit(jax.jacfwd(lambda v: lm.apply(head, params["layer1"]["head"], f, v)[0, 0]))(
        np.linspace(-1, 1, STACK.channels, dtype=np.float32)[None, None]
    )
    seen = np.abs(jacobian[:, :, 0, 0]).max(1) > 0
    np.testing.assert_array_equal(seen, np.tril(np.ones((STACK.channels,) * 2, bool), -1))


def test_channels_change_places_as_in_algorithm_2():
    x = np.arange(4)
    np.testing.assert_array_equal(STACK.flow.mixing(1), np.concatenate([x[0::2], x[1::2]]))
    h = normal(0, 2, STACK.steps, STACK.channels)
    for l in range(3):
        np.testing.assert_array_equal(lm.back(STACK.flow, l, lm.order(STACK.flow, l, h)), h)
    plain = dataclasses.replace(STACK, mix=False)
    np.testing.assert_array_equal(lm.order(plain.flow, 2, h), h)


# --- the bound ------------------------------------------------------------------------------------


def test_a_tied_layer_alone_bounds_by_the_discrete_model():
    """ELBO = sum_t log sum_k pi_t(k) p(k | z_t) for any sigma, and the discrete cross-entropy as sigma goes to 0 (appendix F)."""
    params, x = moved(ONE), texts(ONE, 4)
    eps = normal(5, *x.shape, ONE.dims)

    @jax.jit
    def both(params):
        z = lm.encode(params, x, eps)
        features, _ = lm.apply(ONE.flow.contexts[0], params["layer0"]["context"], lm.shift_right(z))
        log_pi = jax.nn.log_softmax(lm.apply(lm._head(ONE.flow, 0), params["layer0"]["head"], features)[:, :, 0])
        posterior = jax.nn.log_softmax(codebook_log_prob(z, *lm.codebook_of(params)))
        return lm.elbo(ONE.flow, params, x, eps), jax.nn.logsumexp(log_pi + posterior, -1).sum(1), log_pi

    for log_sigma in (-0.5, -4.9):
        codebook = {**params["codebook"], "log_scales": np.full(ONE.vocab, log_sigma, np.float32)}
        found, expected, log_pi = both({**params, "codebook": codebook})
        np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_allclose(
        found, np.take_along_axis(np.asarray(log_pi), x[..., None], -1)[..., 0].sum(1), atol=5e-3
    )


def test_parts_of_a_text_give_what_the_whole_gives(monkeypatch):
    """Large vocabularies are worked on in parts of a text."""
    params, x = moved(ONE), texts(ONE, 8)
    value = lambda p: ONE.nll(p, {"tokens": x}, jax.random.split(jax.random.key(0), 8))  # noqa: E731
    whole = jax.jit(value)(params)
    monkeypatch.setattr(layers, "ROOM", 8 * 2 * ONE.vocab)
    parts = jax.jit(lambda p: value(p))(params)
    assert "scan" in str(jax.make_jaxpr(lambda p: value(p))(params))
    np.testing.assert_allclose(parts, whole, rtol=2e-4)


def test_appended_layers_change_nothing_before_they_are_trained():
    layers = (*ONE.layers, Layer("mix1", depth=1, components=4), Layer("affine", depth=1, maf=False))
    layers = (*layers, Layer("mixd", depth=1, components=3, tied=False))
    stage1 = dataclasses.replace(ONE, layers=layers, groups=(1, 3), stage=1)
    stage2 = dataclasses.replace(stage1, stage=2)
    trained = moved(stage1)
    params = {**fresh(stage2), **trained}
    batch, rng = {"tokens": texts(ONE, 64)}, jax.random.key(1)
    before = jax.jit(stage1.loss)(trained, batch, rng)[0]
    after = jax.jit(stage2.loss)(params, batch, rng)[0]
    np.testing.assert_allclose(after, before, atol=1e-4)


def test_stages_hold_what_is_trained():
    task = dataclasses.replace(STACK, groups=(1, 2))
    assert dataclasses.replace(task, stage=1).about.held == ()
    assert dataclasses.replace(task, stage=1).flow_layers == 1
    assert dataclasses.replace(task, stage=2).about.held == ("codebook", "layer0")
    assert all(network.required for network in dataclasses.replace(task, stage=2).about.networks.values())
    assert dataclasses.replace(task, stage=2).flow_layers == 3
    assert dataclasses.replace(STACK, stage=3).about.held == ("codebook", "layer0", "layer1")
    assert set(jax.eval_shape(dataclasses.replace(STACK, stage=2).init, jax.random.key(0))) == {
        "codebook",
        "layer0",
        "layer1",
    }


# --- samples --------------------------------------------------------------------------------------


def test_a_sample_depends_on_its_key_alone():
    params, rng = moved(STACK), jax.random.key(4)
    keys = jax.random.split(rng, 8)
    draw = jax.jit(lambda p, keys: STACK.sample(p, keys, 8, None, STACK.Sampling(passes=True)))
    drawn, turned = draw(params, keys), draw(params, keys[::-1])
    np.testing.assert_array_equal(turned["tokens"], drawn["tokens"][::-1])
    assert len(set(map(bytes, np.asarray(drawn["tokens"])))) > 1
    assert drawn["passes"].shape == (8, 4, STACK.length)
    assert drawn["latents"].shape == (8, 4, STACK.length, STACK.dims)
    np.testing.assert_array_equal(drawn["passes"][:, -1], drawn["tokens"])
    # the passes are the states that the forward pass goes through
    _, states, _ = forward(STACK)(params, drawn["latents"][:, -1])
    for state, latents in zip(states, np.moveaxis(np.asarray(drawn["latents"]), 1, 0)[-2::-1]):
        np.testing.assert_allclose(state.reshape(latents.shape), latents, atol=5e-3)


def test_a_text_is_rewritten_by_its_strength():
    params, x = moved(ONE), texts(ONE, 256)
    # apart, so that what comes back is decoded to the token it was; all as likely as they are in these texts
    codebook = {"means": 3 * params["codebook"]["means"], "log_scales": np.full(ONE.vocab, math.log(0.3), np.float32)}
    params = {
        **params,
        "codebook": codebook,
        "layer0": {**params["layer0"], "head": jax.tree.map(np.zeros_like, params["layer0"]["head"])},
    }
    rewrite = jax.jit(
        lambda p, strength: ONE.sample(
            p, jax.random.key(0), 256, {"tokens": x}, ONE.Sampling(strength=strength, passes=True)
        )
    )
    drawn = [rewrite(params, strength) for strength in (0.0, 0.3, 1.0)]
    same = [(np.asarray(one["tokens"]) == x).mean() for one in drawn]
    assert same[0] == 1.0
    assert same[0] > same[1] > same[2]
    # what is rewritten is as the model's own: its noise is N(0, I)
    begun = np.asarray(drawn[1]["latents"][:, 0]).reshape(-1, ONE.dims)
    np.testing.assert_allclose(np.cov(begun.T), np.eye(ONE.dims), atol=0.1)


def test_a_vector_that_is_not_finite_is_no_token():
    params = moved(ONE)
    z = vectors(ONE, params, 1).copy()
    z[0, 2, 1] = np.nan
    np.testing.assert_array_equal(jax.jit(lm.decode)(params, z)[0] < 0, np.arange(ONE.length) == 2)


def test_one_channel_has_nobody_to_tell_and_sweeps_are_an_inverse():
    task = dataclasses.replace(ONE, dims=1, layers=(Layer("mix1", depth=1, components=2),))
    params = moved(task)
    z = vectors(task, params, 4)

    @jax.jit
    def run(params):
        u = lm.forward(task.flow, params, z)[0][-1]
        return invert(lm.chain(task.flow, params, 4), u, Jacobi(unconverged="keep"))

    swept = run(params)
    np.testing.assert_allclose(swept.states[-1], z, atol=2e-3)
    assert (swept.report["sweeps"] > 1).all()


@pytest.mark.parametrize("layer", [ONE.layers[0], Layer("mix1", depth=1, components=3)], ids=["mixd", "mix1"])
def test_drawing_components_is_the_distribution_of_the_inverse(layer):
    """Quantiles of two vectors and what their numbers have to do with one another, by both ways."""
    task = dataclasses.replace(ONE, layers=(layer,), length=2)
    params, n = moved(task), 2_000
    z = normal(0, n, task.steps, 2 * task.channels)

    @jax.jit
    def both(params):
        given = (True, z), (False, z[..., : task.channels])
        return [invert(lm.chain(task.flow, params, n, fresh=fresh), u).states[-1] for fresh, u in given]

    drawn, exact = both(params)
    ways = [np.asarray(x).reshape(n, -1) for x in (drawn, exact)]
    assert np.abs(ways[0] - ways[1]).max() > 0.1
    quantiles = [np.percentile(x, [10, 25, 50, 75, 90], axis=0) for x in ways]
    np.testing.assert_allclose(*quantiles, atol=0.25)
    above = [x > quantiles[1][2] for x in ways]  # how often two numbers are large together
    np.testing.assert_allclose(*(np.einsum("ni,nj->ij", x, x, dtype=float) / n for x in above), atol=0.05)


def test_only_the_likeliest_components_are_kept():
    """As if the logits of all others were minus infinity."""
    params, n = moved(ONE), 64
    u, f = normal(0, n, 1, ONE.channels), normal(1, n, 1, ONE.width)
    twice = np.concatenate([0 * u, u], -1)

    @jax.jit
    def run(params, u, f):
        solver = lambda *how: lm._solver(ONE.flow, params, 0, *how)  # noqa: E731
        logits = lm.apply(lm._head(ONE.flow, 0), params["layer0"]["head"], f)[:, :, 0]
        kept = logits >= jnp.sort(logits)[..., -3:-2]
        masked = jax.nn.log_softmax(jnp.where(kept, logits, -jnp.inf))
        drawn = [solver(True, temperature, top)(twice, f) for temperature, top in ((1.0, 1), (1e-5, None))]
        return solver(False, 1.0, 3)(u, f), rosenblatt_inverse(u, masked, *lm.codebook_of(params)), logits, drawn

    found, wanted, logits, drawn = jax.device_get(run(params, u, f))
    np.testing.assert_allclose(found, wanted, atol=1e-3, rtol=1e-3)
    every = [
        str(jax.make_jaxpr(lambda p, t=top: lm._solver(ONE.flow, p, 0, False, 1.0, t)(u, f))(params))
        for top in (ONE.vocab, None)
    ]
    assert every[0] == every[1]
    # and where components are drawn, nothing but these is, which a low temperature comes to
    likeliest = params["codebook"]["means"][logits[:, 0].argmax(-1)]
    for one in drawn:
        np.testing.assert_allclose(one[:, 0], likeliest, rtol=1e-6)


# --- the discrete model ---------------------------------------------------------------------------


def test_the_discrete_model_samples_what_it_scores():
    """Its cached sampler picks what the uncached network's logits say for the same noise."""
    task = DiscreteLM(vocab=5, length=6, width=8, depth=2, head_dim=8)
    params, n, rng = noise(task, 0.4), 4, jax.random.key(0)
    drawn = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(rng, i), (6, 1)))

    @jax.jit
    def run(params):
        tokens = task.sample(params, rng, n)["tokens"]
        features, _ = lm.apply(task._context(), params["context"], lm.shift_right(params["embedding"]["table"][tokens]))
        log_pi = jax.nn.log_softmax(lm.apply(task._head(), params["head"], features)[:, :, 0])
        picked = lm.pick(log_pi, drawn(jnp.arange(n))[..., 0])
        return tokens, picked, task.nll(params, {"tokens": tokens}, rng), log_pi

    tokens, picked, nll, log_pi = jax.device_get(run(params))
    np.testing.assert_array_equal(picked, tokens)
    np.testing.assert_allclose(nll, -np.take_along_axis(log_pi, tokens[..., None], -1)[..., 0].sum(1), rtol=1e-4)


def test_picks_follow_their_weights():
    weights = np.array([0.5, 0.0, 0.2, 0.3], np.float32)
    *picks, last = np.asarray(
        jax.jit(lambda u: lm.pick(jnp.log(weights), u))(np.append(normal(0, 20_000), np.float32(9)))
    )
    np.testing.assert_allclose(np.bincount(picks, minlength=4) / 20_000, weights, atol=0.015)
    assert last == 3


def test_flops_are_those_of_the_traced_loss():
    """But for the half of attention that the mask hides, and the smaller products of the heads."""
    for task in (ONE, DiscreteLM(vocab=5, length=6, width=8, depth=2, head_dim=8, scan=False)):
        depth = task.layers[0].depth if task is ONE else task.depth
        batch = {"tokens": jnp.zeros((1, task.length), jnp.int32)}
        traced = jax.make_jaxpr(task.nll)(jax.eval_shape(lambda t=task: fresh(t)), batch, jax.random.key(0))
        hidden = 2 * depth * task.length**2 * task.width
        np.testing.assert_allclose(task.flops() / 3, flops.count(traced) - hidden, rtol=0.01)
    held = dataclasses.replace(STACK, stage=3)
    assert STACK.flops() / 3 < held.flops() < STACK.flops()


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"patch": 4}, "task.patch=4 does not divide task.length=6"),
        ({"layers": (Layer("mixd", components=4),)}, "task.layers.0.components=4"),
        ({"stage": 4}, "task.stage=4 is no stage"),
        ({"groups": (2,)}, "task.groups=(2,)"),
        ({"patch": 3, "dims": 1}, "task.mix"),
        ({"head_dim": 3, "width": 6}, "task.head_dim=3"),
    ],
)
def test_mistakes_name_the_field(fields, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        dataclasses.replace(STACK, **fields)


@pytest.mark.parametrize("options", [{"temperature": 0.5}, {"top": 2}])
def test_options_of_layers_that_there_are_not(options):
    task = dataclasses.replace(STACK, layers=STACK.layers[1:])
    with pytest.raises(UserError, match="use shrink="):
        task.sample({}, jax.random.key(0), 1, None, task.Sampling(**options))


def test_predictions_of_the_discrete_model_are_its_likelihood():
    task = DiscreteLM(vocab=5, length=6, width=8, depth=1, head_dim=8, scan=False)
    params, tokens = noise(task, 0.5), texts(task, 4)
    other = np.where(np.arange(task.length) == 2, (tokens + 1) % task.vocab, tokens)

    @jax.jit
    def run(params):
        logs, changed = jnp.split(task.predict(params, np.concatenate([tokens, other])), 2)
        soft = task.predict(params, np.eye(5, dtype=np.float32)[tokens])
        return logs, changed, soft, task.nll(params, {"tokens": tokens})

    logs, changed, soft, nll = jax.device_get(run(params))
    np.testing.assert_allclose(np.exp(logs).sum(-1), 1, rtol=1e-5)
    own = np.take_along_axis(logs, tokens[..., None], -1)[..., 0]
    np.testing.assert_allclose(-own.sum(1), nll, rtol=1e-5)
    moved_by = np.abs(changed - logs).max((0, 2))
    assert (moved_by[:3] == 0).all()
    assert (moved_by[3:] > 0).all()
    np.testing.assert_allclose(soft, logs, atol=1e-5)
