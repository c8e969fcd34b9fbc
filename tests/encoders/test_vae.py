"""The autoencoder: parity with published code's numbers, both layouts of its files, and a small one that trains."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fresh import noise
from mistakes import told

from zoo import weights
from zoo.encoders import vae
from zoo.errors import UserError
from zoo.task import abilities

GOLDEN = Path(__file__).parent.parent / "golden" / "encoders"
TINY = vae.AutoEncoder(image=8, widths=(8, 16), layers=1, groups=4, latent=2, scale=None)


class Case:
    """The golden file, our task and parameters for it, and everything computed in one program."""

    def __init__(self):
        f = self.f = np.load(GOLDEN / "vae.npz")
        c = json.loads(str(f["config"]))
        self.task = task = vae.AutoEncoder(
            image=c["sample_size"],
            channels=c["in_channels"],
            latent=c["latent_channels"],
            widths=tuple(c["block_out_channels"]),
            layers=c["layers_per_block"],
            groups=c["norm_num_groups"],
            scale=c["scaling_factor"],
        )
        self.state = {k.removeprefix("w:"): v for k, v in f.items() if k.startswith("w:")}
        self.params = weights.from_official(task, self.state)
        self.x, self.z = (np.moveaxis(f[k], 1, -1) for k in ("x", "z"))
        self.moments = jax.jit(task.moments)
        self.out = jax.device_get(jax.jit(self._everything)(self.params))
        self.out["mean"], self.out["logvar"] = self.moments(self.params, self.x)

    def _everything(self, params):
        moments, hidden = self.task._encode(params, self.x)
        mean, std = self.task.encode(params, self.x)
        return {
            "moments": moments,
            "scaled": mean,
            "std": std / self.task.scale,
            "decoded": self.task.decode(params, self.z * self.task.scale),
            "hidden": hidden,
            "features": self.task.features(params, {"image": self.x}),
        }


@pytest.fixture(scope="module")
def case():
    return Case()


GOLDEN_ARRAYS = ("moments", "mean", "logvar", "std", "decoded")


def test_equals_the_published_numbers(case):
    assert {k for k in case.f if not k.startswith("w:")} == {*GOLDEN_ARRAYS, "config", "x", "z"}
    for name in GOLDEN_ARRAYS:
        np.testing.assert_allclose(case.out[name], np.moveaxis(case.f[name], 1, -1), rtol=0, atol=2e-5, err_msg=name)
    np.testing.assert_allclose(case.out["scaled"], 0.18215 * case.out["mean"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(case.out["features"], case.out["hidden"].mean((1, 2)), atol=1e-6)


def test_the_published_layout_comes_back_to_the_bit(case):
    back = weights.to_official(case.task, case.params)
    assert set(back) == set(case.state)
    for name, array in case.state.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)


NEW = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def test_older_attention_keys_are_read(case):
    for convolution in (False, True):
        old = dict(case.state)
        for side in ("encoder", "decoder"):
            for before, now in NEW.items():
                for leaf in ("weight", "bias"):
                    array = old.pop(f"{side}.mid_block.attentions.0.{now}.{leaf}")
                    array = array[:, :, None, None] if convolution and leaf == "weight" else array
                    old[f"{side}.mid_block.attentions.0.{before}.{leaf}"] = array
        assert not any("to_" in name for name in old)
        jax.tree.map(np.testing.assert_array_equal, weights.from_official(case.task, old), case.params)
    query = "encoder.mid_block.attentions.0.query.weight"
    with told("unexpected (1)", "query"):
        weights.from_official(case.task, {**case.state, query: old[query][:, :, 0, 0] + 1})


def test_a_measured_scale_is_read_where_the_file_has_it(case):
    task = dataclasses.replace(case.task, scale=None)
    fresh = weights.from_official(task, case.state)
    assert float(fresh["latents"]["square"]) == 1
    measured = {**fresh, "latents": {"square": jnp.float32(4.0)}}
    back = weights.from_official(task, weights.to_official(task, measured))
    assert float(back["latents"]["square"]) == 4
    with pytest.raises(UserError, match=r"latents\.square"):
        weights.from_official(case.task, weights.to_official(task, measured))


def test_log_variances_are_clipped(case):
    wild = jax.tree.map(lambda x: x, case.params)
    wild["encoder"]["quant"]["bias"] = np.asarray([0.0] * 4 + [1e3, -1e3, 0.0, 0.0], np.float32)
    logvar = np.asarray(case.moments(wild, np.zeros_like(case.x))[1])
    assert (logvar[..., 0] == 20).all()
    assert (logvar[..., 1] == -30).all()
    assert np.abs(logvar[..., 2:]).max() < 20


# --- a small one of its own -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn():
    """Random parameters, and eight images of one colour each."""
    colours = np.random.default_rng(1).uniform(-1, 1, (8, 1, 1, 3)).astype(np.float32)
    params = {**noise(TINY, 0.3), "latents": {"square": jnp.float32(1.3)}}
    return params, {"image": np.tile(colours, (1, 8, 8, 1))}


def test_the_scale_follows_the_latents(drawn):
    params, batch = drawn
    square = params["latents"]["square"]
    for latents in np.random.default_rng(0).uniform(0.5, 2, (3, TINY.latent)):
        params = TINY.after_step(params, {"latent_square": latents})
        square = 0.99 * square + 0.01 * latents.mean()
        np.testing.assert_allclose(params["latents"]["square"], square, rtol=1e-5)
    _, metrics = jax.eval_shape(TINY.loss, params, batch, jax.random.key(0))
    assert metrics["latent_square"].shape == (TINY.latent,)
    assert TINY.about.held == ("latents",)


def test_a_measured_scale_makes_latents_of_unit_size(drawn):
    params, batch = drawn

    @jax.jit
    def everything(params, image):
        raw, logvar = TINY.moments(params, image)
        metrics = {"latent_square": jnp.square(raw).mean((0, 1, 2))}
        measured = jax.lax.fori_loop(0, 2000, lambda _, p: TINY.after_step(p, metrics), params)
        mean, std = TINY.encode(measured, image)
        return raw, logvar, mean, std, TINY.decode(measured, mean), TINY.reconstruct(params, image)

    raw, logvar, mean, std, decoded, reconstructed = everything(params, batch["image"])
    np.testing.assert_allclose(jnp.square(mean).mean(), 1, rtol=1e-3)
    np.testing.assert_allclose(std / mean, jnp.exp(logvar / 2) / raw, rtol=1e-4)
    np.testing.assert_allclose(decoded, reconstructed, atol=1e-5)


def test_the_loss_is_what_it_says(drawn):
    params, batch = drawn
    task = dataclasses.replace(TINY, kl=0.5, scale=0.7, mean=(0.3, -0.2), std=(2.0, 0.5))
    rng = jax.random.key(3)
    x = batch["image"]

    @jax.jit
    def everything(params):
        mean, std = task.encode(params, x)
        z = mean + std * jax.random.normal(rng, mean.shape)
        return task.loss(params, batch, rng), z, task.decode(params, z), task.moments(params, x)

    (loss, metrics), scaled, y, moments = everything(params)
    raw, logvar = (np.asarray(m, np.float64) for m in moments)
    kl = sum(0.5 * (raw[i] ** 2 + np.exp(logvar[i]) - 1 - logvar[i]).sum() for i in range(8)) / 8 / (8 * 8 * 3)
    l1, mse = np.abs(y - x).mean(), np.square(y - x).mean()
    np.testing.assert_allclose(metrics["kl"], kl, rtol=1e-4)
    np.testing.assert_allclose(metrics["l1"], l1, rtol=1e-4)
    np.testing.assert_allclose(loss, l1 + mse + 0.5 * kl, rtol=1e-4)
    psnr = np.mean([10 * np.log10(4 / np.square(y[i] - x[i]).mean()) for i in range(8)])
    np.testing.assert_allclose(metrics["psnr"], psnr, rtol=1e-4)
    np.testing.assert_allclose(metrics["latent_std"], np.sqrt(np.square(scaled).mean()), rtol=1e-4)


def test_bfloat16_stays_close_and_keeps_float32_where_it_matters(drawn):
    params, batch = drawn
    task, x = dataclasses.replace(TINY, dtype="bfloat16"), batch["image"][:2]
    (mean, std), (want, _) = jax.jit(lambda p: (task.encode(p, x), TINY.encode(p, x)))(params)
    assert mean.dtype == std.dtype == jnp.float32
    assert jax.eval_shape(task.decode, params, mean).dtype == jnp.float32
    assert jax.eval_shape(task._encode, params, x)[1].dtype == jnp.bfloat16
    np.testing.assert_allclose(mean, want, atol=0.02 * np.abs(want).max())
    assert np.abs(mean - want).max() > 0


def test_the_published_size():
    task = vae.sd(image=512)
    assert (task.image, task.factor, task.scale) == (512, 8, 0.18215)
    count = sum(x.size for x in jax.tree.leaves(weights.abstract(task)))
    assert 83e6 < count < 85e6
    assert len(task.import_names()) == len(jax.tree.leaves(weights.abstract(task))) == 248
    assert {"features", "after_step", "import_names", "import_state"} <= set(abilities(task))


def test_fields_that_do_not_fit_are_named():
    for field, value, hint in (("image", 9, "task.image=8"), ("groups", 3, "task.groups=2")):
        with told(f"task.{field}={value!r}", hint):
            dataclasses.replace(TINY, **{field: value})


def test_images_and_latents_that_do_not_fit_are_refused():
    params = weights.abstract(TINY)
    for shape in ((1, 9, 8, 3), (1, 8, 8, 1)):
        with pytest.raises(UserError, match=f"{shape[1]}x{shape[2]} pixels and {shape[3]} channels.* 2 divides"):
            jax.eval_shape(TINY.encode, params, jnp.zeros(shape))
    with pytest.raises(UserError, match="latents of 4 channels"):
        jax.eval_shape(TINY.decode, params, jnp.zeros((1, 4, 4, 4)))


def test_large_images_attend_some_pixels_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = np.random.default_rng(0).normal(size=(3, 2, 16, 1, 8)).astype(np.float32)
    whole = jax.jit(vae._attend)(q, k, v)
    monkeypatch.setattr(vae, "_QUERIES", 4)
    np.testing.assert_allclose(jax.jit(lambda *x: vae._attend(*x))(q, k, v), whole, atol=1e-6)
    assert "scan" in str(jax.make_jaxpr(lambda *x: vae._attend(*x))(q, k, v))
