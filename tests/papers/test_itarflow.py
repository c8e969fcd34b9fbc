"""iTARFlow: parity with the official implementation's numbers, and the laws of a flow that knows the level of noise."""

import dataclasses
import itertools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flow_by_hand import PatchGolden, Rows, four_steps, nhwc
from fresh import fresh, randomised

from zoo import config, weights
from zoo.diffusion.levels import Levels
from zoo.diffusion.smc import Particles
from zoo.diffusion.solvers import Ancestral, Euler, Heun
from zoo.errors import UserError
from zoo.flows.inverse import Guidance
from zoo.flows.patches import Level
from zoo.nn.embed import patchify, unpatchify
from zoo.papers.itarflow import ITarFlow, ITarFlowSampling
from zoo.papers.tarflow import TarFlow
from zoo.task import sample_keys

GOLDEN = Path(__file__).parent.parent / "golden" / "itarflow"
CASES = [("cond", True), ("uncond_mixed", False), ("shared", True)]
WEIGHTS = ("ones", "t", "t_norm", "sqr_t", "sqr_t_norm")
TINY = ITarFlow(
    image=4, channels=1, patch=2, width=16, depth=(1, 2), head_dim=8, classes=3, low=0.05, high=0.7, scan=False
)


class Case(PatchGolden):
    def fields(self, c):
        patch, width = (x[0] if len(x) == 1 else tuple(x) for x in (c["patch_sizes"], c["channels"]))
        return {
            "patch": patch,
            "width": width,
            "depth": tuple(c["layers_per_block"]),
            "low": c["t0"],
            "high": c["t1"],
            "input_scale": c["input_scale"],
            "shared": c["shared_backbone_layers"],
        }

    def programs(self):
        return self._forward, self._inverse, self._denoised

    @property
    def t(self):
        return jnp.asarray(self.f["in/t"])[:, 0]

    def expected(self, name):
        found = self.f[f"out/{name}"]
        return np.moveaxis(found, -3, -1) if found.ndim >= 4 else found

    def loss(self, params, label, weight="t"):
        return (
            dataclasses.replace(self.task, weight=weight).weigh(self.t)
            * self.task.forward(params, self.x, self.t, label)[2]
        ).mean()

    def _forward(self, params):
        task, stack, n = self.task, self.task.stack, len(self.x)
        kinds = ("", "_nolabel", "_droplabel") if task.classes else ("",)
        x, t = jnp.concatenate([self.x] * len(kinds)), jnp.concatenate([self.t] * len(kinds))
        found = task.forward(params, x, t, self.labels(self.label, self.none, self.drop))
        out = {}
        for suffix, z, logdet, nll in zip(kinds, *(jnp.split(a, len(kinds)) for a in found)):
            out[f"z{suffix}"] = stack.cut(z, stack.patches[0], stack.patches[-1])
            out |= {f"logdets{suffix}": logdet, f"nll_per_dim{suffix}": nll}
            for weight in WEIGHTS if not suffix else ("ones", "t"):
                w = dataclasses.replace(task, weight=weight).weigh(self.t)
                out[f"loss_reweight_{weight}{suffix}"] = (w * nll).mean()
        out["patches"] = patchify(self.x, stack.patches[0])
        states, logdets = stack.flow(params, task.to_tokens(self.x), task.condition(n, self.t, self.label))
        for i, (state, logdet) in enumerate(zip(states[1:], logdets)):
            block = stack.cut(state, stack.patches[0], stack.patches[i])
            out |= {f"block_output{i}": block, f"block_logdet{i}": logdet}
        out["norms"] = jnp.stack([jnp.square(s).mean((1, 2)) for s in states[1:]], 1)
        out["residuals"] = jnp.stack([jnp.square(b - a).mean((1, 2)) for a, b in itertools.pairwise(states)], 1)
        out["time_embed0"] = Level(stack.nets[0].width).apply({"params": params["block0"]["level"]}, jnp.log(self.t))
        return out

    def _inverse(self, params):
        task, stack = self.task, self.task.stack
        z0 = stack.cut(self.z0, stack.patches[-1], stack.patches[0])  # given in the last block's patches
        n = len(z0)

        def drawn(z, t, label, guidance=0.0):
            strong, weak = (task.condition(len(z), t, y) for y in (label, None))
            return stack.inverse(params, z, strong, weak, guidance).states

        z, _, _ = task.forward(params, self.x, self.t, self.label)
        high = jnp.full(n, task.high)
        rows = jnp.concatenate([z0, z, z0])
        states = drawn(rows, jnp.concatenate([high, self.t, high]), self.labels(self.label, self.label, self.none))
        _, back, unlabelled = jnp.split(task.to_image(states[-1]), 3)
        out = {"x_rec": back, **({"sample_nolabel_plain": unlabelled} if task.classes else {})}
        out |= {
            f"sample_plain_seq{i}": unpatchify(s[:n], stack.patches[0], task.channels) for i, s in enumerate(states)
        }
        w, own = self.c["guidance"], {"attention_temperature": self.c["attn_temp"]}
        kinds = {
            "sample_tarflow_annealed_all": Guidance(w, **own),
            "sample_tarflow_constant_all": Guidance(w, annealed=False, **own),
        }
        first_only = {
            "sample_tarflow_annealed_first": Guidance(w, blocks="first", **own),
            "sample_starflow_first": Guidance(w, rule="gaussian", annealed=False, blocks="first", **own),
            "sample_starflow_annealed_first": Guidance(w, rule="gaussian", blocks="first", **own),
        }
        for parts, blocks in ((kinds, "all"), (first_only, "first")):
            by = Rows.by(stack, parts.values(), blocks=blocks, **own)
            many = drawn(jnp.concatenate([z0] * len(parts)), task.high, self.labels(*[self.label] * len(parts)), by)
            out |= dict(zip(parts, jnp.split(task.to_image(many[-1]), len(parts))))
        return out

    def _denoised(self, params):
        """Denoising steps of every state that the official samplers went through, in one batch."""
        task, n = self.task, len(self.x)
        names = ("ode5", "ode5_clip", "ode1", "sde4")
        levels = [task.low, (task.low + task.high) / 2, task.high]
        rows, at = [self.x] * 3, [jnp.full(n, t) for t in levels]
        for name in names:
            for x, t in zip(nhwc(self.f[f"out/iter_{name}_x"])[:-1], self.f[f"out/iter_{name}_t"]):
                rows.append(x)
                at.append(jnp.full(n, t))
        label = self.labels(*[self.label] * len(rows))
        x0 = task.denoise(params, jnp.concatenate(rows), jnp.concatenate(at), {} if label is None else {"label": label})
        x0, out = x0.reshape(len(rows), *self.x.shape), {}
        for t, found in zip(levels, x0):
            out[f"denoised_t{t:g}"] = found
        cuts = np.cumsum([3, *(len(self.f[f"out/iter_{name}_t"]) for name in names)])
        for name, a, b in zip(names, cuts, cuts[1:]):
            out[f"iter_{name}_x0"] = x0[a:b]
        return out


@pytest.fixture(scope="module", params=CASES, ids=[name for name, _ in CASES])
def case(request):
    name, scan = request.param
    return Case(GOLDEN / f"{name}.npz", ITarFlow, scan=scan)


def test_every_number_equals_the_official_one(case):
    """But for states between steps and the array that shows the official defect of a batch, all of the file."""
    for name, value in case.found.items():
        want = case.expected(name)
        loose = name.startswith(("x_rec", "sample", "denoised", "iter"))
        np.testing.assert_allclose(value, want, rtol=0, atol=2e-5 if loose else 1e-5, err_msg=name)
    rest = {name.removeprefix("out/") for name in case.f if name.startswith("out/")} - set(case.found)
    assert all(name.startswith(("grad", "adamw", "iter_")) or name == "sample_starflow_first_batched" for name in rest)
    np.testing.assert_allclose(
        case.found["sample_starflow_first"][0], case.expected("sample_starflow_first_batched")[0], atol=2e-5
    )
    assert np.abs(case.found["sample_starflow_first"] - case.expected("sample_starflow_first_batched")).max() > 1e-3


def test_solvers_take_the_official_steps(case):
    """From each state and what was made of it to the next one, by the tables that samplers run."""
    for name, steps in (("ode5", 5), ("ode5_clip", 5), ("sde4", 4)):
        x, x0, t = (case.f[f"out/iter_{name}_{key}"] for key in ("x", "x0", "t"))
        o = ITarFlowSampling(nfe=steps, solver=Ancestral() if "sde" in name else Euler())
        plan = o._by_solver.plan(case.task.sigmas)
        np.testing.assert_allclose(plan.sigma, t, rtol=1e-6)
        x0 = np.clip(x0, -1, 1) if "clip" in name else x0
        for k in range(steps - 1):
            noise = case.f["in/sde_noise"][k] if "sde" in name else 0.0
            moved = plan.move_x[k, 0, 0] * x[k] + plan.move_h[k, 0, 0] * x0[k] + plan.move_e[k, 0] * noise
            np.testing.assert_allclose(moved, x[k + 1], rtol=0, atol=2e-5, err_msg=f"{name} {k}")
        np.testing.assert_allclose(x0[-1], x[-1], rtol=0, atol=2e-5)


def test_gradients_and_four_steps_equal_the_official_ones(case):
    losses, first, norm = four_steps(case.task, case.params, lambda p: case.loss(p, case.drop))
    np.testing.assert_allclose(losses, case.f["out/adamw_losses"], rtol=0, atol=1e-5)
    assert losses[0] == pytest.approx(float(case.f["out/grad_loss"]), abs=1e-5)
    assert norm == pytest.approx(float(case.f["out/grad_global_norm"]), abs=1e-4)
    keys = [key.removeprefix("out/grad:") for key in case.f if key.startswith("out/grad:")]
    assert len(keys) >= 5
    for key in keys:
        np.testing.assert_allclose(first[key], case.f[f"out/grad:{key}"], rtol=0, atol=1e-5, err_msg=key)


def test_published_files_are_told_apart_and_shared_layers_may_stand_twice(case):
    task, state = case.task, case.state
    for key, value in weights.to_official(task, case.params).items():
        if key in state:
            np.testing.assert_array_equal(value, state[key])
        else:
            assert key.endswith("attn_mask")  # goldens have that of block 0
    if task.shared:
        twice = {f"blocks.1.{k}": v for k, v in state.items() if k.startswith("shared_backbone")}
        again = weights.from_official(task, {**state, **twice})
        jax.tree.map(np.testing.assert_array_equal, again, case.params)
    if len({*task.depth}) > 1:
        return
    tarflow = TarFlow(image=4, channels=1, patch=2, width=16, depth=1, blocks=2, head_dim=8, classes=3)
    with pytest.raises(UserError, match="checkpoint of TarFlow"):
        weights.from_official(TINY, weights.to_official(tarflow, fresh(tarflow)))
    with pytest.raises(UserError, match="checkpoint of iTARFlow"):
        weights.from_official(tarflow, weights.to_official(TINY, fresh(TINY)))


def test_laws_of_the_level_are_the_official_ones():
    helpers = json.loads((GOLDEN / "helpers.json").read_text())
    u = jnp.asarray(helpers["u"], jnp.float32)
    for key, want in helpers.items():
        law, *bounds = key.split("_")
        if law in ("uni", "linear"):
            low, high = map(float, bounds)
            found = dataclasses.replace(TINY, low=low, high=high, law=law).levels(u)
            np.testing.assert_allclose(found, want, rtol=1e-5, err_msg=key)
    share = jax.scipy.stats.norm.cdf(jnp.asarray(helpers["normal"]))
    np.testing.assert_allclose(dataclasses.replace(TINY, law="edm").levels(share), helpers["edm"], rtol=1e-4)


# --- laws -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    return randomised(TINY, out=0.1)


def test_the_denoiser_is_the_slope_of_the_density_and_its_energy_is_whole(tiny):
    """Against finite differences at three levels, one by one and together; and in pieces."""
    rng = np.random.default_rng(0)
    x, t, label = rng.normal(size=(3, 4, 4, 1)), np.array([0.05, 0.2, 0.7]), np.array([0, -1, 2])
    log_prob, slope, h = jax.jit(lambda x: -TINY.energy(tiny, x, t, {"label": label})), np.zeros_like(x), 2e-2
    for i in np.ndindex(4, 4):
        step = np.zeros_like(x)
        step[(slice(None), *i)] = h
        near, far = (np.float64(log_prob(x + k * step)) - np.float64(log_prob(x - k * step)) for k in (1, 2))
        slope[(slice(None), *i, 0)] = (8 * near - far) / (12 * h)  # of fourth order: numbers are float32
    given = {"label": jnp.asarray(label)}
    narrow, levels = jnp.asarray(x, jnp.float32), jnp.asarray(t, jnp.float32)
    tasks = (TINY, dataclasses.replace(TINY, chunk=2))

    @jax.jit
    def run(params):
        denoised = [task.denoise(params, narrow, levels, given) for task in tasks]
        return *denoised, TINY.energy(params, narrow, levels, given), TINY.forward(params, narrow, levels, label)

    found, in_pieces, energy, (z, logdet, nll) = run(tiny)
    np.testing.assert_allclose(found, x + t.reshape(-1, 1, 1, 1) ** 2 * slope, atol=1e-3)
    np.testing.assert_allclose(in_pieces, found, atol=1e-5)
    np.testing.assert_allclose(energy, 16 * (nll + 0.5 * math.log(2 * math.pi)), rtol=1e-5)
    np.testing.assert_allclose(energy, -jax.scipy.stats.norm.logpdf(z).sum((1, 2)) - 16 * logdet, rtol=1e-5)


def test_its_log_det_is_that_of_the_jacobian_and_its_inverse_the_way_back(tiny):
    x, t = np.random.default_rng(1).normal(size=(1, 4, 4, 1)).astype(np.float32), jnp.asarray([0.3])

    @jax.jit
    def both(params, x):
        z, logdet, _ = TINY.forward(params, x, t)
        slopes = jax.jacobian(lambda v: TINY.forward(params, v.reshape(x.shape), t)[0].ravel())(x.ravel())
        return logdet[0] * x.size, slopes, TINY.inverse(params, z, None, 0.3)

    log, slopes, back = both(tiny, x)
    np.testing.assert_allclose(np.linalg.slogdet(slopes), (1, log), atol=1e-4)
    np.testing.assert_allclose(back, x, atol=1e-4)


def test_samples_are_the_inverse_and_then_the_solver(tiny):
    """By hand, from the same noise; of one call TarFlow's step; each of its key alone."""
    keys, given = jax.random.split(jax.random.key(3), 2), {"label": jnp.asarray([1, -1])}

    @jax.jit
    def draw(params):
        rows = (1, keys, given), (4, keys, given), (1, keys[1:], {"label": given["label"][1:]})
        return [TINY.sample(params, k, len(k), g, ITarFlowSampling(nfe=n))["image"] for n, k, g in rows]

    denoise, states = jax.jit(lambda p, x, at: TINY.denoise(p, x, at, given)), []
    x = jax.jit(TINY.inverse)(tiny, TINY.latent(keys), given["label"])
    for at, to in itertools.pairwise(np.append(np.linspace(0.7, 0.05, 4), 0.0)):
        states.append(denoise(tiny, x, jnp.float32(at)))
        x = states[-1] + to / at * (x - states[-1])
    *both, alone = draw(tiny)
    for found, wanted in zip(both, (states[0], x), strict=True):
        np.testing.assert_allclose(found, jnp.clip(wanted, -1, 1), atol=1e-4)
    np.testing.assert_allclose(alone[0], both[0][1], atol=1e-5)
    with pytest.warns(UserWarning, match="outside of what the model was trained on"):
        jax.eval_shape(lambda p: TINY.sample(p, keys, 2, given, ITarFlowSampling(level=0.9)), tiny)


def test_from_the_lowest_level_there_is_one_step(tiny):
    """Whatever the calls, and from below it too, which is said; without calls the noise stays."""
    key = jax.random.key(3)

    def drawn(params, level, nfe=None):
        return TINY.sample(params, key, 2, None, ITarFlowSampling(level=level, nfe=nfe))["image"]

    @jax.jit
    def run(params):
        noisy = TINY.inverse(params, TINY.latent(sample_keys(key, 2)), None, TINY.low)
        x0 = TINY.denoise(params, noisy, jnp.float32(TINY.low))
        return drawn(params, TINY.low), drawn(params, TINY.low, 0), jnp.clip(x0, -1, 1), jnp.clip(noisy, -1, 1)

    one, none, x0, noisy = run(tiny)
    np.testing.assert_allclose(one, x0, atol=1e-5)
    np.testing.assert_allclose(none, noisy, atol=1e-5)
    assert np.abs(x0 - noisy).max() > 1e-3
    with pytest.warns(UserWarning, match="outside of what the model was trained on"):
        assert jax.eval_shape(lambda p: drawn(p, 0.02), tiny).shape == one.shape


def test_without_levels_it_is_tarflow():
    """Equal depths and a network of levels that gives zeros."""
    task = dataclasses.replace(TINY, depth=(2, 2))
    plain = TarFlow(
        image=4, channels=1, patch=2, width=16, depth=2, blocks=2, head_dim=8, classes=3, noise=0.3, scan=False
    )
    params = randomised(plain, out=0.1)
    level = jax.tree.map(jnp.zeros_like, fresh(task)["block0"]["level"])
    own = {key: {**block, "level": level} for key, block in params.items() if key != "prior"}
    x, label = jnp.asarray(np.random.default_rng(2).normal(size=(2, 4, 4, 1)), jnp.float32), jnp.asarray([0, 2])
    found, wanted = (
        jax.jit(lambda p, one=one: one.denoise(p, x, jnp.float32(0.3), {"label": label}))(p)
        for one, p in ((task, own), (plain, params))
    )
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_particles_begin_as_what_the_flow_draws(tiny, monkeypatch):
    """Of two levels that are nearly one, samples are particles as they began."""
    z, label = jax.random.normal(jax.random.key(1), (24, TINY.tokens, TINY.dims)), jnp.asarray([0, 1, -1])
    monkeypatch.setattr(ITarFlow, "latent", lambda self, keys: z)
    options = ITarFlowSampling(temper=2.0, nfe=2, levels=Levels(low=TINY.high - 1e-7), particles=Particles(8))

    @jax.jit
    def run(params):
        begun = TINY.inverse(params, z, jnp.repeat(label, 8), TINY.high)
        return TINY.sample(params, jax.random.key(0), 3, {"label": label}, options), jnp.clip(begun, -1, 1)

    drawn, begun = run(tiny)
    away = np.abs(drawn["image"][:, None] - begun.reshape(3, 8, 4, 4, 1)).max((2, 3, 4))
    assert (away.min(1) < 5e-3).all()
    assert (np.median(away, 1) > 0.1).all()
    assert np.isfinite(drawn["trace"].log_normaliser).all()


def test_parameters_of_the_published_sizes_are_counted():
    for name, count in (("64", 771_394_656), ("128", 1_202_502_784), ("256", 2_220_731_392)):
        task = config.load(f"itarflow/imagenet{name}").task
        assert sum(math.prod(x.shape) for x in jax.tree.leaves(weights.abstract(task))) == count


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dataclasses.replace(TINY, low=0.8), "task.low=0.8 must be below task.high=0.7"),
        (lambda: dataclasses.replace(TINY, patch=(2, 1, 2)), "task.patch=.* for the 2 blocks"),
        (lambda: dataclasses.replace(TINY, patch=(2, 3)), "task.patch=3 does not divide task.image=4"),
        (lambda: dataclasses.replace(TINY, shared=1), "task.shared=1: every block needs a layer of its own"),
        (lambda: ITarFlowSampling(temper=2.0, guidance=1.0), "without guidance"),
        (lambda: ITarFlowSampling(particles=Particles(8)), "nothing to weigh"),
        (lambda: ITarFlowSampling(solver=Heun(), nfe=4), "odd number of calls"),
    ],
)
def test_mistakes_are_told(make, message):
    with pytest.raises(UserError, match=message):
        make()
