"""TarFlow: parity with the official implementation's numbers, and the laws a flow obeys with random weights."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fresh import fresh

from zoo import dist, weights
from zoo.errors import UserError
from zoo.flows.inverse import Guidance, Jacobi, jacobi, once, sequential
from zoo.flows.stack import apply
from zoo.flows.transforms import LOG_2PI, affine_inverse
from zoo.nn.embed import patchify, unpatchify
from zoo.papers import tarflow
from zoo.train.optim import AdamW
from zoo.train.step import split

GOLDEN = Path(__file__).parent.parent / "golden" / "tarflow"
CASES = [("cond_nvp", True), ("uncond_nvp", False), ("uncond_vp", True)]
TINY = tarflow.TarFlow(image=4, channels=1, patch=2, width=16, depth=2, blocks=3, head_dim=8)


def nhwc(x):
    return jnp.asarray(np.moveaxis(x, -3, -1))


def forward(task, params, image, label=None):
    """z and log-det of images."""
    return task.stack.forward(params, patchify(image, task.patch), label)[:2]


def inverse(task, params, z, label=None, guidance=0.0, method="sequential"):
    """Images on the way back from z."""
    none = jnp.full(len(z), -1)
    states = task.stack.inverse(params, z, label, none, guidance, method=method).states
    return [unpatchify(s, task.patch, task.channels) for s in states]


def block(task, params, t, *inputs):
    """Log-scale and shift, and what else the network of block t gives."""
    return apply(task.stack.nets[t], params[f"block{t}"], *inputs)


class Case:
    """A golden file, our task and parameters for it, and everything computed in two programs."""

    def __init__(self, name, scan):
        self.f = np.load(GOLDEN / f"{name}.npz")
        c = self.c = json.loads(str(self.f["config"]))
        self.task = task = tarflow.TarFlow(
            image=c["img_size"],
            channels=c["in_channels"],
            patch=c["patch_size"],
            width=c["channels"],
            depth=c["layers_per_block"],
            blocks=c["num_blocks"],
            head_dim=c["head_dim"],
            classes=c["num_classes"],
            scale=c["nvp"],
            noise=c["noise_std"],
            scan=scan,
        )
        state = {k.removeprefix("state/"): v for k, v in self.f.items() if k.startswith("state/")}
        self.params = weights.from_official(task, state)
        self.x = nhwc(self.f["in/x"])
        self.z0 = jnp.asarray(self.f["in/z0"])
        self.label = jnp.asarray(self.f["in/y"], jnp.int32) if task.classes else None
        self.drop = jnp.asarray(self.f["in/y_drop"], jnp.int32) if task.classes else None
        self.forward = jax.device_get(jax.jit(self._forward)(self.params))
        self.inverse = jax.device_get(jax.jit(self._inverse)(self.params))

    def loss(self, params, label):
        z, logdet = forward(self.task, params, self.x, label)
        return 0.5 * jnp.square(z).mean() - logdet.mean()

    def _forward(self, params):
        task, x, label, out = self.task, self.x, self.label, {}
        (patches, *states), logdets = task.stack.flow(params, patchify(x, task.patch), label)
        out |= {
            "patches": patches,
            "block_outputs": jnp.stack(states),
            "block_logdets": jnp.stack(logdets),
        }
        for suffix, y in [("", label)] + ([("_nolabel", None), ("_droplabel", self.drop)] if task.classes else []):
            z, logdet = forward(task, params, x, y)
            out |= {f"z{suffix}": z, f"logdets{suffix}": logdet, f"loss{suffix}": self.loss(params, y)}
        nll = 0.5 * jnp.square(out["z"]).mean((1, 2)) - out["logdets"]
        out |= {
            "nll_per_dim_per_sample": nll,
            "bpd_per_sample": task.about.likelihood.bits(nll + 0.5 * LOG_2PI),
        }
        grads = jax.grad(self.loss)(params, self.drop)
        trained, _ = split(task, grads)
        out["grad_global_norm"] = jnp.sqrt(sum(jnp.square(g).sum() for g in jax.tree.leaves(trained)))
        out["variance"] = task.after_step(params, {"variance": jnp.square(out["z"]).mean(0)})["prior"]["var"]
        return out, grads

    def _inverse(self, params):
        task, z0, label, w, tau = self.task, self.z0, self.label, self.c["guidance"], self.c["attn_temp"]
        var = params["prior"]["var"]
        z = forward(task, params, self.x, label)[0]
        plain = inverse(task, params, z0, label)
        out = {
            "x_rec": inverse(task, params, z / jnp.sqrt(var), label)[-1],
            "sample_plain_sequence": jnp.stack([unpatchify(z0, task.patch, task.channels), *plain[1:]]),
            "sample_guided": inverse(task, params, z0, label, Guidance(w, "ab", tau, annealed=False))[-1],
            "sample_guided_annealed": inverse(task, params, z0, label, Guidance(w, "ab", tau))[-1],
            "sample_guided_annealed_a": inverse(task, params, z0, label, Guidance(w, "a", tau))[-1],
            "sample_guided_annealed_b": inverse(task, params, z0, label, Guidance(w, "b", tau))[-1],
        }
        out |= self._jacobi(params)
        if task.classes:
            out["sample_guided_annealed_temp1"] = inverse(task, params, z0, label, w)[-1]
            out["sample_nolabel"] = inverse(task, params, z0)[-1]
            out["sample_nolabel_guided_annealed"] = inverse(task, params, z0, None, Guidance(w, "ab", tau))[-1]
        sample = nhwc(self.f["out/sample_plain"])
        for name, y in [("denoised", label)] + ([("denoised_nolabel", None)] if task.classes else []):
            score = task.stack.score(params, patchify(self.x, task.patch), y)
            out[f"{name}_score_x"] = unpatchify(score, task.patch, task.channels)
            for end, x in (("x", self.x), ("sample_plain", sample)):
                clean = task.stack.denoise(params, patchify(x, task.patch), task.noise, y)
                out[f"{name}_{end}"] = unpatchify(clean, task.patch, task.channels)
        return out

    def last_block(self, params):
        """What inverts the last block, and what goes into it in its own order."""
        z = jnp.asarray(self.f["in/z0"]) * jnp.sqrt(params["prior"]["var"])
        last = self.task.blocks - 1
        stack = self.task.stack
        return stack.chain(params, len(z), self.label).stepper(last), stack.order(z, last)

    def _jacobi(self, params):
        """The last block token by token, and by sweeps u <- v s(u) + b(u) over all tokens, every one of them kept."""
        stepper, v = self.last_block(params)
        last, tokens = self.task.blocks - 1, self.task.tokens

        def sweep(u, _):
            u = affine_inverse(v, *once(stepper, u))
            return u, self.task.stack.order(u, last)

        _, sweeps = jax.lax.scan(sweep, v, length=tokens)
        chosen = jnp.array([1, 2, 3, 4, 8, tokens - 1, tokens]) - 1
        error = jnp.abs(sweeps - self.f["out/jacobi_exact"]).max((1, 2, 3))
        exact = self.task.stack.order(sequential(stepper, v), last)
        return {"jacobi_exact": exact, "jacobi_iterates": sweeps[chosen], "jacobi_err": error}


@pytest.fixture(scope="module", params=CASES, ids=[f"{name}-{'scan' if s else 'unrolled'}" for name, s in CASES])
def case(request):
    return Case(*request.param)


def test_forward_equals_the_official_numbers(case):
    out, _ = case.forward
    np.testing.assert_array_equal(out["patches"], case.f["out/patches"])
    names = [n for n in out if n not in ("patches", "variance")]
    assert {"z", "logdets", "loss", "bpd_per_sample", "grad_global_norm"} <= set(names)
    for name in names:
        np.testing.assert_allclose(out[name], case.f[f"out/{name}"], rtol=0, atol=1e-5, err_msg=name)


def test_no_golden_array_is_left_out(case):
    compared = {*case.forward[0], *case.inverse, "adamw_losses", "sample_plain", "var_after_update", "x_rec"}
    assert {k.removeprefix("out/") for k in case.f if k.startswith("out/") and "/grad/" not in k} <= compared


def test_gradients_equal_the_official_numbers(case):
    theirs = weights.to_official(case.task, case.forward[1])
    names = [k.removeprefix("out/grad/") for k in case.f if k.startswith("out/grad/")]
    assert names
    for name in names:
        np.testing.assert_allclose(theirs[name], case.f[f"out/grad/{name}"], rtol=0, atol=1e-5, err_msg=name)


def test_inverse_and_denoising_equal_the_official_numbers(case):
    assert len(case.inverse) >= 10
    for name, ours in case.inverse.items():
        golden = case.f[f"out/{name}"]
        golden = golden if name.startswith("jacobi") else np.moveaxis(golden, -3, -1)
        np.testing.assert_allclose(ours, golden, rtol=0, atol=1e-4 if "score" in name else 2e-5, err_msg=name)
    plain = np.moveaxis(case.f["out/sample_plain"], -3, -1)
    np.testing.assert_allclose(case.inverse["sample_plain_sequence"][-1], plain, rtol=0, atol=2e-5)


def test_sweeps_equal_the_official_iterates(case):
    """A block stopped after 1, 4, 8 and as many sweeps as it has tokens to find."""

    @jax.jit
    def run(params):
        stepper, v = case.last_block(params)
        plans = [Jacobi(sweeps=n, tol=0.0, unconverged="keep") for n in (1, 4, 8, case.task.tokens)]
        return [jacobi(stepper, v, plan) for plan in plans]

    found, exact = run(case.params), case.task.tokens - 1
    for (u, sweeps, bad), theirs, count in zip(found, (0, 3, 4, 6), (1, 4, 8, exact), strict=True):
        ours = case.task.stack.order(u, case.task.blocks - 1)
        np.testing.assert_allclose(ours, case.f["out/jacobi_iterates"][theirs], rtol=0, atol=2e-5)
        assert (sweeps <= count).all()
        assert sweeps.max() == count
        assert bad.all() == (count < exact)


@pytest.mark.parametrize("modules", [3, (8, 1, 2)])
def test_full_sweeps_equal_the_official_samples(case, modules):
    """Without a tolerance every number of modules gives the sequential samples, guided ones too."""
    method = Jacobi(modules=modules, tol=0.0)
    w, tau = case.c["guidance"], case.c["attn_temp"]

    @jax.jit
    def run(params):
        weights = (0.0, Guidance(w, "ab", tau))
        return [inverse(case.task, params, case.z0, case.label, g, method)[-1] for g in weights]

    for ours, name in zip(run(case.params), ("sample_plain", "sample_guided_annealed"), strict=True):
        np.testing.assert_allclose(ours, nhwc(case.f[f"out/{name}"]), rtol=0, atol=2e-5, err_msg=name)


def test_prior_variances_follow_the_batch(case):
    want = case.f["out/var_after_update"] if not case.task.scale else case.f["state/var"]
    np.testing.assert_allclose(case.forward[0]["variance"], want, rtol=0, atol=1e-5)


def test_adamw_equals_the_official_losses(case):
    optimizer = AdamW(lr=1e-3, schedule="constant", b2=0.95, weight_decay=1e-4, decay_all=True).build(4)
    trained, held = split(case.task, case.params)

    @jax.jit
    def step(trained, opt):
        loss, grads = jax.value_and_grad(lambda p: case.loss({**held, **p}, case.drop))(trained)
        updates, opt = optimizer.update(grads, opt, trained)
        return jax.tree.map(jnp.add, trained, updates), opt, loss

    opt, losses = optimizer.init(trained), []
    for _ in range(4):
        trained, opt, loss = step(trained, opt)
        losses.append(float(loss))
    np.testing.assert_allclose(losses, case.f["out/adamw_losses"], rtol=0, atol=1e-5)


def test_the_official_layout_comes_back_to_the_bit(case):
    back = weights.to_official(case.task, case.params)
    for name in (k.removeprefix("state/") for k in case.f if k.startswith("state/")):
        np.testing.assert_array_equal(back[name], case.f[f"state/{name}"], err_msg=name)
    assert back[f"blocks.{case.task.blocks - 1}.attn_mask"].shape == (case.task.tokens,) * 2


def test_learning_rate_equals_the_official_schedule():
    f = np.load(GOLDEN / "lr_schedule.npz")
    names = [k.removesuffix("_lr") for k in f if k.endswith("_lr")]
    assert names
    for name in names:
        warmup, total, low, high = f[f"{name}_args"]
        rate = AdamW(lr=float(high), final_lr=float(low), warmup=int(warmup)).learning_rate(int(total))
        ours = jax.vmap(rate)(jnp.arange(int(total)))
        np.testing.assert_allclose(ours, f[f"{name}_lr"], rtol=1e-5, atol=1e-9, err_msg=name)


# --- laws, with random weights: fresh ones give constant outputs and hide every mistake -------------


def randomised(task, seed=0):
    """Parameters in which masks, orders and shifts show, and which still invert well."""
    params = fresh(task, seed)
    rng = np.random.default_rng(seed)
    half = task.dims if task.scale else 0

    def noisy(path, x):
        name = jax.tree_util.keystr(path)
        if "'out']['kernel']" in name and "attention" not in name:
            std = np.where(np.arange(x.shape[-1]) < half, 0.06, 0.2) / task.width**0.5
            return jnp.asarray(rng.normal(size=x.shape) * std, jnp.float32)
        if "prior" in name:
            return x if task.scale else jnp.asarray(rng.uniform(0.5, 1.5, x.shape), jnp.float32)
        return x + jnp.asarray(rng.normal(size=x.shape) * 0.1, jnp.float32)

    return jax.tree_util.tree_map_with_path(noisy, params)


def picture(task, n, seed=1):
    return jax.random.uniform(jax.random.key(seed), (n, task.image, task.image, task.channels), minval=-1.0)


@pytest.mark.parametrize("scale", [True, False])
def test_round_trip(scale):
    task = dataclasses.replace(TINY, scale=scale, classes=3)
    params, x, label = randomised(task), picture(TINY, 3), jnp.array([0, -1, 2])

    @jax.jit
    def there_and_back(params):
        z, _ = forward(task, params, x, label)
        return inverse(task, params, z / jnp.sqrt(params["prior"]["var"]), label)[-1]

    np.testing.assert_allclose(there_and_back(params), x, atol=1e-4)


def test_logdet_is_the_jacobians():
    params, x = randomised(TINY), picture(TINY, 1)

    def flat(v):
        return forward(TINY, params, v.reshape(x.shape))[0].ravel()

    jacobian = jax.jit(jax.jacfwd(flat))(x.ravel())
    _, logdet = forward(TINY, params, x)
    dims = TINY.tokens * TINY.dims
    np.testing.assert_allclose(np.linalg.slogdet(jacobian)[1] / dims, logdet[0], atol=1e-5)
    assert abs(float(logdet[0])) > 1e-3


@pytest.mark.parametrize("t", [0, 1])
def test_a_block_is_causal_in_its_own_order(t):
    params, u = randomised(TINY), jax.random.normal(jax.random.key(3), (1, TINY.tokens, TINY.dims))

    @jax.jit
    def outputs(u):
        return jnp.concatenate(block(TINY, params, t, u)[:2], -1)

    for token in range(TINY.tokens):
        changed = outputs(u.at[:, token].add(1.0)) - outputs(u)
        np.testing.assert_array_equal(changed[:, : token + 1], 0)
        assert token == TINY.tokens - 1 or np.abs(changed[:, token + 1]).max() > 0


@pytest.mark.parametrize("scan", [True, False])
def test_cached_equals_uncached(scan):
    task = dataclasses.replace(TINY, scan=scan)
    params, u = randomised(task), jax.random.normal(jax.random.key(3), (2, TINY.tokens, TINY.dims))
    whole = jax.jit(lambda u: block(task, params, 1, u))(u)
    cache = task.stack.nets[1].memory(2)
    one = jax.jit(lambda token, cache, i: block(task, params, 1, token, None, cache, i))
    for i in range(task.tokens - 1):
        *outputs, cache, _ = one(u[:, i : i + 1], cache, i)
        for out, want in zip(outputs, whole):
            np.testing.assert_allclose(out[:, 0], want[:, i + 1], atol=1e-5)


def test_guidance_of_nothing_is_nothing():
    params = randomised(TINY)

    def draw(**options):
        return TINY.sample(params, jax.random.key(5), 2, None, TINY.Sampling(denoise=0, **options))["image"]

    plain = draw()
    np.testing.assert_array_equal(draw(guidance=0.0), plain)
    with pytest.warns(UserWarning, match="changes nothing"):
        same = draw(guidance=2.0)
    np.testing.assert_allclose(same, plain, atol=1e-5)
    with pytest.warns(UserWarning, match="do nothing"):
        np.testing.assert_array_equal(draw(guidance=Guidance(attention_temperature=0.3)), plain)
    other = draw(guidance=Guidance(2.0, attention_temperature=0.3))
    assert np.abs(other - plain).max() > 1e-3


def test_a_negative_label_is_no_label_in_both_directions():
    task = dataclasses.replace(TINY, classes=3)
    params, x = randomised(task), picture(task, 2)
    none = jnp.array([-1, -1])
    np.testing.assert_allclose(*(forward(task, params, x, y)[0] for y in (none, None)), atol=1e-6)
    z = jax.random.normal(jax.random.key(5), (2, task.tokens, task.dims))
    np.testing.assert_allclose(*(inverse(task, params, z, y)[-1] for y in (none, None)), atol=1e-5)


def test_sample_i_depends_on_its_key_alone():
    params = randomised(TINY)
    key = jax.random.key(9)
    few, many = (jax.jit(lambda p, n=n: TINY.sample(p, key, n)["image"])(params) for n in (3, 5))
    np.testing.assert_allclose(few, many[:3], atol=1e-5)
    assert np.abs(many[3] - many[4]).max() > 1e-3


def test_scanned_and_unrolled_agree_whatever_is_recomputed():
    params, x = randomised(TINY), picture(TINY, 2)

    def value(task):
        like = weights.matching(params, weights.abstract(task))
        loss = lambda p: task.stack.log_prob(p, patchify(x, 2)).mean()  # noqa: E731
        total, grads = jax.jit(jax.value_and_grad(loss))(like)
        return total, weights.flatten(weights.stacked(jax.device_get(grads)))

    want, grads = value(TINY)
    for other in (dataclasses.replace(TINY, scan=False), dataclasses.replace(TINY, remat="full")):
        total, found = value(other)
        np.testing.assert_allclose(total, want, rtol=1e-5)
        for name, g in grads.items():
            np.testing.assert_allclose(found[name], g, atol=1e-4, err_msg=name)


@pytest.mark.devices8
@pytest.mark.parametrize("mesh", [dist.Mesh(data=8), dist.Mesh(data=2, fsdp=2, tensor=2)], ids=["data", "all"])
def test_eight_devices_agree_with_one(mesh):
    params, x = randomised(TINY), picture(TINY, 8)
    loss = lambda p, b: TINY.loss(p, b, jax.random.key(0))[0]  # noqa: E731
    want = jax.jit(loss)(params, {"image": x})
    boxed = jax.eval_shape(TINY.init, jax.random.key(0))
    built = mesh.build()
    with dist.use(built):
        where = dist.shardings(boxed, built)
        placed = jax.device_put(params, where)
        got = jax.jit(loss)(placed, {"image": jax.device_put(x, dist.batch_sharding(built))})
    assert abs(float(got) - float(want)) < 1e-6


def test_uniform_noise_fills_the_bins():
    task = dataclasses.replace(TINY, noise_type="uniform", levels=17)
    k = jnp.arange(16).reshape(1, 4, 4, 1)
    noisy = task.add_noise(jax.random.key(0), 2 * k / 16 - 1)
    np.testing.assert_array_equal(jnp.floor((noisy + 1) * 17 / 2), k)
    np.testing.assert_allclose(
        task.about.likelihood.bits(0.5 * LOG_2PI), 0.5 * np.log2(2 * np.pi) + np.log2(17 / 2), rtol=1e-6
    )
    assert (task.about.likelihood.name, TINY.about.likelihood.name) == ("bpd", "noisy_bits_per_dim")


def test_bfloat16_stays_close_and_keeps_float32_where_it_matters():
    task = dataclasses.replace(TINY, dtype="bfloat16")
    params, x = randomised(TINY), picture(TINY, 2)
    z, logdet = forward(task, params, x)
    want, _ = forward(TINY, params, x)
    assert z.dtype == logdet.dtype == jnp.float32
    np.testing.assert_allclose(z, want, atol=0.1)
    assert np.abs(z - want).max() > 0


def test_patches_come_back():
    x = picture(tarflow.TarFlow(image=8, patch=2, width=64), 2)
    np.testing.assert_array_equal(unpatchify(patchify(x, 2), 2, 3), x)


@pytest.mark.parametrize("field, value", [("head_dim", 24), ("patch", 3), ("patch", 4)])
def test_fields_that_do_not_fit_are_named(field, value):
    with pytest.raises(UserError, match=rf"task\.{field}={value}"):
        dataclasses.replace(TINY, **{field: value})


def test_denoising_refuses_uniform_noise():
    task = dataclasses.replace(TINY, noise_type="uniform")
    with pytest.raises(UserError, match="noise_type"):
        task.sample(randomised(task), jax.random.key(0), 1, None, task.Sampling(denoise=1.0))
