"""EDM2: its U-Net, loss, samplers, training steps and averages against the official numbers, and what the task promises."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from by_hand import by_hand
from fresh import drawn, noise
from mistakes import told

import zoo
from zoo import config, dist, weights
from zoo.commands.weights import import_checkpoint
from zoo.diffusion.levels import Levels
from zoo.diffusion.precondition import Precondition
from zoo.diffusion.sampling import DenoiserSampling
from zoo.diffusion.solvers import Churn, Heun
from zoo.encoders.vae import AutoEncoder
from zoo.papers import edm2
from zoo.papers.edm2 import networks
from zoo.papers.edm2.task import Edm2, UNet
from zoo.task import Denoises, Params, Prepares, Samples
from zoo.train import averages
from zoo.train.averages import Power
from zoo.train.optim import AdamW
from zoo.train.step import State, make_train_step, split
from zoo.weights.official import from_official, to_official, write_state_dict

NAMES = {
    "model_channels": "width", "channel_mult": "multiples", "num_blocks": "blocks", "attn_resolutions": "attention", "dropout": "dropout",
    "channels_per_head": "head_dim", "channel_mult_noise": "noise_multiple", "channel_mult_emb": "embedding_multiple",
    "res_balance": "residual_balance", "attn_balance": "attention_balance", "concat_balance": "skip_balance", "clip_act": "clip",
    "resample_filter": "taps", "logvar_channels": "uncertainty",
}  # fmt: skip


def nhwc(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, -3, -1)


def task_of(given: dict[str, Any]) -> Edm2:
    net = {ours: given[theirs] for theirs, ours in NAMES.items() if theirs in given}
    net = {name: tuple(value) if isinstance(value, list) else value for name, value in net.items()}
    sizes = given["img_resolution"], given["img_channels"], given["label_dim"]
    return Edm2(*sizes, network=UNet(**net), data=given.get("sigma_data", 0.5))


class Noting(Edm2):
    """The task, whose network notes what it is given and what its parts make."""

    notes: ClassVar[dict[str, Any]] = {}

    @property
    def _net(self) -> Any:
        net, notes = super()._net, self.notes

        def apply(variables: Any, z: Any, features: Any, hot: Any, **more: Any) -> Any:
            found, state = net.apply(variables, z, features, hot, **more, capture_intermediates=True)
            notes.update(state["intermediates"], F=found, unet_in_x=z, emb_fourier=features)
            return found

        return SimpleNamespace(apply=apply)


class Golden:
    """The official arrays of a file, and its network with its weights, which come in by the door of users."""

    def __init__(self, name: str, made: str = "config", prefix: str = "w:") -> None:
        self.f = dict(np.load(Path(__file__).parent.parent / "golden" / "edm" / f"edm2_{name}.npz"))
        self.meta = json.loads(bytes(self.f["meta_json"]).decode())
        if made in self.meta:
            self.task = task_of(self.meta[made])
            state = {key.removeprefix(prefix): x for key, x in self.f.items() if key.startswith(prefix)}
            self.params = from_official(self.task, state)

    @functools.cached_property
    def program(self) -> Any:
        """(params, x, sigma, hot) -> x0, log-variance and what the network notes; compiled once for all that is asked."""
        task = Noting(**{x.name: getattr(self.task, x.name) for x in dataclasses.fields(self.task)})

        def run(p: Params, x: jax.Array, sigma: jax.Array, hot: Any) -> Any:
            def network(z: jax.Array, noise: jax.Array) -> jax.Array:
                task.notes["c_noise"] = noise
                return task.raw(p, z, noise, hot)

            task.notes.clear()
            x0 = Precondition("edm", task.data).denoise(network, x, sigma)
            return x0, task.log_variance(p, sigma), dict(task.notes)

        return jax.jit(run)

    def denoise(self, x: Any, sigma: Any, hot: Any) -> Any:
        """x0 of any number of images, the last of which are repeated to fill the program's rows."""
        rows = np.minimum(np.arange(len(self.f["x"])), len(x) - 1)
        x, sigma = np.asarray(x, np.float32)[rows], np.broadcast_to(np.float32(sigma), len(x))[rows]
        return np.asarray(self.program(self.params, x, sigma, None if hot is None else hot[rows])[0])[: rows[-1] + 1]


@pytest.fixture(scope="module", autouse=True)
def traced_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Edm2, "import_names", functools.cache(Edm2.import_names))
        yield


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
    level = np.exp(-0.4 + f["loss_rnd_normal"]).ravel()
    x, y, hot = nhwc(f["x"]), nhwc(f["images"]), f.get("class_labels")
    noisy = y + level[:, None, None, None] * nhwc(f["loss_noise_unit"])
    x0, u, parts = g.program(g.params, x, f["sigma"], hot)
    condition = parts["noise"]["__call__"][0]
    found = {"D": x0, "logvar": u, "emb_noise": condition}
    found |= {key: parts[key] for key in ("unet_in_x", "c_noise", "F", "emb_fourier")}
    found["D_scalar_sigma"] = g.denoise(x, f["sigma"][0], hot)
    if hot is not None:
        condition = networks.mixed(condition, parts["label"]["__call__"][0], task.network.label_balance)
        found["D_no_label"] = g.denoise(x, f["sigma"], np.zeros_like(hot))
        found["D_soft"] = g.denoise(x, f["sigma"], f["class_labels_soft"])
    found["emb"] = networks.silu(condition)
    guess, own, _ = g.program(g.params, noisy, level, hot)
    weight = np.asarray(Precondition("edm", 0.5).weight(level))  # the official loss keeps its own sigma_data
    own, weight = (np.asarray(a)[:, None, None, None] for a in (own, weight))
    found["loss_map"] = weight * np.exp(-own) * np.square(guess - y) + own
    for key, array in found.items():
        wanted = nhwc(f[key]) if f[key].ndim == 4 else f[key]
        near(array, wanted, 2e-4 if key == "loss_map" else 1e-5, key)
    keys = [key for key in f if key.startswith("act:")]
    assert len(keys) == len([part for part in parts if re.match("enc|dec", part)])
    for key in keys:
        ours = re.sub(r"act:(enc|dec)\.(\d+)x\d+_", r"\1_\2_", key)
        near(parts[ours]["__call__"][0], nhwc(f[key]), 2e-5, key, 1e-4)
    half = from_official(task, {k[2:]: v.astype(np.float16) for k, v in f.items() if k[:2] == "w:"})
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype("float32")}
    near(g.program(half, x, f["sigma"], hot)[0], nhwc(f["D_float16_params_upcast"]), 1e-5)


def test_functions_equal_the_official_numbers() -> None:
    f = Golden("functions").f

    def functions(a: jax.Array, b: jax.Array, c: jax.Array) -> dict[str, Any]:
        found = {"mp_silu_a": networks.silu(a)}
        for key in f:
            share = key.rpartition("_")[2]
            if key.startswith("mp_sum"):
                found[key] = networks.mixed(a, c, float(share))
            if key.startswith("mp_cat"):
                found[key] = networks.joined(a, b, float(share))
            if key.startswith("resample"):
                resize: Any = "half" if "down" in key else "twice"
                found[key] = networks.resized(a, resize, tuple(map(float, share)))
        found["normalize_a_all"] = networks.normalised(a, (1, 2, 3))
        found["normalize_a_dim1"] = networks.normalised(a, -1)
        found["normalize_tiny_dim1"] = networks.normalised(1e-5 * a, -1)
        kernel = {"params": {"kernel": f["mpconv_weight"].transpose(2, 3, 1, 0)}}
        for name, gain in (("mpconv_a", 1.0), ("mpconv_a_gain0.7", 0.7)):
            found[name] = networks.Linear(5, 3).apply(kernel, a, gain)
        linear = {"params": {"kernel": f["mplinear_weight"].T}}
        return {**found, "mplinear_out": networks.Linear(5).apply(linear, f["mplinear_in"])}

    for key, array in jax.jit(functions)(*(nhwc(f[key]) for key in "abc")).items():
        near(array, nhwc(f[key]) if f[key].ndim == 4 else f[key], 2e-6 if "mpconv" in key else 1e-6, key)
    vae = edm2.autoencoder()
    mean, std = (nhwc(part) for part in np.split(f["vae_raw"], 2, axis=1))
    np.testing.assert_allclose(0.5 / np.asarray(vae.std), f["vae_scale"].ravel(), rtol=1e-6)
    np.testing.assert_allclose(-0.5 * np.asarray(vae.mean) / np.asarray(vae.std), f["vae_bias"].ravel(), rtol=1e-6)
    mean, std = vae.scaled({}, mean, std)
    near(mean + std * nhwc(f["vae_eps"]), nhwc(f["vae_final"]), 1e-5)


def test_samples_equal_the_official_numbers(golden: Golden) -> None:
    g = Golden("sampler", "guide_config", "g:")
    f, churn, other = g.f, g.meta["churn"], g.meta["levels"]
    levels, start = Levels().grid(g.meta["num_steps"]), np.moveaxis(f["noise"], -3, -1)
    seen: list[tuple[Any, Any]] = []

    def denoise(x: Any, sigma: float) -> Any:
        seen.append((x, golden.denoise(x, sigma, f["class_labels"])))
        return seen[-1][1]

    heun = Heun().plan(levels)
    plain = by_hand(heun, denoise, start[None])
    near(plain, nhwc(f["heun_out"]), 2e-4)
    near(plain, nhwc(f["heun_out_float64"]), 2e-4)  # whose state is of twice the digits
    np.testing.assert_allclose(heun.sigma, f["heun_eval_sigma"], rtol=1e-6)
    for i, (x, x0) in enumerate(seen):
        near(x, nhwc(f["heun_eval_x"][i]), 2e-4, f"input {i}")
        near(x0, nhwc(f["heun_eval_D"][i]), 2e-4, f"output {i}")

    def guided(x: Any, sigma: float) -> Any:
        x0 = denoise(x, sigma)
        return x0 + (g.meta["guidance"] - 1) * (x0 - np.asarray(guide(g.params, np.float32(x), np.float32(sigma))))

    guide = jax.jit(g.task.denoise)
    near(by_hand(heun, guided, start[None]), nhwc(f["guided_out"]), 1e-3, rtol=1e-4)
    used = [i for i, s in enumerate(levels) if churn["S_min"] <= s <= churn["S_max"]]
    draws = np.zeros((len(heun.sigma), *start.shape))
    draws[2 * np.asarray(used)] = nhwc(f["churn_noise"])
    near(by_hand(Churn(*churn.values()).plan(levels), denoise, start[None], draws), nhwc(f["churn_out"]), 2e-4)
    fewer = Levels(low=other["sigma_min"], high=other["sigma_max"], rho=other["rho"]).grid(other["num_steps"])
    near(by_hand(Heun().plan(fewer), denoise, start[None]), nhwc(f["levels_out"]), 2e-4)


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
    (trained, _), zero = split(task, g.params), jnp.zeros((), jnp.int32)
    moved = averages.begin(ema, trained), jax.jit(built.init)(trained)
    state = State(zero, g.params, *moved, jax.random.key(0), zero, zero)
    step = jax.jit(make_train_step(task, built, ema=ema))
    sigma = np.exp(-0.4 + f["loss_rnd_normal"])[:, :, 0, 0, 0]
    batches = {
        "image": nhwc(f["images"]),
        "sigma": sigma,
        "noise": nhwc(f["loss_noise_unit"]),
        "hot": f["class_labels"],
    }
    losses = []
    for i in range(3):
        state, metrics = step(state, {key: x[i] for key, x in batches.items()})
        losses.append(float(metrics["loss"]) * numbers)
        if i == 0:  # Adam's first moment after a step is a tenth of the gradient
            moments = [s.mu for s in jax.tree.leaves(state.opt, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu")]
            grads = jax.tree.map(lambda m: 10 * numbers * np.asarray(m), moments[0])
    np.testing.assert_allclose(losses, f["loss_sum_over_batch"], rtol=1e-5)

    def compare(prefix: str, found: Params, atol: float, relative: bool = False) -> None:
        ours = to_official(task, {**g.params, **found})
        keys = [key for key in f if key.startswith(prefix)]
        assert len(keys) > 2
        for key in keys:
            if not key.endswith(("freqs", "phases")):
                bound = atol * np.abs(f[key]).max() if relative else atol
                near(ours[key.partition(":")[2]], f[key], bound, key, 1e-5)

    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(grads))
    some = {key: g.params["net"][key] for key in ("enc_8_conv", "dec_4_in0")}
    made = jax.jit(task.before_step)({"net": some, "uncertainty": g.params["uncertainty"]})
    compare("normalised0:", {**made, "net": {**g.params["net"], **made["net"]}}, 1e-6)
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


def test_a_published_size_has_the_published_count() -> None:
    task = edm2.sized("s", channels=3, classes=1000)
    shapes = weights.flatten(weights.abstract(task))
    held = sum(x.size for name, x in shapes.items() if name.startswith("fourier"))
    assert sum(x.size for x in shapes.values()) - held == 280_209_381
    assert held == 2 * task.network.width + 256
    assert len(shapes) == 203


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
    """Normal ones whose gains are open."""
    return gained(0.7)


def gained(gain: float) -> Params:
    return jax.tree.map(lambda x: x if x.ndim else np.float32(gain), noise(TASK, 1.0))


X = np.random.default_rng(0).normal(size=(3, 4, 4, 2)).astype(np.float32)
LEVEL = np.float32([0.1, 1.0, 9.0])


def test_it_denoises_in_float32_whatever_the_length_of_its_weights(params: Params) -> None:
    assert isinstance(TASK, Denoises)
    assert isinstance(TASK, Samples)
    run = jax.jit(TASK.denoise)

    def denoise(p: Params, label: Any = 0, x: Any = X, sigma: Any = LEVEL) -> np.ndarray:
        return np.asarray(run(p, x, sigma, {"label": np.broadcast_to(np.int32(label), 3)}))

    one, other, none = (denoise(params, label) for label in (0, 1, -1))
    assert np.abs(one - other).max() > 1e-3
    assert np.abs(one - none).max() > 1e-3
    near(none, run(params, X, LEVEL), 1e-6)
    longer = {k: jax.tree.map(lambda x: np.asarray(7 * x) if x.ndim > 1 else x, v) for k, v in params.items()}
    near(denoise(longer), one, 1e-3)
    for sigma in TASK.sigmas:
        assert np.isfinite(denoise(params, 0, X * np.float32(sigma), np.full(3, sigma, np.float32))).all()
    rough = jax.jit(dataclasses.replace(TASK, dtype="bfloat16").denoise)(params, X, LEVEL, {"label": np.zeros(3, int)})
    assert rough.dtype == jnp.float32
    total = (LEVEL**2 + TASK.data**2)[:, None, None, None]
    scale = TASK.data * LEVEL[:, None, None, None] / np.sqrt(total)
    assert 1e-4 < np.sqrt(np.square((np.asarray(rough) - one) / scale).mean()) < 0.01
    shut = drawn(lambda key: dist.unbox(TASK.init(key))["net"]["gain"], jax.random.key(0))
    np.testing.assert_allclose(denoise(gained(float(shut)), range(3)), TASK.data**2 / total * X, rtol=1e-6)


class Caught(Edm2):
    """Its loss tells what it is of."""

    def losses(self, params: Params, image: jax.Array, *_: Any) -> tuple[jax.Array, jax.Array]:
        return image, jnp.square(image - X)


def test_training_draws_latents() -> None:
    task = Caught(**{x.name: getattr(TASK, x.name) for x in dataclasses.fields(TASK)})
    task = dataclasses.replace(task, inputs="latents")
    error = jax.jit(lambda batch: task.loss({}, batch, jax.random.key(2))[1]["x0_error"])
    for wide in (3.0, 0.0):
        batch = {"latent": X, "latent_std": np.full(X.shape, wide, np.float32), "label": np.arange(3)}
        assert float(error(batch)) == pytest.approx(wide, rel=0.2)
    assert task.about.held == ("fourier",)


def test_latents_are_decoded(params: Params) -> None:
    task = dataclasses.replace(TASK, inputs="latents", vae=VAE)
    own, label = {**params, "vae": noise(VAE)}, {"label": np.asarray([0, 1, -1])}

    @jax.jit
    def run(p: Params) -> Any:
        found = task.finished(p, X, label)
        return found, VAE.decode(p["vae"], X)

    found, image = run(own)
    near(found["image"], np.clip(image, -1, 1), 1e-5)
    drawn = jax.eval_shape(lambda p: task.sample(p, jax.random.key(0), 3, label, DenoiserSampling(nfe=3)), own)
    assert {k: x.shape for k, x in drawn.items()} == {"latent": (3, 4, 4, 2), "image": (3, 4, 4, 3), "label": (3,)}
    bare = jax.eval_shape(lambda p: TASK.sample(p, jax.random.key(0), 3), params)
    assert {k: x.shape for k, x in bare.items()} == {"image": (3, 4, 4, 2)}


def test_a_mesh_gives_what_one_device_gives(params: Params) -> None:
    batch = {"image": np.tile(X, (3, 1, 1, 1))[:8], "label": np.arange(8) % 3}

    def error(block: Any, p: Params) -> Any:
        x0 = TASK.denoise({**p, "net": {**p["net"], first: block}}, batch["image"], jnp.float32(1.0), batch)
        return jnp.square(x0).mean(), x0

    first = "enc_4_block0"  # the way back to it is through all others
    found = []
    for mesh in (dist.Mesh(data=1).build(jax.devices()[:1]), dist.Mesh(fsdp=2).build(jax.devices())):
        with dist.use(mesh):
            where = dist.shardings(jax.eval_shape(TASK.init, jax.random.key(0)), mesh)
            run = jax.jit(lambda p: jax.value_and_grad(error, has_aux=True)(p["net"][first], p))
            found.append(jax.device_get(run(jax.device_put(params, where))))
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
