"""Laws of couplings of mixtures: exact inverses, exact densities, exact derivatives, also where densities underflow."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from zoo.flows import transforms
from zoo.flows.transforms import (
    affine,
    affine_inverse,
    codebook_log_prob,
    log_tails,
    mixture,
    mixture_inverse,
    mixture_log_prob,
    normal_log_prob,
    probit,
    rosenblatt,
    rosenblatt_inverse,
)

N, K, D = 256, 27, 5  # every test has arrays of these sizes, so that all share what is compiled
FORWARD, INVERSE, LOG_PROB = jax.jit(mixture), jax.jit(mixture_inverse), jax.jit(mixture_log_prob)
TOKENS, TOKENS_INVERSE, CODEBOOK = jax.jit(rosenblatt), jax.jit(rosenblatt_inverse), jax.jit(codebook_log_prob)


def pulled(function):
    """The gradient of the outputs weighed by the first argument, with respect to all arguments of `function`."""
    return jax.jit(lambda weights, *arguments: jax.vjp(function, *arguments)[1](weights))


SLOPES = {compiled: pulled(function) for compiled, function in (
    (FORWARD, mixture), (INVERSE, mixture_inverse), (TOKENS, rosenblatt), (TOKENS_INVERSE, rosenblatt_inverse),
    (CODEBOOK, codebook_log_prob),
)}  # fmt: skip


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield request.param


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def normalised(logits):
    return logits - scipy.special.logsumexp(logits, -1, keepdims=True)


def numbers(dtype, n=N, seed=0):
    """z [n] from random mixtures, and log-weights, means and log-scales [n, K] of these."""
    rng = np.random.default_rng(seed)
    log_weights, means = normalised(1.5 * rng.normal(size=(n, K))), rng.normal(size=(n, K))
    log_scales = math.log(0.3) + 0.5 * rng.normal(size=(n, K))
    rows, k = np.arange(n), (log_weights + rng.gumbel(size=(n, K))).argmax(-1)
    z = means[rows, k] + np.exp(log_scales[rows, k]) * rng.normal(size=n)
    return tuple(np.asarray(x, dtype) for x in (z, log_weights, means, log_scales))


def vectors(dtype, n=N, seed=0):
    """z [n, D] from mixtures of one random codebook, log-weights [n, K], means [K, D], log-scales [K]."""
    rng = np.random.default_rng(seed)
    log_weights = normalised(1.5 * rng.normal(size=(n, K)))
    means, log_scales = rng.normal(size=(K, D)), math.log(0.3) + 0.3 * rng.normal(size=K)
    k = (log_weights + rng.gumbel(size=(n, K))).argmax(-1)
    z = means[k] + np.exp(log_scales[k])[:, None] * rng.normal(size=(n, D))
    return tuple(np.asarray(x, dtype) for x in (z, log_weights, means, log_scales))


def worst(a, b):
    return float(np.abs(a - b).max())


def test_tails_and_probit_keep_their_digits(dtype):
    x = np.concatenate([np.linspace(-30, 30, 2001), -np.logspace(1, 4, 500)]).astype(dtype)
    eps = 64 * float(jnp.finfo(dtype).eps)
    for mine, sign in zip(jax.jit(log_tails)(x), (1, -1)):
        # What counts is the error of a sum with other logarithms: absolute where they are small.
        np.testing.assert_allclose(mine, scipy.special.log_ndtr(sign * np.float64(x)), rtol=eps, atol=eps)
    y = -np.logspace(math.log10(math.log(2)), 7, 2001).astype(dtype)
    x, slope = jax.jit(jax.vmap(jax.value_and_grad(probit)))(y)
    np.testing.assert_allclose(scipy.special.log_ndtr(np.float64(x)), y, rtol=eps)
    mills = math.sqrt(math.pi / 2) * scipy.special.erfcx(-np.float64(x) * math.sqrt(0.5))  # Phi(x) / phi(x)
    np.testing.assert_allclose(slope, mills, rtol=1e-5 if dtype == "float32" else 1e-11)


@pytest.mark.parametrize("law", ["number", "vector"])
def test_what_went_in_comes_back(dtype, law):
    forward, inverse = (FORWARD, INVERSE) if law == "number" else (TOKENS, TOKENS_INVERSE)
    z, *parameters = numbers(dtype) if law == "number" else vectors(dtype)
    u, log_p = forward(z, *parameters)
    back = inverse(u, *parameters)
    assert u.dtype == log_p.dtype == back.dtype == dtype
    assert u.shape == back.shape == z.shape
    assert log_p.shape == (N,)
    z_bar, u_bar = (5e-4, 1e-5) if dtype == "float32" else (1e-10, 1e-10)
    assert np.quantile(np.abs(back - z), 0.999) < z_bar
    assert worst(forward(back, *parameters)[0], u) < u_bar
    noise = np.random.default_rng(1).normal(size=z.shape).astype(dtype)
    assert worst(forward(inverse(noise, *parameters), *parameters)[0], noise) < u_bar
    if law == "number":
        np.testing.assert_allclose(log_p, LOG_PROB(z, *parameters), rtol=0, atol=u_bar)


def test_several_points_at_a_time_find_the_same_roots(monkeypatch):
    """As accelerators look for them."""
    z, *parameters = vectors("float32")
    u, _ = TOKENS(z, *parameters)
    monkeypatch.setattr(transforms, "probes", lambda numbers: 15)
    back = jax.jit(lambda *x: rosenblatt_inverse(*x))(u, *parameters)
    assert np.quantile(np.abs(back - z), 0.999) < 5e-4
    assert worst(TOKENS(back, *parameters)[0], u) < 1e-5
    assert "length=7" in str(jax.make_jaxpr(lambda *x: rosenblatt_inverse(*x))(u, *parameters))


def test_log_det_is_that_of_the_jacobian(dtype):
    bar = 1e-4 if dtype == "float32" else 1e-10
    z, *parameters = numbers(dtype)
    u, log_p = FORWARD(z, *parameters)
    slope = SLOPES[FORWARD]((np.ones_like(u), np.zeros_like(u)), z, *parameters)[0]
    assert worst(log_p - normal_log_prob(u), np.log(slope)) < bar

    z, log_weights, *codebook = vectors(dtype)
    u, log_p = TOKENS(z, log_weights, *codebook)
    rows = [np.broadcast_to(row, (N, D)).astype(dtype) for row in np.eye(D)]
    jacobian = np.stack([SLOPES[TOKENS]((row, 0 * log_p), z, log_weights, *codebook)[0] for row in rows], 1)
    assert worst(np.triu(jacobian, 1), 0) == 0
    sign, log_det = np.linalg.slogdet(jacobian)
    assert (sign > 0).all()
    assert worst(log_p - normal_log_prob(u).sum(-1), log_det) < bar
    joint = scipy.special.logsumexp(log_weights + CODEBOOK(z, *codebook), -1)
    assert worst(joint, log_p) < bar


def test_far_out_everything_stays_finite(dtype):
    z = np.linspace(-60, 60, N, dtype=dtype)
    _, log_weights, means, log_scales = (np.tile(x[:1], (N, 1)) for x in numbers(dtype))
    log_weights[:, 0] = -math.inf  # one is switched off
    log_weights = normalised(log_weights)
    parameters = log_weights, means, log_scales
    u, log_p = FORWARD(z, *parameters)
    assert np.abs(u).max() > 30
    assert np.isfinite(u).all()
    assert np.isfinite(log_p).all()
    assert (np.diff(u) > 0).all()
    back = INVERSE(u, *parameters)
    bar = 1e-5 if dtype == "float32" else 1e-10
    np.testing.assert_allclose(back, z, rtol=bar, atol=bar)
    np.testing.assert_allclose(FORWARD(back, *parameters)[0], u, rtol=bar, atol=bar)
    # All derivatives too, and the switched-off component has none.
    ones = np.ones_like(u)
    for slopes in (SLOPES[FORWARD]((ones, ones), z, *parameters), SLOPES[INVERSE](ones, u, *parameters)):
        assert all(np.isfinite(slope).all() for slope in slopes)
        assert all((slope[:, 0] == 0).all() for slope in slopes[2:])

    z = np.stack([z, -z, z, z / 2, np.ones_like(z)], -1)
    codebook = vectors(dtype)[2:]
    u, log_p = TOKENS(z, log_weights, *codebook)
    assert np.isfinite(u).all()
    assert np.isfinite(log_p).all()
    back = TOKENS_INVERSE(u, log_weights, *codebook)
    np.testing.assert_allclose(TOKENS(back, log_weights, *codebook)[0], u, rtol=bar, atol=bar)
    slopes = SLOPES[TOKENS]((np.ones_like(u), np.ones_like(log_p)), z, log_weights, *codebook)
    assert all(np.isfinite(slope).all() for slope in slopes)


def test_gaps_between_components_give_no_nan():
    """All of the gap [-9.5, 9.5] is u = 0 to float32: z is anything in it, and its slope is held."""
    means = np.where(np.arange(K) < 1, -10, 10) + np.zeros((N, K))
    log_weights = np.log(np.where(means < 0, 0.5, 0.5 / (K - 1)))
    parameters = [np.float32(x) for x in (log_weights, means, np.full((N, K), math.log(0.02)))]
    u = np.append(np.linspace(-0.5, 0.5, N - 1), 0).astype("float32")
    z = INVERSE(u, *parameters)
    assert np.abs(z).max() < 10.1
    np.testing.assert_allclose(z[np.array([0, N - 2])], [-10, 10], atol=0.02)
    assert all(np.isfinite(slope).all() for slope in SLOPES[INVERSE](np.ones_like(u), u, *parameters))


@pytest.mark.parametrize(
    "law, way",
    [
        ("number", "forward"),
        ("number", "inverse"),
        ("vector", "forward"),
        ("vector", "inverse"),
        ("codebook", "forward"),
    ],
)
def test_gradients_are_those_of_differences(double, law, way):
    """Argument for argument along random directions. Log-weights move normalised: only there is the map defined."""
    arguments = numbers("float64") if law == "number" else vectors("float64")
    forward, inverse = (FORWARD, INVERSE) if law == "number" else (TOKENS, TOKENS_INVERSE)
    function = {"forward": forward, "inverse": inverse}[way]
    if law == "codebook":
        function, arguments = CODEBOOK, (arguments[0], *arguments[2:])
    if way == "inverse":
        arguments = (forward(*arguments)[0], *arguments[1:])
    rng = np.random.default_rng(1)
    weights = jax.tree.map(lambda x: rng.normal(size=x.shape) / N, function(*arguments))
    slopes = jax.tree.map(np.asarray, SLOPES[function](weights, *arguments))
    for i, (x, slope) in enumerate(zip(arguments, slopes)):
        direction, step = rng.normal(size=x.shape), 1e-6
        ends = []
        for end in (x + step * direction, x - step * direction):
            moved = normalised(end) if i == 1 and law != "codebook" else end
            outputs = function(*arguments[:i], moved, *arguments[i + 1 :])
            ends.append(
                sum((w * np.asarray(o)).sum() for w, o in zip(jax.tree.leaves(weights), jax.tree.leaves(outputs)))
            )
        if i == 1 and law != "codebook":
            slope = slope - np.exp(x) * slope.sum(-1, keepdims=True)
        true = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose((slope * direction).sum(), true, rtol=1e-5, atol=1e-7)


def test_samples_become_noise():
    """Numbers of one token depend on each other, which the map of whole tokens removes."""
    codebook, parts = vectors("float32", seed=3)[2:], 16
    uniform = np.full((N, K), -math.log(K), "float32")
    u = []
    for part in range(parts):
        rng = np.random.default_rng(part)
        k = rng.integers(0, K, N)
        z = codebook[0][k] + np.exp(codebook[1][k])[:, None] * rng.normal(size=(N, D)).astype("float32")
        u.append(TOKENS(z, uniform, *codebook)[0])
    u, n = np.concatenate(u), parts * N
    assert np.abs(u.mean(0)).max() < 3 / n**0.5
    assert np.abs(u.std(0) - 1).max() < 0.05
    assert np.abs(np.corrcoef(u.T) - np.eye(D)).max() < 4 / n**0.5


@pytest.mark.parametrize("k", [1, K])
def test_one_component_is_the_affine_coupling(k):
    """So are K equal ones, and one of which the others are switched off."""
    z, log_scale, mean = np.random.default_rng(0).normal(size=(3, 1, N, 1)).astype("float32")
    v, mean_logdet = affine(z, log_scale, mean)
    log_weights = np.where(np.arange(K) < k, -math.log(k), -math.inf) + np.zeros((N, 1))
    others = np.arange(K) - 13 if k == 1 else 0
    parameters = [np.float32(x) for x in (log_weights, np.where(np.arange(K) < k, mean[0], others), log_scale[0])]
    parameters[2] = np.broadcast_to(parameters[2], (N, K))
    u, log_p = FORWARD(z[0, :, 0], *parameters)
    np.testing.assert_allclose(u, v[0, :, 0], rtol=1e-5, atol=2e-6)
    np.testing.assert_allclose((log_p - normal_log_prob(u)).mean(), mean_logdet[0], atol=1e-5)
    back = affine_inverse(v, np.exp(log_scale), mean)[0, :, 0]
    np.testing.assert_allclose(INVERSE(v[0, :, 0], *parameters), back, rtol=1e-6, atol=1e-6)


def test_shapes_broadcast_and_low_precision_is_left_behind():
    z, log_weights, means, log_scales = vectors("float32", 6)
    vector = z.reshape(2, 3, D), log_weights[:3], means, log_scales
    number = vector[0][..., 0], log_weights[:3], means[:, 0], log_scales
    for function, arguments, shapes in (
        (mixture, number, [(2, 3), (2, 3)]),
        (mixture_inverse, number, [(2, 3)]),
        (rosenblatt, vector, [(2, 3, D), (2, 3)]),
        (rosenblatt_inverse, vector, [(2, 3, D)]),
        (codebook_log_prob, (vector[0], means, log_scales), [(2, 3, K)]),
    ):
        half = [jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in arguments]
        outputs = jax.tree.leaves(jax.eval_shape(function, *half))
        assert [(x.shape, x.dtype) for x in outputs] == [(shape, jnp.float32) for shape in shapes]


def test_an_even_shift_of_the_codebook_costs_no_digits():
    z, _, means, log_scales = vectors("float32")
    shifted = CODEBOOK(z + 64, means + 64, log_scales)
    square = ((np.float64(z + 64)[:, None] - np.float64(means + 64)) ** 2).sum(-1)
    true = -0.5 * square * np.exp(-2 * np.float64(log_scales)) - D * (log_scales + 0.5 * math.log(2 * math.pi))
    np.testing.assert_allclose(shifted, true, rtol=1e-6, atol=1e-3)


def test_no_array_has_numbers_and_components():
    """With a vocabulary of components that array would be the largest by far."""
    z, log_weights, means, log_scales = vectors("float32", 7)
    text = str(jax.make_jaxpr(rosenblatt)(z, log_weights, means, log_scales))
    assert f"f32[7,{K}]" in text
    assert not any(shape in text for shape in (f"[7,{D},{K}]", f"[{D},7,{K}]", f"[7,{K},{D}]"))


def test_inverses_take_a_fixed_number_of_steps():
    """No loop runs until something has converged: all samples of a batch and all batches take the same time."""
    z, *parameters = numbers("float32", 2)
    text = str(jax.make_jaxpr(mixture_inverse)(z, *parameters))
    assert "while[" not in text
    assert f"length={transforms.SEARCH['float32'][0]}" in text
