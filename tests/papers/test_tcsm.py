"""TCSM: objectives, targets and tilts on texts that can be enumerated, the losses of MDLM and SEDD by hand, and the network."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tabular
from fresh import noise
from tabular import CLEAN, HIDING, NOISY, L, Tabular, V, law

from zoo.diffusion.tokens import EPS, Masked, Uniform
from zoo.errors import UserError
from zoo.models import Model
from zoo.nn import layers
from zoo.papers.tcsm import Tcsm, TcsmRatio, TcsmSampling, objectives, targets
from zoo.papers.tcsm.targets import Target

P = law()
TABLE = tabular.marginals(tabular.posterior(P, 0.5, True)[1])  # of masked tokens it is the same at all times
PAIRS = [(x, h) for x in range(27) for h in range(8)]  # of a clean text and what of it is hidden
X0, XT = CLEAN[[x for x, _ in PAIRS]], np.where(HIDING[[h for _, h in PAIRS]], V, CLEAN[[x for x, _ in PAIRS]])


def conditionals(p):
    """p(x_i = y | the other tokens) [27, L, V]."""
    ones = np.stack([[np.where(np.arange(L) == i, y, CLEAN) for y in range(V)] for i in range(L)])  # [L, V, 27, L]
    found = np.moveaxis(p[tabular.index(ones, V)], 2, 0)
    return found / found.sum(-1, keepdims=True)


# --- objectives -----------------------------------------------------------------------------------


def bregman(kind, log_a, log_b):
    """D_F(a, b) = sum over the last axis of F(a) - F(b) - F'(b)(a - b), F of `Divergence`."""
    a, b = jnp.exp(log_a), jnp.exp(log_b)
    return {
        "squared": jnp.square(a - b) / 2,
        "gkl": a * (log_a - log_b) - a + b,
        "is": a / b - (log_a - log_b) - 1,
    }[kind].sum(-1)


def test_the_score_form_is_a_divergence_of_distributions():
    """Of a position: E[D(c, c')] = V KL + sum of p / p' - log(p / p') - 1, for generalised KL and for Itakura-Saito."""
    rng = np.random.default_rng(0)
    log_p, log_q = np.log(rng.dirichlet(np.ones(5), (2, 7)))
    with jax.enable_x64(True):
        p, ratio = np.exp(log_p), np.exp(log_p - log_q)
        wanted = 5 * (p * (log_p - log_q)).sum(-1) + (ratio - (log_p - log_q) - 1).sum(-1)

        @functools.partial(jax.jit, static_argnums=0)
        def run(kind, log_p, log_q):
            each = jnp.stack([bregman(kind, log_p - log_p[:, [x]], log_q - log_q[:, [x]]) for x in range(5)], -1)
            soft = Target(None, log_p, jnp.ones(7))
            hard = [Target(jnp.full((7, 1), x), jnp.zeros((7, 1)), jnp.ones(7)) for x in range(5)]
            of_hard = jnp.stack([objectives.score(kind, log_q, target) for target in hard], -1)
            return each, [objectives.score(kind, q, soft) for q in (log_q, log_p)], of_hard

        for kind in ("gkl", "is", "squared"):
            each, at, hard = jax.device_get(run(kind, log_p, log_q))
            assert (each >= -1e-12).all()
            exact = (p * each).sum(-1)
            if kind != "squared":
                np.testing.assert_allclose(exact, wanted, rtol=1e-9)
            # what is written of it in terms of a target differs by what does not depend on the model
            np.testing.assert_allclose(5 * (at[0] - at[1]), exact, rtol=1e-9)
            np.testing.assert_allclose((p * hard).sum(-1), at[0], rtol=1e-9)


def test_every_objective_is_least_at_the_joint_posterior():
    """A table of the joint p(x0 | x_t) under the uniform kernel, whatever clean texts it is compared at."""
    total, posterior = tabular.posterior(P, 0.5, False)
    ones = np.stack([[np.where(np.arange(L) == i, y, CLEAN) for y in range(V)] for i in range(L)])
    near = np.moveaxis(tabular.index(ones, V), 2, 0)  # [27, L, V], the texts that differ in one place
    joint, even = total[:, None] * posterior, total[:, None] / 27  # weights: any proposal of full support will do

    def log_p(table):
        return jax.nn.log_softmax(table[:, near])  # [27, 27, L, V]

    hard, truth = np.broadcast_to(CLEAN[None, ..., None], (27, 27, L, 1)), np.log(posterior)
    away = truth + np.random.default_rng(0).normal(size=truth.shape)
    with jax.enable_x64(True):

        @jax.jit
        def run(truth, away):
            data, soft = Target(hard, jnp.zeros(hard.shape), jnp.ones(27)), Target(None, log_p(truth), jnp.ones(27))

            def losses(table):
                p = log_p(table)
                score = [joint * objectives.score(kind, p, data).sum(-1) for kind in ("gkl", "is", "squared")]
                soften = objectives.distribution(p, soft).sum(-1)
                return jnp.stack([each.sum() for each in (*score, joint * soften, even * soften)])

            return losses(truth), losses(away), jax.jacrev(losses)(truth)

        least, other, slope = jax.device_get(run(truth, away))
        np.testing.assert_allclose(slope, 0, atol=1e-9)
        assert (least < other - 0.01).all()


def test_ratios_and_preferences_are_least_at_the_truth():
    """Of two laws of nine texts their log-ratio, and of rewards what says who is chosen: no gradient there, and more elsewhere."""
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(9), 2)
    reward, away = rng.normal(size=(2, 9))
    chance = p[:, None] * p / (1 + np.exp(reward - reward[:, None]))  # that the first is chosen, of all pairs
    losses = {
        kind: (np.log(p / q), lambda s, k=kind: (p[:, None] * q * objectives.ratio(k, s[:, None], s)).sum())
        for kind in objectives.RATIOS
    }
    losses["preferred"] = reward, lambda s: (chance * objectives.preferred(s[:, None], s)).sum()
    with jax.enable_x64(True):
        for kind, (truth, loss) in losses.items():
            run = jax.jit(jax.value_and_grad(loss))
            least, slope = run(truth)
            np.testing.assert_allclose(slope, 0, atol=1e-9, err_msg=kind)
            assert least < run(truth + away)[0] - 0.01, kind


@pytest.mark.parametrize(("kernel", "schedule"), [("masked", "cosine"), ("uniform", "loglinear")])
def test_the_bound_of_the_exact_denoiser_is_the_entropy(kernel, schedule):
    """Whatever the schedule."""
    task = Tabular(kernel=kernel, schedule=schedule, objective="sedd" if kernel == "uniform" else "distribution")
    entropy = -(P * np.log(P)).sum()
    u, w = np.polynomial.legendre.leggauss(40)
    u, w = (u + 1) / 2, w / 2
    t, w = (u, w) if kernel == "masked" else (u**2, 2 * u * w)  # the bound of the other one falls steeply at the end
    last = {"loglinear": 1 / (1 - EPS), "cosine": 4 / np.pi * np.arcsin((2 * (1 - EPS)) ** -0.5)}[schedule]
    t, w = t * last, w * last  # all of the noise
    if kernel == "masked":
        noise = np.asarray(task.times.noise(jnp.asarray(t)), np.float64)
        hidden = HIDING[[h for _, h in PAIRS]].sum(1)
        chance = noise[:, None] ** hidden * (1 - noise[:, None]) ** (L - hidden)  # [t, pairs]
        tables = np.broadcast_to(np.log(np.maximum(TABLE, 1e-30)), (len(t), *TABLE.shape))
        x0, xt, p = X0, XT, np.array([P[x] for x, _ in PAIRS])
    else:
        tables, chance, pairs = [], [], [(a, b) for a in range(27) for b in range(27)]
        x0, xt = CLEAN[[a for a, _ in pairs]], CLEAN[[b for _, b in pairs]]
        for noise in np.asarray(task.times.noise(jnp.asarray(t, jnp.float32)), np.float64):
            q = tabular.kernel(noise, False)
            chance.append(np.prod([q[x0[:, i], xt[:, i]] for i in range(L)], 0))
            tables.append(np.log(tabular.marginals(tabular.posterior(P, noise, False)[1])))
        p = np.array([P[a] for a, _ in pairs])
    nats = jax.jit(jax.vmap(lambda table, t: task.nelbo(tabular.net(table), x0, xt, jnp.full(len(x0), t))))
    found = nats(np.asarray(tables, np.float32), np.asarray(t, np.float32))
    bound = np.einsum("t,tp,p,tp->", w, chance, p, np.asarray(found, np.float64))
    assert bound == pytest.approx(entropy, abs=1e-6 if kernel == "masked" else 2e-4)


# --- targets --------------------------------------------------------------------------------------


def test_targets_of_a_scorer_are_the_conditionals_of_its_law():
    log, truth, share, some = np.log(P).astype(np.float32), conditionals(P), 0.3, (np.arange(27) % L)[:, None]

    def score(texts):
        return jnp.asarray(log)[tabular.index(texts, V)]

    @jax.jit
    def run(texts, proposals, xt, hidden):
        found, every = targets.exact(score, texts, V), targets.top_k(score, texts, proposals, V)
        noisy = targets.given_noise(found, Uniform(V), xt, jnp.full((27, 1), share))
        masked = targets.given_noise(every, Masked(V), hidden, jnp.full((27, 1), share))
        return found, every, targets.top_k(score, texts, proposals, 2, positions=some), noisy, masked

    proposals, xt = np.random.default_rng(0).normal(size=(27, L, V)), CLEAN[::-1].copy()
    found, every, few, noisy, masked = jax.device_get(run(CLEAN, proposals, xt, np.where(HIDING[5], V, CLEAN)))
    np.testing.assert_allclose(np.exp(found.log), truth, rtol=1e-4)
    np.testing.assert_allclose(np.exp(every.log), np.take_along_axis(truth, every.ids, -1), rtol=1e-4)
    assert (few.ids[..., 0] == CLEAN).all()
    two = np.take_along_axis(truth, few.ids, -1)
    wanted = np.where((np.arange(L) == some)[..., None], two / two.sum(-1, keepdims=True), [1.0, 0.0])
    np.testing.assert_allclose(np.exp(few.log), wanted, rtol=1e-4)
    # what is known of the noisy text besides
    q = tabular.kernel(share, False)[:, xt]  # [y, 27, L]
    given = truth * np.moveaxis(q, 0, -1)
    np.testing.assert_allclose(np.exp(noisy.log), given / given.sum(-1, keepdims=True), rtol=1e-4)
    np.testing.assert_allclose(masked.log[:, 0], every.log[:, 0], atol=1e-6)
    assert (np.exp(masked.log[:, 1]) == (every.ids[:, 1] == CLEAN[:, 1:2])).all()


# --- MDLM and SEDD by hand ------------------------------------------------------------------------


def by_hand(outputs, x0, xt, t, vocab, kind):
    """MDLM (arXiv:2406.07524, equation 11) and SEDD (arXiv:2310.16834) with their own parametrisations, in float64, token by token."""
    sigma = -np.log1p(-(1 - EPS) * t)
    rate, e = (1 - EPS) / (1 - (1 - EPS) * t), np.expm1(sigma)
    total = 0.0
    for b in range(len(x0)):
        for i in range(x0.shape[1]):
            out, a, z = outputs[b, i].astype(np.float64), x0[b, i], xt[b, i]
            p = np.exp(out - out.max()) / np.exp(out - out.max()).sum()
            if kind == "mdlm":
                total += (z == vocab) * rate[b] / e[b] * -np.log(p[a])
            elif kind == "absorb":
                s, rho = out - np.log(e[b]) - np.log(vocab), 1 / e[b]
                total += (z == vocab) * rate[b] * (np.exp(s).sum() - rho * s[a] + rho * (np.log(rho / 1) - 1))
            else:
                q = np.exp(-sigma[b]) * np.eye(vocab) + (1 - np.exp(-sigma[b])) / vocab  # [x, y]
                s = np.log((p[:, None] / q[:, [z]] * q).sum(0))
                r = e[b] / (e[b] + vocab)
                mean = s.mean() - s[z] / vocab
                negative = r * mean if z == a else s[a] / e[b] + mean
                if z == a:
                    constant = (vocab - 1) / vocab * r * (np.log(r) - 1)
                else:
                    constant = ((-np.log(r) - 1) / r - (vocab - 2)) / vocab
                total += rate[b] * (np.exp(s).mean() - np.exp(s[z]) / vocab - negative + constant)
    return total / x0.size


SMALL = Tcsm(vocab=5, length=6, width=16, depth=1, head_dim=8, scan=False)
TIMED = dataclasses.replace(SMALL, objective="sedd", kernel="uniform", time=True)


moved = functools.partial(
    noise, scale=0.1
)  # random weights: fresh heads give zeros, which would hide what is before them


def texts(task, n):
    return np.random.default_rng(2).integers(0, task.vocab, (n, task.length), np.int32)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [("mdlm", {}), ("absorb", {"objective": "sedd"}), ("uniform", {"objective": "sedd", "kernel": "uniform"})],
)
def test_the_loss_is_that_of_mdlm_and_of_sedd(kind, fields):
    task, x, rng = Tabular(**fields), np.tile(CLEAN, (8, 1)), jax.random.key(3)
    table = np.random.default_rng(0).normal(size=(27 if kind == "uniform" else 64, L, V)).astype(np.float32)
    run = jax.jit(
        lambda: (task.hidden(jax.random.split(rng)[0], x), task.loss({"net": tabular.net(table)}, {"tokens": x}, rng))
    )
    (t, xt), (loss, _) = run()
    outputs = table[tabular.index(np.asarray(xt), V if kind == "uniform" else V + 1)]
    wanted = by_hand(outputs, x, np.asarray(xt), np.asarray(t, np.float64), V, kind)
    assert (xt != x).any()
    assert loss == pytest.approx(wanted, rel=1e-6)


def test_sedd_is_zero_at_the_true_ratios_and_nowhere_less():
    xt, x0, noise = (np.ravel(x) for x in np.meshgrid(np.arange(5), np.arange(5), [0.001, 0.3, 0.9]))
    q = (1 - noise) * np.eye(5)[..., None] + noise / 5  # [x, y, pairs]
    every = np.arange(len(xt))
    log = np.log(q[x0, :, every] / q[x0, xt, every][:, None])
    target = targets.one_hot(jnp.asarray(x0))
    with jax.enable_x64(True):
        np.testing.assert_allclose(objectives.score_entropy_uniform(log, target, xt, noise), 0, atol=1e-9)
        away = log + 0.3 * (np.arange(5) == (xt[:, None] + 1) % 5)
        assert (objectives.score_entropy_uniform(away, target, xt, noise) > 0).all()


# --- the network, and samples ---------------------------------------------------------------------


def test_every_token_sees_all_others_and_time_is_told_where_it_is_on():
    x = texts(SMALL, 1)
    others = np.where(np.eye(7, 6, -1, bool), 5, x)  # one hidden at a time
    for task in (SMALL, TIMED):
        ask = jax.jit(
            lambda net, noise, task=task: task.compared(net, others, jnp.full(7, noise), lambda found, *_: found)
        )
        out, later = (np.asarray(ask(moved(task)["net"], share)) for share in (0.2, 0.8))
        assert (np.abs(out[1:] - out[0]).max(-1) > 1e-6).all()
        assert (np.abs(later - out).max() > 1e-3) == task.time
    assert "modulation" not in str(jax.tree_util.tree_structure(moved(SMALL)))
    shapes = jax.tree.map(jnp.shape, moved(SMALL)["net"])
    assert (shapes["embed"]["tokens"]["table"], shapes["head"]["out"]["kernel"]) == ((6, 16), (16, 5))
    table = np.random.default_rng(0).normal(size=(64, L, V))
    log_p = np.asarray(jax.jit(Tabular().log_p)(tabular.net(table), NOISY, np.full(64, 0.5)))
    np.testing.assert_allclose(np.exp(log_p).sum(-1), 1, rtol=1e-5)
    known = NOISY < V  # what is not hidden is what it is
    assert (np.exp(log_p)[known] == np.eye(V)[NOISY[known]]).all()


@pytest.mark.parametrize("task", [SMALL, TcsmRatio(vocab=5, length=6, width=16, depth=1, head_dim=8, scan=False)],
                         ids=["masked", "ratio"])  # fmt: skip
def test_samples_keep_what_is_given_and_hold_no_mask(task):
    params, n = moved(task), 16
    options = task.Sampling(steps=3, temperature=0.9, top_p=0.9, strength=0.5)
    draw = jax.jit(lambda p, keys, given: task.sample(p, keys, len(keys), given, options)["tokens"])
    keys, text = jax.random.split(jax.random.key(0), n), texts(task, n)
    given = text.copy()
    given[:8, ::2] = -1
    found = np.asarray(draw(params, keys, {"tokens": given}))
    assert (found[given >= 0] == given[given >= 0])[:24].all()
    assert ((found >= 0) & (found < task.vocab)).all()
    changed = (found != text).mean(1)
    assert 0 < changed[8:].mean() < 0.6  # a share of the others
    assert (found[:8] == np.where(given < 0, found, text)[:8]).all()
    other = np.asarray(draw(params, keys[::-1], {"tokens": given[::-1]}))
    assert (other[::-1] == found).all()  # each from its own key
    assert options.network_calls == (15 if isinstance(task, TcsmRatio) else 3)
    part = "ratio" if isinstance(task, TcsmRatio) else "net"  # of which a diverged one is seen
    assert (
        draw({**params, part: jax.tree.map(lambda x: x * jnp.nan, params[part])}, keys, {"tokens": given}) < 0
    ).all()


@dataclasses.dataclass(frozen=True)
class Telling(Tabular):
    """Writes how noisy it is told that the text is."""

    def log_p(self, net, xt, noise):
        said = jax.nn.one_hot(jnp.floor(noise * (self.vocab - 0.5)).astype(int), self.vocab)
        return jnp.broadcast_to(jnp.log(said)[:, None], (*xt.shape, self.vocab))


def test_the_noise_that_is_told_is_the_share_of_the_text_that_is_hidden():
    given = np.asarray([[-1, -1, -1], [-1, 0, 0], [-1, -1, 0]])
    for kernel, told in (("masked", [2, 0, 1]), ("uniform", [2, 2, 2])):
        task = Telling(kernel=kernel, objective="sedd", time=True)
        draw = functools.partial(task.sample, {"net": tabular.net(0.0)}, n=3, options=TcsmSampling(steps=1))
        found = jax.jit(lambda key, draw=draw: draw(key, conditions={"tokens": given}))(jax.random.key(0))
        np.testing.assert_array_equal(found["tokens"], np.where(given < 0, np.array(told)[:, None], given))


def test_settings_that_do_not_go_together_are_sentences():
    with pytest.raises(
        UserError, match=r"task\.weight='nelbo' with task\.kernel='uniform' is of task\.objective='sedd'"
    ):
        dataclasses.replace(SMALL, kernel="uniform")
    with pytest.raises(UserError, match=r"task\.head_dim=5 must be even"):
        dataclasses.replace(SMALL, head_dim=5)


def test_tokens_that_no_text_holds_are_refused(tmp_path):
    """MASK would come back as it is, and -1 would be read as MASK."""
    model = Model(SMALL, moved(SMALL), "raw", 1, None, (), tmp_path)
    for token in (5, -2, 0.0):
        with pytest.raises(UserError, match="sample: tokens must be whole numbers from -1 to 4"):
            model.sample(1, conditions={"tokens": np.full((1, 6), token)})
    for token in (5, -1, 0.0):
        with pytest.raises(UserError, match="nll: tokens must be whole numbers from 0 to 4"):
            model.nll({"tokens": np.full((1, 6), token)})


def test_the_bound_of_a_text_follows_from_its_key():
    nll = jax.jit(lambda x, keys: SMALL.nll(moved(SMALL), {"tokens": x}, keys))
    x, keys = texts(SMALL, 8), jax.random.split(jax.random.key(0), 8)
    found = np.asarray(nll(x, keys))
    np.testing.assert_allclose(nll(x[::-1], keys[::-1])[::-1], found, rtol=1e-5)
    assert SMALL.about.likelihood.kind == "bound"


def test_a_ratio_is_refused_the_network_of_another_kernel(tmp_path, monkeypatch):
    from zoo import models

    ratio = TcsmRatio(vocab=5, length=6, width=16, depth=1, head_dim=8)
    given = models.Model(
        dataclasses.replace(SMALL, kernel="uniform", weight="one"), {"net": {}}, "raw", 1, None, (), tmp_path
    )
    monkeypatch.setattr(models, "open_model", lambda *_, **__: given)
    monkeypatch.setattr(models, "locate", lambda name: tmp_path)
    with pytest.raises(
        UserError, match=r'weights.net=RUN:net differs in kernel \("uniform" there, and here "masked"\)'
    ):
        models.given_weights({"net": "RUN:net"}, ratio)


def test_parts_of_a_text_give_what_the_whole_gives(monkeypatch):
    """Large vocabularies are worked on in parts of a text."""
    x, found = texts(SMALL, 8), []
    for room in (layers.ROOM, 8 * 2 * 5):
        monkeypatch.setattr(layers, "ROOM", room)
        found.append(jax.jit(lambda p, room=room: SMALL.loss(p, {"tokens": x}, jax.random.key(0))[0])(moved(SMALL)))
    np.testing.assert_allclose(*found, rtol=1e-5)
    assert "scan" in str(jax.make_jaxpr(SMALL.loss)(moved(SMALL), {"tokens": x}, jax.random.key(0)))
