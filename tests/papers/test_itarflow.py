"""iTARFlow: parity with the official implementation's numbers, and the laws of a flow that knows the level of noise."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy
from flow_by_hand import PatchGolden, Rows, four_steps, nhwc
from fresh import noise, randomised

from zoo import config, weights
from zoo.diffusion.levels import Levels
from zoo.diffusion.smc import Particles
from zoo.diffusion.solvers import Ancestral, Euler, Heun
from zoo.errors import UserError
from zoo.flows.inverse import Guidance
from zoo.flows.patches import Level
from zoo.flows.stack import Stack
from zoo.nn.embed import patchify, unpatchify
from zoo.papers.itarflow import ITarFlow, ITarFlowSampling
from zoo.papers.tarflow import TarFlow

GOLDEN = Path(__file__).parent.parent / "golden" / "itarflow"
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
        """Scores and guidance of the one with classes alone: what the other is for, patches, shows on the way there and back."""
        return self._forward, self._inverse, *([self._denoised] if self.task.classes else [])

    @property
    def t(self):
        return jnp.asarray(self.f["in/t"])[:, 0]

    def expected(self, name):
        found = self.f[f"out/{name}"]
        return np.moveaxis(found, -3, -1) if found.ndim >= 4 else found

    def loss(self, params, label, weight="t"):
        return (
            replace(self.task, weight=weight).weigh(self.t) * self.task.forward(params, self.x, self.t, label)[2]
        ).mean()

    def _forward(self, params):
        task, stack, n = self.task, self.task.stack, len(self.x)
        kinds = ("", "_nolabel", "_droplabel") if task.classes else ("",)
        x, t = jnp.concatenate([self.x] * len(kinds)), jnp.concatenate([self.t] * len(kinds))
        seen = []
        with pytest.MonkeyPatch.context() as patch:
            flow = Stack.flow
            patch.setattr(Stack, "flow", lambda *args: seen.append(flow(*args)) or seen[-1])
            found = task.forward(params, x, t, self.labels(self.label, self.none, self.drop))
        out = {}
        for suffix, z, logdet, nll in zip(kinds, *(jnp.split(a, len(kinds)) for a in found)):
            out[f"z{suffix}"] = stack.cut(z, stack.patches[0], stack.patches[-1])
            out |= {f"logdets{suffix}": logdet, f"nll_per_dim{suffix}": nll}
            for weight in WEIGHTS if not suffix else ("ones", "t"):
                w = replace(task, weight=weight).weigh(self.t)
                out[f"loss_reweight_{weight}{suffix}"] = (w * nll).mean()
        out["patches"] = patchify(self.x, stack.patches[0])
        states, logdets = ([x[:n] for x in part] for part in seen[0])
        for i, (state, logdet) in enumerate(zip(states[1:], logdets)):
            block = stack.cut(state, stack.patches[0], stack.patches[i])
            out |= {f"block_output{i}": block, f"block_logdet{i}": logdet}
        out["norms"] = jnp.stack([jnp.square(s).mean((1, 2)) for s in states[1:]], 1)
        out["residuals"] = jnp.stack([jnp.square(b - a).mean((1, 2)) for a, b in itertools.pairwise(states)], 1)
        out["time_embed0"] = Level(stack.nets[0].width).apply({"params": params["block0"]["level"]}, jnp.log(self.t))
        return out

    def _inverse(self, params):
        task, stack = self.task, self.task.stack
        # given in the last block's patches
        z0, z = (stack.cut(x, stack.patches[-1], stack.patches[0]) for x in (self.z0, jnp.asarray(self.f["out/z"])))
        n = len(z0)

        def drawn(z, t, label, guidance=0.0):
            strong, weak = (task.condition(len(z), t, y) for y in (label, None))
            return stack.inverse(params, z, strong, weak, guidance).states

        high = jnp.full(n, task.high)

        def told(z, x_rec, **samples):
            sequence = {f"sample_plain_seq{i}": unpatchify(s, stack.patches[0], task.channels) for i, s in enumerate(z)}
            return {"x_rec": x_rec, **samples, **sequence}

        if not task.classes:
            states = drawn(jnp.concatenate([z0, z]), jnp.concatenate([high, self.t]), None)
            return told([s[:n] for s in states], task.to_image(states[-1])[n:])
        w, plain = self.c["guidance"], ("plain", "x_rec", "sample_nolabel_plain")
        everywhere = {
            **dict.fromkeys(plain, Guidance()),
            "sample_tarflow_annealed_all": Guidance(w),
            "sample_tarflow_constant_all": Guidance(w, annealed=False),
        }
        first_only = {
            "sample_tarflow_annealed_first": Guidance(w, blocks="first"),
            "sample_starflow_first": Guidance(w, rule="gaussian", annealed=False, blocks="first"),
            "sample_starflow_annealed_first": Guidance(w, rule="gaussian", blocks="first"),
        }
        out = {}
        for kinds, blocks in ((everywhere, "all"), (first_only, "first")):
            rows = jnp.concatenate([z if name == "x_rec" else z0 for name in kinds])
            t = jnp.concatenate([self.t if name == "x_rec" else high for name in kinds])
            labels = self.labels(*(self.none if "nolabel" in name else self.label for name in kinds))
            states = drawn(rows, t, labels, Rows.by(stack, kinds.values(), blocks=blocks))
            out |= dict(zip(kinds, jnp.split(task.to_image(states[-1]), len(kinds))))
            if "plain" in kinds:
                sequence = [s[:n] for s in states]
        del out["plain"]
        return told(sequence, **out)

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
        label = jnp.concatenate([self.label] * len(rows))
        x0 = task.denoise(params, jnp.concatenate(rows), jnp.concatenate(at), {"label": label})
        x0, out = x0.reshape(len(rows), *self.x.shape), {}
        for t, found in zip(levels, x0):
            out[f"denoised_t{t:g}"] = found
        cuts = np.cumsum([3, *(len(self.f[f"out/iter_{name}_t"]) for name in names)])
        for name, a, b in zip(names, cuts, cuts[1:]):
            out[f"iter_{name}_x0"] = x0[a:b]
        return out


@pytest.fixture(scope="module")
def labelled():
    return Case(GOLDEN / "shared.npz", ITarFlow, scan=True)


@pytest.fixture(scope="module", params=["shared", "uncond_mixed"])
def case(request):
    if request.param == "shared":
        return request.getfixturevalue("labelled")
    return Case(GOLDEN / "uncond_mixed.npz", ITarFlow, scan=False)


def test_every_number_equals_the_official_one(case):
    """But for states between steps and the array that shows the official defect of a batch, all of the file."""
    for name, value in case.found.items():
        want = case.expected(name)
        loose = name.startswith(("x_rec", "sample", "denoised", "iter"))
        np.testing.assert_allclose(value, want, rtol=0, atol=2e-5 if loose else 1e-5, err_msg=name)
    if not case.task.classes:
        return
    rest = {name.removeprefix("out/") for name in case.f if name.startswith("out/")} - set(case.found)
    assert all(name.startswith(("grad", "adamw", "iter_")) or name == "sample_starflow_first_batched" for name in rest)
    np.testing.assert_allclose(
        case.found["sample_starflow_first"][0], case.expected("sample_starflow_first_batched")[0], atol=2e-5
    )
    assert np.abs(case.found["sample_starflow_first"] - case.expected("sample_starflow_first_batched")).max() > 1e-3


def test_solvers_take_the_official_steps(labelled):
    """From each state and what was made of it to the next one, by the tables that samplers run."""
    for name, steps in (("ode5", 5), ("ode5_clip", 5), ("sde4", 4)):
        x, x0, t = (labelled.f[f"out/iter_{name}_{key}"] for key in ("x", "x0", "t"))
        o = ITarFlowSampling(nfe=steps, solver=Ancestral() if "sde" in name else Euler())
        plan = o._by_solver.plan(labelled.task.sigmas)
        np.testing.assert_allclose(plan.sigma, t, rtol=1e-6)
        x0 = np.clip(x0, -1, 1) if "clip" in name else x0
        for k in range(steps - 1):
            noise = labelled.f["in/sde_noise"][k] if "sde" in name else 0.0
            moved = plan.move_x[k, 0, 0] * x[k] + plan.move_h[k, 0, 0] * x0[k] + plan.move_e[k, 0] * noise
            np.testing.assert_allclose(moved, x[k + 1], rtol=0, atol=2e-5, err_msg=f"{name} {k}")
        np.testing.assert_allclose(x0[-1], x[-1], rtol=0, atol=2e-5)


def test_gradients_and_four_steps_equal_the_official_ones(labelled):
    losses, first, norm = four_steps(labelled.task, labelled.params, lambda p: labelled.loss(p, labelled.drop))
    np.testing.assert_allclose(losses, labelled.f["out/adamw_losses"], rtol=0, atol=1e-5)
    assert losses[0] == pytest.approx(float(labelled.f["out/grad_loss"]), abs=1e-5)
    assert norm == pytest.approx(float(labelled.f["out/grad_global_norm"]), abs=1e-4)
    keys = [key.removeprefix("out/grad:") for key in labelled.f if key.startswith("out/grad:")]
    assert len(keys) >= 5
    for key in keys:
        np.testing.assert_allclose(first[key], labelled.f[f"out/grad:{key}"], rtol=0, atol=1e-5, err_msg=key)


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


def test_published_files_of_another_paper_are_told():
    tarflow = TarFlow(image=4, channels=1, patch=2, width=16, depth=1, blocks=2, head_dim=8, classes=3)
    with pytest.raises(UserError, match="checkpoint of TarFlow"):
        weights.from_official(TINY, weights.to_official(tarflow, noise(tarflow)))
    with pytest.raises(UserError, match="checkpoint of iTARFlow"):
        weights.from_official(tarflow, weights.to_official(TINY, noise(TINY)))


def test_laws_of_the_level_are_the_official_ones():
    helpers = {k: np.asarray(v, np.float32) for k, v in json.loads((GOLDEN / "helpers.json").read_text()).items()}
    laws = {key: key.split("_") for key in helpers if key.startswith(("uni", "linear"))}

    @jax.jit
    def run(u, share):
        even = {key: replace(TINY, low=float(a), high=float(b), law=law) for key, (law, a, b) in laws.items()}
        return {"edm": replace(TINY, law="edm").levels(share), **{key: task.levels(u) for key, task in even.items()}}

    found = run(helpers["u"], scipy.stats.norm.cdf(helpers["normal"]).astype(np.float32))
    assert len(found) > 3
    for key, ours in found.items():
        np.testing.assert_allclose(ours, helpers[key], rtol=1e-4 if key == "edm" else 1e-5, err_msg=key)


# --- laws -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    return randomised(TINY, out=0.1)


def test_the_denoiser_is_the_slope_of_the_density_and_its_energy_is_whole(tiny):
    """Against finite differences at three levels, in pieces."""
    rng = np.random.default_rng(0)
    x, t, label = rng.normal(size=(3, 4, 4, 1)), np.array([0.05, 0.2, 0.7]), np.array([0, -1, 2])
    given, slope, h = {"label": jnp.asarray(label)}, np.zeros_like(x), 2e-2

    @jax.jit
    def both(x):
        return TINY.energy(tiny, x, t, given), TINY.forward(tiny, x, t, label)

    for i in np.ndindex(4, 4):
        step = np.zeros_like(x)
        step[(slice(None), *i)] = h
        near, far = (np.float64(both(x - k * step)[0]) - np.float64(both(x + k * step)[0]) for k in (1, 2))
        slope[(slice(None), *i, 0)] = (8 * near - far) / (12 * h)  # of fourth order: numbers are float32
    found = jax.jit(lambda x: replace(TINY, chunk=2).denoise(tiny, x, np.float32(t), given))(np.float32(x))
    energy, (z, logdet, nll) = both(x)
    np.testing.assert_allclose(found, x + t.reshape(-1, 1, 1, 1) ** 2 * slope, atol=1e-3)
    np.testing.assert_allclose(energy, 16 * (nll + 0.5 * math.log(2 * math.pi)), rtol=1e-5)
    np.testing.assert_allclose(energy, -jax.scipy.stats.norm.logpdf(z).sum((1, 2)) - 16 * logdet, rtol=1e-5)


def test_samples_are_the_inverse_and_then_the_solver(tiny):
    """By hand, from the same noise; by a solver with noise of its own, rows follow from their keys and labels alone.

    One call is one step, as from the lowest level, whatever the calls; without calls the noise stays.
    """
    keys, given = jax.random.split(jax.random.key(3), 2), {"label": np.array([1, -1])}
    options = ({"nfe": 4}, {"nfe": 1}, {"level": TINY.low}, {"level": TINY.low, "nfe": 0})
    noised = {"solver": Ancestral(), "nfe": 2}

    @jax.jit
    def draw(params, keys, given):
        return [TINY.sample(params, keys, 2, given, ITarFlowSampling(**o))["image"] for o in (*options, noised)]

    z, inverse = TINY.latent(keys), jax.jit(TINY.inverse)
    denoise = jax.jit(lambda x, at: TINY.denoise(tiny, x, at, given))
    x, noisy = (np.asarray(inverse(tiny, z, given["label"], np.float32(t))) for t in (TINY.high, TINY.low))
    clean = []
    for at, to in itertools.pairwise(np.append(np.linspace(0.7, 0.05, 4), 0.0).astype(np.float32)):
        clean.append(np.asarray(denoise(x, at)))
        x = clean[-1] + to / at * (x - clean[-1])
    wanted = x, clean[0], denoise(noisy, np.float32(TINY.low)), noisy
    *drawn, first = draw(tiny, keys, given)
    for found, one in zip(drawn, wanted, strict=True):
        np.testing.assert_allclose(found, np.clip(one, -1, 1), atol=1e-4)
    np.testing.assert_allclose(draw(tiny, keys[::-1], {"label": given["label"][::-1]})[-1][::-1], first, atol=1e-4)
    assert np.abs(wanted[2] - noisy).max() > 1e-3
    for level in (0.9, 0.02):
        with pytest.warns(UserWarning, match="outside of what the model was trained on"):
            jax.eval_shape(lambda p, o=ITarFlowSampling(level=level): TINY.sample(p, keys, 2, given, o), tiny)


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
        (lambda: replace(TINY, low=0.8), "task.low=0.8 must be below task.high=0.7"),
        (lambda: replace(TINY, patch=(2, 1, 2)), "task.patch=.* for the 2 blocks"),
        (lambda: replace(TINY, patch=(2, 3)), "task.patch=3 does not divide task.image=4"),
        (lambda: replace(TINY, shared=1), "task.shared=1: every block needs a layer of its own"),
        (lambda: ITarFlowSampling(temper=2.0, guidance=1.0), "without guidance"),
        (lambda: ITarFlowSampling(particles=Particles(8)), "nothing to weigh"),
        (lambda: ITarFlowSampling(solver=Heun(), nfe=4), "odd number of calls"),
    ],
)
def test_mistakes_are_told(make, message):
    with pytest.raises(UserError, match=message):
        make()
