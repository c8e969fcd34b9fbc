"""STARFlow: parity with the official implementation's numbers, and the sizes of the published models."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flow_by_hand import Rows, block, forward, inverse, nhwc, tokens, untokens

from zoo import weights
from zoo.flows import stack as flow_stack
from zoo.flows.inverse import Guidance, Jacobi, jacobi
from zoo.nn.embed import grid_positions, patchify, rope_angles, rotate
from zoo.papers import starflow
from zoo.papers.starflow.model import positions

GOLDEN = Path(__file__).parent.parent / "golden" / "starflow"
CASES = [("t2i_base", True), ("class_cond", True), ("learned_pos", True), ("lm_deep_block", False)]


@functools.cache
def golden(name):
    """Arrays and description. Samples of the text model lie in a file of their own, on the same inputs."""
    f = dict(np.load(GOLDEN / f"{name}.npz"))
    if name == "t2i_base":
        more = np.load(GOLDEN / "t2i_sampling.npz")
        for key in ("x", "y", "y_null", "noise"):
            np.testing.assert_array_equal(f[key], more[key])
        f = {**more, **f}
    return f, json.loads(bytes(f["meta_json"]).decode())


def task_of(meta, scan=True):
    """The task that a golden file's constructor arguments describe."""
    c, lm = meta["config"], meta.get("deep_block_kwargs")
    depths = c["layers_per_block"]
    depths = depths * c["num_blocks"] if len(depths) == 1 else depths
    if lm:
        depths = [*depths[:-1], lm["num_layers"]]
        lm = starflow.LanguageModel(
            width=lm["channels"],
            heads=lm["num_heads"],
            kv_heads=lm["num_kv_heads"],
            head_dim=lm["head_dim"],
            mlp=lm["expansion"] * lm["channels"],
        )
    return starflow.StarFlow(
        latent=(c["img_size"],) * 2,
        channels=c["in_channels"],
        patch=c["patch_size"],
        width=c["channels"],
        depths=tuple(depths),
        head_dim=c["head_dim"],
        classes=c["txt_dim"] - 1 if c["txt_size"] == 1 else 0,
        text_tokens=0 if c["txt_size"] == 1 else c["txt_size"],
        text_width=c["txt_dim"],
        captions="features",
        condition="deep" if c["cond_top_only"] else "all",
        start=bool(c["sos"]),
        order=c["seq_order"],
        positions="rope" if c["rope"] else "learned",
        reach=c["img_size"] / c["patch_size"],
        scale="softplus" if c["use_softplus"] else "exp",
        clip=c["soft_clip"],
        final_norm=bool(c["use_final_norm"]),
        lm=lm or None,
        scan=scan,
    )


class Case:
    """A golden file, our task and parameters for it, and its forward pass; with a language model, which has all else, gradients too."""

    def __init__(self, name, scan):
        self.name, (self.f, self.meta) = name, golden(name)
        self.task = task_of(self.meta, scan)
        self.state = {k.removeprefix("w:"): v for k, v in self.f.items() if k.startswith("w:")}
        self.params = weights.from_official(self.task, self.state)
        self.x, self.noise = nhwc(self.f["x"]), nhwc(self.f["noise"])
        self.y, self.null = self.f["y"], self.f["y_null"]
        run = functools.partial(forward_all, self.task, y=self.y)
        if self.task.lm:
            run = jax.grad(run, (0, 1), has_aux=True)
        self.grads, self.forward = jax.device_get(jax.jit(run)(self.params, self.x))


made = functools.cache(Case)


def forward_all(task, params, x, y):
    """The loss, and everything of the forward pass that the golden files hold, with each block's log-scales as they are used."""
    seen = []

    def affine(u, a, b):
        seen.append((u, a))
        return used(u, a, b)

    with pytest.MonkeyPatch.context() as patch:
        used = flow_stack.affine
        patch.setattr(flow_stack, "affine", affine)
        z, logdet, squares = forward(task, params, x, y)
    _, stack = task.in_tokens(x)
    rows, columns = (n // task.patch for n in x.shape[1:3])
    states = [*(stack.order(u, i) for i, (u, _) in enumerate(seen)), z]
    out = {f"out{i}": state.reshape(len(x), rows, columns, task.dims) for i, state in enumerate(states)}
    out |= {f"logdet{i}": -a for i, (_, a) in enumerate(seen)}
    out |= {"loss_z": 0.5 * jnp.square(z).mean(), "loss_logdet": -logdet.mean(), "latent_norm": squares.mean()}
    out["loss"] = out["loss_z"] + out["loss_logdet"]
    out["total_loss"] = out["loss"] + 1e-4 * out["latent_norm"]
    return out["total_loss"], {**out, "z": jnp.moveaxis(untokens(task, z, rows), -1, 1)}


def compare(found, f, **tolerance):
    for name, ours in found.items():
        np.testing.assert_allclose(ours, f[name], err_msg=name, **tolerance)


def sequence(name, states, part=slice(None)):
    """[blocks + 1, B, H, W, C] as the golden files hold it: seq0 the noise, seqN the sample."""
    return {f"{name}_seq{i}": np.moveaxis(np.asarray(s)[part], -1, 1) for i, s in enumerate(states)}


@pytest.fixture(scope="module", params=CASES, ids=[f"{n}-{'scan' if s else 'unrolled'}" for n, s in CASES])
def case(request):
    return made(*request.param)


def test_forward_equals_the_official_numbers(case):
    assert len(case.forward) > 10
    compare(case.forward, case.f, atol=2e-5, rtol=1e-4)
    if case.task.lm:
        angles = case.task.stack.nets[-1].angles()
        np.testing.assert_allclose(angles.repeat(2, -1), case.f["freqs_deep"], atol=1e-6)
    if "patchified_x" in case.f:
        tokens = patchify(case.x, case.task.patch, channel_first=False)
        np.testing.assert_array_equal(tokens, case.f["patchified_x"].reshape(tokens.shape))


def test_gradients_equal_the_official_numbers():
    case = made("lm_deep_block", False)
    grads, grad_x = case.grads
    np.testing.assert_allclose(np.moveaxis(grad_x, -1, 1), case.f["grad_x"], rtol=1e-3, atol=2e-6)
    theirs = weights.to_official(case.task, grads)
    names, norms = case.meta["grad_norm_names"], case.f["grad_norm_values"]
    found = np.array([np.linalg.norm(theirs[n].ravel()) for n in names])
    known = np.isfinite(norms)
    assert known.sum() > 20
    np.testing.assert_allclose(found[known], norms[known], rtol=1e-3, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(found[known]), case.f["grad_total_norm"], rtol=1e-4)
    whole = [k for k in case.f if k.startswith("grad:")]
    assert whole
    for key in whole:
        np.testing.assert_allclose(theirs[key.removeprefix("grad:")], case.f[key], rtol=1e-3, atol=2e-6, err_msg=key)


def test_the_official_layout_comes_back_to_the_bit(case):
    back = weights.to_official(case.task, case.params)
    for name, array in case.state.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)
    buffers = {name: tuple(shape) for name, shape in case.meta["buffers"].items()}
    assert {n: back[n].shape for n in back if n not in case.state} == buffers


# --- guidance ---------------------------------------------------------------------------------------

NOISE, Z = "uncfg", "roundtrip"  # both without guidance: from noise, and from the z of data
# programs by case; of each the samples by their names
GUIDED = {
    "t2i_base": [
        {
            NOISE: Guidance(),
            Z: Guidance(),
            "cfg1.5": Guidance(1.5),
            "cfg2.0": Guidance(2.0),
            "cfg3.6": Guidance(3.6),
            "cfg_annealed_flag": Guidance(2.0),
            "orig_ab": Guidance(0.5, rule="linear_scale"),
            "orig_a": Guidance(0.5, "a", rule="linear_scale"),
            "orig_b": Guidance(0.5, "b", rule="linear_scale"),
            "orig_ab_annealed": Guidance(0.5, rule="linear_scale", annealed=True),
        },
        {"cfg_w_attn_temp": Guidance(2.0)},
    ],
    "class_cond": [{NOISE: Guidance(), Z: Guidance(), "cfg2.0": Guidance(2.0)}],
    "learned_pos": [
        {NOISE: Guidance(), Z: Guidance(), "cfg_all": Guidance(1.0)},
        {"cfg_guide_top": Guidance(1.0, blocks="first")},
    ],
    "lm_deep_block": [{"cfg2.0": Guidance(2.0)}],
}
SWEPT = {
    "jacobi_th": Jacobi(modules=4, tol=1e-3, criterion="relative", refresh=False, unconverged="keep"),
    "jacobi_2sweeps": Jacobi(modules=2, tol=0.0, sweeps=2, refresh=False, unconverged="keep"),
}


def test_samples_equal_the_official_numbers(case):
    """By all guidances in one batch, each as if it were alone."""
    n = len(case.x)
    for wanted in GUIDED[case.name]:
        many = len(wanted)
        guidance = Rows.by(case.task.stack, wanted.values()) if many > 1 else next(iter(wanted.values()))
        begun = np.concatenate([nhwc(case.f["z"]) if name == Z else case.noise for name in wanted])
        y, null = (np.concatenate([x] * many) for x in (case.y, case.null))
        options = {"attention_temperature": 0.8} if "cfg_w_attn_temp" in wanted else {}
        states = jax.jit(lambda p: inverse(case.task, p, begun, y, null, guidance, **options))(case.params)  # noqa: B023
        assert len(states) == case.task.blocks + 1
        for i, name in enumerate(wanted):
            part = slice(i * n, (i + 1) * n)
            if name != Z:
                compare(sequence(name, states, part), case.f, atol=5e-4, rtol=1e-4)
                continue
            back = np.moveaxis(np.asarray(states[-1][part]), -1, 1)
            np.testing.assert_allclose(back, case.f.get("roundtrip_x", case.f["x"]), atol=5e-4)


@pytest.fixture(scope="module")
def base():
    return made("t2i_base", True)


def test_the_gaussian_rule_equals_the_official_numbers():
    f, _ = golden("t2i_base")
    strong, weak = ((jnp.log(f[f"g_sigma_{k}"]), jnp.asarray(f[f"g_mu_{k}"])) for k in "cu")
    for w in (0.5, 3.6, 10.0):
        scale, shift = Guidance.of(w, "gaussian", annealed=False).apply(strong, weak, jnp.ones(1))
        np.testing.assert_allclose(scale, f[f"g_sigma_w{w}"], rtol=2e-5)
        np.testing.assert_allclose(shift, f[f"g_mu_w{w}"], rtol=2e-5, atol=2e-5)


def test_denoising_equals_the_official_numbers(base):
    given = {"text": base.y, "null_text": base.null}
    clean = jax.jit(lambda p: base.task.denoise(p, base.x, jnp.float32(base.task.noise), given))(base.params)
    np.testing.assert_allclose(np.moveaxis(clean, -1, 1), base.f["self_denoise_sigma0.3"], rtol=1e-3, atol=5e-5)


def test_a_guided_forward_pass_equals_the_official_numbers(base):
    task, deep, stack = base.task, base.task.blocks - 1, base.task.stack

    @jax.jit
    def run(params):
        u = stack.order(base.forward[f"out{deep}"].reshape(len(base.x), -1, task.dims), deep)
        both = block(stack, params, deep, jnp.concatenate([u, u]), jnp.concatenate([base.y, base.null]))
        parts = zip(*(jnp.split(x, 2) for x in both))
        scale, shift = Guidance.of(2.0, "gaussian", annealed=False).apply(*parts, jnp.ones(1))
        return untokens(task, stack.order((u - shift) / scale, deep), task.rows), -jnp.log(scale)

    z, logdet = run(base.params)
    twice = np.concatenate([np.moveaxis(z, -1, 1)] * 2)
    np.testing.assert_allclose(twice, base.f["forward_guided_z"], atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(np.concatenate([logdet] * 2), base.f["forward_guided_logdet_deep"], atol=1e-4)


@pytest.mark.parametrize("name", SWEPT)
def test_sweeps_over_chunks_equal_the_official_numbers(base, name):
    """Fixed points of chunks of tokens, by the official rule of stopping and with caches that keep the last input.

    The shallow blocks differ in their parameters alone and share a program.
    """
    stack, deep = base.task.stack, base.task.blocks - 1

    @functools.partial(jax.jit, static_argnums=0)
    def run(i, params, v):
        chain = stack.chain({f"block{i}": params}, len(v), base.y, base.null, Guidance(2.0))
        return jacobi(chain.stepper(i), v, SWEPT[name])[0]

    states = [np.asarray(tokens(base.task, base.noise))]
    for i in reversed(range(base.task.blocks)):
        u = run(min(i, 1) if i < deep else i, base.params[f"block{i}"], stack.order(states[-1], i))
        states.append(stack.order(np.asarray(u), i))
    found = [untokens(base.task, x, base.task.rows) for x in states]
    compare(sequence(name, found), base.f, atol=5e-4, rtol=1e-4)


def test_rectangular_grids_equal_the_official_numbers(base):
    f, _ = golden("t2i_rect")
    x, y, null = nhwc(f["x"]), f["y"], f["y_null"]
    compare(jax.jit(lambda p: forward_all(base.task, p, x, y)[1])(base.params), f, atol=2e-5, rtol=1e-4)
    found = jax.jit(lambda p: inverse(base.task, p, nhwc(f["noise"]), y, null, Guidance(2.0)))(base.params)
    compare(sequence("cfg2.0", found), f, atol=5e-4, rtol=1e-4)
    grid, deep = x.shape[1:3], base.task.blocks - 1
    nets = base.task.stack_on(grid).nets
    np.testing.assert_allclose(positions(grid, 8, base.task.reach), f["positions_deep"], atol=1e-6)
    for i, name in ((deep, "freqs_deep"), (0, "freqs_shallow")):
        np.testing.assert_allclose(nets[i].angles().repeat(2, -1), f[name], atol=1e-6)
    # their pairs are adjacent numbers, ours halves
    rope_in = jnp.asarray(f["rope_in"]).swapaxes(1, 2)
    halves = jnp.concatenate([rope_in[..., 0::2], rope_in[..., 1::2]], -1)
    out = rotate(halves, jnp.asarray(nets[deep].angles()))
    theirs = f["rope_out"].swapaxes(1, 2)
    np.testing.assert_allclose(out, np.concatenate([theirs[..., 0::2], theirs[..., 1::2]], -1), atol=1e-5)


def test_position_tables_of_the_published_model():
    f, _ = golden("t2i_rect")
    big = starflow.text_to_image(captions="features")
    for rows, columns in ((32, 32), (64, 64), (24, 42)):
        name, deep = f"{rows}x{columns}", big.blocks - 1
        kept = f[f"real_rows_{name}"]
        np.testing.assert_allclose(positions((rows, columns), 128, big.reach)[kept], f[f"real_pos_{name}"], atol=1e-5)
        ours = big.stack_on((rows, columns)).nets[deep].angles()[kept].repeat(2, -1)
        np.testing.assert_allclose(ours, f[f"real_freqs_{name}"], atol=2e-5)
    np.testing.assert_allclose(grid_positions(5, 7, 16), f["pos2d_5x7"], atol=1e-5)
    np.testing.assert_allclose(
        rope_angles(grid_positions(5, 7, 16), (16, 16)).repeat(2, -1), f["freqs2d_5x7"], atol=2e-5
    )


# --- the published sizes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "total", "entries"),
    [
        (starflow.text_to_image(captions="features"), 3_858_281_544, 455),
        (starflow.class_conditional(), 1_412_255_816, 383),
    ],
    ids=["text", "classes"],
)
def test_published_sizes_match(task, total, entries):
    """Numbers and names; that of each tensor's shape and place is told by the round trip of the small ones."""
    own = weights.flatten(weights.stacked(weights.abstract(task)))
    assert sum(int(np.prod(x.shape)) for x in own.values()) == total
    names = task.import_names()
    assert len({name.source for name in names}) == len(names) == entries
    assert {name.target for name in names if name.target} == set(own)
