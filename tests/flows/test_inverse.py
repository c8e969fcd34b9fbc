"""Laws of inverses by sweeps: they are the sequential inverse, and what is not converged is said.

Most blocks here are toys without a network, whose scale and shift follow from a weighted sum of a cache of past tokens.
The weights of later tokens are zeros that are multiplied, as those of attention are: a number that overflows in a later
token and is not caught makes NaN of all earlier ones.
"""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fresh import randomised

from zoo import dist
from zoo.errors import UserError
from zoo.flows import inverse
from zoo.flows.inverse import Chain, Jacobi, Stepper, invert, once, swept
from zoo.nn.attention import init_cache, write_cache
from zoo.papers import starflow, tarflow

D = 2


def sequential(stepper, v):
    return inverse.sequential(stepper, v)[0]


def jacobi(stepper, v, plan):
    return inverse.jacobi(stepper, v, plan)[:3]


def bent(h):
    """Scale and shift of a block that depends on its input everywhere, with both dimensions in both."""
    return jnp.exp(0.6 * jnp.tanh(h)), jnp.sin(h + 1.3 * h[..., ::-1])


def toy(tokens, batch, *, start=True, strength=1.0, rule=bent, prefix=None, seed=0, unseen=()):
    """A block on `tokens` tokens. `strength`, a number or one for each sample, is how much it depends on its input.

    `prefix` [B, S, D] stands in the cache before the first token; the tokens fed at `unseen` have weight zero.
    """
    fed, slots = tokens if start else tokens - 1, 0 if prefix is None else prefix.shape[1]
    table = np.random.default_rng(seed).normal(size=(fed, slots + fed)) * (2 / fed) ** 0.5
    table[:, list(unseen)] = 0
    table = jnp.asarray(table, jnp.float32)
    strength = jnp.broadcast_to(jnp.asarray(strength, jnp.float32), (batch,))[:, None, None]
    put = lambda cache, u, index: write_cache(cache, u[:, :, None], u[:, :, None], index, None)  # noqa: E731
    cache = init_cache(None, batch, slots + fed, 1, D, jnp.float32)
    cache = put(cache, prefix, 0) if slots else cache

    def step(u, cache, index):
        cache = put(cache, u, slots + index)
        rows = jax.lax.dynamic_slice_in_dim(table, index, u.shape[1])
        seen = jnp.arange(slots + fed) <= slots + index + jnp.arange(u.shape[1])[:, None]
        tokens = jax.tree.leaves(cache)[0][:, 0]
        return *rule(strength * jnp.einsum("qn,bdn->bqd", rows * seen, tokens)), cache

    return Stepper(step, cache, jnp.array([0.3, -0.5]) if start else None, slots)


def noise(tokens, batch, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(batch, tokens, D)), jnp.float32)


def chained(tokens, batch, blocks=3, **options):
    """Blocks of different weights, every second one from the last token to the first."""
    return Chain(
        blocks,
        lambda i, *_: toy(tokens, batch, seed=i, **options),
        lambda x, i: x[:, ::-1] if i % 2 else x,
        lambda i: jnp.zeros((1, 2 * D)),
    )


def near(found, want, atol=2e-5, **options):
    np.testing.assert_allclose(found, want, rtol=0, atol=atol, **options)


def error(found, want):
    return np.abs(np.asarray(found) - np.asarray(want)).max((1, 2))


# --- sweeps to the end are the sequential inverse ---------------------------------------------------


@pytest.mark.parametrize("start", [True, False], ids=["start", "no-start"])
@pytest.mark.parametrize("tokens", [2, 12])
def test_full_sweeps_are_the_sequential_inverse(tokens, start):
    """12 and 11, 2 and 1 tokens to find: modules that divide them and that do not, one, all and more than all."""
    v, count = noise(tokens, 3), tokens if start else tokens - 1
    plans = [Jacobi(n, tol=0.0, unconverged="keep") for n in (1, tokens + 4)]
    plans.append(Jacobi(5, tol=0.0, unconverged="keep", start="zeros"))

    @jax.jit
    def run(v):
        stepper = toy(tokens, 3, start=start, strength=1.5)
        return sequential(stepper, v), [jacobi(stepper, v, plan) for plan in plans]

    want, found = run(v)
    assert error(want, v).max() > 0.1
    for plan, (u, sweeps, bad) in zip(plans, found, strict=True):
        near(u, want, err_msg=str(plan))
        assert not bad.any(), plan
        size = -(-count // min(plan.modules, count))
        needed = -(-count // size)
        assert (needed <= sweeps).all(), plan
        assert (sweeps <= needed * size).all(), plan


def test_a_single_token_without_a_start_passes_unchanged():
    one = noise(1, 2)
    np.testing.assert_array_equal(sequential(toy(2, 2, start=False), one), one)
    found = invert(Chain(1, lambda i, *_: toy(2, 2, start=False), lambda x, i: x, jnp.zeros), one, "jacobi")
    np.testing.assert_array_equal(found.states[-1], one)
    assert found.report == {}


def test_tokens_of_a_prefix_are_seen_and_kept():
    """By the sweeps, and by the sequential inverse that follows them in the same cache."""
    v, prefix = noise(6, 2), noise(3, 2, seed=5)

    @jax.jit
    def run(v, prefix):
        stepper = toy(6, 2, prefix=prefix)
        plans = Jacobi(2, tol=0.0), Jacobi(sweeps=1)
        return sequential(stepper, v), [jacobi(stepper, v, plan) for plan in plans]

    want, found = run(v, prefix)
    assert error(run(v, 0 * prefix)[0], want).min() > 0.1
    for (u, _, bad), failed in zip(found, (False, True), strict=True):
        near(u, want)
        assert bad.tolist() == [failed, failed]


# --- blocks of a chain ------------------------------------------------------------------------------


def test_blocks_have_plans_and_reports_of_their_own():
    tokens, v = 9, noise(9, 4, seed=2)
    plans = {
        "sequential": "sequential",
        "mixed": Jacobi((0, 1, 3), tol=0.0),
        "short": Jacobi(sweeps=(1, 9, 9), tol=(1e-5, 0.0, 0.1), start=("v", "zeros", "v"), unconverged="keep"),
        "first": Jacobi(sweeps=(9, 9, 1), unconverged="keep"),
    }
    found = jax.jit(lambda v: {k: invert(chained(tokens, 4), v, plan) for k, plan in plans.items()})(v)
    want = found["sequential"]
    assert want.report == {}
    assert len(want.states) == 4
    np.testing.assert_array_equal(want.states[0], v)
    for ours, theirs in zip(found["mixed"].states, want.states, strict=True):
        near(ours, theirs)
    for name in ("mixed", "short", "first"):
        assert found[name].report["sweeps"].shape == found[name].report["unconverged"].shape == (4, 3)
    sweeps = found["mixed"].report["sweeps"]
    assert (sweeps[:, 0] == 0).all()
    assert (sweeps[:, 1] >= 2).all()
    assert (sweeps[:, 2] >= 3).all()
    assert not found["mixed"].report["unconverged"].any()
    # of three blocks the last is inverted first
    for name, i in (("short", 0), ("first", 2)):
        bad = found[name].report["unconverged"]
        assert bad[:, i].all()
        assert not np.delete(bad, i, 1).any()
        assert (found[name].report["sweeps"][:, i] == 1).all()
        assert (np.delete(found[name].report["sweeps"], i, 1) > 1).all()


def test_blocks_that_sweeps_cannot_help_go_token_by_token():
    for tokens, modules, sweeps in ((9, 7, True), (9, 8, False), (9, 0, False), (2, 1, False), (3, 1, True)):
        assert swept(Jacobi(modules), tokens) == sweeps, (tokens, modules)


def test_a_tolerance_that_floats_cannot_reach_is_said():
    v, plan = noise(6, 2), Jacobi(tol=(1e-5, 1e-9))
    with pytest.warns(
        UserWarning, match="method.tol=1e-09 is below what float32 resolves: block 1 goes token by token"
    ):
        found = jax.jit(lambda v: invert(chained(6, 2, 2), v, plan))(v)
    assert (found.report["sweeps"][:, 1] == 0).all()
    assert (found.report["sweeps"][:, 0] > 0).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for plan in (Jacobi(tol=1e-6), Jacobi(tol=0.0), Jacobi(0, tol=1e-9)):
            jax.eval_shape(lambda v, p=plan: invert(chained(6, 2, 2), v, p).states, v)


# --- tolerance --------------------------------------------------------------------------------------


def test_a_sample_does_not_depend_on_its_batch():
    """Easy and hard ones: each has the numbers and the sweeps that it has among its own copies."""
    tokens, v = 16, noise(16, 4)
    strength = np.array([0.0, 0.15, 1.5, 0.02], np.float32)
    plan = Jacobi(3, tol=2e-2, sweeps=5)
    run = jax.jit(lambda v, s: jacobi(toy(tokens, len(v), strength=s), v, plan))
    u, sweeps, bad = run(v, strength)
    assert bad.tolist() == [False, False, True, False]
    assert len(set(sweeps.tolist())) == 4
    for i in range(4):
        alone = run(jnp.asarray(np.repeat(v[i : i + 1], 4, 0)), np.repeat(strength[i], 4))
        near(alone[0][0], u[i])
        assert (alone[1][0], alone[2][0]) == (sweeps[i], bad[i])


@pytest.mark.parametrize("criterion", ["max", "relative"])
def test_the_error_falls_with_the_tolerance(criterion):
    """Each sample stops by itself; the relative criterion looks at the mean of the batch."""
    tokens, v, tols = 24, noise(24, 3), (1e-1, 1e-3, 1e-5)

    @jax.jit
    def run(v):
        stepper = toy(tokens, 3, strength=jnp.array([0.1, 0.4, 0.6]))
        plans = [Jacobi(tol=t, criterion=criterion, unconverged="keep") for t in tols]
        return sequential(stepper, v), [jacobi(stepper, v, plan) for plan in plans]

    want, found = run(v)
    errors, counts = np.array([error(u, want) for u, *_ in found]), np.array([n for _, n, _ in found])
    assert not np.array([bad for *_, bad in found]).any()
    assert (np.diff(errors.max(1)) < 0).all()
    assert (np.diff(counts, axis=0) >= 0).all()
    assert (counts[0] + 2 < counts[-1]).all()
    assert (counts[-1] < tokens).all()  # stopped by the tolerance, not because it was exact
    if criterion == "max":
        assert (errors <= np.array(tols)[:, None] + 1e-6).all()
    else:
        assert (counts == counts[:, :1]).all()


def test_modules_that_follow_see_the_last_tokens():
    """Stale keys and values are those of the tokens before the last sweep: a whole change behind."""
    tokens, v = 24, noise(24, 6)
    limits = {"tol": 0.2}, {"sweeps": 2, "unconverged": "keep"}

    @jax.jit
    def run(v):
        stepper = toy(tokens, 6, strength=0.15)
        return sequential(stepper, v), [
            [jacobi(stepper, v, Jacobi(4, refresh=r, **limit))[0] for r in (True, False)] for limit in limits
        ]

    want, found = run(v)
    for limit, both in zip(limits, found, strict=True):
        ours, theirs = (error(u, want) for u in both)
        assert (ours <= theirs + 1e-6).all(), limit
        assert theirs.mean() > 1.25 * ours.mean(), limit


# --- what does not converge -------------------------------------------------------------------------


def test_samples_that_fail_are_said_and_go_token_by_token():
    tokens, v, strength = 16, noise(16, 3), jnp.array([0.02, 3.0, 0.03])
    short, enough = Jacobi(sweeps=1), Jacobi(sweeps=3, tol=1e-2)

    @jax.jit
    def run(v):
        stepper = toy(tokens, 3, strength=strength)
        plans = [dataclasses.replace(p, unconverged=u) for p in (short, enough) for u in ("sequential", "keep")]
        return sequential(stepper, v), [jacobi(stepper, v, plan) for plan in plans]

    want, ((slow, *said), (kept, *too), (mixed, *some), (rough, *same)) = run(v)
    for sweeps, bad in (said, too):
        assert sweeps.tolist() == [1, 1, 1]
        assert bad.all()
    near(slow, want, 1e-6)
    assert error(kept, want).min() > 1e-4
    for sweeps, bad in (some, same):
        assert bad.tolist() == [False, True, False]
        assert sweeps[1] == 3
    good = jnp.array([0, 2])
    np.testing.assert_array_equal(mixed[good], rough[good])
    assert error(mixed[good], want[good]).min() > 1e-6  # so these are not the sequential numbers
    near(mixed[1], want[1], 1e-6)
    assert error(rough[1:2], want[1:2]) > 0.1


def steep(h):
    """exp overflows for every guess of about 3, and is near 1 for tokens of about 0.005."""
    return jnp.exp(400 * jnp.square(h)), 3 + 0.1 * h[..., ::-1]


def explosive(tokens, batch, *, start, zeros=()):
    """(stepper, v, u): v is about -3 and u about 0.005; v is exactly 0, and u 3, at the tokens `zeros`, which none sees."""
    first = 0 if start else 1
    stepper = toy(tokens, batch, start=start, rule=steep, strength=0.5, unseen=[t + 1 - first for t in zeros])
    u = 0.005 * noise(tokens, batch, seed=3)
    if start:
        stepper = stepper._replace(start=jnp.array([0.005, -0.005]))
    for t in zeros:
        u = u.at[:, t].set(once(stepper, u)[1][:, t])
    scale, shift = once(stepper, u)
    v = (u - shift) / scale
    return stepper, v.at[:, list(zeros)].set(0.0) if zeros else v, u


@pytest.mark.parametrize("start", [True, False], ids=["start", "no-start"])
def test_overflow_on_the_way_is_no_overflow_in_the_end(start):
    tokens = 10

    @jax.jit
    def run():
        stepper, v, u = explosive(tokens, 3, start=start, zeros=(4, 7))
        wild = once(stepper, v)[0] * v
        plans = Jacobi(3, tol=0.0), Jacobi(start="zeros"), Jacobi(sweeps=3), Jacobi(clamp=5.0)
        return u, wild, sequential(stepper, v), [jacobi(stepper, v, plan) for plan in plans]

    u, wild, slow, found = run()
    assert np.isinf(wild).any((1, 2)).all()
    assert np.isnan(wild).any((1, 2)).all()
    near(slow, u, 1e-4)
    for i, (ours, _, bad) in enumerate(found):
        near(ours, slow, 1e-4, err_msg=str(i))
        assert bad.all() == (i == 2), i


def test_a_first_guess_that_overflows_costs_no_token():
    """A large number in, a small one out, and squares between: the guess must not reach the tokens before it."""
    tokens, squares = 8, lambda h: (jnp.exp(0.6 * jnp.tanh(h)), jnp.sin(h))

    @jax.jit
    def run(v, large):
        base = toy(tokens, 2, rule=squares, strength=8.0)

        def step(u, cache, index):
            scale, shift, cache = base.step(jnp.square(u), cache, index)
            place = index + jnp.arange(u.shape[1])[:, None]
            return jnp.where(place == 4, scale / large, scale), shift, cache

        stepper, v = base._replace(step=step), v.at[0, 4].mul(large)
        return sequential(stepper, v), [jacobi(stepper, v, Jacobi(n, tol=0.0))[0] for n in (1, 3)]

    for large in (1e20, 3e38):
        want, found = run(noise(tokens, 2), large)
        assert np.isfinite(want[0]).all()
        for u in found:
            near(u, want, 2e-3)


def test_what_sweeps_leave_in_the_cache_does_not_reach_the_sequential_inverse():
    tokens = 8
    base = toy(tokens, 2)

    def step(u, cache, index):
        scale, shift, cache = base.step(u**8, cache, index)  # infinite for a guess at the bound
        return jnp.where(index + jnp.arange(u.shape[1])[:, None] == 4, scale / 1e20, scale), shift, cache

    stepper, v = base._replace(step=step), (0.3 * noise(tokens, 2)).at[0, 4].set(1e20)
    want = sequential(stepper, v)
    assert np.isfinite(want).all()
    u, _, bad = jax.jit(lambda v: jacobi(stepper, v, Jacobi(sweeps=1)))(v)
    assert bad.all()
    near(u, want)


def test_an_infinite_inverse_stays_in_its_sample():
    tokens, v = 10, noise(10, 3).at[1, 3].set(3e38)
    plans = [Jacobi(3, tol=0.0), Jacobi(3, tol=1e-3, unconverged="keep"), Jacobi(sweeps=2)]
    rule = lambda h: (3 * jnp.exp(0.6 * jnp.tanh(h)), jnp.sin(h))  # noqa: E731

    @jax.jit
    def run(v):
        blocks = chained(tokens, 3, 2, rule=rule)
        return invert(blocks, v), [invert(blocks, v, plan) for plan in plans]

    want, found = run(v)
    assert not np.isfinite(want.states[-1][1]).all()
    good = jnp.array([0, 2])
    for plan, out in zip(plans, found, strict=True):
        x, bad = out.states[-1], out.report["unconverged"]
        scale = np.abs(want.states[-1][good]).max()
        near(x[good], want.states[-1][good], 0.05 * scale if plan.unconverged == "keep" else 2e-5 * scale)
        assert bad[1].any(), plan  # in the first of the two blocks: later ones have nothing left to find
        if plan.sweeps is None:
            assert not bad[good].any(), plan
        if plan.unconverged == "sequential":
            assert not np.isfinite(x[1]).all(), plan


def test_the_relative_criterion_does_not_measure_by_what_overflowed():
    tokens, v = 16, noise(16, 2)
    rule = lambda h: (jnp.exp(0.6 * jnp.tanh(h)), jnp.sin(h))  # noqa: E731
    plan = Jacobi(tol=1e-6, criterion="relative")
    run = jax.jit(lambda v: (sequential(toy(tokens, 2, rule=rule), v), *jacobi(toy(tokens, 2, rule=rule), v, plan)))
    want, u, _, bad = run(v.at[1, 3].set(1e9))
    assert bad.tolist() == [False, True]
    near(u[0], want[0], 1e-2)
    near(u[1] / 1e9, want[1] / 1e9)


def test_a_clamp_changes_no_result():
    v = noise(12, 3).at[0].mul(4.0)

    @jax.jit
    def run(v):
        stepper = toy(12, 3)
        plans = [Jacobi(2, tol=0.0, clamp=5.0, unconverged=u) for u in ("sequential", "keep")]
        return sequential(stepper, v), [jacobi(stepper, v, plan) for plan in plans]

    want, ((u, _, bad), (kept, *_)) = run(v)
    assert bad.tolist() == (np.abs(want).max((1, 2)) > 5.0).tolist() == [True, False, False]
    near(u, want)
    near(kept[1:], want[1:])
    assert np.abs(kept).max() <= 5.0


# --- mistakes ---------------------------------------------------------------------------------------


def test_mistakes_are_told():
    for fields in ({"modules": (1, 2)}, {"sweeps": (1,)}, {"tol": (0.1,) * 4}, {"start": ("v", "v")}):
        ((name, value),) = fields.items()
        with pytest.raises(
            UserError, match=rf"method.{name}=.*: {len(value)} values for the 3 blocks .*give one, or one"
        ):
            invert(chained(5, 2), noise(5, 2), Jacobi(**fields))
    with pytest.raises(
        UserError, match="method='newton' is unknown; choose one of auto, sequential, jacobi, gs_jacobi"
    ):
        Jacobi.of("newton")
    assert [Jacobi.of(n).modules for n in ("auto", "sequential", "jacobi", "gs_jacobi")] == [0, 0, 1, 8]


# --- networks ---------------------------------------------------------------------------------------

TAR = tarflow.TarFlow(image=6, channels=1, patch=2, width=16, depth=1, blocks=2, head_dim=8, classes=3)
STAR = starflow.StarFlow(
    latent=(3, 3), channels=2, width=20, depths=(1, 1), head_dim=20, classes=3, reach=3.0, penalty=0.0, condition="all"
)
LABEL = jnp.array([0, 2, -1])


def weights(task):
    return randomised(task, 0.5 / task.width**0.5)


def runs(task, plans, guidance=0.0):
    """{name: inverse by a plan} as one program: "" for the sequential inverse."""
    normal = lambda *shape: np.random.default_rng(1).normal(size=shape).astype(np.float32)  # noqa: E731
    v, y, null = normal(3, task.tokens, task.dims), LABEL, jnp.full(3, -1)
    if isinstance(task, starflow.StarFlow):
        y, null = normal(2, 3, task.prefix, task.condition_width)

    @jax.jit
    def run(params):
        chain = task.stack.chain(params, 3, y, null, guidance)
        return {name: invert(chain, v, plan) for name, plan in {"": "sequential", **plans}.items()}

    found = run(weights(task))
    assert error(found[""].states[-1], found[""].states[0]).min() > 0.1
    return found


@pytest.mark.parametrize("task", [TAR, STAR], ids=["tarflow-linear-annealed", "starflow-gaussian"])
def test_guided_sweeps_and_fallbacks_are_the_sequential_inverse(task):
    """The condition stands before the tokens in STARFlow's caches, and must outlive the way back from failed sweeps."""
    plans = {"full": Jacobi((1, 3), tol=0.0, unconverged="keep"), "failed": Jacobi(sweeps=1)}
    found = runs(task, plans, 1.5)
    want = found.pop("").states[-1]
    for name, out in found.items():
        near(out.states[-1], want, 1e-5 if name == "failed" else 2e-5, err_msg=name)
        assert out.report["unconverged"].all() == (name == "failed")
    assert (found["full"].report["sweeps"] > 2).all()


def test_bfloat16_converges_or_falls_back():
    loose, few = Jacobi(2, tol=1e-3, unconverged="keep"), Jacobi(sweeps=3, tol=1e-4)
    found = runs(dataclasses.replace(TAR, dtype="bfloat16"), {"loose": loose, "few": few})
    want = found.pop("").states[-1]
    for name, out in found.items():
        near(out.states[-1], want, 2e-2, err_msg=name)
        assert name == "few" or not out.report["unconverged"].any()


@pytest.mark.devices8
def test_samples_of_a_mesh_are_those_of_one_device():
    """Some converge and some fall back, on every number of devices the same."""
    params, key, mesh = weights(TAR), jax.random.key(4), dist.Mesh(data=4, tensor=2).build()
    given = {"label": jnp.arange(8) % 3}
    plan = Jacobi(2, tol=1e-4, sweeps=(3, 4))
    draw = lambda p: TAR.sample(p, key, 8, given, TAR.Sampling(guidance=1.0, denoise=0.0, method=plan))  # noqa: E731
    alone = jax.jit(draw)(params)
    with dist.use(mesh):
        placed = jax.device_put(params, dist.shardings(jax.eval_shape(TAR.init, jax.random.key(0)), mesh))
        shared = jax.jit(lambda p: draw(p))(placed)
    near(shared["image"], alone["image"], 1e-5)
    for name in ("sweeps", "unconverged"):
        np.testing.assert_array_equal(shared[name], alone[name])
    assert alone["unconverged"].any()
    assert not alone["unconverged"].all()
