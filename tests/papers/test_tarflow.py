"""TarFlow: parity with the official implementation's numbers, and the laws a flow obeys with random weights."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flow_by_hand import PatchGolden, Rows, four_steps, nhwc
from fresh import randomised

from zoo import weights
from zoo.errors import UserError
from zoo.flows.inverse import Guidance, Jacobi, jacobi, once
from zoo.flows.stack import apply
from zoo.flows.transforms import LOG_2PI, affine_inverse
from zoo.nn.embed import patchify, unpatchify
from zoo.papers import tarflow
from zoo.task import Denoises, abilities, sample_keys
from zoo.train.optim import AdamW

GOLDEN = Path(__file__).parent.parent / "golden" / "tarflow"
TINY = tarflow.TarFlow(image=4, channels=1, patch=2, width=16, depth=2, blocks=2, head_dim=8)


def forward(task, params, image, label=None):
    """z and log-det of images."""
    return task.stack.forward(params, patchify(image, task.patch), label)[:2]


def inverse(task, params, z, label=None, guidance=0.0, method="sequential"):
    """Images on the way back from z."""
    none = jnp.full(len(z), -1)
    states = task.stack.inverse(params, z, label, none, guidance, method=method).states
    return [unpatchify(s, task.patch, task.channels) for s in states]


def block(task, params, i, *inputs):
    """Log-scale and shift, and what else the network of block i gives."""
    return apply(task.stack.nets[i], params[f"block{i}"], *inputs)


class Case(PatchGolden):
    def fields(self, c):
        return {
            "patch": c["patch_size"],
            "width": c["channels"],
            "depth": c["layers_per_block"],
            "blocks": c["num_blocks"],
            "scale": c["nvp"],
            "noise": c["noise_std"],
        }

    def programs(self):
        """Sweeps, scores and guidance of the one with classes alone."""
        return self._forward, self._inverse, *([self._swept] if self.task.classes else [])

    def loss(self, params, label):
        z, logdet = forward(self.task, params, self.x, label)
        return 0.5 * jnp.square(z).mean() - logdet.mean()

    def _forward(self, params):
        kinds = ("", "_nolabel", "_droplabel") if self.task.classes else ("",)
        patches = patchify(self.x, self.task.patch)
        label = self.labels(self.label, self.none, self.drop)
        states, logdets = self.task.stack.flow(params, jnp.concatenate([patches] * len(kinds)), label)
        n = len(patches)
        out = {
            "patches": states[0][:n],
            "block_outputs": jnp.stack([state[:n] for state in states[1:]]),
            "block_logdets": jnp.stack([logdet[:n] for logdet in logdets]),
        }
        for suffix, z, logdet in zip(kinds, *(jnp.split(x, len(kinds)) for x in (states[-1], sum(logdets)))):
            loss = 0.5 * jnp.square(z).mean() - logdet.mean()
            out |= {f"z{suffix}": z, f"logdets{suffix}": logdet, f"loss{suffix}": loss}
        nll = 0.5 * jnp.square(out["z"]).mean((1, 2)) - out["logdets"]
        bits = self.task.about.likelihood.bits(nll + 0.5 * LOG_2PI)
        out |= {"nll_per_dim_per_sample": nll, "bpd_per_sample": bits}
        if not self.task.scale:
            variance = jnp.square(out["z"]).mean(0)
            out["var_after_update"] = self.task.after_step(params, {"variance": variance})["prior"]["var"]
        return out

    def _inverse(self, params):
        """Without guidance, and with labels by all kinds of guidance in one batch."""
        task, n, w, tau = self.task, len(self.z0), self.c["guidance"], self.c["attn_temp"]
        z = self.f["out/z"] / jnp.sqrt(params["prior"]["var"])
        kinds = {
            "sample_plain": (Guidance(), 1.0, self.label),
            "x_rec": (Guidance(), 1.0, self.label),
            "sample_nolabel": (Guidance(), 1.0, self.none),
            "sample_guided": (Guidance(w, annealed=False), tau, self.label),
            "sample_guided_annealed": (Guidance(w), tau, self.label),
            "sample_guided_annealed_a": (Guidance(w, "a"), tau, self.label),
            "sample_guided_annealed_b": (Guidance(w, "b"), tau, self.label),
            "sample_guided_annealed_temp1": (Guidance(w), 1.0, self.label),
            "sample_nolabel_guided_annealed": (Guidance(w), tau, self.none),
        }
        kinds = kinds if task.classes else dict(list(kinds.items())[:2])
        parts, taus, labels = zip(*kinds.values())
        by = Rows.by(task.stack, parts, attention_temperature=jnp.repeat(jnp.array(taus), n)) if task.classes else 0.0
        rows = jnp.concatenate([z if name == "x_rec" else self.z0 for name in kinds])
        states = inverse(task, params, rows, self.labels(*labels), by)
        first = [state[:n] for state in states]
        return {
            "sample_plain_sequence": jnp.stack([unpatchify(self.z0, task.patch, task.channels), *first[1:]]),
            "jacobi_exact": patchify(first[1], task.patch),
            **dict(zip(kinds, jnp.split(states[-1], len(kinds)))),
        }

    def _swept(self, params):
        """The last block by sweeps u <- v s(u) + b(u) over all tokens, every one of them kept; denoised data and samples."""
        task, last, order = self.task, self.task.blocks - 1, self.task.stack.order
        stepper, v = self.last_block(params)

        def sweep(u, _):
            u = affine_inverse(v, *once(stepper, u))
            return u, order(u, last)

        _, sweeps = jax.lax.scan(sweep, v, length=task.tokens)
        out = {
            "jacobi_iterates": sweeps[jnp.array([1, 2, 3, 4, 8, task.tokens - 1, task.tokens]) - 1],
            "jacobi_err": jnp.abs(sweeps - self.f["out/jacobi_exact"]).max((1, 2, 3)),
        }
        both = jnp.concatenate([self.x, nhwc(self.f["out/sample_plain"])])
        x, label = jnp.concatenate([both] * 2), self.labels(self.label, self.label, self.none, self.none)
        clean = task.denoise(params, x, jnp.float32(task.noise), {"label": label})
        scores, clean = (jnp.split(y, 4) for y in ((clean - x) / task.noise**2, clean))
        for i, name in ((0, "denoised"), (2, "denoised_nolabel")):
            out |= {f"{name}_score_x": scores[i], f"{name}_x": clean[i], f"{name}_sample_plain": clean[i + 1]}
        return out

    def last_block(self, params):
        """What inverts the last block, and what goes into it in its own order."""
        z = self.z0 * jnp.sqrt(params["prior"]["var"])
        stack, last = self.task.stack, self.task.blocks - 1
        return stack.chain(params, len(z), self.label).stepper(last), stack.order(z, last)


@pytest.fixture(scope="module")
def labelled():
    return Case(GOLDEN / "cond_nvp.npz", tarflow.TarFlow, scan=True)


@pytest.fixture(scope="module", params=["cond_nvp", "uncond_vp"])
def case(request):
    if request.param == "cond_nvp":
        return request.getfixturevalue("labelled")
    return Case(GOLDEN / "uncond_vp.npz", tarflow.TarFlow, scan=False)


def test_every_number_equals_the_official_one(case):
    """All arrays of the file but gradients."""
    for name, ours in case.found.items():
        golden = case.f[f"out/{name}"]
        image = name.startswith(("x_rec", "sample", "denoised"))
        atol = 1e-4 if "score" in name else 2e-5 if image or name.startswith("jacobi") else 1e-5
        golden = np.moveaxis(golden, -3, -1) if image else golden
        np.testing.assert_allclose(ours, golden, rtol=0, atol=atol, err_msg=name)
    if case.task.classes:
        rest = {k.removeprefix("out/") for k in case.f if k.startswith("out/") and "/grad/" not in k} - set(case.found)
        assert rest == {"adamw_losses", "grad_global_norm", "var_after_update"}


def test_gradients_and_four_steps_equal_the_official_ones(labelled):
    losses, first, norm = four_steps(labelled.task, labelled.params, lambda p: labelled.loss(p, labelled.drop))
    np.testing.assert_allclose(losses, labelled.f["out/adamw_losses"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(norm, labelled.f["out/grad_global_norm"], rtol=0, atol=1e-5)
    names = [k.removeprefix("out/grad/") for k in labelled.f if k.startswith("out/grad/")]
    assert names
    for name in names:
        np.testing.assert_allclose(first[name], labelled.f[f"out/grad/{name}"], rtol=0, atol=1e-5, err_msg=name)


def test_full_sweeps_equal_the_official_samples(labelled):
    """Without a tolerance every number of modules gives the sequential samples, guided ones too."""
    w, tau, n = labelled.c["guidance"], labelled.c["attn_temp"], len(labelled.z0)
    method = Jacobi(modules=(8, 1, 3), tol=0.0, unconverged="keep")

    @jax.jit
    def run(params):
        guidance = Rows.by(labelled.task.stack, [Guidance(0.0), Guidance(w)], attention_temperature=tau)
        label = labelled.labels(labelled.label, labelled.label)
        drawn = inverse(labelled.task, params, jnp.concatenate([labelled.z0] * 2), label, guidance, method)[-1]
        return drawn, jacobi(*labelled.last_block(params), Jacobi(sweeps=4, tol=0.0, unconverged="keep"))

    drawn, (u, sweeps, bad, _) = run(labelled.params)
    for ours, name in zip((drawn[:n], drawn[n:]), ("sample_plain", "sample_guided_annealed"), strict=True):
        np.testing.assert_allclose(ours, nhwc(labelled.f[f"out/{name}"]), rtol=0, atol=2e-5, err_msg=name)
    ours = labelled.task.stack.order(u, labelled.task.blocks - 1)
    np.testing.assert_allclose(ours, labelled.f["out/jacobi_iterates"][3], rtol=0, atol=2e-5)
    assert (sweeps == 4).all()
    assert bad.all()


def test_the_official_layout_comes_back_to_the_bit(case):
    back = weights.to_official(case.task, case.params)
    for name, array in case.state.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)
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

OUT = np.repeat((0.015, 0.05), TINY.dims)  # smaller log-scales than shifts


def weights_of(task):
    return randomised(task, OUT)


def picture(task, n, seed=1):
    return np.random.default_rng(seed).uniform(-1, 1, (n, task.image, task.image, task.channels)).astype(np.float32)


@pytest.fixture(scope="module")
def whole():
    """Of three pictures with and without a label: z, log-dets and way back, z without labels, the Jacobian of the first, and nll."""
    task = dataclasses.replace(TINY, classes=3)
    x, label = picture(task, 3), jnp.array([0, -1, 2])

    @jax.jit
    def run(params):
        def ahead(first):
            z, logdet = forward(task, params, jnp.concatenate([first[None], x[1:]]), label)
            return z[0].ravel(), (z, logdet)

        jacobian, (z, logdet) = jax.jacfwd(ahead, has_aux=True)(x[0])
        back = inverse(task, params, z / jnp.sqrt(params["prior"]["var"]), label)[-1]
        keys, clean = jax.random.split(jax.random.key(0), 3), dataclasses.replace(task, noise=0.0)
        nll = clean.nll(params, {"image": x, "label": label}, keys)
        return z, logdet, back, forward(task, params, x, None)[0], jacobian.reshape(x[0].size, -1), nll

    return x, *jax.device_get(run(weights_of(task)))


def test_the_inverse_is_the_way_back_and_the_logdet_that_of_the_jacobian(whole):
    x, z, logdet, back, none, jacobian, _ = whole
    np.testing.assert_allclose(back, x, atol=1e-4)
    assert np.abs(z - patchify(x, TINY.patch)).max() > 0.1
    np.testing.assert_allclose(np.linalg.slogdet(jacobian)[1] / len(jacobian), logdet[0], atol=1e-5)
    assert abs(float(logdet[0])) > 1e-3
    np.testing.assert_allclose(z[1], none[1], atol=1e-6)  # a negative label is none
    assert np.abs(z - none)[[0, 2]].max((1, 2)).min() > 1e-3


def test_the_likelihood_is_the_density_of_z_and_the_logdet_with_the_label(whole):
    x, z, logdet, *_, nll = whole
    size = x[0].size
    wanted = 0.5 * (np.square(z).sum((1, 2)) + size * np.log(2 * np.pi)) - size * logdet
    np.testing.assert_allclose(nll, wanted, rtol=1e-5)


def test_blocks_are_causal_in_their_own_order_and_cached_equals_uncached():
    """Of two blocks: row 0 is of some tokens, row t + 1 of others at t. The second again token by token with a cache."""
    u = jax.random.normal(jax.random.key(3), (1, TINY.tokens, TINY.dims))
    u = jnp.concatenate([u, u + jnp.eye(TINY.tokens)[..., None]])

    @jax.jit
    def run(params):
        one = lambda i: lambda row: jnp.concatenate(block(TINY, params, i, row[None])[:2], -1)[0]  # noqa: E731

        def step(cache, inputs):
            index, token = inputs
            *outputs, cache, _ = block(TINY, params, 1, token[:, None], None, cache, index)
            return cache, jnp.concatenate(outputs, -1)[:, 0]

        inputs = jnp.arange(TINY.tokens - 1), u[:, :-1].swapaxes(0, 1)
        _, cached = jax.lax.scan(step, TINY.stack.nets[1].memory(len(u)), inputs)
        return [jax.lax.map(one(i), u) for i in (0, 1)], cached.swapaxes(0, 1)

    found, cached = jax.device_get(run(weights_of(TINY)))
    np.testing.assert_allclose(cached, found[1][:, 1:], atol=1e-5)
    for base, *changed in found:
        for token, other in enumerate(changed):
            np.testing.assert_array_equal(other[: token + 1], base[: token + 1])
            assert token == TINY.tokens - 1 or np.abs(other - base)[token + 1].max() > 0


def test_guidance_of_nothing_is_nothing():
    params, z = weights_of(TINY), TINY.latent(jax.random.split(jax.random.key(5), 2))

    own = Guidance(2.0, attention_temperature=jnp.array([1, 1, 0.3, 0.3]))

    @jax.jit
    def draw(params):
        return inverse(TINY, params, z)[-1], inverse(TINY, params, jnp.concatenate([z, z]), guidance=own)[-1]

    plain, guided = draw(params)
    np.testing.assert_allclose(guided[:2], plain, atol=1e-5)
    assert np.abs(guided[2:] - plain).max() > 1e-3
    assert not Guidance(attention_temperature=0.3).active
    for guidance, told in ((2.0, "changes nothing"), (Guidance(attention_temperature=0.3), "do nothing")):
        with pytest.warns(UserWarning, match=told):
            jax.eval_shape(
                lambda p, o=TINY.Sampling(guidance=guidance): TINY.sample(p, jax.random.key(0), 2, None, o), params
            )


def test_sample_i_depends_on_its_key_alone():
    """Wherever it stands and whatever else is drawn."""
    key, run = jax.random.key(9), jax.jit(lambda p, k: TINY.sample(p, k, 3)["image"])
    keys = sample_keys(key, 5)
    first, then = (run(weights_of(TINY), keys[i : i + 3]) for i in (0, 2))
    np.testing.assert_allclose(first[2], then[0], atol=1e-5)
    assert np.abs(first[1] - first[2]).max() > 1e-3
    np.testing.assert_array_equal(*(jax.random.key_data(k) for k in (keys[:3], sample_keys(key, 3))))


def test_uniform_noise_fills_the_bins():
    task = dataclasses.replace(TINY, noise_type="uniform", levels=17)
    k = np.arange(16, dtype=np.float32).reshape(1, 4, 4, 1)
    noisy = np.asarray(jax.jit(task.add_noise)(jax.random.key(0), 2 * k / 16 - 1))
    np.testing.assert_array_equal(np.floor((noisy + 1) * 17 / 2), k)
    np.testing.assert_allclose(
        task.about.likelihood.bits(0.5 * LOG_2PI), 0.5 * np.log2(2 * np.pi) + np.log2(17 / 2), rtol=1e-6
    )
    assert (task.about.likelihood.name, TINY.about.likelihood.name) == ("bpd", "noisy_bits_per_dim")


def test_bfloat16_stays_close_and_keeps_float32_where_it_matters(whole):
    task = dataclasses.replace(TINY, dtype="bfloat16", classes=3)
    x, want, *_ = whole
    z, logdet = jax.jit(lambda p: forward(task, p, x, jnp.array([0, -1, 2])))(weights_of(task))
    assert z.dtype == logdet.dtype == jnp.float32
    np.testing.assert_allclose(z, want, atol=0.1)
    assert np.abs(z - want).max() > 0


@pytest.mark.parametrize("field, value", [("head_dim", 24), ("patch", 3), ("patch", 4)])
def test_fields_that_do_not_fit_are_named(field, value):
    with pytest.raises(UserError, match=rf"task\.{field}={value}"):
        dataclasses.replace(TINY, **{field: value})


def test_denoising_is_float32_at_the_level_of_training():
    assert isinstance(TINY, Denoises)
    assert TINY.sigmas == (0.05, 0.05)
    half = jax.eval_shape(TINY.denoise, weights.abstract(TINY), jnp.zeros((3, 4, 4, 1), jnp.bfloat16), 0.05)
    assert half.dtype == jnp.float32


def test_denoising_refuses_uniform_noise():
    task = dataclasses.replace(TINY, noise_type="uniform")
    assert "denoise" not in abilities(task)
    with pytest.raises(UserError, match=r"denoise.*task\.noise_type='uniform'"):
        task.denoise({}, picture(task, 1), 0.05)
    with pytest.raises(UserError, match="noise_type"):
        task.sample({}, jax.random.key(0), 1, None, task.Sampling(denoise=1.0))
