"""Autoregressive couplings, affine and of mixtures: forward, log-det and inverse, in float32 whatever the network computes in.

Affine (TarFlow, arXiv:2412.06329): a network reads tokens 0..t and gives a log-scale a and a shift b for token t + 1;
token 0 passes unchanged.

Mixtures (TarFlowLM, arXiv:2507.00425): a number z with the density of a mixture of K Gaussians becomes normal noise
u = Phi^-1(F(z)), F the mixture's distribution function ("Mix-1"). D numbers with the density of one mixture of K isotropic
Gaussians become D normal numbers, one after the other, each by its conditional mixture given those before ("Mix-d", the
Rosenblatt map). Either way log |du/dz| = log p(z) - log N(u; 0, I). `log_weights` are normalised by the caller; a component
that is switched off has -inf. Leading axes broadcast as in NumPy. float64 stays float64.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.nn import log_softmax, softmax
from jax.scipy.special import erfc, logsumexp

from zoo import dist

LOG_2PI = math.log(2 * math.pi)
NEWTON = 8  # steps of `probit`
SEARCH = {
    "float32": (25, 3),
    "float64": (32, 4),
}  # steps of an inverse: halvings of its bracket, then guarded Newton steps
PROBED = 1 << 24  # numbers that an inverse looks at in a round, at most, on an accelerator
NEGLIGIBLE = -60.0  # log of a share that changes no sum, and of the smallest slope an inverse is differentiated with


def shift_right(outputs: jax.Array) -> jax.Array:
    """Hand the output at token t to token t + 1; token 0 gets zeros. [B, T, D] -> [B, T, D]."""
    return jnp.pad(outputs[:, :-1], ((0, 0), (1, 0), (0, 0)))


def affine(u: jax.Array, a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """v = (u - b) exp(-a) with its log-det as a mean over tokens and dimensions (TarFlow, arXiv:2412.06329).

    Args:
        u, a, b: [B, T, D]; a and b already belong to the token they act on.

    Returns:
        v [B, T, D] and log |dv/du| / (T D) [B], both float32.
    """
    u, a, b = (x.astype(jnp.float32) for x in (u, a, b))
    return (u - b) * jnp.exp(-a), -a.mean((1, 2))


def affine_inverse(v: jax.Array, scale: jax.Array, shift: jax.Array) -> jax.Array:
    """u = v scale + shift in float32; all of the same shape. `scale` is exp(a), or what guidance makes of it."""
    return v.astype(jnp.float32) * scale.astype(jnp.float32) + shift.astype(jnp.float32)


def precise(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """All in float32, or in float64 where one of them is: what mixtures are computed in."""
    dtype = jnp.result_type(jnp.float32, *arrays)
    return tuple(jnp.asarray(x, dtype) for x in arrays)


def normal_log_prob(u: jax.Array) -> jax.Array:
    """log N(u; 0, 1) of each number, in the shape of u, nats."""
    (u,) = precise(u)
    return -0.5 * (u * u + LOG_2PI)


def shorter_tail(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What is asked of Phi(-|x|): whether x is so far out that it goes by its asymptotic series, itself, its hazard by that.

    The hazard is phi / Phi, that is |x| over a series in 1 / x^2; quotients of densities underflow there, and differences
    of their logarithms have lost their digits.
    """
    far, away = -20.0 if x.dtype == jnp.float64 else -10.0, -jnp.abs(x)
    beyond = jnp.minimum(away, far)
    i = 1 / (beyond * beyond)
    series = 1 - i * (1 - i * (3 - i * (15 - i * (105 - i * (945 - i * 10395)))))
    return away < far, 0.5 * erfc(-jnp.maximum(away, far) * math.sqrt(0.5)), -beyond / series


@jax.custom_jvp
def log_tails(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """log Phi(x) and log Phi(-x), both exact far out on either side, for one erfc."""
    far, tail, far_hazard = shorter_tail(x)
    low = jnp.where(far, normal_log_prob(x) - jnp.log(far_hazard), jnp.log(tail))
    high = jnp.log1p(-tail)
    return jnp.where(x < 0, low, high), jnp.where(x < 0, high, low)


@log_tails.defjvp
def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[tuple, tuple]:
    (x,), (dx,) = primals, tangents
    return log_tails(x), (hazard(x) * dx, -hazard(-x) * dx)


def log_ndtr(x: jax.Array) -> jax.Array:
    """log Phi(x)."""
    return log_tails(x)[0]


def hazard(x: jax.Array) -> jax.Array:
    """phi(x) / Phi(x), the derivative of log Phi."""
    far, tail, far_hazard = shorter_tail(x)
    near = jnp.exp(normal_log_prob(x)) / jnp.where(x < 0, tail, 1 - tail)
    return jnp.where(far & (x < 0), far_hazard, near)


@jax.custom_jvp
def probit(y: jax.Array) -> jax.Array:
    """The x with log Phi(x) = y, for y <= log 1/2; a little above works too. Any shape."""
    tail = jnp.minimum(y, -2.0)
    x = jnp.where(y < -2.0, -jnp.sqrt(-2 * tail - jnp.log(-2 * tail) - LOG_2PI), 1.25 * (y + math.log(2)))
    return jax.lax.fori_loop(0, NEWTON, lambda _, x: x - (log_ndtr(x) - y) / hazard(x), x)


@probit.defjvp
def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    x = probit(*primals)
    return x, tangents[0] / hazard(x)


def standard(z: jax.Array, means: jax.Array, log_scales: jax.Array) -> jax.Array:
    """z [...] seen from each component, in its standard deviations. [..., K]."""
    return (z[..., None] - means) * jnp.exp(-log_scales)


def side(u: jax.Array) -> jax.Array:
    """1 below the median and -1 above: which tail is the shorter, so that its logarithm keeps its digits."""
    return jnp.where(u < 0, 1.0, -1.0).astype(u.dtype)


def mixture_log_prob(z: jax.Array, log_weights: jax.Array, means: jax.Array, log_scales: jax.Array) -> jax.Array:
    """log sum_k pi_k N(z; m_k, s_k^2) of numbers z. z [...], the others [..., K] -> [...], nats."""
    z, log_weights, means, log_scales = precise(z, log_weights, means, log_scales)
    return logsumexp(log_weights + normal_log_prob(standard(z, means, log_scales)) - log_scales, axis=-1)


def mixture(
    z: jax.Array, log_weights: jax.Array, means: jax.Array, log_scales: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """u = Phi^-1(F(z)), F the distribution function of sum_k pi_k N(m_k, s_k^2) (arXiv:2507.00425, 3.2.1).

    Both tails of F are summed as logarithms and the shorter is inverted: F itself is 1 in float32 from eight standard
    deviations on, and off by 3e-3 in u before. With one component u = (z - m) / s. Derivatives are first ones only.

    Args:
        z: [...].
        log_weights, means, log_scales: [..., K].

    Returns:
        u [...] and log p(z) [...]; log |du/dz| = log p(z) - normal_log_prob(u).
    """
    return _mixture(*precise(z, log_weights, means, log_scales))


@jax.custom_jvp
def _mixture(z: jax.Array, log_weights: jax.Array, means: jax.Array, log_scales: jax.Array) -> tuple:
    e = standard(z, means, log_scales)
    below, above = (logsumexp(log_weights + tail, axis=-1) for tail in log_tails(e))
    x = probit(jnp.minimum(below, above))
    log_p = logsumexp(log_weights + normal_log_prob(e) - log_scales, axis=-1)
    return jnp.where(below < above, x, -x), log_p


@_mixture.defjvp
def _(primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]) -> tuple[tuple, tuple]:
    # With y the logarithm of the shorter tail, dy = sum_k q_k (dlog pi_k + dlog Phi(+-e_k)) and du = +-dy / hazard(+-u).
    # Shares and hazards stay in range where the densities that they are quotients of do not.
    u, log_p = _mixture(*primals)
    z, log_weights, means, log_scales = primals
    dz, dlog_weights, dmeans, dlog_scales = tangents
    e, sign = standard(z, means, log_scales), side(u)[..., None]
    share = softmax(log_weights + log_ndtr(sign * e), axis=-1) / hazard(sign * u[..., None])
    posterior = softmax(log_weights + normal_log_prob(e) - log_scales, axis=-1)
    de = jnp.exp(-log_scales) * (dz[..., None] - dmeans) - e * dlog_scales
    du = (share * hazard(sign * e)) * de + (share * sign) * dlog_weights
    dlog_p = posterior * (dlog_weights - dlog_scales) - (posterior * e) * de
    return (u, log_p), (du.sum(-1), dlog_p.sum(-1))


def probes(numbers: int) -> int:
    """At how many points a bracket is looked at a time, for arrays of so many numbers a point.

    One on a CPU, where work is time. An accelerator takes as long for 15, and so needs a quarter of the rounds.
    """
    return 15 if dist.platform() in ("gpu", "tpu") and 15 * numbers <= PROBED else 1


def mixture_inverse(u: jax.Array, log_weights: jax.Array, means: jax.Array, log_scales: jax.Array) -> jax.Array:
    """z = F^-1(Phi(u)), the inverse of `mixture`: u [...], the others [..., K] -> z [...].

    z lies between the least and the greatest m_k + s_k u: there all components are below Phi(u), here above. That bracket is
    cut, in half or on accelerators at several points at once, and then refined by Newton steps that may not leave it, a
    fixed number of each. In a gap between components z
    is as uncertain as dz/du is large; u comes back all the same. Derivatives are those of the implicit function, with
    dz/du held below e^60.
    """
    return _mixture_inverse(*precise(u, log_weights, means, log_scales))


@jax.custom_jvp
def _mixture_inverse(u: jax.Array, log_weights: jax.Array, means: jax.Array, log_scales: jax.Array) -> jax.Array:
    # Mirrored where u > 0, so that the lower tail is the shorter one.
    sign = side(u)
    goal, means = log_ndtr(sign * u), sign[..., None] * means
    ends = means + jnp.exp(log_scales) * (sign * u)[..., None]
    # Components of no weight in this tail only widen the bracket.
    counts = log_weights > NEGLIGIBLE + goal[..., None]
    low, high = (
        jnp.where(counts, ends, math.inf).min(-1),
        jnp.where(counts, ends, -math.inf).max(-1),
    )

    halvings, steps = SEARCH[u.dtype.name]
    points = probes(math.prod(ends.shape))
    places = jnp.arange(1, points + 1, dtype=u.dtype) / (points + 1)

    def narrow(z: jax.Array, excess: jax.Array, low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.where(excess < 0, z, low), jnp.where(excess < 0, high, z)

    def cut(_: int, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        z = low[..., None] + (high - low)[..., None] * places
        e = standard(z, *(x[..., None, :] for x in (means, log_scales)))
        excess = logsumexp(log_weights[..., None, :] + log_ndtr(e), axis=-1) - goal[..., None]
        lows, highs = narrow(z, excess, low[..., None], high[..., None])
        return lows.max(-1), highs.min(-1)

    def refine(_: int, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        z, low, high = state
        e = standard(z, means, log_scales)
        log_tail = logsumexp(log_weights + log_ndtr(e), axis=-1)
        log_p = logsumexp(log_weights + normal_log_prob(e) - log_scales, axis=-1)
        excess = log_tail - goal
        low, high = narrow(z, excess, low, high)
        return jnp.clip(z - excess * jnp.exp(jnp.minimum(log_tail - log_p, -NEGLIGIBLE)), low, high), low, high

    low, high = jax.lax.fori_loop(0, math.ceil(halvings / math.log2(points + 1)), cut, (low, high))
    return sign * jax.lax.fori_loop(0, steps, refine, (0.5 * (low + high), low, high))[0]


@_mixture_inverse.defjvp
def _(primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    # u(z, ...) of `_mixture` has not changed: its derivative, written there, solved for dz.
    z = _mixture_inverse(*primals)
    u, log_weights, means, log_scales = primals
    du, dlog_weights, dmeans, dlog_scales = tangents
    e, sign = standard(z, means, log_scales), side(u)[..., None]
    share = softmax(log_weights + log_ndtr(sign * e), axis=-1)
    slope = (share * hazard(sign * e) * jnp.exp(-log_scales)).sum(-1, keepdims=True)
    slope = jnp.maximum(slope, math.exp(NEGLIGIBLE))
    posterior = softmax(log_weights + normal_log_prob(e) - log_scales, axis=-1)
    by_u = (hazard(sign * u[..., None]) / slope)[..., 0]
    moved = posterior * dmeans + (posterior * (z[..., None] - means)) * dlog_scales
    return z, by_u * du + (moved - (sign * share / slope) * dlog_weights).sum(-1)


def codebook_log_prob(z: jax.Array, means: jax.Array, log_scales: jax.Array) -> jax.Array:
    """log N(z; m_k, s_k^2 I) for each entry of a codebook. z [..., D], means [K, D], log_scales [K] -> [..., K], nats.

    One matrix product in full precision, the square being expanded: off by about 1e-7 |z - c|^2 / s^2, c the middle of
    the codebook.
    """
    z, means, log_scales = precise(z, means, log_scales)
    middle = jax.lax.stop_gradient(means.mean(0))  # distances do not depend on it, but their rounding does
    z, means = z - middle, means - middle
    product = jnp.einsum("...d,kd->...k", z, means, precision="highest")
    square = jnp.sum(z * z, -1, keepdims=True) - 2 * product + jnp.sum(means * means, -1)
    return -0.5 * square * jnp.exp(-2 * log_scales) - z.shape[-1] * (log_scales + 0.5 * LOG_2PI)


def rosenblatt(
    z: jax.Array, log_weights: jax.Array, means: jax.Array, log_scales: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The Rosenblatt map of sum_k pi_k N(z; m_k, s_k^2 I) (arXiv:2507.00425, 3.2.2, Algorithm 1).

    Number i of u follows from number i of z and from how probable the components are after the numbers before. Nothing is
    larger than [..., K], with or without gradient but for the [D, ..., K] log-weights that a gradient keeps.
    Where the log-density alone is wanted, `codebook_log_prob` and a logsumexp do.

    Args:
        z: [..., D].
        log_weights: [..., K].
        means: [K, D].
        log_scales: [K].

    Returns:
        u [..., D] and log p(z) [...]; log |det du/dz| = log p(z) - normal_log_prob(u).sum(-1).
    """
    z, log_weights, means, log_scales = precise(z, log_weights, means, log_scales)

    def step(log_alpha: jax.Array, number: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, tuple]:
        return updated(log_alpha, *number, log_scales), mixture(number[0], log_alpha, number[1], log_scales)

    # A step's own arrays are made again for the gradient: there are six of the size of the carry.
    step = jax.checkpoint(step, prevent_cse=False)
    _, (u, log_p) = jax.lax.scan(step, spread(z, log_weights), (jnp.moveaxis(z, -1, 0), means.T))
    return jnp.moveaxis(u, 0, -1), log_p.sum(0)


def rosenblatt_inverse(u: jax.Array, log_weights: jax.Array, means: jax.Array, log_scales: jax.Array) -> jax.Array:
    """The inverse of `rosenblatt`: u [..., D], log_weights [..., K], means [K, D], log_scales [K] -> z [..., D]."""
    u, log_weights, means, log_scales = precise(u, log_weights, means, log_scales)

    def step(log_alpha: jax.Array, number: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        z = mixture_inverse(number[0], log_alpha, number[1], log_scales)
        return updated(log_alpha, z, number[1], log_scales), z

    _, z = jax.lax.scan(step, spread(u, log_weights), (jnp.moveaxis(u, -1, 0), means.T))
    return jnp.moveaxis(z, 0, -1)


def spread(z: jax.Array, log_weights: jax.Array) -> jax.Array:
    """Log-weights [..., K] for every vector z [..., D]: a loop's carry has its shape from the start."""
    return jnp.broadcast_to(
        log_weights, (*jnp.broadcast_shapes(z.shape[:-1], log_weights.shape[:-1]), log_weights.shape[-1])
    )


def updated(log_alpha: jax.Array, z: jax.Array, means: jax.Array, log_scales: jax.Array) -> jax.Array:
    """Log-weights [..., K] of the components once z [...] is known, normalised anew: far out log p alone has too few digits."""
    return log_softmax(log_alpha + normal_log_prob(standard(z, means, log_scales)) - log_scales, axis=-1)
