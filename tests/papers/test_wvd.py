"""WVD's network and task: what is known stays as it is, and is all that the rest depends on."""

import dataclasses
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo import weights
from zoo.commands.flops import count
from zoo.data.scenes import Scenes
from zoo.diffusion.solvers import Euler, Heun, run
from zoo.dist import unbox
from zoo.encoders.vae import AutoEncoder, sd
from zoo.errors import UserError
from zoo.papers.wvd import Mixture, Wvd, WvdSampling
from zoo.papers.wvd.metrics import Geometry
from zoo.papers.wvd.projection import filled
from zoo.papers.wvd.task import NAMES, Known

TASK = Wvd(frames=3, image=8, patch=4, width=16, depth=2, head_dim=8)


@pytest.fixture(scope="module")
def clips():
    source = Scenes("open", 3, 8, train=4, test=4).source("train")
    rows = [source[i] for i in range(4)]
    clips = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    clips["seen"][:, :, 6:, 2] = False
    return clips


def random(task, seed=1):
    """Parameters of which none is zero."""
    leaves, tree = jax.tree.flatten(unbox(jax.eval_shape(task.init, jax.random.key(0))))
    rng = np.random.default_rng(seed)
    return tree.unflatten([jnp.asarray(0.3 * rng.standard_normal(x.shape), jnp.float32) for x in leaves])


@dataclass(frozen=True)
class Oracle(Wvd):
    """Knows the clip: params["truth"] [B, F, S, S, 6]."""

    def velocity(self, params, z, level, cell):
        t = level.max((1, 2))[:, None, None, None, None]
        truth = jnp.resize(params["truth"], z.shape)
        return (z - truth) / jnp.where(t > 0, t, 1.0)


@dataclass(frozen=True)
class Told(Wvd):
    """Its velocity is params["v"]."""

    def velocity(self, params, z, level, cell):
        return params["v"]


def _truth(clips):
    return np.concatenate([clips["frames"], clips["points"]], -1)


def test_whoever_knows_the_clip_draws_it(clips):
    """For every task, trained, guided or replaced, what is not known is the truth to 1e-3, what is known is itself to the bit."""
    kind = Oracle(**{f.name: getattr(TASK, f.name) for f in dataclasses.fields(TASK)})
    rare = replace(kind, tasks=Mixture(1, 0, 0, 0, 0))

    def draw(task, name, guidance):
        options = WvdSampling(task=name, nfe=3, guidance=guidance)
        return task.sample({"truth": _truth(clips)}, jax.random.key(0), 4, clips, options), task._given(name, clips, 4)

    cases = [(kind, name, 0.0) for name in ("joint", "depth", "camera", "render")]
    cases += [(kind, "stereo", 2.0), (kind, "image", 2.0), (rare, "stereo", 0.0)]
    found = jax.device_get(jax.jit(lambda: [draw(*case) for case in cases])())
    for (_, name, _), (drawn, (given, known)) in zip(cases, found):
        assert np.asarray(known).any() == (name != "joint")
        for i, key in enumerate(("frames", "points")):
            mask = np.asarray(known[..., i])
            np.testing.assert_array_equal(drawn[key][mask], given[i][mask])
            np.testing.assert_allclose(drawn[key][~mask], clips[key][~mask], atol=1e-3, err_msg=f"{name} {key}")
        strip = np.asarray(drawn["image"][0])
        np.testing.assert_array_equal(strip[8:, 8:16], drawn["points"][0, 1])


@dataclass(frozen=True)
class Plain(Wvd):
    """Knows that numbers of clips are standard normal, and no more."""

    def velocity(self, params, z, level, cell):
        t = level.max((1, 2))[:, None, None, None, None]
        return (2 * t - 1) * z / ((1 - t) ** 2 + t**2)


def test_langevin_steps_lead_to_the_law_of_the_model(clips):
    """From half of their standard deviation, numbers that are not known come to it; the known ones are noised."""
    task = Plain(frames=3, image=8, tasks=Mixture(1, 0, 0, 0, 0))
    keys, sigma = jax.random.split(jax.random.key(0), 4), jnp.asarray(1.5)
    known = Known(_truth(clips), jnp.zeros((4, 3, 8, 8, 2), bool).at[..., 0].set(True))
    _, project = task._completing({}, known, keys, WvdSampling(task="stereo", corrections=60))
    start = 0.5 * jnp.sqrt(1 + sigma**2) * jax.random.normal(jax.random.key(1), known.value.shape)
    x = np.asarray(jax.jit(project)(0, start, sigma))
    assert np.square(x[..., 3:]).mean() == pytest.approx(1 + 1.5**2, rel=0.08)
    assert np.std(x[..., :3] - clips["frames"]) == pytest.approx(1.5, rel=0.05)


def test_guidance_goes_away_from_what_is_said_with_nothing_known(clips):
    params, sigma, keys = random(TASK), jnp.asarray(0.7), jax.random.split(jax.random.key(0), 4)
    cell = jnp.zeros((4, 3, 8, 8, 2), bool).at[..., 0].set(True)
    x = _truth(clips) + 0.7 * jax.random.normal(jax.random.key(4), _truth(clips).shape)

    @jax.jit
    def x0(value):
        options = [WvdSampling(task="stereo", guidance=weight) for weight in (0.0, 2.0)]
        state = jnp.where(jnp.repeat(cell, 3, -1), value, x)  # in sampling it comes near what is known
        return [TASK._completing(params, Known(value, cell), keys, o)[0](state, sigma) for o in options]

    (one, guided), (other, others) = x0(_truth(clips)), x0(-_truth(clips))
    weak, same = ((3 * a - b)[..., 3:] / 2 for a, b in ((one, guided), (other, others)))
    np.testing.assert_allclose(weak, same, atol=1e-4)
    assert np.abs(one - other)[..., 3:].max() > 0.1 < np.abs(weak - one[..., 3:]).max()
    np.testing.assert_array_equal(guided[..., :3], clips["frames"])


def test_noise_of_known_cells_changes_nothing_and_their_values_do(clips):
    params, value = random(TASK), _truth(clips)
    cell = jax.random.bernoulli(jax.random.key(3), 0.5, (4, 3, 8, 8, 2)).at[:, 0, ..., 0].set(True)
    there = jnp.repeat(cell, 3, -1)
    x = value + 0.7 * jax.random.normal(jax.random.key(4), value.shape)
    x0 = jax.jit(lambda x, value: TASK.x0(params, x, jnp.asarray(0.7), Known(value, cell)))
    one, noisy, moved = x0(x, value), x0(x + 5 * there, value), x0(x, value + 0.1 * there)
    np.testing.assert_array_equal(one, noisy)
    assert np.abs(one - moved)[~np.asarray(there)].max() > 1e-3
    np.testing.assert_array_equal(one[there], value[there])


def test_forward_law_and_where_the_loss_looks(clips):
    """The loss is 0 for the true velocity; its gradient is 0 exactly where a pixel is known or not seen; x0 = z - t v."""
    fields = {f.name: getattr(TASK, f.name) for f in dataclasses.fields(TASK)}
    oracle, told, rng = Oracle(**fields), Told(**fields), jax.random.key(5)
    v, none = np.full((4, 3, 8, 8, 6), 7, np.float32), np.zeros((4, 3, 8, 8, 2), bool)
    x, sigma = _truth(clips), np.float32([0.5, 1, 2, 4])

    @jax.jit
    def run(v):
        exact = oracle.loss({"truth": x}, clips, rng)[0]
        grad = jax.grad(lambda v: told.loss({"v": v}, clips, rng)[0])(v)
        known = told.masks(clips, told._drawn(jax.random.split(rng, 3)[2], 4))
        return exact, grad, known, told.x0({"v": v}, x, sigma, Known(x, none))

    exact, grad, known, x0 = map(np.asarray, run(v))
    assert exact < 1e-7
    counts = ~known & np.stack([np.ones_like(clips["seen"]), clips["seen"]], -1)
    assert 0.1 < counts.mean() < 0.9
    np.testing.assert_array_equal(grad != 0, np.repeat(counts, 3, -1))
    t = (sigma / (1 + sigma))[:, None, None, None, None]
    np.testing.assert_allclose(x0, (1 - t) * x - t * 7.0, atol=1e-5)


def test_masks_are_what_the_mixture_says(clips):
    known = np.asarray(jax.jit(TASK.masks)({key: x[np.zeros(5, int)] for key, x in clips.items()}, np.arange(5)))
    seen = clips["seen"][0]
    want = {"joint": [0, 0, 0], "image": [1, 0, 0], "stereo": [1, 1, 1], "camera": [1, 0, 0], "render": [1, 0, 0]}
    for name, mask in zip(NAMES, known):
        np.testing.assert_array_equal(mask[..., 0].all((1, 2)), want[name])
        np.testing.assert_array_equal(mask[..., 0].any((1, 2)), want[name])
    first = np.arange(3)[:, None, None] == 0
    np.testing.assert_array_equal(known[4, ..., 1], seen)
    np.testing.assert_array_equal(known[3, 0, ..., 1], seen[0])
    assert 0.2 < known[3, 1:, ..., 1].mean() < 1
    assert not known[:3, ..., 1].any()
    assert not (known[..., 1] & ~seen & ~first).any()


def test_a_factorised_network_is_a_joint_one_where_blocks_see_the_same():
    """With one frame the blocks within frames see all; those across see a token alone, so they are without attention here."""
    joint = replace(TASK, frames=1)
    crossed = replace(joint, pattern="factorised")
    params = random(joint)
    block = params["trunk"]["trunk"]["block"]
    block["attention"]["out"] = jax.tree.map(lambda x: x.at[1].set(0), block["attention"]["out"])
    halves = {name: jax.tree.map(lambda x, i=i: x[i::2], block) for i, name in enumerate(("space", "time"))}
    other = {**params, "trunk": {**params["trunk"], "trunk": {"block": halves}}}
    z, level = jax.random.normal(jax.random.key(1), (3, 3, 8, 8, 6)), jnp.full((3, 3, 2), 0.3)
    cell, three = jnp.zeros((3, 3, 8, 8, 2), bool), replace(TASK, pattern="factorised")
    a, b, c = jax.jit(
        lambda: (
            joint.velocity(params, z[:, :1], level[:, :1], cell[:, :1]),
            crossed.velocity(other, z[:, :1], level[:, :1], cell[:, :1]),
            three.velocity(random(three), z.at[1:].set(z[0]).at[1, 0].add(1), level, cell),
        )
    )()
    np.testing.assert_allclose(a, b, atol=1e-4)
    assert np.abs(a).max() > 0.1
    assert (np.abs(c[1] - c[0]).max((1, 2, 3)) > 1e-3).all()  # every frame hears of the first


def test_points_are_added_to_a_network_of_images_without_a_change():
    twin = replace(TASK, modalities="rgb", tasks=Mixture(0.5, 0.5, 0, 0, 0))
    images = random(twin)
    fresh = jax.jit(lambda: unbox(TASK.init(jax.random.key(0)))["points"])
    z, level = jax.random.normal(jax.random.key(1), (2, 3, 8, 8, 6)), jnp.full((2, 3, 2), 0.3)
    cell = jax.random.bernoulli(jax.random.key(2), 0.5, (2, 3, 8, 8, 2))
    a, b = jax.jit(
        lambda points: (
            twin.velocity(images, z[..., :3], level[..., :1], cell[..., :1]),
            TASK.velocity({**images, "points": points}, z, level, cell),
        )
    )(fresh())
    np.testing.assert_allclose(a, b[..., :3], atol=1e-5)
    assert np.abs(a).max() > 0.1
    assert not np.asarray(b[..., 3:]).any()


def test_figures_of_geometry_stand_beside_their_controls():
    data = Scenes("open", 3, 16, train=4, test=3)
    true = jnp.stack([jnp.asarray(x["points"]) for x in map(data.source("test").__getitem__, range(3))])
    first = jnp.asarray([x["frames"] for x in map(data.source("test").__getitem__, range(3))])

    def sample(self, params, rng, n, conditions=None, options=None):
        frames, points = conditions["frames"], conditions["points"]
        if options.task == "image":
            frames = jnp.broadcast_to(frames[:, :1], frames.shape)
        if options.task == "render":  # of the points of whose clip these are the images?
            own = true[jnp.square(frames[:, None] - first).sum((2, 3, 4, 5)).argmin(1)]
            frames = jnp.where(jnp.abs(own - points).max((1, 2, 3, 4), keepdims=True) > 0, -frames, frames)
        return {"frames": frames, "points": points}

    kind = dataclass(frozen=True)(type("Painter", (Wvd,), {"sample": sample}))
    found = Geometry(limit=3, batch=2)(kind(frames=3, image=16), {}, data, jax.random.key(0))
    assert found["points"] == found["points_median"] == 0
    assert found["points_shuffled"] > found["points_shuffled_aligned"] > 0.1
    mean = np.mean([data.source("train")[i]["points"] for i in range(4)], 0)
    assert found["points_mean"] == pytest.approx(np.linalg.norm(true - mean, axis=-1).mean(), rel=1e-5)
    assert found["pose_turn"] < 0.1
    assert min(found["pose_identity"], found["pose_turn_shuffled"], found["pose_absolute_shuffled"]) > 1
    assert found["depth_rel"] < 1e-3
    assert found["reprojection"] < 1e-2
    assert found["psnr"] > 100 > 30 > found["psnr_none"] == pytest.approx(found["psnr_copy"])
    assert found["psnr_wrong"] < 20
    assert (found["clips"], found["split"]) == (3, "test")
    with pytest.raises(UserError, match="tells a clip from another one, and the test split has one"):
        Geometry().check_data(TASK, Scenes("open", 3, 8, train=1, test=1))
    with pytest.raises(UserError, match="asks for several tasks"):
        Geometry(options={"task": "stereo"}).check(TASK)


def test_latents_that_are_known_stay_and_pixels_with_them(clips):
    """With an autoencoder a cell is known where nine in ten of its pixels are; given pixels come back as they were given."""
    vae = AutoEncoder(image=8, channels=3, latent=2, widths=(4, 4), layers=1, groups=4, scale=1.0)
    task = Plain(frames=3, image=8, patch=1, vae=vae)
    options = WvdSampling(task="camera", solver=Heun(), nfe=3)
    params = {"vae": random(vae)}

    @jax.jit
    def run(params):
        given, known = task._given("camera", clips, 4)
        return task.sample(params, jax.random.key(0), 4, clips, options), given, known, task._cells(known, 0.9)

    drawn, given, known, cell = jax.device_get(run(params))
    x = jax.eval_shape(task.encoded, params, clips["frames"], clips["points"])
    assert x.shape == (4, *task.shape) == (4, 3, 4, 4, 4)
    np.testing.assert_array_equal(cell, known.reshape(4, 3, 4, 2, 4, 2, 2).all((3, 5)))
    for i, key in enumerate(("frames", "points")):
        mask = np.asarray(known[..., i])
        np.testing.assert_array_equal(drawn[key][mask], given[i][mask])
        assert np.isfinite(drawn[key]).all()
    assert not np.asarray(given[1][:, 1:] == 0).all(-1).any()  # holes are filled before they are encoded


@pytest.mark.parametrize("pattern", ["joint", "factorised"])
def test_model_flops_are_three_times_those_of_the_loss(pattern):
    task = Wvd(frames=4, image=32, width=192, pattern=pattern)
    loss = jax.make_jaxpr(task.loss)(weights.abstract(task), task.spec(1), jax.eval_shape(lambda: jax.random.key(0)))
    assert task.flops() == pytest.approx(3 * count(loss), rel=0.01)


def test_holes_take_the_nearest_known_value():
    rng = np.random.default_rng(0)
    known = rng.random((2, 8, 8)) < 0.3
    image = rng.random((2, 8, 8, 3)).astype(np.float32)
    got = np.asarray(jax.jit(filled)(image, known))
    where = np.stack(np.meshgrid(np.arange(8), np.arange(8), indexing="ij"), -1)
    for x, y, mask in zip(image, got, known):
        far = np.linalg.norm(where[:, :, None] - where[mask], axis=-1)
        at = np.linalg.norm(y[:, :, None] - x[mask], axis=-1).argmin(-1)
        # jump flooding misses the nearest one now and then, by little
        assert (np.take_along_axis(far, at[..., None], -1)[..., 0] <= far.min(-1) + 1).all()
        np.testing.assert_array_equal(y[mask], x[mask])


def test_solvers_hand_their_state_to_a_projection():
    """Before calls that read it as it is: all of Euler's, of Heun's those that begin a step."""
    levels = np.asarray([4.0, 2.0, 1.0])
    for solver, calls in ((Euler(), [1, 1, 1]), (Heun(), [1, 0, 1, 0, 1])):
        last = run(
            solver.plan(levels),
            lambda x, sigma: x,
            jnp.ones((1, 2)),
            project=lambda i, x, sigma: jnp.full_like(x, 100.0) + i,
        )
        np.testing.assert_array_equal(last, 100.0 + len(calls) - 1)
    seen = run(
        Heun().plan(levels), lambda x, sigma: x, jnp.ones((1, 2)), project=lambda i, x, s: x + (i == 1) + (i == 3)
    )
    np.testing.assert_allclose(seen, run(Heun().plan(levels), lambda x, sigma: x, jnp.ones((1, 2))))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Wvd(modalities="rgb"), "task.tasks.stereo is about points"),
        (lambda: Mixture(0, 0, 0, 0, 0), "has no task"),
        (lambda: Wvd(pattern="factorised", depth=3), "even task.depth"),
        (lambda: Wvd(image=248, vae=sd(), patch=2), "no multiple of 16 pixels, a token's side .task.patch=2 cells of 8"),
        (lambda: asked(TASK, task="stereo"), "there are no frames here"),
        (lambda: asked(replace(TASK, modalities="rgb", tasks=Mixture(1, 1, 0, 0, 0)), task="stereo"), "draws images alone"),
        (lambda: asked(TASK, guidance=1.0), "guidance=1.0 compares what is known with nothing known"),
    ],
)  # fmt: skip
def test_mistakes(make, words):
    with pytest.raises(UserError, match=words):
        make()


def asked(model, **options):
    return model.sample({}, jax.random.key(0), 1, None, WvdSampling(**options))
