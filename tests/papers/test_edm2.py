"""EDM2: its U-Net, loss, samplers, training steps and averages against the official numbers, and what the task promises."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fresh import drawn, fresh
from mistakes import told

import zoo
from zoo import config, dist, weights
from zoo.commands.weights import import_checkpoint
from zoo.diffusion.levels import Levels
from zoo.diffusion.precondition import Precondition
from zoo.diffusion.sampling import DenoiserSampling
from zoo.diffusion.solvers import Churn, Heun, Plan, run
from zoo.encoders.vae import AutoEncoder
from zoo.papers import edm2
from zoo.papers.edm2 import networks
from zoo.papers.edm2.task import Edm2, UNet
from zoo.task import Denoises, Params, Prepares, Samples
from zoo.train import averages
from zoo.train.averages import Power
from zoo.train.optim import AdamW
from zoo.train.step import init_state, make_train_step, split
from zoo.weights.official import from_official, to_official, write_state_dict

NAMES = {
    "model_channels": "width", "channel_mult": "multiples", "num_blocks": "blocks", "attn_resolutions": "attention", "dropout": "dropout",
    "channels_per_head": "head_dim", "channel_mult_noise": "noise_multiple", "channel_mult_emb": "embedding_multiple",
    "res_balance": "residual_balance", "attn_balance": "attention_balance", "concat_balance": "skip_balance", "clip_act": "clip",
    "resample_filter": "taps", "logvar_channels": "uncertainty",
}  # fmt: skip


def nhwc(x: np.ndarray) -> jax.Array:
    return jnp.asarray(np.moveaxis(x, -3, -1))


def task_of(given: dict[str, Any]) -> Edm2:
    net = {ours: given[theirs] for theirs, ours in NAMES.items() if theirs in given}
    net = {name: tuple(value) if isinstance(value, list) else value for name, value in net.items()}
    sizes = given["img_resolution"], given["img_channels"], given["label_dim"]
    return Edm2(*sizes, network=UNet(**net), data=given.get("sigma_data", 0.5))


class Golden:
    """The official arrays of a file, and its network with its weights, which come in by the door of users."""

    def __init__(self, name: str, made: str = "config", prefix: str = "w:") -> None:
        self.f = dict(np.load(Path(__file__).parent.parent / "golden" / "edm" / f"edm2_{name}.npz"))
        self.meta = json.loads(bytes(self.f["meta_json"]).decode())
        if made in self.meta:
            self.task = task_of(self.meta[made])
            state = {key.removeprefix(prefix): x for key, x in self.f.items() if key.startswith(prefix)}
            self.params = from_official(self.task, state)

    def denoise(self, params: Params, x: jax.Array, sigma: Any, hot: Any) -> jax.Array:
        kind = Precondition("edm", self.task.data)
        return kind.denoise(lambda z, noise: self.task.raw(params, z, noise, hot), x, jnp.asarray(sigma))


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden("cond")


def near(found: Any, wanted: np.ndarray, atol: float, name: str = "", rtol: float = 0.0) -> None:
    np.testing.assert_allclose(found, wanted, atol=atol, rtol=rtol or atol, err_msg=name)


# --- the official numbers -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cond", "options"])
def test_network_denoisers_and_loss_equal_the_official_numbers(name: str, golden: Golden) -> None:
    g = golden if name == "cond" else Golden(name)
    f, task = g.f, g.task
    level = jnp.exp(-0.4 + jnp.asarray(f["loss_rnd_normal"]).ravel())
    y, hot, none = nhwc(f["images"]), f.get("class_labels"), np.zeros((len(f["x"]), 7), np.float32)
    noisy = y + level[:, None, None, None] * nhwc(f["loss_noise_unit"])
    # one program for all of them: x, sigma, label
    rows: dict[str, Any] = {
        "D": (nhwc(f["x"]), f["sigma"], hot),
        "D_scalar_sigma": (nhwc(f["x"]), np.full_like(f["sigma"], f["sigma"][0]), hot),
        "loss_map": (noisy, level, hot),
    }
    if hot is not None:
        rows["D_no_label"] = nhwc(f["x"]), f["sigma"], none
        rows["D_soft"] = nhwc(f["x"]), f["sigma"], f["class_labels_soft"]
        drawn = Golden("sampler", "").f  # the calls of a whole trajectory
        f = {**f, "heun_eval_D": drawn["heun_eval_D"].reshape(-1, *f["x"].shape[1:])}
        path = nhwc(drawn["heun_eval_x"].reshape(f["heun_eval_D"].shape))
        rows["heun_eval_D"] = path, np.repeat(drawn["heun_eval_sigma"], 2), np.tile(drawn["class_labels"], (11, 1))
    x, sigma = (jnp.concatenate([row[i] for row in rows.values()]) for i in range(2))
    label = None if hot is None else jnp.concatenate([row[2] for row in rows.values()])

    @jax.jit
    def everything(p: Params) -> Any:
        seen: dict[str, Any] = {}

        def network(z: jax.Array, noise: jax.Array) -> jax.Array:
            waves = networks.fourier(noise, **p["fourier"]["noise"])
            raw, state = task._net.apply({"params": p["net"]}, z, waves, label, capture_intermediates=True)
            seen.update(state["intermediates"], F=raw, emb_fourier=waves, told=noise)
            seen["in"] = z
            return raw

        return Precondition("edm", task.data).denoise(network, x, sigma), seen, task.log_variance(p, sigma)

    x0, parts, u = everything(g.params)
    ends = np.cumsum([len(row[0]) for row in rows.values()])
    found = dict(zip(rows, np.split(np.asarray(x0), ends[:-1])))
    head = slice(len(f["x"]))
    found |= {
        "unet_in_x": parts["in"][head],
        "c_noise": parts["told"][head],
        "F": parts["F"][head],
        "emb_fourier": parts["emb_fourier"][head],
        "logvar": u[head],
    }
    condition = found["emb_noise"] = parts["noise"]["__call__"][0][head]
    if hot is not None:
        condition = networks.mixed(condition, parts["label"]["__call__"][0][head], task.network.label_balance)
    found["emb"] = networks.silu(condition)
    weight = Precondition("edm", 0.5).weight(level)  # the official loss keeps its own sigma_data
    own = task.log_variance(g.params, level)
    square = jnp.square(found["loss_map"] - y)
    found["loss_map"] = (weight * jnp.exp(-own))[:, None, None, None] * square + own[:, None, None, None]
    for key, array in found.items():
        wanted = nhwc(f[key]) if f[key].ndim == 4 else f[key]
        near(array, wanted, 2e-4 if key == "loss_map" else 1e-5, key)
    keys = [key for key in f if key.startswith("act:")]
    assert len(keys) == len([part for part in parts if re.match("enc|dec", part)])
    for key in keys:
        ours = re.sub(r"act:(enc|dec)\.(\d+)x\d+_", r"\1_\2_", key)
        near(parts[ours]["__call__"][0][head], nhwc(f[key]), 2e-5, key, 1e-4)
    half = from_official(task, {k[2:]: v.astype(np.float16) for k, v in f.items() if k[:2] == "w:"})
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype("float32")}
    near(everything(half)[0][head], nhwc(f["D_float16_params_upcast"]), 1e-5)


def test_functions_equal_the_official_numbers() -> None:
    f = Golden("functions").f
    a, b, c = (nhwc(f[key]) for key in "abc")
    near(networks.silu(a), nhwc(f["mp_silu_a"]), 1e-6)
    for key in f:
        share = key.rpartition("_")[2]
        if key.startswith("mp_sum"):
            near(networks.mixed(a, c, float(share)), nhwc(f[key]), 1e-6, key)
        if key.startswith("mp_cat"):
            near(networks.joined(a, b, float(share)), nhwc(f[key]), 1e-6, key)
        if key.startswith("resample"):
            resize: Any = "half" if "down" in key else "twice"
            near(networks.resized(a, resize, tuple(map(float, share))), nhwc(f[key]), 1e-6, key)
    near(networks.normalised(a, (1, 2, 3)), nhwc(f["normalize_a_all"]), 1e-6)
    near(networks.normalised(a, -1), nhwc(f["normalize_a_dim1"]), 1e-6)
    near(networks.normalised(1e-5 * a, -1), nhwc(f["normalize_tiny_dim1"]), 1e-6)
    kernel = {"params": {"kernel": f["mpconv_weight"].transpose(2, 3, 1, 0)}}
    for name, gain in (("mpconv_a", 1.0), ("mpconv_a_gain0.7", 0.7)):
        found: Any = networks.Linear(5, 3).apply(kernel, a, gain)
        near(found, nhwc(f[name]), 2e-6, name)
    found = networks.Linear(5).apply({"params": {"kernel": f["mplinear_weight"].T}}, f["mplinear_in"])
    near(found, f["mplinear_out"], 1e-6)
    vae = edm2.autoencoder()
    mean, std = (nhwc(part) for part in np.split(f["vae_raw"], 2, axis=1))
    np.testing.assert_allclose(0.5 / np.asarray(vae.std), f["vae_scale"].ravel(), rtol=1e-6)
    np.testing.assert_allclose(-0.5 * np.asarray(vae.mean) / np.asarray(vae.std), f["vae_bias"].ravel(), rtol=1e-6)
    mean, std = vae.scaled({}, mean, std)
    near(mean + std * nhwc(f["vae_eps"]), nhwc(f["vae_final"]), 1e-5)


def test_samples_equal_the_official_numbers_guided_by_a_second_network_too(golden: Golden) -> None:
    g = Golden("sampler", "guide_config", "g:")
    f, meta, hot = g.f, g.meta, g.f["class_labels"]

    @jax.jit
    def sample(p: Any, plan: Plan, draws: jax.Array, guidance: jax.Array) -> jax.Array:
        def denoise(x: jax.Array, sigma: jax.Array) -> jax.Array:
            x0 = golden.denoise(p[0], x, sigma, hot)
            return x0 + guidance * (x0 - g.denoise(p[1], x, sigma, None))

        return run(plan, denoise, nhwc(f["noise"])[None], lambda i: draws[i])

    models, steps, churn = (golden.params, g.params), meta["num_steps"], meta["churn"]
    heun = Heun().plan(Levels().grid(steps))
    np.testing.assert_allclose(heun.sigma, f["heun_eval_sigma"], rtol=1e-6)
    none = jnp.zeros((len(heun.sigma), *nhwc(f["noise"]).shape))
    plain = sample(models, heun, none, jnp.float32(0))
    near(plain, nhwc(f["heun_out"]), 2e-4)
    near(plain, nhwc(f["heun_out_float64"]), 2e-4)  # whose state is of twice the digits
    near(sample(models, heun, none, jnp.float32(meta["guidance"] - 1)), nhwc(f["guided_out"]), 1e-3, rtol=1e-4)
    churned = Churn(*churn.values()).plan(Levels().grid(steps))
    used = [i for i, s in enumerate(Levels().grid(steps)) if churn["S_min"] <= s <= churn["S_max"]]
    draws = none.at[2 * np.asarray(used)].set(nhwc(f["churn_noise"]))
    near(sample(models, churned, draws, jnp.float32(0)), nhwc(f["churn_out"]), 2e-4)
    other = meta["levels"]
    levels = Levels(low=other["sigma_min"], high=other["sigma_max"], rho=other["rho"]).grid(other["num_steps"])
    # as many calls as the others, so that it is the same program: the last level again and again changes nothing
    short, idle = Heun().plan(levels), len(heun.sigma) - (2 * len(levels) - 1)
    assert idle == 4
    padded = Plan(*(x if x.shape[:1] != short.sigma.shape else np.concatenate([x, *[x[-1:]] * idle]) for x in short))
    near(sample(models, padded, none, jnp.float32(0)), nhwc(f["levels_out"]), 2e-4)


class Given(Edm2):
    """The task with the noise of its batches."""

    def loss(self, params: Params, batch: Any, rng: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        each, _ = self.losses(params, batch["image"], batch["sigma"], batch["noise"], batch["hot"])
        return each.mean(), {}


def test_three_training_steps_and_both_averages_equal_the_official_numbers() -> None:
    g = Golden("train")
    f, meta = g.f, g.meta
    task, rate = Given(**{x.name: getattr(g.task, x.name) for x in dataclasses.fields(g.task)}), meta["lr"]
    assert isinstance(task, Prepares)
    ema = tuple(map(Power, meta["ema_stds"]))
    numbers = f["images"][0, 0].size  # theirs is the sum over these
    optimiser = AdamW(
        lr=rate["ref_lr"],
        final_lr=0.0,
        warmup=round(rate["rampup_Mimg"] * 1e6 / meta["batch"]),
        schedule="inverse_sqrt",
        hold=rate["ref_batches"],
        b2=0.99,
        eps=1e-8 / numbers,
        weight_decay=0.0,
    )
    np.testing.assert_allclose([optimiser.learning_rate(3)(i) for i in range(3)], f["lrs"], rtol=1e-6)
    built = optimiser.build(3)
    state = drawn(lambda seed: dist.unbox(init_state(task, built, seed, ema)), 0)
    trained, _ = split(task, g.params)
    state = state.replace(params=g.params, ema=averages.begin(ema, trained), opt=built.init(trained))
    step = jax.jit(make_train_step(task, built, ema=ema))
    sigma = jnp.exp(-0.4 + jnp.asarray(f["loss_rnd_normal"]))[:, :, 0, 0, 0]
    batches = {
        "image": nhwc(f["images"]),
        "sigma": sigma,
        "noise": nhwc(f["loss_noise_unit"]),
        "hot": f["class_labels"],
    }
    normal = {**g.params, **task.before_step(trained)}
    each, _ = jax.jit(g.task.losses)(normal, *(batches[key][0] for key in ("image", "sigma", "noise", "hot")))
    near(each, nhwc(f["loss_map0"]), 2e-4, rtol=1e-4)
    losses = []
    for i in range(3):
        state, metrics = step(state, {key: x[i] for key, x in batches.items()})
        losses.append(float(metrics["loss"]) * numbers)
        if i == 0:  # Adam's first moment after a step is a tenth of the gradient
            moments = [s.mu for s in jax.tree.leaves(state.opt, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu")]
            grads = jax.tree.map(lambda m: 10 * numbers * m, moments[0])
    np.testing.assert_allclose(losses, f["loss_sum_over_batch"], rtol=1e-5)

    def compare(prefix: str, found: Params, atol: float, relative: bool = False) -> None:
        ours = to_official(task, {**g.params, **found})
        keys = [key for key in f if key.startswith(prefix)]
        assert len(keys) > 2
        for key in keys:
            if not key.endswith(("freqs", "phases")):
                bound = atol * np.abs(f[key]).max() if relative else atol
                near(ours[key.removeprefix(prefix)], f[key], bound, key, 1e-5)

    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(grads))
    compare("normalised0:", task.before_step(trained), 1e-6)
    compare("grad0:", grads, 1e-4, relative=True)
    compare("after:", state.params, 5e-6)
    for std in ("0.050", "0.100"):
        compare(f"ema-{std}:", state.ema[f"{float(std):g}"], 5e-6)
    assert averages.chosen(ema, state.ema) is state.ema["0.05"]
    assert averages.chosen(ema, state.ema, 0.1) is state.ema["0.1"]
    with told("ema=0.3", "0.05, 0.1"):
        averages.chosen(ema, state.ema, 0.3)


def test_formulas_of_averages_and_learning_rates_equal_the_official_numbers() -> None:
    f = Golden("phema_lr").f
    powers = [Power(float(std)) for std in f["std"]]
    np.testing.assert_allclose([p.exponent for p in powers], f["exp"], rtol=1e-9)
    with jax.enable_x64(True):
        for power, wanted in zip(powers, f["beta"]):
            decays = [power.decay(np.float64(t / f["t_delta"] - 1)) for t in f["t_next"]]
            np.testing.assert_allclose(decays, wanted, rtol=1e-9, atol=1e-12)
    g = np.asarray([p.exponent for p in powers])
    np.testing.assert_allclose(np.sqrt((g + 1) / ((g + 2) ** 2 * (g + 3))), f["std_back"], rtol=1e-9)
    inner, outer = ([Power(float(std)).exponent for std in f[key]] for key in ("in_std", "out_std"))
    times, one = f["in_ofs"], float(f["out_ofs"])
    pairs = averages.overlap(times[:, None], np.asarray(inner)[:, None], times, np.asarray(inner))
    np.testing.assert_allclose(pairs, f["corr_in_in"], rtol=1e-9)
    for i, exponent in enumerate(outer):
        wanted = averages.overlap(times, np.asarray(inner), one, exponent)
        np.testing.assert_allclose(wanted, f["corr_in_out"][:, i], rtol=1e-9)
        found, missed = averages.combination(times / one, inner, 1.0, exponent)  # the unit of time is free
        np.testing.assert_allclose(found, f["coefs"][:, i], rtol=0, atol=1e-9)
        at = (np.arange(200_000) + 0.5) / 200_000
        profiles = [np.where(at < t, (at / t) ** g * (g + 1) / t, 0) for t, g in zip(times / one, inner)]
        own = at**exponent * (exponent + 1)
        by_hand = np.sqrt(np.mean((found @ np.stack(profiles) - own) ** 2) / np.mean(own**2))
        assert missed == pytest.approx(by_hand, abs=1e-4)
    for i, (end, std) in enumerate(zip(f["resp_ofs"], f["resp_std"])):
        s = np.arange(len(f["resp"]))
        share = np.where(s <= end, (s / end) ** Power(float(std)).exponent, 0)
        np.testing.assert_allclose(share / share.sum(), f["resp"][:, i], rtol=1e-9)
    for seen, batch, lr, hold, ramp, wanted in f["lr_table"]:
        warmup = ramp * 1e6 / batch
        one = AdamW(lr=lr, final_lr=0.0, warmup=round(warmup), schedule="inverse_sqrt", hold=hold)
        whole = 1e-6 if seen > ramp * 1.001e6 or warmup % 1 == 0 else 2e-4  # we warm up over whole steps
        assert float(one.learning_rate(1)(seen / batch)) == pytest.approx(wanted, rel=whole)


# --- published weights ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "channels", "classes", "count"), [("xs", 4, 0, 124_201_253), ("s", 3, 1000, 280_209_381)]
)
def test_published_sizes_have_the_published_counts(size: Any, channels: int, classes: int, count: int) -> None:
    task = edm2.sized(size, channels=channels, classes=classes)
    shapes = weights.flatten(weights.abstract(task))
    held = sum(x.size for name, x in shapes.items() if name.startswith("fourier"))
    assert sum(x.size for x in shapes.values()) - held == count
    assert held == 2 * task.network.width + 256
    assert len(shapes) == 202 + (classes > 0)


def test_a_published_file_comes_in_whole_or_is_refused_by_name(golden: Golden, params: Params, tmp_path: Path) -> None:
    for key, array in to_official(golden.task, golden.params).items():
        np.testing.assert_array_equal(array, golden.f[f"w:{key}"], err_msg=key)
    official = {key: x.astype(np.float16) for key, x in to_official(TASK, params).items()}
    write_state_dict(tmp_path / "official.safetensors", official)
    said = import_checkpoint(TASK, tmp_path / "official.safetensors", tmp_path / "out")
    assert "every tensor used" in said
    for text in (said, (tmp_path / "out" / "README.md").read_text()):
        assert "CC BY-NC-SA 4.0" in text
    found = zoo.load(str(tmp_path / "out")).params
    assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype("float32")}
    jax.tree.map(lambda a, b: near(a, b, 1e-3), found, params)
    block = "unet.enc.4x4_block0.emb_gain"
    with told("missing", block, "unexpected", "unet.more", "wrong shape", "unet.emb_label.weight"):
        given = {key: x for key, x in official.items() if key != block}
        from_official(dataclasses.replace(TASK, classes=8), {"unet.more": np.ones(3), **given})


# --- the task -------------------------------------------------------------------------------------

TASK = Edm2(
    image=4,
    channels=2,
    classes=3,
    network=UNet(width=8, multiples=(1,), blocks=1, attention=(), head_dim=4, dropout=0.2, uncertainty=8),
)
VAE = AutoEncoder(
    image=4, channels=3, latent=2, widths=(4,), layers=1, groups=4, mean=(1.0, 2.0), std=(2.0, 1.0), unit=True
)


@pytest.fixture(scope="module")
def params() -> Params:
    """Fresh parameters whose gains are open."""
    return jax.tree.map(lambda x: jnp.full_like(x, 0.7) if x.ndim == 0 else x, fresh(TASK))


X, LEVEL = jax.random.normal(jax.random.key(0), (3, 4, 4, 2)), jnp.array([0.1, 1.0, 9.0])


def test_it_denoises_in_float32_whatever_the_length_of_its_weights(params: Params, golden: Golden) -> None:
    denoise = jax.jit(TASK.denoise)
    assert isinstance(TASK, Denoises)
    assert isinstance(TASK, Samples)
    one, other, none = (denoise(params, X, LEVEL, {"label": jnp.full(3, label)}) for label in (0, 1, -1))
    assert np.abs(one - other).max() > 1e-3
    assert np.abs(one - none).max() > 1e-3
    near(none, denoise(params, X, LEVEL), 1e-6)
    longer = {k: jax.tree.map(lambda x: 7 * x if x.ndim > 1 else x, v) for k, v in params.items()}
    near(denoise(longer, X, LEVEL, {"label": jnp.zeros(3, jnp.int32)}), one, 1e-3)
    for sigma in TASK.sigmas:
        assert np.isfinite(denoise(params, X * sigma, jnp.full(3, sigma), {"label": jnp.zeros(3, jnp.int32)})).all()
    f = golden.f
    half = jax.jit(dataclasses.replace(golden.task, dtype="bfloat16").denoise)(
        golden.params, nhwc(f["x"]), f["sigma"], {"label": jnp.argmax(f["class_labels"], -1)}
    )
    assert half.dtype == jnp.float32
    scale = Precondition("edm").coefficients(f["sigma"])[1][:, None, None, None]
    assert 0.003 < np.sqrt(np.square((half - nhwc(f["D"])) / scale).mean()) < 0.01  # configs/edm2/README.md
    skip = Precondition("edm", TASK.data).coefficients(LEVEL)[0][:, None, None, None]
    np.testing.assert_array_equal(denoise(fresh(TASK), X, LEVEL, {"label": jnp.arange(3)}), skip * X)


def test_training_draws_latents(params: Params) -> None:
    task, loss = dataclasses.replace(TASK, inputs="latents"), []
    draw = jax.jit(lambda batch: task.loss(params, batch, jax.random.key(2))[0])
    for wide in (9.0, 0.0):
        loss.append(float(draw({"latent": X, "latent_std": jnp.full(X.shape, wide), "label": jnp.arange(3)})))
    assert loss[0] > 5 * loss[1]
    assert task.about.held == ("fourier",)


def test_latents_are_decoded(params: Params) -> None:
    task = dataclasses.replace(TASK, inputs="latents", vae=VAE)
    own, label = {**params, "vae": fresh(VAE)}, {"label": jnp.asarray([0, 1, -1])}
    found = jax.jit(lambda p: task.sample(p, jax.random.key(0), 3, label, DenoiserSampling(nfe=3)))(own)
    assert {k: x.shape for k, x in found.items()} == {"latent": (3, 4, 4, 2), "image": (3, 4, 4, 3), "label": (3,)}
    near(found["image"], jnp.clip(VAE.decode(own["vae"], found["latent"]), -1, 1), 1e-5)
    bare = jax.eval_shape(lambda p: TASK.sample(p, jax.random.key(0), 3), params)
    assert {k: x.shape for k, x in bare.items()} == {"image": (3, 4, 4, 2)}


@pytest.mark.devices8
def test_a_mesh_gives_what_one_device_gives(params: Params) -> None:
    task = dataclasses.replace(TASK, network=dataclasses.replace(TASK.network, dropout=0.0))
    batch = {"image": jax.random.normal(jax.random.key(1), (8, 4, 4, 2)), "label": jnp.arange(8) % 3}

    def both(p: Params) -> Any:
        grads = jax.grad(task.loss, has_aux=True)(p, batch, jax.random.key(2))[0]
        return task.denoise(p, batch["image"], jnp.float32(1.0), batch), grads["net"]

    found = []
    for mesh in (dist.Mesh(data=1).build(jax.devices()[:1]), dist.Mesh(data=2, fsdp=4).build(jax.devices())):
        with dist.use(mesh):
            where = dist.shardings(jax.eval_shape(task.init, jax.random.key(0)), mesh)
            found.append(jax.device_get(jax.jit(both)(jax.device_put(params, where))))
    jax.tree.map(lambda a, b: near(a, b, 1e-5 + 1e-5 * np.abs(b).max()), *found)


def test_what_does_not_fit_is_told(params: Params) -> None:
    def network(**fields: Any) -> Any:
        return dataclasses.replace(TASK, network=dataclasses.replace(TASK.network, **fields))

    with told("guidance", "autoguidance/imagenet512"):
        TASK.sample(params, jax.random.key(0), 1, None, DenoiserSampling(guidance=1.0))
    for make, words in (
        (lambda: network(taps=(1.0, 2.0, 1.0)), ("task.network.taps", "even")),
        (lambda: network(head_dim=3), ("task.network.head_dim=3", "8", "task.network.head_dim=2")),
        (lambda: dataclasses.replace(TASK, vae=VAE), ("task.inputs='images'", "task.vae")),
        (lambda: dataclasses.replace(TASK, vae=VAE, inputs="latents", channels=5), ("task.channels=5", "task.channels=2")),
        (lambda: dataclasses.replace(config.load("edm2/imagenet64:smoke"), ema=(Power(0.1),) * 2), ("ema lists the width 0.1 twice",)),
    ):  # fmt: skip
        with told(*words):
            make()
