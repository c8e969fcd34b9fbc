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
from flow_by_hand import Rows, nhwc

from zoo import weights
from zoo.diffusion.sampling import onward
from zoo.diffusion.solvers import Ancestral, run
from zoo.flows.inverse import Guidance
from zoo.flows.patches import Level
from zoo.nn.embed import patchify, unpatchify
from zoo.papers.itarflow import ITarFlow, ITarFlowSampling
from zoo.train.optim import AdamW

GOLDEN = Path(__file__).parent.parent / "golden" / "itarflow"
CASES = [("cond", True), ("uncond_mixed", False), ("shared", True)]
WEIGHTS = ("ones", "t", "t_norm", "sqr_t", "sqr_t_norm")
TINY = ITarFlow(
    image=4, channels=1, patch=2, width=16, depth=(1, 1, 2), head_dim=8, classes=3, low=0.05, high=0.7, scan=False
)


class Case:
    """A golden file, our task and parameters for it, and everything computed in a few programs."""

    def __init__(self, name, scan):
        self.f = np.load(GOLDEN / f"{name}.npz")
        c = self.c = json.loads(str(self.f["config"]))

        def one(values):
            return values[0] if len(values) == 1 else tuple(values)

        self.task = task = ITarFlow(
            image=c["img_size"],
            channels=c["in_channels"],
            patch=one(c["patch_sizes"]),
            width=one(c["channels"]),
            depth=tuple(c["layers_per_block"]),
            head_dim=c["head_dim"],
            classes=c["num_classes"],
            low=c["t0"],
            high=c["t1"],
            input_scale=c["input_scale"],
            shared=c["shared_backbone_layers"],
            scan=scan,
        )
        self.state = {k.removeprefix("state/"): v for k, v in self.f.items() if k.startswith("state/")}
        self.params = weights.from_official(task, self.state)
        self.x, self.t = nhwc(self.f["in/x"]), jnp.asarray(self.f["in/t"])[:, 0]
        z0 = jnp.asarray(self.f["in/z0"])  # in the last block's patches
        self.z0 = task.stack._cut(z0, task._each("patch")[-1], task._each("patch")[0])
        self.label = jnp.asarray(self.f["in/y"], jnp.int32) if task.classes else None
        self.drop = jnp.asarray(self.f["in/y_drop"], jnp.int32) if task.classes else None
        self.found = jax.device_get(jax.jit(self._forward)(self.params))
        self.found |= jax.device_get(jax.jit(self._inverse)(self.params))
        self.found |= jax.device_get(jax.jit(self._denoised)(self.params))

    def labels(self, *rows):
        return jnp.concatenate(rows) if self.task.classes else None

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
        kinds = {"": self.label, **({"_nolabel": None, "_droplabel": self.drop} if task.classes else {})}
        out = {}
        for suffix, label in kinds.items():
            z, logdet, nll = task.forward(params, self.x, self.t, label)
            out |= {f"z{suffix}": z, f"logdets{suffix}": logdet, f"nll_per_dim{suffix}": nll}
            for weight in WEIGHTS if not suffix else ("ones", "t"):
                w = dataclasses.replace(task, weight=weight).weigh(self.t)
                out[f"loss_reweight_{weight}{suffix}"] = (w * nll).mean()
        last, first = task._each("patch")[-1], task._each("patch")[0]
        for key in [key for key in out if key.startswith("z")]:
            out[key] = stack._cut(out[key], first, last)
        patches = patchify(self.x, first)
        states, logdets = stack.flow(
            task._joined(params), task.input_scale * patches, task.condition(n, self.t, self.label)
        )
        out["patches"] = patches
        for i, (state, logdet) in enumerate(zip(states[1:], logdets)):
            out |= {f"block_output{i}": stack._cut(state, first, task._each("patch")[i]), f"block_logdet{i}": logdet}
        out["norms"] = jnp.stack([jnp.square(s).mean((1, 2)) for s in states[1:]], 1)
        out["residuals"] = jnp.stack([jnp.square(b - a).mean((1, 2)) for a, b in itertools.pairwise(states)], 1)
        out["time_embed0"] = Level(stack.nets[0].width).apply({"params": params["block0"]["level"]}, jnp.log(self.t))
        return out

    def _inverse(self, params):
        task, stack, n = self.task, self.task.stack, len(self.z0)
        joined = task._joined(params)

        def drawn(z, t, label, guidance=0.0):
            strong, weak = (task.condition(len(z), t, y) for y in (label, None))
            return stack.inverse(joined, z, strong, weak, guidance).states

        z, _, _ = task.forward(params, self.x, self.t, self.label)
        high, none = jnp.full(n, task.high), None if self.label is None else jnp.full(n, -1)
        rows = jnp.concatenate([self.z0, z, self.z0])
        states = drawn(rows, jnp.concatenate([high, self.t, high]), self.labels(self.label, self.label, none))
        first = task._each("patch")[0]
        plain, back, unlabelled = jnp.split(task.to_image(states[-1]), 3)
        out = {"x_rec": back, **({"sample_nolabel_plain": unlabelled} if task.classes else {})}
        out |= {f"sample_plain_seq{i}": unpatchify(s[:n], first, task.channels) for i, s in enumerate(states)}
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
            many = drawn(
                jnp.concatenate([self.z0] * len(parts)), task.high, self.labels(*[self.label] * len(parts)), by
            )
            out |= dict(zip(parts, jnp.split(task.to_image(many[-1]), len(parts))))
        return out

    def _denoised(self, params):
        """Denoising steps of every state that the official samplers went through, in one batch, and our own samplers' ends."""
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
        begin, given = nhwc(self.f["out/iter_ode5_x"])[0], {} if self.label is None else {"label": self.label}
        twice, clip = jnp.concatenate([begin, begin]), jnp.arange(2 * n).reshape(-1, 1, 1, 1) >= n

        def both(x, sigma):
            x0 = task.denoise(params, x, sigma, {k: jnp.concatenate([v, v]) for k, v in given.items()})
            return jnp.where(clip, jnp.clip(x0, -1, 1), x0)

        ends = onward(
            ITarFlowSampling(nfe=5)._by_solver.plan(task.sigmas),
            both,
            twice,
            jax.random.split(jax.random.key(0), 2 * n),
        )
        out |= dict(zip(("iter_ode5_end", "iter_ode5_clip_end"), jnp.split(ends, 2)))
        plan = Ancestral().plan(np.linspace(task.high, task.low, 4))
        noise = jnp.concatenate([nhwc(self.f["in/sde_noise"]), begin[None]])
        out["iter_sde4_end"] = run(
            plan, lambda x, sigma: task.denoise(params, x, sigma, given), begin[None] / task.high, lambda i: noise[i]
        )
        return out


@pytest.fixture(scope="module", params=CASES, ids=[name for name, _ in CASES])
def case(request):
    return Case(*request.param)


def test_every_number_equals_the_official_one(case):
    """But for states between steps and the array that shows the official defect of a batch, all of the file."""
    for name, value in case.found.items():
        if name.endswith("_end"):
            want = np.moveaxis(case.f[f"out/{name.replace('_end', '_x')}"][-1], -3, -1)
        else:
            want = case.expected(name)
        loose = name.startswith(("x_rec", "sample", "denoised", "iter"))
        np.testing.assert_allclose(value, want, rtol=0, atol=2e-5 if loose else 1e-5, err_msg=name)
    rest = {name.removeprefix("out/") for name in case.f if name.startswith("out/")} - set(case.found)
    assert all(name.startswith(("grad", "adamw", "iter_")) or name == "sample_starflow_first_batched" for name in rest)
    np.testing.assert_allclose(
        case.found["sample_starflow_first"][0], case.expected("sample_starflow_first_batched")[0], atol=2e-5
    )
    assert np.abs(case.found["sample_starflow_first"] - case.expected("sample_starflow_first_batched")).max() > 1e-3


def test_gradients_and_four_steps_equal_the_official_ones(case):
    optimizer = AdamW(lr=1e-3, schedule="constant", b2=0.95, weight_decay=1e-4, decay_all=True).build(4)

    @jax.jit
    def step(params, opt):
        loss, grads = jax.value_and_grad(case.loss)(params, case.drop)
        updates, opt = optimizer.update(grads, opt, params)
        return jax.tree.map(jnp.add, params, updates), opt, loss, grads

    params, opt, losses = case.params, optimizer.init(case.params), []
    for i in range(4):
        params, opt, loss, grads = step(params, opt)
        losses.append(float(loss))
        if not i:
            first = weights.to_official(case.task, grads)
            norm = math.sqrt(sum(float(jnp.square(g).sum()) for g in jax.tree.leaves(grads)))
    np.testing.assert_allclose(losses, case.f["out/adamw_losses"], rtol=0, atol=1e-5)
    assert losses[0] == pytest.approx(float(case.f["out/grad_loss"]), abs=1e-5)
    assert norm == pytest.approx(float(case.f["out/grad_global_norm"]), abs=1e-4)
    keys = [key.removeprefix("out/grad:") for key in case.f if key.startswith("out/grad:")]
    assert len(keys) >= 5
    for key in keys:
        np.testing.assert_allclose(first[key], case.f[f"out/grad:{key}"], rtol=0, atol=1e-5, err_msg=key)
