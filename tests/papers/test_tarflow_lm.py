"""TarFlowLM: laws of its stack with randomised weights, the bound in closed form, stages, and the discrete model beside it."""

import dataclasses
import math
import re
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fresh import fresh

from zoo.commands import flops
from zoo.errors import UserError
from zoo.flows.inverse import invert
from zoo.flows.transforms import codebook_log_prob, normal_log_prob, rosenblatt_inverse
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
    return jax.tree.map(lambda x: x + jnp.asarray(scale * rng.normal(size=x.shape), x.dtype), fresh(task))


@lru_cache
def forward(task):
    """Compiled once for all tests: all states and log p, and log p without the last state."""

    def both(params, z):
        states, log_p = lm.forward(task.flow, params, z)
        return states, (log_p, lm.forward(task.flow, params, z, last=False)[1])

    return jax.jit(both)


def texts(task, n, seed=2):
    return jax.random.randint(jax.random.key(seed), (n, task.length), 0, task.vocab)


def vectors(task, params, n, seed=3):
    """Vectors of random texts, where data live."""
    return lm.encode(params, texts(task, n), jax.random.normal(jax.random.key(seed), (n, task.length, task.dims)))


@pytest.fixture(scope="module", params=[STACK, FLAT], ids=["stack", "flat"])
def passed(request):
    """A stack with randomised weights, vectors, and the way there."""
    task = request.param
    params = moved(task)
    z = vectors(task, params, 8)
    states, log_p = forward(task)(params, z)
    return task, params, z, states, log_p


def test_inverse_undoes_forward(passed):
    task, params, z, states, _ = passed
    found = jax.jit(lambda p, u: invert(lm.chain(task.flow, p, 8), u))(params, states[-1])
    assert len(found.states) == len(task.layers) + 1
    for there, back in zip([z.reshape(states[0].shape), *states], found.states[::-1]):
        np.testing.assert_allclose(back, there, atol=2e-3)
        assert np.median(np.abs(back - there)) < 1e-4
    np.testing.assert_array_equal(lm.decode(params, found.states[-1].reshape(z.shape)), lm.decode(params, z))


def test_log_density_is_that_of_the_brute_force_jacobian(passed):
    """It needs not what the last layer gives."""
    task, params, z, states, log_p = passed

    @jax.jit
    def jacobian(z):
        return jax.jacfwd(lambda flat: lm.forward(task.flow, params, flat.reshape(1, *z.shape))[0][-1].ravel())(
            z.ravel()
        )

    for i, short in ((0, False), (1, True)):
        logdet = np.linalg.slogdet(np.asarray(jacobian(z[i]), np.float64))[1]
        wanted = normal_log_prob(states[-1][i]).sum() + logdet
        np.testing.assert_allclose(log_p[short][i], wanted, rtol=1e-4, atol=2e-3)


def test_a_step_depends_on_those_before_it_alone():
    """Pitfall 1 of the objective: a step that saw itself would make the bound absurdly good."""
    for reverse in (False, True):
        task = dataclasses.replace(ONE, layers=(Layer("mix1", depth=1, components=2, reverse=reverse),))
        params, z = moved(task), jax.random.normal(jax.random.key(3), (1, task.length, task.dims))

        @jax.jit
        def numbers(h, task=task, params=params):
            """What the head of every step gets from the transformer, in the order of the text."""
            inside = lm.order(task.flow, 0, h)
            features, _ = lm.apply(task.flow.contexts[0], params["layer0"]["context"], lm.shift_right(inside))
            return features[:, ::-1] if task.flow.layers[0].reverse else features

        before = numbers(z)
        for step in range(task.length):
            changed = np.abs(numbers(z.at[:, step].add(1.0)) - before).max((0, 2)) > 0
            expected = np.arange(task.length) < step if reverse else np.arange(task.length) > step
            np.testing.assert_array_equal(changed, expected)


def test_channels_of_a_step_follow_one_another():
    params = moved(STACK)
    head, f = lm._head(STACK.flow, 1), jnp.ones((1, 1, STACK.width))
    jacobian = jax.jit(jax.jacfwd(lambda v: lm.apply(head, params["layer1"]["head"], f, v)[0, 0]))(
        jnp.linspace(-1, 1, STACK.channels)[None, None]
    )
    seen = np.abs(jacobian[:, :, 0, 0]).max(1) > 0
    np.testing.assert_array_equal(seen, np.tril(np.ones((STACK.channels,) * 2, bool), -1))


def test_channels_change_places_as_in_algorithm_2():
    x = np.arange(4)
    np.testing.assert_array_equal(STACK.flow.mixing(1), np.concatenate([x[0::2], x[1::2]]))
    h = jax.random.normal(jax.random.key(0), (2, STACK.steps, STACK.channels))
    for l in range(3):
        np.testing.assert_array_equal(lm.back(STACK.flow, l, lm.order(STACK.flow, l, h)), h)
    plain = dataclasses.replace(STACK, mix=False)
    np.testing.assert_array_equal(lm.order(plain.flow, 2, h), h)


# --- the bound ------------------------------------------------------------------------------------


def test_a_tied_layer_alone_bounds_by_the_discrete_model():
    """ELBO = sum_t log sum_k pi_t(k) p(k | z_t) for any sigma, and the discrete cross-entropy as sigma goes to 0 (appendix F)."""
    params, x = moved(ONE), texts(ONE, 4)
    eps = jax.random.normal(jax.random.key(5), (*x.shape, ONE.dims))

    @jax.jit
    def both(params):
        z = lm.encode(params, x, eps)
        features, _ = lm.apply(ONE.flow.contexts[0], params["layer0"]["context"], lm.shift_right(z))
        log_pi = jax.nn.log_softmax(lm.apply(lm._head(ONE.flow, 0), params["layer0"]["head"], features)[:, :, 0])
        posterior = jax.nn.log_softmax(codebook_log_prob(z, *lm.codebook_of(params)))
        return lm.elbo(ONE.flow, params, x, eps), jax.nn.logsumexp(log_pi + posterior, -1).sum(1), log_pi

    for log_sigma in (-0.5, -4.9):
        codebook = {**params["codebook"], "log_scales": jnp.full(ONE.vocab, log_sigma)}
        found, expected, log_pi = both({**params, "codebook": codebook})
        np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_allclose(found, jnp.take_along_axis(log_pi, x[..., None], -1)[..., 0].sum(1), atol=5e-3)


def test_parts_of_a_text_give_what_the_whole_gives(monkeypatch):
    """Large vocabularies are worked on in parts of a text."""
    params, x = moved(ONE), texts(ONE, 8)
    value = jax.value_and_grad(lambda p: ONE.loss(p, {"tokens": x}, jax.random.key(0))[0])
    whole = jax.jit(value)(params)
    monkeypatch.setattr(layers, "ROOM", 8 * 2 * ONE.vocab)
    parts = jax.jit(lambda p: value(p))(params)
    assert "scan" in str(jax.make_jaxpr(lambda p: ONE.loss(p, {"tokens": x}, jax.random.key(0)))(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5), whole, parts)


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
    keys = jax.vmap(lambda i: jax.random.fold_in(rng, i))(jnp.arange(8))
    draw = jax.jit(lambda p, keys: STACK.sample(p, keys, 8, None, STACK.Sampling(passes=True)))
    drawn, turned = draw(params, keys), draw(params, keys[::-1])
    np.testing.assert_array_equal(turned["tokens"], drawn["tokens"][::-1])
    assert len(set(map(bytes, np.asarray(drawn["tokens"])))) > 1
    assert drawn["passes"].shape == (8, 4, STACK.length)
    assert drawn["latents"].shape == (8, 4, STACK.length, STACK.dims)
    np.testing.assert_array_equal(drawn["passes"][:, -1], drawn["tokens"])
    # the passes are the states that the forward pass goes through
    states, _ = forward(STACK)(params, drawn["latents"][:, -1])
    for state, latents in zip(states, np.moveaxis(np.asarray(drawn["latents"]), 1, 0)[-2::-1]):
        np.testing.assert_allclose(state.reshape(latents.shape), latents, atol=5e-3)


def test_a_text_is_rewritten_by_its_strength():
    params, x = moved(ONE), texts(ONE, 512)
    # apart, so that what comes back is decoded to the token it was; all as likely as they are in these texts
    codebook = {"means": 3 * params["codebook"]["means"], "log_scales": jnp.full(ONE.vocab, math.log(0.3))}
    params = {
        **params,
        "codebook": codebook,
        "layer0": {**params["layer0"], "head": jax.tree.map(jnp.zeros_like, params["layer0"]["head"])},
    }
    rewrite = jax.jit(
        lambda p, strength: ONE.sample(
            p, jax.random.key(0), 512, {"tokens": x}, ONE.Sampling(strength=strength, passes=True)
        )
    )
    drawn = [rewrite(params, strength) for strength in (0.0, 0.3, 1.0)]
    same = [float((one["tokens"] == x).mean()) for one in drawn]
    assert same[0] == 1.0
    assert same[0] > same[1] > same[2]
    # what is rewritten is as the model's own: its noise is N(0, I)
    noise = np.asarray(drawn[1]["latents"][:, 0]).reshape(-1, ONE.dims)
    np.testing.assert_allclose(np.cov(noise.T), np.eye(ONE.dims), atol=0.1)


def test_a_vector_that_is_not_finite_is_no_token():
    params = moved(ONE)
    z = vectors(ONE, params, 1).at[0, 2, 1].set(jnp.nan)
    np.testing.assert_array_equal(lm.decode(params, z)[0] < 0, np.arange(ONE.length) == 2)


def test_one_channel_has_nobody_to_tell_and_sweeps_are_the_sequential_inverse():
    task = dataclasses.replace(ONE, dims=1, layers=(Layer("mix1", depth=1, components=2),))
    params = moved(task)
    z = vectors(task, params, 4)
    ways = jax.jit(lambda p, u: [invert(lm.chain(task.flow, p, 4), u, way) for way in ("sequential", "jacobi")])
    found, swept = ways(params, jax.jit(lambda p: lm.forward(task.flow, p, z)[0][-1])(params))
    np.testing.assert_allclose(found.states[-1], z, atol=2e-3)
    np.testing.assert_allclose(swept.states[-1], z, atol=2e-3)
    assert (swept.report["sweeps"] > 1).all()


@pytest.mark.parametrize("layer", [ONE.layers[0], Layer("mix1", depth=1, components=3)], ids=["mixd", "mix1"])
def test_drawing_components_is_the_distribution_of_the_inverse(layer):
    """Quantiles of two vectors and what their numbers have to do with one another, by both ways."""
    task = dataclasses.replace(ONE, layers=(layer,), length=2)
    params, n = moved(task), 4_000
    noise = jax.random.normal(jax.random.key(0), (n, task.steps, 2 * task.channels))
    drawn = jax.jit(lambda p: invert(lm.chain(task.flow, p, n, fresh=True), noise).states[-1])(params)
    exact = jax.jit(lambda p: invert(lm.chain(task.flow, p, n), noise[..., : task.channels]).states[-1])(params)
    ways = [np.asarray(x).reshape(n, -1) for x in (drawn, exact)]
    assert np.abs(ways[0] - ways[1]).max() > 0.1
    quantiles = [np.percentile(x, [10, 25, 50, 75, 90], axis=0) for x in ways]
    np.testing.assert_allclose(*quantiles, atol=0.25)
    above = [x > quantiles[1][2] for x in ways]  # how often two numbers are large together
    np.testing.assert_allclose(*(np.einsum("ni,nj->ij", x, x, dtype=float) / n for x in above), atol=0.05)


def test_only_the_likeliest_components_are_kept():
    """As if the logits of all others were minus infinity."""
    params, n = moved(ONE), 64
    u = jax.random.normal(jax.random.key(0), (n, 1, ONE.channels))
    f = jax.random.normal(jax.random.key(1), (n, 1, ONE.width))
    solve = lambda top: jax.jit(lm._solver(ONE.flow, params, 0, False, 1.0, top))(u, f)  # noqa: E731
    logits = lm.apply(lm._head(ONE.flow, 0), params["layer0"]["head"], f)[:, :, 0]
    kept = logits >= jnp.sort(logits)[..., -3:-2]
    masked = jax.nn.log_softmax(jnp.where(kept, logits, -jnp.inf))
    np.testing.assert_allclose(
        solve(3), jax.jit(rosenblatt_inverse)(u, masked, *lm.codebook_of(params)), atol=1e-3, rtol=1e-3
    )
    np.testing.assert_array_equal(solve(ONE.vocab), solve(None))
    # and where components are drawn, nothing but these is
    likeliest = lm.codebook_of(params)[0][logits[:, 0].argmax(-1)]
    for temperature, top in ((1.0, 1), (1e-5, None)):  # which a low temperature comes to
        drawn = jax.jit(lm._solver(ONE.flow, params, 0, True, temperature, top))(jnp.concatenate([0 * u, u], -1), f)
        np.testing.assert_allclose(drawn[:, 0], likeliest, rtol=1e-6)


# --- the discrete model ---------------------------------------------------------------------------


def test_the_discrete_model_samples_what_it_scores():
    """Its cached sampler picks what the uncached network's logits say for the same noise."""
    task = DiscreteLM(vocab=5, length=6, width=8, depth=2, head_dim=8)
    params, n, rng = moved(task), 4, jax.random.key(0)
    tokens = jax.jit(lambda p: task.sample(p, rng, n)["tokens"])(params)

    @jax.jit
    def uncached(params):
        x = params["embedding"]["table"][tokens]
        features, _ = lm.apply(task._context(), params["context"], lm.shift_right(x))
        return jax.nn.log_softmax(lm.apply(task._head(), params["head"], features)[:, :, 0])

    log_pi = uncached(params)
    noise = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(rng, i), (6, 1)))(jnp.arange(n))[..., 0]
    np.testing.assert_array_equal(lm.pick(log_pi, noise), tokens)
    nll = jax.jit(task.nll)(params, {"tokens": tokens}, rng)
    np.testing.assert_allclose(nll, -jnp.take_along_axis(log_pi, tokens[..., None], -1)[..., 0].sum(1), rtol=1e-4)


def test_picks_follow_their_weights():
    weights = jnp.array([0.5, 0.0, 0.2, 0.3])
    picks = lm.pick(jnp.log(weights), jax.random.normal(jax.random.key(0), (20_000,)))
    np.testing.assert_allclose(np.bincount(picks, minlength=4) / 20_000, weights, atol=0.015)
    assert int(lm.pick(jnp.log(weights), jnp.array(9.0))) == 3


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
    params, tokens = moved(task, 0.5), texts(task, 4)
    predict = jax.jit(task.predict)
    logs = predict(params, tokens)
    np.testing.assert_allclose(jnp.exp(logs).sum(-1), 1, rtol=1e-5)
    own = jnp.take_along_axis(logs, tokens[..., None], -1)[..., 0]
    np.testing.assert_allclose(-own.sum(1), task.nll(params, {"tokens": tokens}), rtol=1e-5)
    changed = np.abs(predict(params, tokens.at[:, 2].add(1).clip(max=4)) - logs).max((0, 2))
    assert (changed[:3] == 0).all()
    assert (changed[3:] > 0).all()
    np.testing.assert_allclose(task.predict(params, jax.nn.one_hot(tokens, 5)), logs, atol=1e-5)
