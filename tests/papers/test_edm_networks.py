"""EDM's U-Nets against the official numbers: their parts, denoisers, losses, gradients, samples, and the published layout."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from by_hand import by_hand
from mistakes import told

from zoo import config, weights
from zoo.diffusion.levels import Levels
from zoo.diffusion.precondition import Precondition, iddpm_levels, nearest
from zoo.diffusion.solvers import Churn, Heun
from zoo.nn.embed import fourier, waves
from zoo.nn.layers import Conv, GroupNorm
from zoo.nn.unet import resized
from zoo.papers.edm import ADM, Edm, Transformer, UNet
from zoo.papers.edm.networks import TAPS
from zoo.papers.edm.official import names

FOLDER = Path(__file__).parent.parent / "golden" / "edm"


def nhwc(x: np.ndarray) -> jax.Array:
    return jnp.asarray(np.moveaxis(x, -3, -1))


def close(found: Any, wanted: np.ndarray, atol: float, rtol: float, name: str) -> None:
    np.testing.assert_allclose(found, wanted, atol=atol, rtol=rtol, err_msg=name)


class Golden:
    """The official arrays of one file, a task of that network, and the file's weights as it imports them."""

    def __init__(self, name: str) -> None:
        self.name, self.f = name, dict(np.load(FOLDER / f"{name}.npz"))
        self.meta = json.loads(bytes(self.f["meta_json"]).decode())
        c = self.meta["config"]
        same = {"width": c["model_channels"], "multiples": tuple(c["channel_mult"]), "blocks": c["num_blocks"]}
        same["attention"] = tuple(c["attn_resolutions"])
        network: UNet | ADM
        if c["model_type"] == "DhariwalUNet":
            network = ADM(**same, head_dim=self.meta["channels_per_head"] or 64)
        else:
            kind = "ncsn++" if c.get("embedding_type") == "fourier" else "ddpm++"
            network = UNet(**same, kind=kind, augment=c.get("augment_dim", 0))
        self.task = Edm(
            image=c["img_resolution"],
            channels=c["img_channels"],
            classes=c["label_dim"],
            network=network,
            precondition="iddpm" if "iDDPM" in self.meta["kind"] else "edm",
        )
        self.state = {key.removeprefix("w:"): x for key, x in self.f.items() if key.startswith("w:")}
        self.params = weights.from_official(self.task, self.state)
        self.buffers = self.params.get("buffers", {})
        self.rows = len(self.f["x"])

    @functools.cached_property
    def program(self) -> Any:
        """(trained, z, noise, hot, augment, by) -> (F, parts, gradient of <by, F>); compiled once for all that is asked."""
        frequencies = {k: v for k, v in self.buffers.items() if k == "frequencies"}

        def forward(net: Any, z: Any, noise: Any, hot: Any, augment: Any, by: Any) -> Any:
            extra = frequencies if augment is None else {"augment": augment}
            found, state = self.task._net.apply(
                {"params": net}, z, noise, hot, **extra, capture_intermediates=lambda module, _: module.name in modules
            )
            return (by * found).sum(), (found, state["intermediates"])

        modules = set(self.params["net"])
        learns = self.name in LEARNS
        call = jax.grad(forward, has_aux=True) if learns else lambda *args: ({}, forward(*args)[1])
        return jax.jit(call)

    def arguments(self, z: Any, noise: Any, hot: Any, augment: Any, by: Any) -> tuple[Any, ...]:
        """Those of the program in its shapes: what is not given is zeros, which is no class and no augmentation."""
        sizes = self.task.classes, getattr(self.task.network, "augment", 0)
        hot, augment = (
            jnp.zeros((self.rows, size)) if x is None else jnp.asarray(x) for x, size in zip((hot, augment), sizes)
        )
        shape = (*z.shape[:-1], z.shape[-1] * (2 if self.task.precondition == "iddpm" else 1))
        noise = jnp.broadcast_to(jnp.asarray(noise, jnp.float32), z.shape[:1])
        augment = augment if sizes[1] else None
        return jnp.asarray(z), noise, hot, augment, jnp.broadcast_to(jnp.asarray(by, jnp.float32), shape)

    def network(self, z: Any, noise: Any, hot: Any = None, augment: Any = None) -> Any:
        return self.program(self.params["net"], *self.arguments(z, noise, hot, augment, 0.0))[1][0]

    def denoise(self, x: Any, sigma: Any, hot: Any = None, augment: Any = None, kind: Any = None) -> Any:
        """x0 of any number of images, the last of which are repeated to fill the program's rows."""
        rows = jnp.minimum(jnp.arange(self.rows), len(x) - 1)
        hot, augment = (None if a is None else jnp.asarray(a)[rows] for a in (hot, augment))
        network = functools.partial(self.network, hot=hot, augment=augment)
        sigma = jnp.broadcast_to(jnp.asarray(sigma, jnp.float32), len(x))[rows]
        door = Precondition(kind or self.task.precondition)
        return door.denoise(network, jnp.asarray(x, jnp.float32)[rows], sigma, self.buffers.get("levels"))[: len(x)]


FILES = ["edm_ddpmpp", "edm_ncsnpp", "edm_iddpm", "edm_adm_noattn"]  # the network of `edm_adm` is that of `edm_iddpm`
LEARNS = ["edm_ddpmpp"]  # a gradient is what its network gives, and takes four times as long to compile


@pytest.fixture(scope="module", autouse=True)
def traced_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Edm, "import_names", functools.cache(Edm.import_names))
        yield


@pytest.fixture(scope="module", params=FILES)
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden(request.param)


def test_the_network_and_its_parts_equal_the_official_numbers(golden: Golden) -> None:
    f, adm = golden.f, isinstance(golden.task.network, ADM)
    given = golden.arguments(nhwc(f["unet_in_x"]), f["c_noise"], f.get("class_labels"), None, 0.0)
    _, (found, state) = golden.program(golden.params["net"], *given)
    close(found, nhwc(f["F"]), 1e-5, 1e-5, "F")
    seen = {name: parts["__call__"][0] for name, parts in state.items()}
    close(jax.nn.silu(seen["embed1"] + (seen["label"] if adm else 0)), f["emb"], 1e-5, 1e-5, "emb")
    half = f["map_noise"].shape[-1] // 2
    told = (
        fourier(f["c_noise"], golden.buffers["frequencies"])
        if "frequencies" in golden.buffers
        else waves(jnp.asarray(f["c_noise"]), 2 * half, last=not adm)
    )
    close(jnp.roll(told, half, -1), f["map_noise"], 2e-5, 1e-5, "map_noise")  # ours begins with sines
    parts = [key.removeprefix("act:") for key in f if key.startswith("act:")]
    assert len(parts) >= 11
    for key in parts:
        name = re.sub(r"\.(\d+)x\d+_", r"_\1_", key)
        part = seen[{"dec_8_aux_norm": "norm", "dec_8_aux_conv": "out"}.get(name, name)]
        if "residual" in name:
            part = resized(part, "half", TAPS["ncsn++"], 0)
        close(part, nhwc(f[f"act:{key}"]), 2e-5, 1e-4, key)


def test_denoisers_equal_the_official_numbers(golden: Golden) -> None:
    f, x, sigma, hot = golden.f, nhwc(golden.f["x"]), golden.f["sigma"], golden.f.get("class_labels")
    found = {"D": golden.denoise(x, sigma, hot), "D_no_label": golden.denoise(x, sigma)}
    if "D_augment" in f:
        found["D_augment"] = golden.denoise(x, sigma, hot, f["augment_labels"])
        found |= {f"D_{kind}_precond": golden.denoise(x, sigma, hot, kind=kind) for kind in ("vp", "ve")}
        close(Precondition("vp").coefficients(sigma)[3], f["vp_c_noise"], 2e-4, 0, "vp_c_noise")
        # the lowest one is rounded there, to some places of float32
        close(Precondition("vp").sigmas, f["vp_sigma_min_max"], 0, 0.03, "vp_sigma_min_max")
    assert all(name in found for name in f if name[0] == "D")
    for name in set(found) & set(f):
        loose = 2e-4 if "precond" in name else 1e-5
        close(found[name], nhwc(f[name]), loose, loose, name)


@pytest.mark.parametrize("golden", LEARNS, indirect=True)
def test_loss_and_gradients_equal_the_official_numbers(golden: Golden) -> None:
    f = golden.f
    sigma = jnp.exp(-1.2 + 1.2 * jnp.asarray(f["loss_rnd"]).ravel())
    y, door = nhwc(f["images"]), Precondition()
    x = y + sigma[:, None, None, None] * nhwc(f["loss_noise_unit"])
    told = f.get("class_labels"), f.get("augment_labels")

    def loss(found: jax.Array) -> tuple[jax.Array, jax.Array]:
        square = jnp.square(door.denoise(lambda *_: found, x, sigma) - y)
        each = door.weight(sigma)[:, None, None, None] * square
        return each.sum() / len(y), each

    into, noise = door.coefficients(sigma)[2:]
    z = into[:, None, None, None] * x
    by, each = jax.grad(loss, has_aux=True)(golden.network(z, noise, *told))
    close(each, nhwc(f["loss_map"]), 2e-4, 1e-4, "loss_map")
    grads, _ = golden.program(golden.params["net"], *golden.arguments(z, noise, *told, by))
    theirs = weights.to_official(golden.task, {**golden.params, "net": grads})
    checked = [key.removeprefix("grad:") for key in f if key.startswith("grad:")]
    assert len(checked) > 20
    for key in checked:
        wanted = f[f"grad:{key}"]
        close(theirs[key], wanted, 1e-4 * np.abs(wanted).max(), 1e-4, key)


@pytest.mark.parametrize("golden", FILES[:2], indirect=True)  # the others have none
def test_samples_equal_the_official_numbers(golden: Golden) -> None:
    f, steps, churn = golden.f, golden.meta["num_steps"], golden.meta["churn"]
    stochastic = Churn(churn["S_churn"], churn["S_min"], churn["S_max"], churn["S_noise"])
    noise = np.moveaxis(f["noise"], -3, -1)
    draws = np.repeat(np.moveaxis(f["churn_noise"], -3, -1), 2, 0)  # one a step; its second call has none
    seen: list[tuple[Any, Any]] = []

    def denoise(x: Any, sigma: float) -> Any:
        seen.append((x, golden.denoise(x, sigma, f.get("sample_labels"))))
        return seen[-1][1]

    for name, solver in (("churn", stochastic), ("heun", Heun())):
        seen.clear()
        plan = solver.plan(Levels().grid(steps))
        close(by_hand(plan, denoise, noise[None], draws), nhwc(f[f"{name}_out"]), 2e-4, 1e-4, name)
    close(plan.sigma, f["heun_eval_sigma"], 0, 1e-6, "levels")
    for i, (x, x0) in enumerate(seen):
        close(x, nhwc(f["heun_eval_x"][i]), 2e-4, 1e-4, f"input {i}")
        close(x0, nhwc(f["heun_eval_D"][i]), 2e-4, 1e-4, f"output {i}")


def test_a_task_gives_its_network_the_class_and_what_is_held(golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    f, task, params = golden.f, golden.task, golden.params

    class Compiled:
        """In the place of the network, the program there is of it."""

        def apply(self, variables: Any, z: Any, noise: Any, hot: Any, rngs: Any, frequencies: Any = None) -> Any:
            assert variables["params"] is params["net"]
            assert frequencies is golden.buffers.get("frequencies")
            return golden.network(z, noise, hot)

    assert task.about.held == (("buffers",) if golden.buffers else ())
    made = weights.abstract(dataclasses.replace(task, dtype="bfloat16"))
    assert {x.dtype for x in jax.tree.leaves(made)} == {jnp.dtype("float32")}
    monkeypatch.setattr(Edm, "_net", Compiled())
    given = {"label": jnp.argmax(f["class_labels"], -1)} if "class_labels" in f else None
    close(task.denoise(params, nhwc(f["x"]), f["sigma"], given), nhwc(f["D"]), 1e-5, 1e-5, "D")


def test_levels_of_iddpm_are_rounded_as_the_official_ones() -> None:
    f = dict(np.load(FOLDER / "edm_iddpm.npz"))
    index = nearest(f["round_in"], f["w:u"])
    np.testing.assert_array_equal(index, f["round_index"])
    np.testing.assert_array_equal(f["w:u"][index], f["round_out"])
    close(iddpm_levels(), f["w:u"], 0, 1e-3, "u was accumulated in float32 there")
    close(Precondition("iddpm").sigmas, f["id_sigma_min_max"], 0, 1e-3, "range")


def test_embeddings_filters_and_norms_equal_the_official_numbers() -> None:
    f = dict(np.load(FOLDER / "edm_functions.npz"))

    def parts(x: jax.Array, a: jax.Array) -> dict[str, Any]:
        codes = {
            "positional_endpoint_16": waves(x, 16),
            "positional_noendpoint_16": waves(x, 16, last=False),
            "positional_endpoint_128": waves(x, 128),
            "fourier_16": fourier(x, f["fourier_freqs"]),
        }
        found = {name: jnp.roll(code, code.shape[-1] // 2, -1) for name, code in codes.items()}  # ours begin with sines
        for way, name, taps in itertools.product(("down", "up"), ("11", "1331"), (TAPS["ddpm++"], TAPS["ncsn++"])):
            if name != "".join(map(str, taps)):
                continue
            part = {"kernel": f[f"{way}{name}_w"].transpose(2, 3, 1, 0), "bias": f[f"{way}{name}_b"]}

            def conv(x: jax.Array, padding: int, part: Any = part) -> Any:
                return Conv(6, padding=padding).apply({"params": part}, x)

            edge, resize = len(taps) // 2 - 1, "half" if way == "down" else "twice"
            plain = resized(a, resize, taps)
            fused = (
                resized(conv(a, 1 + edge), resize, taps, 0)
                if way == "down"
                else conv(resized(a, resize, taps, max(edge - 1, 0)), max(1 - edge, 0))
            )
            found |= {f"{way}{name}_nokernel": plain, f"{way}{name}": conv(plain, 1), f"{way}{name}_fused": fused}
        norm = {"params": {"scale": f["gn_w"], "bias": f["gn_b"]}}
        found["gn"] = GroupNorm(2, 1e-6).apply(norm, a)
        found |= {f"gn_small_eps{e}": GroupNorm(2, float(e)).apply(norm, 2e-3 * a) for e in ("1e-6", "1e-5")}
        return found

    found = jax.jit(parts)(jnp.asarray(f["noise_labels"]), nhwc(f["a"]))
    wanted = {name.removesuffix("_out"): x for name, x in f.items() if name.endswith("_out") or "al_" in name}
    wanted["fourier_16"] = f["fourier_16"]
    assert wanted.keys() == found.keys()
    for name, x in found.items():
        close(x, wanted[name] if x.ndim == 2 else nhwc(wanted[name]), 2e-5 if x.ndim == 2 else 1e-5, 1e-5, name)


# --- the published layout -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters", "keys"),
    [
        ("edm/cifar10", 55_735_299, 427),
        ("edm/ffhq64:ncsnpp", 62_761_091, 563),
        ("edm/imagenet64_adm", 295_899_267, 553),
    ],
)
def test_published_sizes(name: str, parameters: int, keys: int) -> None:
    task: Any = config.load(name).task
    params = weights.abstract(task)
    assert sum(x.size for x in jax.tree.leaves(params["net"])) == parameters
    listed = names(params, task.image, "adm" if isinstance(task.network, ADM) else task.network.kind)
    assert len(listed) == len({one.source for one in listed}) == keys


@pytest.mark.parametrize("name", FILES)
def test_import_and_export_are_each_other_s_way_back(name: str) -> None:
    golden = Golden(name)
    back = weights.to_official(golden.task, golden.params)
    assert back.keys() == golden.state.keys()
    for name, array in golden.state.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)
    bare = {name: x for name, x in golden.state.items() if "resample_filter" not in name}
    again = weights.from_official(golden.task, bare)
    jax.tree.map(np.testing.assert_array_equal, again, golden.params)


def test_files_that_do_not_fit_are_told(tmp_path: Path) -> None:
    case = Golden("edm_ddpmpp")
    state = {name: x for name, x in case.state.items() if name != "model.dec.8x8_aux_conv.bias"}
    with told("missing", "model.dec.8x8_aux_conv.bias", "unexpected", "u"):
        weights.from_official(case.task, {**state, "u": np.zeros(1001)})
    plain = dataclasses.replace(case.task, network=dataclasses.replace(case.task.network, augment=0))
    with told("model.map_augment.weight"):
        weights.from_official(plain, case.state)
    with told("model.map_noise.freqs", "model.enc.4x4_aux_residual.weight"):
        other = dataclasses.replace(case.task.network, kind="ncsn++")
        weights.from_official(dataclasses.replace(case.task, network=other), case.state)
    with told("Edm", "no published layout", "a transformer has none"):
        weights.from_official(dataclasses.replace(case.task, network=Transformer(8, 1, 4, 2)), case.state)
    (tmp_path / "edm-cifar10.pkl").write_bytes(b"\x80")
    with told("edm-cifar10.pkl", "runs code", "state_dict()", "edm-cifar10.npz"):
        weights.read_state_dict(tmp_path / "edm-cifar10.pkl")


def test_networks_and_levels_that_do_not_fit_are_told() -> None:
    with told("task.network.head_dim=10", "32 channels", "task.network.head_dim=2"):
        ADM(width=16, multiples=(1, 2), head_dim=10)
    for kind, low, high, said in (("ve", 0.002, 0.01, "0.02 to 100"), ("vp", 1e5, 2e5, "task.low=100000")):
        with told(f"task.precondition={kind!r}", said, f"task.high={high:g}"):
            Edm(precondition=kind, low=low, high=high)
    assert Edm(precondition="ve").sigmas == (0.02, 80.0)
    assert Edm(precondition="iddpm", low=1e-3, high=1e5).sigmas == Precondition("iddpm").sigmas
    task = Edm(image=4, channels=1, network=Transformer(8, 1, 4, 2), precondition="iddpm")
    x = jax.ShapeDtypeStruct((2, 4, 4, 1), jnp.float32)
    found = jax.eval_shape(task.denoise, weights.abstract(task), x, jax.ShapeDtypeStruct((), jnp.float32))
    assert found.shape == x.shape
