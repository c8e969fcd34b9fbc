"""Attention: the TPU kernel against the plain products, which backend serves which device, and that meshes change nothing.

And caches: that looking at a part of them changes nothing either.
"""

import contextlib
import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fresh import noise
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from zoo import dist, weights
from zoo.errors import UserError
from zoo.flows import inverse
from zoo.nn import attention
from zoo.nn.attention import (
    Stages,
    attend,
    attend_cached,
    init_cache,
    reaches,
    reaching,
    splash,
    write_cache,
)
from zoo.papers.starflow import StarFlow
from zoo.papers.tarflow import TarFlow

pytestmark = pytest.mark.devices8

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def inputs(tokens: int, batch: int = 4, heads: int = 2, head_dim: int = 8) -> list[jax.Array]:
    """q, k, v and what the output is multiplied with."""
    rng = np.random.default_rng(tokens)
    return [jnp.asarray(rng.normal(size=(batch, tokens, heads, head_dim)), jnp.float32) for _ in range(4)]


def values_and_gradients(how: Attend, q: jax.Array, k: jax.Array, v: jax.Array, by: jax.Array) -> list[np.ndarray]:
    """The output, and the gradients of its product with `by` with respect to q, k and v."""

    def scalar(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = how(q, k, v)
        return jnp.vdot(y, by), y

    (_, y), gradients = jax.jit(jax.value_and_grad(scalar, (0, 1, 2), has_aux=True))(q, k, v)
    return [np.asarray(x) for x in (y, *gradients)]


def on(mesh: dist.Mesh | None, devices: int = 8) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if mesh is None else dist.use(mesh.build(jax.devices()[:devices]))


# by hand

SEEN = np.array([[1, 0, 1, 1, 0], [0, 0, 0, 1, 0], [1, 1, 1, 1, 1], [0, 1, 1, 0, 1]], bool)


@pytest.mark.parametrize(("causal", "shared"), [(True, False), (False, False), (False, True)])
def test_attention_is_softmax_of_products_with_the_keys_that_are_seen(causal: bool, shared: bool) -> None:
    q, k, v, _ = inputs(5)
    k, v = (x[:, :, :1] if shared else x for x in (k, v))
    some = SEEN | (np.arange(5) == 0) if causal else SEEN  # each query has one at least
    both = jax.jit(lambda q, k, v: [attend(q, k, v, causal=causal, seen=given) for given in (jnp.asarray(some), None)])
    for seen, found in zip((some, np.ones_like(some)), both(q, k, v), strict=True):
        for b, t, h in np.ndindex(4, 5, 2):
            keys = np.flatnonzero(seen[b] & ((np.arange(5) <= t) | (not causal)))
            ours, theirs = (np.asarray(x, np.float64)[b, keys, 0 if shared else h] for x in (k, v))
            weight = np.exp(ours @ np.asarray(q, np.float64)[b, t, h] / np.sqrt(8))
            np.testing.assert_allclose(found[b, t, h], weight @ theirs / weight.sum(), atol=1e-5)


def test_keys_that_are_not_seen_get_no_gradient_and_no_nan() -> None:
    q, k, v, by = inputs(5)
    y, dq, dk, dv = values_and_gradients(
        lambda *x: attend(*x, causal=False, backend="auto", seen=jnp.asarray(SEEN)), q, k, v, by
    )
    assert all(np.isfinite(x).all() for x in (y, dq, dk, dv))
    for gradient in (dk, dv):
        assert not gradient[~SEEN].any()
    assert np.abs(dv[SEEN]).max(-1).min() > 0


# stages

MIXED = dist.Mesh(data=1, fsdp=2, sequence=2, tensor=2)
BLOCKS = (0,) * 3 + (1,) * 3 + (2,) * 3  # equal ones
MIXED_STAGES = (0, 1, 2, 4, 4, 4, 7, 7, 8, 9)  # words, blocks of two sizes, words again


def dense(q: jax.Array, k: jax.Array, v: jax.Array, mask: np.ndarray) -> jax.Array:
    logits = jnp.where(mask, jnp.einsum("bthk,bshk->bhts", q, k) / q.shape[-1] ** 0.5, -jnp.inf)
    return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(logits), v)


def seen_by(of: tuple[int, ...], same: bool) -> np.ndarray:
    """By hand."""
    mask = np.zeros((len(of), len(of)), bool)
    for t, s in np.ndindex(mask.shape):
        mask[t, s] = of[s] == of[t] or (of[s] < of[t] and not same)
    return mask


@pytest.mark.parametrize(("of", "same"), [(BLOCKS, True), (MIXED_STAGES, False), (MIXED_STAGES, True)])
def test_stages_have_the_values_and_gradients_of_a_dense_mask(
    of: tuple[int, ...], same: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_PART", 3)
    stages, (q, k, v, by) = Stages(of, same), inputs(len(of))
    np.testing.assert_array_equal(stages.mask, seen_by(of, same))
    expected = values_and_gradients(lambda *x: dense(*x, stages.mask), q, k, v, by)
    found = values_and_gradients(lambda *x: attend(*x, causal=False, stages=stages), q, k, v, by)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6, rtol=1e-6)


def test_what_no_stage_sees_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def logits(of: tuple[int, ...], same: bool) -> int:
        q, k, v, _ = inputs(len(of), batch=1, heads=1)
        traced = jax.make_jaxpr(lambda *x: attend(*x, causal=False, stages=Stages(of, same)))(q, k, v)
        return sum(e.outvars[0].aval.size for e in traced.jaxpr.eqns if e.primitive.name == "exp")

    assert logits(BLOCKS, False) == 81  # of so few tokens all
    monkeypatch.setattr(attention, "_PART", 3)
    assert logits(BLOCKS, False) == seen_by(BLOCKS, False).sum() == 54
    assert logits(BLOCKS, True) == 27
    assert logits(MIXED_STAGES, False) == 3 * 3 + 3 * 6 + 3 * 9 + 1 * 10  # words come together


def test_the_tpu_kernel_takes_stages() -> None:
    stages = Stages(tuple(np.repeat(np.arange(5), (50, 1, 1, 70, 80)).tolist()))
    q, k, v, by = inputs(len(stages.of))
    expected = values_and_gradients(lambda *x: dense(*x, stages.mask), q, k, v, by)
    with on(dist.Mesh(data=1, sequence=2, tensor=2), 4):
        found = values_and_gradients(lambda *x: splash(*x, causal=False, stages=stages, interpret=True), q, k, v, by)
    np.testing.assert_allclose(found[0], expected[0], atol=1e-5)
    for one, other in zip(found[1:], expected[1:], strict=True):
        assert np.abs(one - other).max() <= 1e-5 * np.abs(other).max()


def test_tokens_of_one_step_see_each_other_where_they_are_whole() -> None:
    q, k, v, _ = inputs(9)

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array, places: jax.Array) -> Any:
        cache, found = init_cache(None, 4, 9, 2, 8, jnp.float32), []
        for i, index in enumerate((0, 3, 6)):
            step = slice(index, index + 3)
            cache = write_cache(cache, k[:, step], v[:, step], index, None)
            found.append([attend_cached(q[:, step], cache, at, None, whole=True) for at in (index, places[i])])
        return found, attend_cached(q[:, 6:], cache, 6, None), dense(q, k, v, seen_by(BLOCKS, False))

    found, causal, wanted = jax.device_get(run(q, k, v, np.array([0, 3, 6])))
    for i, both in enumerate(found):
        for one in both:
            np.testing.assert_allclose(one, wanted[:, 3 * i : 3 * i + 3], atol=1e-6)
    assert np.abs(causal - wanted[:, 6:]).max() > 1e-2


# the TPU kernel, step by step on a CPU


@pytest.mark.parametrize(
    ("tokens", "causal", "mesh", "devices"),
    [
        (640, True, None, 1),  # five small blocks: 512 does not divide
        (200, True, MIXED, 8),  # filled up to blocks
        (132, False, dist.Mesh(data=1, sequence=4), 4),  # the last devices have no queries but filled-up ones
        (130, True, dist.Mesh(data=1, sequence=4), 4),  # four do not divide the tokens: left whole
    ],
    ids=lambda x: "".join(f"{k}{v}" for k, v in dataclasses.asdict(x).items()) if dataclasses.is_dataclass(x) else None,
)
def test_the_tpu_kernel_has_the_values_and_gradients_of_the_plain_products(
    tokens: int, causal: bool, mesh: dist.Mesh | None, devices: int
) -> None:
    q, k, v, by = inputs(tokens)
    expected = values_and_gradients(lambda *x: attend(*x, causal=causal, backend="xla"), q, k, v, by)
    with on(mesh, devices):
        found = values_and_gradients(lambda *x: splash(*x, causal=causal, interpret=True), q, k, v, by)
    np.testing.assert_allclose(found[0], expected[0], atol=1e-5)
    for name, one, other in zip("qkv", found[1:], expected[1:], strict=True):
        assert np.abs(one - other).max() <= 1e-4 * np.abs(other).max(), name


def test_the_tpu_kernel_shares_out_examples_heads_and_queries() -> None:
    """Each device runs it for its own: of no whole array is the kernel's output."""
    q, k, v, _ = inputs(256)
    with on(MIXED):
        traced = jax.make_jaxpr(lambda *x: splash(*x, causal=True, interpret=True))(q, k, v)
    (shared,) = [e for e in traced.jaxpr.eqns if e.primitive.name == "shard_map"]
    local = [v.aval.shape for v in shared.params["jaxpr"].outvars]
    assert local == [(2, 128, 1, 8)]


# which backend


def test_a_kernel_that_cannot_serve_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """And where it is the device's own, "auto" does without it."""
    q, k, v, _ = (x.astype(jnp.bfloat16) for x in inputs(9))
    seen, stages = jnp.ones((4, 9), bool), Stages(BLOCKS)

    def told(backend: str, message: str, **how: Any) -> None:
        with pytest.raises(UserError, match=rf"task\.attention='{backend}' {message}; set task\.attention="):
            attend(q, k, v, causal=True, backend=backend, **how)

    told("splash", "is a TPU kernel and this is a cpu")
    told("cudnn", "needs an NVIDIA GPU and there is none here")
    monkeypatch.setattr(attention, "_has_cudnn", lambda device: True)
    told("cudnn", "knows no stages of tokens", stages=stages)
    served = lambda **how: jax.eval_shape(lambda: attend(q, k, v, causal=False, backend="auto", **how))  # noqa: E731
    served(stages=stages)
    for device in ("cpu", "tpu", "gpu"):
        monkeypatch.setattr(dist, "platform", lambda device=device: device)
        for backend in ("cudnn", "splash"):
            told(backend, "cannot leave out keys .*", seen=seen)
        served(seen=seen)  # the plain products everywhere
    with pytest.raises(UserError, match=r"'cudnn' computes in bfloat16, but task\.dtype='float32'"):
        TarFlow(attention="cudnn")


def test_heads_that_the_mesh_does_not_divide_are_a_sentence() -> None:
    task = TarFlow(image=4, channels=1, patch=2, width=8, depth=1, blocks=1, head_dim=4)
    with (
        on(dist.Mesh(data=2, tensor=4)),
        pytest.raises(UserError, match=r"the number of heads, task.width / task.head_dim, has size 2.*mesh.tensor=2"),
    ):
        jax.eval_shape(task.init, jax.random.key(0))


# caches of which attention looks at a part


def filled(layers: int | None, tokens: int = 300, heads: int = 2) -> attention.Cache:
    """A cache that is full of numbers, also behind the tokens that are asked for."""
    rng = np.random.default_rng(3)
    empty = init_cache(layers, 2, tokens, heads, 8, jnp.float32)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), empty)


@pytest.mark.parametrize(("layer", "heads"), [(None, 2), (1, 1)])
def test_a_reach_over_the_queries_changes_nothing(layer: int | None, heads: int) -> None:
    q, cache = inputs(3, batch=2)[0], filled(None if layer is None else 3, heads=heads)

    @jax.jit
    def run(cache: attention.Cache, index: jax.Array) -> list[jax.Array]:
        return [attend_cached(q, reaching(cache, slots), index, layer) for slots in (None, 100, 9999)]

    for index in (0, 60, 125):
        whole, *others = run(cache, index)
        for found in others:  # one block, 128 slots; all there are
            np.testing.assert_allclose(found, whole, atol=1e-6)
    whole, short, _ = run(cache, 126)  # the last query sees 129
    assert np.abs(short - whole)[:, :2].max() < 1e-6
    assert np.abs(short - whole)[:, 2].max() > 1e-3


def test_a_reach_is_whole_blocks_of_every_layer_and_stays_when_tokens_are_written() -> None:
    caches = {"a": filled(None), "b": [filled(2)]}
    for slots, reach in ((1, 128), (128, 128), (129, 256), (None, None)):
        found = jax.tree.leaves(reaching(caches, slots), is_leaf=lambda x: isinstance(x, attention.Cache))
        assert [cache.reach for cache in found] == [reach, reach]
    _, k, v, _ = inputs(3, batch=2)
    assert write_cache(reaching(filled(None), 5), k, v, 7, None).reach == 128
    traced = jax.make_jaxpr(lambda cache: attend_cached(k, cache, jnp.int32(0), None))(reaching(filled(None), 5))
    assert "2,2,8,300" in str(traced.jaxpr.invars)
    assert "f32[2,2,1,3,128]" in str(traced)  # logits of no more
    assert "f32[2,2,1,3,300]" not in str(traced)


def test_loops_are_cut_on_a_tpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reaches(4096) == [4096]
    monkeypatch.setattr(dist, "platform", lambda: "tpu")
    found = [reaches(n) for n in (1, 511, 512, 1023, 4096)]
    assert found == [[1], [511], [256, 512], [341, 682, 1023], [1024, 2048, 3072, 4096]]


TAR = TarFlow(image=6, channels=1, patch=2, width=8, depth=1, blocks=2, head_dim=8, classes=2)
STAR = StarFlow(
    latent=(3, 3),
    channels=2,
    width=20,
    depths=(1, 1),
    head_dim=20,
    text_tokens=4,
    text_width=8,
    captions="features",
    reach=3.0,
    scan=False,
)


def blocks_of(task: Any) -> Callable[[Any], inverse.Chain]:
    rng = np.random.default_rng(1)
    condition, null = (jnp.asarray(rng.normal(size=(2, 4, 8)), jnp.float32) for _ in range(2))
    if task is TAR:
        condition, null = jnp.array([0, 1]), jnp.full(2, -1)
    return lambda params: task.stack.chain(params, 2, condition, null, 1.5)


@pytest.mark.parametrize("task", [TAR, STAR], ids=["start", "prefix"])
def test_a_loop_cut_in_parts_is_the_whole_one(monkeypatch: pytest.MonkeyPatch, task: Any) -> None:
    """The block with most in front of its tokens; each part looks at no slot that it does not fill."""
    chain, reach = blocks_of(task), []
    v = np.random.default_rng(1).normal(size=(2, task.tokens, task.dims)).astype(np.float32)
    monkeypatch.setattr(attention, "_LANES", 1)

    @jax.jit
    def run(params: Any) -> list[jax.Array]:
        stepper = chain(params).stepper(1)

        def step(u: jax.Array, cache: Any, index: jax.Array) -> Any:
            leaves = jax.tree.leaves(cache, is_leaf=lambda x: isinstance(x, attention.Cache))
            reach.extend(leaf.reach for leaf in leaves)
            return stepper.step(u, cache, index)

        whole, _ = inverse.sequential(stepper, v)
        monkeypatch.setattr(inverse, "reaches", lambda tokens: [1, 4, tokens])
        parts, _ = inverse.sequential(stepper._replace(step=step), v)
        return [whole, parts, inverse.jacobi(stepper, v, inverse.Jacobi(sweeps=1))[0]]  # which does not suffice

    whole, *found = run(noise(task, 0.2, 2))
    prefix, last = (0, 8) if task is TAR else (4, 9)
    assert set(reach) == {prefix + end for end in (1, 4, last)}
    assert np.abs(whole - v).max() > 0.1
    for parts in found:
        np.testing.assert_allclose(parts, whole, atol=1e-5)


def test_the_layout_of_a_tpu_is_pinned_there_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    x = jnp.zeros((2, 2, 64, 1024))
    assert attention._tokens_last(x) is x
    pinned = []
    monkeypatch.setattr(attention, "with_layout_constraint", lambda x, layout: pinned.append(layout) or x)
    monkeypatch.setattr(dist, "platform", lambda: "tpu")
    for shape, count in (((2, 2, 64, 1024), 1), ((3, 2, 2, 64, 512), 2), ((2, 2, 128, 1024), 2), ((2, 2, 64, 300), 2)):
        attention._tokens_last(jnp.zeros(shape))
        assert len(pinned) == count, shape  # whole rows, and few tokens, need none
    assert [layout.major_to_minor for layout in pinned] == [(0, 1, 2, 3), (0, 1, 2, 3, 4)]


# a whole network


def test_a_flow_has_one_loss_and_gradient_however_its_tokens_are_shared_out() -> None:
    task = TarFlow(image=8, channels=1, patch=2, width=16, depth=1, blocks=2, head_dim=8, attention="auto")
    rng = np.random.default_rng(0)
    params = noise(task, 0.2)
    batch = {"image": jnp.asarray(rng.uniform(-1, 1, (8, 8, 8, 1)), jnp.float32)}

    def loss(params: Any) -> jax.Array:
        return task.loss(params, batch, jax.random.key(1))[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    with on(MIXED):
        shared, shared_gradient = jax.jit(jax.value_and_grad(lambda p: loss(p)))(params)
    assert float(shared) == pytest.approx(float(value), rel=1e-6)
    for name, one in weights.flatten(gradient).items():
        other = weights.flatten(shared_gradient)[name]
        assert one.max() > 0 or name.startswith("prior"), name
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-6, err_msg=name)


# compiled for a TPU that is not here


@pytest.fixture(scope="module")
def tpu() -> Iterator[Any]:
    """The devices of a small topology. Its programs are kept out of the cache, which cannot be read without a TPU."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs the aot extra")
    from zoo.commands.aot import target

    with pytest.MonkeyPatch.context() as env:
        for name in ("ALLOW_MULTIPLE_LIBTPU_LOAD", "TPU_SKIP_MDS_QUERY"):
            env.setenv(name, "1")
        before = jax.config.values["jax_persistent_cache_min_compile_time_secs"]
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)
        yield target("v5e:2x2").devices
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before)


def test_forward_and_backward_compile_for_a_tpu_as_kernels(tpu: Any) -> None:
    here = inputs(4)[:3]
    mesh = dist.Mesh(data=1, fsdp=2, sequence=2).build(tpu)
    where = NamedSharding(mesh, P("fsdp", "sequence"))
    x = jax.ShapeDtypeStruct((2, 1024, 2, 64), jnp.bfloat16, sharding=where)

    def scalar(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attend(q, k, v, causal=True, backend="auto").astype(jnp.float32).sum()

    with dist.use(mesh):
        assert dist.platform() == "tpu"
        text = jax.jit(jax.value_and_grad(scalar, (0, 1, 2))).lower(x, x, x).compile().as_text()
        with pytest.raises(UserError, match="needs an NVIDIA GPU"):
            attend(*here, causal=True, backend="cudnn")
    assert dist.platform() == "cpu"
    # one kernel forwards, one for the gradient of queries, one for that of keys and values
    assert text.count('custom_call_target="tpu_custom_call"') == 3
    assert "1024,1024]" not in text  # the logits are nowhere whole
