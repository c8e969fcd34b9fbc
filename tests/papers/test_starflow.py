"""STARFlow: parity with the official implementation's numbers, and the laws a flow obeys with random weights."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fresh import fresh

from zoo import dist, weights
from zoo.encoders.text import T5
from zoo.encoders.vae import AutoEncoder
from zoo.errors import UserError
from zoo.flows.inverse import Guidance, Jacobi
from zoo.flows.stack import apply
from zoo.nn.embed import grid_positions, patchify, rope_angles, rotate, unpatchify
from zoo.papers import starflow
from zoo.papers.starflow.model import positions
from zoo.train.step import make_sampler

GOLDEN = Path(__file__).parent.parent / "golden" / "starflow"
CASES = [("t2i_base", True), ("class_cond", False), ("learned_pos", True), ("lm_deep_block", False)]


def nhwc(x):
    return jnp.asarray(np.moveaxis(x, -3, -1))


def tokens(task, x):
    return task.in_tokens(x)[0]


def untokens(task, x, rows):
    return unpatchify(x, task.patch, task.channels, rows=rows, channel_first=False)


def forward(task, params, x, y=None):
    """z, log-det and mean squares of latents."""
    x, stack = task.in_tokens(x)
    return stack.forward(params, x, y)


def inverse(task, params, z, y=None, null=None, guidance=0.0, **options):
    """Latents on the way back from z, which has their shape."""
    (x, stack), rows = task.in_tokens(z), z.shape[1] // task.patch
    return [untokens(task, s, rows) for s in stack.inverse(params, x, y, null, guidance, **options).states]


def denoise(task, params, x, y=None):
    tokens, stack = task.in_tokens(x)
    return untokens(task, stack.denoise(params, tokens, task.noise, y), x.shape[1] // task.patch)


def block(stack, params, i, *inputs):
    """Log-scale and shift of block i."""
    return apply(stack.nets[i], params[f"block{i}"], *inputs)[:2]


def golden(name):
    f = np.load(GOLDEN / f"{name}.npz")
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
    """A golden file, our task and parameters for it, and everything computed in two programs."""

    def __init__(self, name, scan):
        self.name, (self.f, self.meta) = name, golden(name)
        self.task = task_of(self.meta, scan)
        self.state = {k.removeprefix("w:"): v for k, v in self.f.items() if k.startswith("w:")}
        self.params = weights.from_official(self.task, self.state)
        self.x, self.noise = nhwc(self.f["x"]), nhwc(self.f["noise"])
        self.y, self.null = jnp.asarray(self.f["y"]), jnp.asarray(self.f["y_null"])
        self.forward = jax.device_get(jax.jit(lambda p: forward_all(self.task, p, self.x, self.y))(self.params))

    def loss(self, params, x):
        z, logdet, squares = forward(self.task, params, x, self.y)
        return (0.5 * jnp.square(z).mean() - logdet.mean()) + 1e-4 * squares.mean()


def forward_all(task, params, x, y):
    """Everything of the forward pass that the golden files hold."""
    tokens, stack = task.in_tokens(x)
    states, _ = stack.flow(params, tokens, y)
    rows, columns = (n // task.patch for n in x.shape[1:3])
    out = {f"out{i}": state.reshape(len(x), rows, columns, task.dims) for i, state in enumerate(states)}
    for i, state in enumerate(states[:-1]):
        out[f"logdet{i}"] = -block(stack, params, i, stack.order(state, i), y)[0]
    z, logdet, squares = forward(task, params, x, y)
    out |= {"loss_z": 0.5 * jnp.square(z).mean(), "loss_logdet": -logdet.mean(), "latent_norm": squares.mean()}
    out["loss"] = out["loss_z"] + out["loss_logdet"]
    out["total_loss"] = out["loss"] + 1e-4 * out["latent_norm"]
    return {**out, "z": jnp.moveaxis(untokens(task, z, rows), -1, 1)}


def compare(found, f, **tolerance):
    for name, ours in found.items():
        np.testing.assert_allclose(ours, f[name], err_msg=name, **tolerance)


def sequence(states):
    """[blocks + 1, B, H, W, C] as the golden files hold it: seq0 the noise, seqN the sample."""
    return {f"seq{i}": np.moveaxis(np.asarray(s), -1, 1) for i, s in enumerate(states)}


@pytest.fixture(scope="module", params=CASES, ids=[f"{n}-{'scan' if s else 'unrolled'}" for n, s in CASES])
def case(request):
    return Case(*request.param)


def test_forward_equals_the_official_numbers(case):
    assert len(case.forward) > 10
    compare(case.forward, case.f, atol=2e-5, rtol=1e-4)
    if "patchified_x" in case.f:
        tokens = patchify(case.x, case.task.patch, channel_first=False)
        np.testing.assert_array_equal(tokens, case.f["patchified_x"].reshape(tokens.shape))


def test_gradients_equal_the_official_numbers(case):
    grads, grad_x = jax.jit(jax.grad(case.loss, (0, 1)))(case.params, case.x)
    np.testing.assert_allclose(np.moveaxis(grad_x, -1, 1), case.f["grad_x"], rtol=1e-3, atol=2e-6)
    theirs = weights.to_official(case.task, jax.device_get(grads))
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


def guided(task, params, noise, y, null, guidance, **options):
    run = jax.jit(lambda p: inverse(task, p, noise, y, null, guidance, **options))
    return sequence(run(params))


def test_samples_equal_the_official_numbers(case):
    wanted = {
        "uncfg": Guidance(),
        "cfg2.0": Guidance(2.0),
        "cfg_all": Guidance(1.0),
        "cfg_guide_top": Guidance(1.0, blocks="first"),
    }
    there = [name for name in wanted if f"{name}_seq0" in case.f]
    for name in there:
        found = guided(case.task, case.params, case.noise, case.y, case.null, wanted[name])
        compare({f"{name}_{k}": v for k, v in found.items()}, case.f, atol=5e-4, rtol=1e-4)
    assert there or case.name == "t2i_base"
    if "roundtrip_x" in case.f:
        z = nhwc(case.forward["z"])
        back = jax.jit(lambda p: inverse(case.task, p, z, case.y)[-1])(case.params)
        np.testing.assert_allclose(np.moveaxis(back, -1, 1), case.f["roundtrip_x"], atol=5e-4)


def test_the_official_layout_comes_back_to_the_bit(case):
    back = weights.to_official(case.task, case.params)
    for name, array in case.state.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)
    buffers = {name: tuple(shape) for name, shape in case.meta["buffers"].items()}
    assert {n: back[n].shape for n in back if n not in case.state} == buffers


@pytest.fixture(scope="module")
def base():
    return Case("t2i_base", True)


@pytest.mark.parametrize(
    ("name", "guidance", "options"),
    [
        ("uncfg", Guidance(), {}),
        ("cfg1.5", Guidance(1.5), {}),
        ("cfg2.0", Guidance(2.0), {}),
        ("cfg3.6", Guidance(3.6), {}),
        ("cfg_annealed_flag", Guidance(2.0), {}),
        ("cfg_w_attn_temp", Guidance(2.0), {"attention_temperature": 0.8}),
        ("orig_ab", Guidance(0.5, rule="linear_scale"), {}),
        ("orig_a", Guidance(0.5, "a", rule="linear_scale"), {}),
        ("orig_b", Guidance(0.5, "b", rule="linear_scale"), {}),
        ("orig_ab_annealed", Guidance(0.5, rule="linear_scale", annealed=True), {}),
    ],
)
def test_guided_samples_equal_the_official_numbers(base, name, guidance, options):
    f, _ = golden("t2i_sampling")
    found = guided(
        base.task, base.params, nhwc(f["noise"]), jnp.asarray(f["y"]), jnp.asarray(f["y_null"]), guidance, **options
    )
    assert len(found) == 7
    compare({f"{name}_{k}": v for k, v in found.items()}, f, atol=5e-4, rtol=1e-4)


@pytest.mark.parametrize("w", [0.5, 3.6, 10.0])
def test_the_gaussian_rule_equals_the_official_numbers(w):
    f, _ = golden("t2i_sampling")
    strong, weak = ((jnp.log(f[f"g_sigma_{k}"]), jnp.asarray(f[f"g_mu_{k}"])) for k in "cu")
    scale, shift = Guidance.of(w, "gaussian", annealed=False).apply(strong, weak, jnp.ones(1))
    np.testing.assert_allclose(scale, f[f"g_sigma_w{w}"], rtol=2e-5)
    np.testing.assert_allclose(shift, f[f"g_mu_w{w}"], rtol=2e-5, atol=2e-5)


def test_denoising_equals_the_official_numbers(base):
    f, _ = golden("t2i_sampling")
    clean = jax.jit(lambda p: denoise(base.task, p, nhwc(f["x"]), jnp.asarray(f["y"])))(base.params)
    np.testing.assert_allclose(np.moveaxis(clean, -1, 1), f["self_denoise_sigma0.3"], rtol=1e-3, atol=5e-5)


def test_a_guided_forward_pass_equals_the_official_numbers(base):
    f, _ = golden("t2i_sampling")
    task, deep = base.task, base.task.blocks - 1
    tokens, stack = task.in_tokens(nhwc(f["x"]))
    states, _ = stack.flow(base.params, tokens, jnp.asarray(f["y"]))
    u = stack.order(states[-2], deep)
    parts = [block(stack, base.params, deep, u, jnp.asarray(f[k])) for k in ("y", "y_null")]
    scale, shift = Guidance.of(2.0, "gaussian", annealed=False).apply(*parts, jnp.ones(1))
    z = untokens(task, stack.order((u - shift) / scale, deep), f["x"].shape[-2])
    twice = np.concatenate([np.moveaxis(z, -1, 1)] * 2)
    np.testing.assert_allclose(twice, f["forward_guided_z"], atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(np.concatenate([-jnp.log(scale)] * 2), f["forward_guided_logdet_deep"], atol=1e-4)


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("jacobi_exact", Jacobi(modules=4, tol=0.0)),
        ("jacobi_th", Jacobi(modules=4, tol=1e-3, criterion="relative", refresh=False)),
        ("jacobi_2sweeps", Jacobi(modules=2, tol=0.0, sweeps=2, refresh=False, unconverged="keep")),
    ],
)
def test_sweeps_over_chunks_equal_the_official_numbers(base, name, method):
    """Fixed points of chunks of tokens, by the official rule of stopping and with caches that keep the last input."""
    f, _ = golden("t2i_sampling")
    args = base.task, base.params, nhwc(f["noise"]), jnp.asarray(f["y"]), jnp.asarray(f["y_null"]), Guidance(2.0)
    found = guided(*args, method=method)
    compare({f"{name}_{k}": v for k, v in found.items()}, f, atol=5e-4, rtol=1e-4)
    if name == "jacobi_exact":
        compare({f"cfg2.0_{k}": v for k, v in found.items()}, f, atol=2e-5, rtol=2e-5)


def test_no_golden_array_is_left_out(case, base):
    """Every array of every file but the video's is an input, a weight, a gradient or compared above."""
    inputs = {"x", "y", "y_null", "noise", "labels", "meta_json", "grad_norm_names"}
    above = {
        "grad_x",
        "grad_norm_values",
        "grad_total_norm",
        "roundtrip_x",
        "patchified_x",
        "freqs_deep",
        *case.forward,
    }
    above |= {f"{s}_seq{i}" for s in ("uncfg", "cfg2.0", "cfg_all", "cfg_guide_top") for i in range(7)}
    left = {k for k in case.f if not k.startswith(("w:", "grad:"))} - inputs - above
    assert not left


def test_rectangular_grids_equal_the_official_numbers(base):
    f, _ = golden("t2i_rect")
    x, y, null = nhwc(f["x"]), jnp.asarray(f["y"]), jnp.asarray(f["y_null"])
    compare(jax.jit(lambda p: forward_all(base.task, p, x, y))(base.params), f, atol=2e-5, rtol=1e-4)
    found = guided(base.task, base.params, nhwc(f["noise"]), y, null, Guidance(2.0))
    compare({f"cfg2.0_{k}": v for k, v in found.items()}, f, atol=5e-4, rtol=1e-4)
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


def test_positions_of_a_language_model(case):
    if case.name == "lm_deep_block":
        ours = case.task.stack_on((4, 4)).nets[2].angles()
        np.testing.assert_allclose(ours.repeat(2, -1), case.f["freqs_deep"], atol=1e-6)


# --- the published sizes ----------------------------------------------------------------------------


def published(task):
    """(key, shape) of a published checkpoint by the table of its layout, written out independently of import_names."""
    w, d, slots = task.width, task.dims, task.rows * task.columns + task.prefix
    yield from [("var", (task.rows * task.columns, d))]
    yield from [(f"feat_rope.freqs_{f}", (slots, task.head_dim)) for f in ("cos", "sin")]
    for i, depth in enumerate(task.depths):
        yield f"blocks.{i}.attn_mask", (slots, slots)
        yield f"blocks.{i}.sos_embed", (1, 1, d)
        linears = {"proj_in": (w, d), "proj_out": (2 * d, w)}
        if i == len(task.depths) - 1:
            linears["proj_txt"] = (w, task.classes + 1 if task.classes else task.text_width)
        yield f"blocks.{i}.final_norm.weight", (w,)
        for l in range(depth):
            layer = f"attn_blocks.{l}"
            linears |= {f"{layer}.attention.qkv": (3 * w, w), f"{layer}.attention.proj": (w, w)}
            linears |= {f"{layer}.mlp.main.0": (4 * w, w), f"{layer}.mlp.main.2": (w, 4 * w)}
            for norm in ("attention.norm", "mlp.norm"):
                yield from [(f"blocks.{i}.{layer}.{norm}.{k}", (w,)) for k in ("weight", "bias")]
        for name, shape in linears.items():
            yield from [(f"blocks.{i}.{name}.weight", shape), (f"blocks.{i}.{name}.bias", shape[:1])]


@pytest.mark.parametrize(
    ("task", "total", "entries"),
    [
        (starflow.text_to_image(captions="features"), 3_858_281_544, 455),
        (starflow.class_conditional(), 1_412_255_816, None),
    ],
    ids=["text", "classes"],
)
def test_published_sizes_match_to_the_last_tensor(task, total, entries):
    own = weights.flatten(weights.stacked(weights.abstract(task)))
    assert sum(int(np.prod(x.shape)) for x in own.values()) == total
    names = {n.source: n for n in task.import_names()}
    want = dict(published(task))
    assert set(names) == set(want)
    assert entries is None or len(names) == entries
    filled = {}
    for key, shape in want.items():
        name = names[key]
        if name.target is None:
            assert "mask" in key or "freqs" in key or key == "var"
            continue
        leaf = own[name.target]
        ours = np.broadcast_to(np.float32(0), leaf.shape if name.layer is None else leaf.shape[1:])
        assert weights.official._theirs(name, ours).shape == shape, key
        filled.setdefault(name.target, []).append(name.layer)
    assert set(filled) == set(own)
    for target, layers in filled.items():
        assert layers == [None] or sorted(layers) == list(range(own[target].shape[0]))


# --- laws, with random weights: fresh ones are one affine map and hide every mistake ----------------

TINY = starflow.StarFlow(
    latent=(4, 4), channels=2, width=32, depths=(1, 1, 2), head_dim=32, classes=3, reach=4.0, penalty=0.0
)


def randomised(task, seed=0):
    """Parameters in which masks, orders and shifts show, and which still invert well."""
    params = fresh(task, seed)
    rng = np.random.default_rng(seed)

    def noisy(path, x):
        name = jax.tree_util.keystr(path)
        if "'out']['kernel']" in name and "attention" not in name:
            return jnp.asarray(rng.normal(size=x.shape) * 0.3 / task.width**0.5, jnp.float32)
        return x + jnp.asarray(rng.normal(size=x.shape) * 0.1, jnp.float32)

    return jax.tree_util.tree_map_with_path(noisy, params)


def latents(task, n, seed=1, shape=None):
    return jax.random.normal(jax.random.key(seed), (n, *(shape or task.latent), task.channels))


VARIANTS = {
    "start": TINY,
    "shifted": dataclasses.replace(TINY, start=False, scale="exp", clip=0.0, final_norm=False, condition="all"),
    "learned": dataclasses.replace(TINY, positions="learned", scan=False),
    "patch": dataclasses.replace(TINY, patch=2, order="R2L"),
    "lm": dataclasses.replace(
        TINY,
        classes=0,
        text_tokens=3,
        text_width=32,
        captions="features",
        lm=starflow.LanguageModel(32, 4, 2, 8, 48),
    ),
    "lm-plain": dataclasses.replace(
        TINY,
        classes=0,
        text_tokens=3,
        text_width=32,
        captions="features",
        lm=starflow.LanguageModel(32, 4, 4, 8, 48, qk_norm=False, post_norm=False),
    ),
    "unconditional": dataclasses.replace(TINY, classes=0, head_dim=16),
}


def condition_of(task, n, seed=7):
    return jax.random.normal(jax.random.key(seed), (n, task.prefix, task.condition_width)) if task.prefix else None


@pytest.mark.parametrize("name", VARIANTS)
def test_round_trip(name):
    task = VARIANTS[name]
    params, x, y = randomised(task), latents(task, 2), condition_of(task, 2)

    @jax.jit
    def there_and_back(params):
        z, *_ = forward(task, params, x, y)
        return inverse(task, params, untokens(task, z, task.rows), y)[-1], z

    back, z = there_and_back(params)
    np.testing.assert_allclose(back, x, atol=1e-4)
    assert np.abs(np.asarray(z) - np.asarray(tokens(task, x))).max() > 0.1


@pytest.mark.parametrize("name", ["start", "shifted"])
def test_logdet_is_the_jacobians(name):
    task = VARIANTS[name]
    params, x, y = randomised(task), latents(task, 1), condition_of(task, 1)
    jacobian = jax.jit(jax.jacfwd(lambda v: forward(task, params, v.reshape(x.shape), y)[0].ravel()))(x.ravel())
    _, logdet, _ = forward(task, params, x, y)
    np.testing.assert_allclose(np.linalg.slogdet(jacobian)[1] / x.size, logdet[0], atol=1e-5)
    assert abs(float(logdet[0])) > 1e-3


@pytest.mark.parametrize("name", ["start", "shifted", "lm"])
def test_a_block_is_causal_in_its_own_order(name):
    task = VARIANTS[name]
    deep = task.blocks - 1
    params, y = randomised(task), condition_of(task, 1)
    u = jax.random.normal(jax.random.key(3), (1, task.rows * task.columns, task.dims))

    @jax.jit
    def outputs(u, y):
        return jnp.concatenate(block(task.stack, params, deep, u, y), -1)

    base = outputs(u, y)
    for token in range(u.shape[1]):
        changed = outputs(u.at[:, token].add(1.0), y) - base
        np.testing.assert_array_equal(changed[:, : token + 1], 0)
        assert token == u.shape[1] - 1 or np.abs(changed[:, token + 1]).max() > 0
    seen = np.abs(outputs(u, y + 1.0) - base).max((0, 2))
    assert (seen[0 if task.start else 1 :] > 0).all()  # the condition reaches every token that is not copied


@pytest.mark.parametrize("name", ["start", "learned", "lm"])
def test_cached_equals_uncached(name):
    """Token by token and in chunks of five, against the whole sequence at once."""
    task = VARIANTS[name]
    deep, params, y = task.blocks - 1, randomised(task), condition_of(task, 2)
    u = jax.random.normal(jax.random.key(3), (2, 16, task.dims))
    a, b = jax.jit(lambda u: block(task.stack, params, deep, u, y))(u)
    for chunk in (1, 5):
        step, cache, start, *_ = task.stack.chain(params, 2, y).stepper(deep)
        fed = jnp.concatenate([jnp.broadcast_to(start, u[:, :1].shape), u[:, :-1]], 1)
        step = jax.jit(step)
        for first in range(0, 16, chunk):
            scale, shift, cache = step(fed[:, first : first + chunk], cache, first)
            np.testing.assert_allclose(jnp.log(scale), a[:, first : first + chunk], atol=1e-5)
            np.testing.assert_allclose(shift, b[:, first : first + chunk], atol=1e-5)


def test_guidance_laws():
    task, params = TINY, randomised(TINY)
    z, y, null = latents(task, 2), condition_of(task, 2), condition_of(task, 2, seed=8)
    run = jax.jit(lambda p, g, y, null: inverse(task, p, z, y, null, g)[-1], static_argnums=1)
    plain = run(params, Guidance(), y, null)
    np.testing.assert_allclose(run(params, Guidance(3.0), y, y), plain, atol=1e-5)  # nothing to be pushed away from
    assert np.abs(run(params, Guidance(3.0), y, null) - plain).max() > 1e-3
    # equal scales: the plain rule of classifier-free guidance
    a, b, weak = jnp.zeros(3), jnp.arange(3.0), jnp.ones(3)
    scale, shift = Guidance.of(2.0, "gaussian", annealed=False).apply((a, b), (a, weak), jnp.ones(1))
    np.testing.assert_allclose(scale, 1.0)
    np.testing.assert_allclose(shift, b + 2 * (b - weak), rtol=1e-6)
    # a narrower weak pass counts as one as wide: guidance never widens
    scale, _ = Guidance.of(2.0, "gaussian", annealed=False).apply((a, b), (a - 1, weak), jnp.ones(1))
    np.testing.assert_allclose(scale, 1.0)
    # the density that it promises: log p = (1 + w) log p_strong - w log p_weak + constant
    w, (s, m), (t, n) = 1.5, (0.7, 0.2), (1.3, -0.4)
    scale, shift = Guidance.of(w, "gaussian", annealed=False).apply(
        (jnp.log(s), jnp.asarray(m)), (jnp.log(t), jnp.asarray(n)), jnp.ones(())
    )
    score = lambda x, s, m: -(x - m) / s**2  # noqa: E731
    for x in (-1.0, 0.5):
        np.testing.assert_allclose(score(x, scale, shift), (1 + w) * score(x, s, m) - w * score(x, t, n), rtol=1e-5)


@pytest.mark.devices8
@pytest.mark.parametrize("mesh", [dist.Mesh(data=2, fsdp=2, tensor=2)], ids=["all"])
def test_loss_and_samples_are_those_of_one_device(mesh):
    """On a mesh that six samples do not fill: two more are drawn, and left out."""
    task = dataclasses.replace(TINY, width=64)
    params = randomised(task)
    batch = {"latent": latents(task, 8), "latent_std": 0.1 * jnp.ones((8, 4, 4, 2)), "label": jnp.arange(8) % 3}
    sample = make_sampler(task, 6, {"guidance": 1.0})
    program = jax.jit(lambda p: (task.loss(p, batch, jax.random.key(3))[0], sample(p, jax.random.key(4))["latent"]))
    alone = program(params)
    with dist.use(mesh.build()):
        boxed = jax.eval_shape(task.init, jax.random.key(0))
        placed = jax.device_put(params, dist.shardings(boxed, mesh.build()))
        loss, drawn = jax.jit(lambda p: program.__wrapped__(p))(placed)
    np.testing.assert_allclose(loss, alone[0], rtol=1e-5)
    assert drawn.shape == (6, 4, 4, 2)
    np.testing.assert_allclose(drawn, alone[1], atol=1e-4)


def test_half_precision_keeps_scales_and_losses_in_float32():
    """bfloat16 activations: the loss stays near float32's, and an inverse made of the same networks still inverts."""
    half = dataclasses.replace(TINY, dtype="bfloat16")
    params, x, y = randomised(TINY), latents(TINY, 2), condition_of(TINY, 2)

    def both(task):
        z, logdet, _ = forward(task, params, x, y)
        return 0.5 * jnp.square(z).mean() - logdet.mean(), z, logdet

    (want, _, _), (found, z, logdet) = jax.jit(both, static_argnums=0)(TINY), jax.jit(both, static_argnums=0)(half)
    assert z.dtype == logdet.dtype == jnp.float32
    assert abs(float(found - want)) < 0.02
    assert float(found) != float(want)
    back = jax.jit(lambda p: inverse(half, p, untokens(half, z, 4), y)[-1])(params)
    np.testing.assert_allclose(back, x, atol=0.15)


def test_sample_i_depends_on_its_key_alone():
    params, key = randomised(TINY), jax.random.key(9)
    few, many = (
        jax.jit(
            lambda p, n=n: TINY.sample(p, key, n, {"label": jnp.arange(n) % 3}, TINY.Sampling(guidance=1.0))["latent"]
        )(params)
        for n in (3, 5)
    )
    np.testing.assert_allclose(few, many[:3], atol=1e-5)
    assert np.abs(many[3] - many[4]).max() > 1e-3


def test_denoising_a_gaussian_is_exact():
    """Fresh parameters are one affine map per block: x is Gaussian, and Tweedie's formula its posterior mean."""
    task = dataclasses.replace(TINY, depths=(1,), classes=0, head_dim=16, noise=0.5)
    params = fresh(task)
    a, b = block(task.stack, params, 0, jnp.zeros((1, 16, 2)))
    var, mean = jnp.exp(2 * a[0, 0]), b[0, 0]
    x = latents(task, 1)
    clean = denoise(task, params, x)
    np.testing.assert_allclose(clean, x - 0.25 * (x - mean) / var, atol=1e-5)


def test_a_dropped_class_is_none_and_a_dropped_caption_the_null():
    params, label = randomised(TINY), jnp.array([0, 2])
    seen = TINY.conditions(params, {"label": label})
    np.testing.assert_array_equal(seen[:, 0], np.eye(4)[[0, 2]])
    for dropped in ({"label": jnp.array([-1, -1])}, {"latent": jnp.zeros((2, 1))}):
        np.testing.assert_array_equal(TINY.conditions(params, dropped)[:, 0], np.eye(4)[[3, 3]])
    task = VARIANTS["lm"]
    text, null = jnp.ones((2, 3, 32)), jnp.zeros((2, 3, 32))
    seen = task.conditions({}, {"text": text, "null_text": null}, jnp.array([True, False]))
    np.testing.assert_array_equal(seen, jnp.stack([null[0], text[0]]))
    with pytest.raises(UserError, match="null_text"):
        task.conditions({}, {"text": text})


def test_grids_that_patches_do_not_fill_are_refused():
    task = VARIANTS["patch"]
    with pytest.raises(UserError, match=r"task.patch=2 does not divide latents of 4 x 5"):
        jax.eval_shape(lambda x: tokens(task, x), jnp.zeros((1, 4, 5, 2)))
    with pytest.raises(UserError, match=r"grid=1,8"):
        jax.eval_shape(
            lambda p: task.sample(p, jax.random.key(0), 1, None, task.Sampling(grid=(1, 8))), randomised(task)
        )


def test_guidance_without_anything_asked_for_is_said():
    with pytest.warns(UserWarning, match="compares a pass with itself"):
        jax.eval_shape(
            lambda p: TINY.sample(p, jax.random.key(0), 2, None, TINY.Sampling(guidance=1.0)), randomised(TINY)
        )


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"width": 48}, "head_dim"),
        ({"latent": (4, 3), "patch": 2}, "task.latent"),
        ({"text_tokens": 3}, "one of them"),
        ({"head_dim": 16}, "head_dim=16 leaves no pairs"),
        ({"inputs": "images"}, "task.vae"),
        ({"classes": 0, "text_tokens": 3}, "text encoder"),
    ],
)
def test_bad_fields_are_named(fields, match):
    with pytest.raises(UserError, match=match):
        dataclasses.replace(TINY, **fields)


# --- decoder tuning ---------------------------------------------------------------------------------

SMALL = AutoEncoder(image=8, channels=1, latent=2, widths=(4, 4), layers=1, groups=2, scale=None)
TUNE = starflow.DecoderTune(vae=SMALL, width=4, stages=2, network=SMALL)


@pytest.fixture(scope="module")
def tuning():
    params = fresh(TUNE)
    batch = {"image": jax.random.uniform(jax.random.key(1), (4, 8, 8, 1), minval=-1.0)}

    def gradient(task):
        trained = {k: params[k] for k in ("decoder", "discriminator")}
        return jax.jit(jax.grad(lambda p: task.loss({**params, **p}, batch, jax.random.key(2))[0]))(trained)

    return params, batch, gradient


def test_decoder_and_discriminator_have_gradients_of_their_own(tuning):
    """The discriminator's part leaves the decoder alone, and the decoder's part the discriminator."""
    params, batch, gradient = tuning
    assert set(params) == {"encoder", "decoder", "latents", "discriminator", "lecam", "features"}
    assert set(TUNE.about.held) == {"encoder", "latents", "lecam", "features"}
    whole = gradient(TUNE)
    alone = dataclasses.replace(TUNE, gan=0.0, feature=0.0, lecam=0.0)

    def squared(decoder):
        mean, std = SMALL.encode(params, batch["image"])
        draw, noise = jax.random.split(jax.random.key(2))
        latent = mean + std * jax.random.normal(draw, mean.shape) + 0.3 * jax.random.normal(noise, mean.shape)
        return jnp.square(SMALL.decode({**params, "decoder": decoder}, latent) - batch["image"]).mean()

    want = jax.jit(jax.grad(squared))(params["decoder"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradient(alone)["decoder"], want)
    # what the decoder is paid for does not reach the discriminator, and what the discriminator is paid for reaches it
    other = gradient(dataclasses.replace(TUNE, gan=5.0, square=3.0, feature=0.0))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole["discriminator"], other["discriminator"]
    )
    assert max(np.abs(x).max() for x in jax.tree.leaves(whole["discriminator"])) > 1e-3
    apart = jax.tree.map(lambda a, b: np.abs(a - b).max(), whole["decoder"], other["decoder"])
    assert max(jax.tree.leaves(apart)) > 1e-4


def test_judgements_and_their_running_means(tuning):
    """Hinge and LeCam written out, with means that differ; afterwards the means have moved towards the batch."""
    params, batch, _ = tuning
    params = {**params, "lecam": {"real": jnp.float32(0.7), "decoded": jnp.float32(-0.4)}}
    task = dataclasses.replace(TUNE, square=0.0, feature=0.0, gan=0.0, lecam=2.0)

    @jax.jit
    def both(params):
        mean, std = SMALL.encode(params, batch["image"])
        draw, noise = jax.random.split(jax.random.key(2))
        latent = mean + std * jax.random.normal(draw, mean.shape) + 0.3 * jax.random.normal(noise, mean.shape)
        judge = lambda x: task._judge().apply({"params": params["discriminator"]}, x)  # noqa: E731
        return task.loss(params, batch, jax.random.key(2)), judge(batch["image"]), judge(SMALL.decode(params, latent))

    (loss, metrics), real, fake = both(params)
    hinge = np.maximum(1 - real, 0).mean() + np.maximum(1 + fake, 0).mean()
    near = np.square(real + 0.4).mean() + np.square(fake - 0.7).mean()
    np.testing.assert_allclose(loss, hinge + 2 * near, rtol=1e-5)
    moved = task.after_step(params, metrics)
    np.testing.assert_allclose(moved["lecam"]["real"], 0.999 * 0.7 + 0.001 * real.mean(), rtol=1e-6)
    np.testing.assert_allclose(moved["lecam"]["decoded"], 0.999 * -0.4 + 0.001 * fake.mean(), rtol=1e-6)
    assert {k for k in params if moved[k] is not params[k]} == {"lecam"}


def test_a_missing_feature_network_is_said(tuning):
    params, batch, _ = tuning
    with pytest.warns(UserWarning, match="feature loss is off.*task.network"):
        jax.eval_shape(dataclasses.replace(TUNE, network=None).loss, params, batch, jax.random.key(0))
    with pytest.raises(UserError, match=r"task.network: T5 has no features"):
        dataclasses.replace(TUNE, network=T5())
    with pytest.raises(UserError, match=r"task.network takes images of \[16, 16, 1\]"):
        dataclasses.replace(TUNE, network=dataclasses.replace(SMALL, image=16))
