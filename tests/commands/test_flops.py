"""Floating-point operations counted from traced programs: what was written, however often it runs and wherever."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P

from zoo import dist
from zoo.commands.flops import count, training_example
from zoo.nn.attention import splash
from zoo.papers.tarflow import TarFlow
from zoo.task import About, Network

pytestmark = pytest.mark.devices8

A = jnp.ones((3, 4))
B = jnp.ones((4, 5))
PRODUCT = 2 * 3 * 4 * 5


def counted(f: Callable[..., Any], *arguments: Any) -> float:
    return count(jax.make_jaxpr(f)(*arguments))


def test_a_matrix_product_is_a_multiply_and_an_add_per_number() -> None:
    assert counted(lambda a, b: a @ b, A, B) == PRODUCT
    assert counted(lambda a: a @ jnp.ones(4), A) == 2 * 3 * 4
    assert counted(lambda a: jnp.exp(a) + a.sum(), A) == 0  # elementwise work and sums are left out
    assert counted(lambda a, b: (a @ b) @ (a @ b).T, A, B) == 2 * PRODUCT + 2 * 3 * 5 * 3


def test_batched_and_several_contracted_axes() -> None:
    q, k = jnp.ones((2, 7, 3, 4)), jnp.ones((2, 9, 3, 4))
    assert counted(lambda q, k: jnp.einsum("bthk,bshk->bhts", q, k), q, k) == 2 * (2 * 3 * 7 * 9) * 4
    assert counted(lambda q, k: jnp.einsum("bthk,bshk->bts", q, k), q, k) == 2 * (2 * 7 * 9) * (3 * 4)


@pytest.mark.parametrize(
    ("layout", "image", "kernel", "groups"),
    [
        (("NCHW", "OIHW", "NCHW"), (2, 6, 8, 8), (10, 6, 3, 3), 1),
        (("NHWC", "HWIO", "NHWC"), (2, 8, 8, 6), (3, 3, 6, 10), 1),
        (("NHWC", "HWIO", "NHWC"), (2, 8, 8, 6), (3, 3, 1, 6), 6),
    ],
)
def test_a_convolution_is_a_product_at_each_place(layout: Any, image: Any, kernel: Any, groups: int) -> None:
    def convolved(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(x, w, (2, 2), "SAME", dimension_numbers=layout, feature_group_count=groups)

    outputs, inputs = (10, 6) if groups == 1 else (6, 1)
    assert counted(convolved, jnp.ones(image), jnp.ones(kernel)) == 2 * (2 * 4 * 4 * outputs) * (3 * 3 * inputs)


def test_a_scan_counts_as_often_as_it_runs() -> None:
    w = jnp.ones((4, 4))

    def layer(h: jax.Array, _: Any) -> tuple[jax.Array, None]:
        return h @ w, None

    def block(h: jax.Array, _: Any) -> tuple[jax.Array, None]:
        return jax.lax.scan(layer, h @ w, None, length=5)[0], None

    once = 2 * 3 * 4 * 4
    assert counted(lambda h: jax.lax.scan(layer, h, None, length=7)[0], A) == 7 * once
    assert counted(lambda h: jax.lax.scan(block, h, None, length=7)[0], A) == 7 * 6 * once
    assert counted(lambda h: jax.lax.fori_loop(0, 7, lambda i, h: h @ w, h), A) == 7 * once  # a scan to jax
    # a loop of unknown length counts once
    assert counted(lambda h: jax.lax.while_loop(lambda h: h.sum() < 9, lambda h: h @ w, h), A) == once


def test_of_branches_the_dearest_counts() -> None:
    branches = [lambda a: a.sum(), lambda a: (a @ B @ B.T).sum(), lambda a: (a @ B).sum()]
    assert counted(lambda i, a: jax.lax.switch(i, branches, a), 0, A) == 2 * PRODUCT


def test_calls_inside_calls_count() -> None:
    inner = jax.jit(lambda a, b: a @ b)
    assert counted(jax.jit(lambda a, b: jax.vmap(inner)(a, b)), jnp.ones((6, 3, 4)), jnp.ones((6, 4, 5))) == 6 * PRODUCT

    @jax.custom_vjp
    def own(a: jax.Array) -> jax.Array:
        return a @ B

    own.defvjp(lambda a: (own(a), None), lambda _, g: (g @ B.T,))
    assert counted(own, A) == PRODUCT
    assert counted(jax.grad(lambda a: own(a).sum()), A) == 2 * PRODUCT


@pytest.mark.parametrize(("remat", "products"), [(False, 4 + 2), (True, 5 + 2)])
def test_what_the_backward_pass_computes_again_counts_again(remat: bool, products: int) -> None:
    """tanh(h V) W: two products forwards, two for each backwards (less what nobody asks for), one more of the first again."""
    v, w, h = jnp.ones((4, 4)), jnp.ones((4, 4)), jnp.ones((3, 4))

    def layer(h: jax.Array, v: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.tanh(h @ v) @ w

    layer = jax.checkpoint(layer) if remat else layer
    gradient = jax.grad(lambda *x: layer(*x).sum(), argnums=(0, 1, 2))
    assert counted(gradient, h, v, w) == products * 2 * 3 * 4 * 4


@pytest.mark.parametrize("mesh", [dist.Mesh(data=8), dist.Mesh(data=2, fsdp=4)])
def test_what_one_device_does_counts_for_all(mesh: dist.Mesh) -> None:
    x, w = jnp.ones((16, 4)), jnp.ones((4, 5))
    with dist.use(mesh.build()):
        shared = jax.shard_map(lambda x, w: x @ w, in_specs=(P("data"), P()), out_specs=P("data"), check_vma=False)
        ways = 1 if mesh.fsdp == 1 else mesh.fsdp  # the same rows on each device of this axis: computed, so counted
        assert counted(shared, x, w) == 2 * 16 * 4 * 5 * ways


def test_a_shard_map_over_one_axis_counts_for_that_axis() -> None:
    with dist.use(dist.Mesh(data=2, fsdp=4).build()):
        shared = jax.shard_map(
            lambda x: x @ jnp.ones((4, 5)),
            in_specs=P("data"),
            out_specs=P("data"),
            axis_names={"data"},
            check_vma=False,
        )
        assert counted(shared, jnp.ones((16, 4))) == 2 * 16 * 4 * 5


@pytest.mark.parametrize(("scope", "share"), [("full", 1.0), ("causal", 5 / 8)])
def test_a_kernel_counts_over_its_grid_and_by_half_where_it_is_causal(scope: str, share: float) -> None:
    """Of four blocks of keys a causal kernel sees one, two, three and four: 10 of 16."""

    def kernel(x: Any, y: Any, out: Any) -> None:
        out[...] = x[...] @ y[...]

    def run(x: jax.Array, y: jax.Array) -> jax.Array:
        with jax.named_scope(scope):
            return pl.pallas_call(
                kernel,
                grid=(3, 4),
                in_specs=[pl.BlockSpec((8, 16), lambda i, j: (i, 0)), pl.BlockSpec((16, 8), lambda i, j: (0, j))],
                out_specs=pl.BlockSpec((8, 8), lambda i, j: (i, j)),
                out_shape=jax.ShapeDtypeStruct((24, 32), jnp.float32),
            )(x, y)

    assert counted(run, jnp.ones((24, 16)), jnp.ones((16, 32))) == share * 2 * 24 * 16 * 32
    inside = jax.named_scope(scope)(lambda x, y: jax.jit(jax.vmap(run))(x, y))
    assert counted(inside, jnp.ones((2, 24, 16)), jnp.ones((2, 16, 32))) == 2 * share * 2 * 24 * 16 * 32


@pytest.mark.parametrize("causal", [True, False])
def test_the_tpu_kernel_counts_as_what_it_computes(causal: bool) -> None:
    """Two products of [T, T] forwards; where it is causal, blocks below the diagonal and on it."""
    x = jax.ShapeDtypeStruct((4, 2048, 2, 64), jnp.bfloat16)
    full = 2 * 2 * 4 * 2 * 2048 * 2048 * 64
    alone = counted(lambda *x: splash(*x, causal=causal), x, x, x)
    assert alone == full * (5 / 8 if causal else 1)
    with dist.use(dist.Mesh(data=2, fsdp=1, sequence=2, tensor=2).abstract(8)):
        shared = counted(lambda *x: splash(*x, causal=causal), x, x, x)
    assert shared == pytest.approx(alone, rel=0.1 if causal else 0)  # a device's queries see blocks of their own shape


# one training example


@dataclass(frozen=True)
class Line:
    """A linear map of `width` numbers to two."""

    width: int = 6
    about = About()

    def spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        return {"x": jax.ShapeDtypeStruct((batch, self.width), jnp.float32)}

    def init(self, rng: jax.Array) -> dict[str, jax.Array]:
        return {"w": jax.random.normal(rng, (self.width, 2))}

    def loss(self, params: Any, batch: Any, rng: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        return jnp.square(batch["x"] @ params["w"]).mean(), {}


@dataclass(frozen=True)
class Told(Line):
    """The same, with a figure of its own."""

    def flops(self) -> float:
        return 17


@dataclass(frozen=True)
class Beside(Told):
    """The same beside a network that is held, and a product of the batch alone; it has no figure."""

    about = About(networks={"held": Network()})

    def flops(self) -> None:  # type: ignore[override]
        return None

    def init(self, rng: jax.Array) -> dict[str, jax.Array]:
        return {**super().init(rng), "held": jnp.ones((self.width, 2))}

    def loss(self, params: Any, batch: Any, rng: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        x = batch["x"]
        return jnp.square(x @ params["w"] - x @ params["held"] - x @ jnp.ones((self.width, 2))).mean(), {}


def test_a_training_example_costs_what_the_task_says_or_three_losses() -> None:
    once = 2 * 6 * 2
    assert training_example(Line()) == 3 * once
    assert training_example(Told()) == 17.0
    assert (
        training_example(Beside()) == (3 + 1 + 1) * once
    )  # what is held is asked for no gradient, nor is what it makes


@dataclass(frozen=True)
class Untold:
    """A TarFlow without its own figure."""

    task: TarFlow

    def __getattr__(self, name: str) -> Any:
        if name == "flops":
            raise AttributeError(name)
        return getattr(self.task, name)


@pytest.mark.parametrize(
    "task",
    [
        TarFlow(image=16, channels=3, patch=2, width=128, depth=3, blocks=2, head_dim=64),
        TarFlow(image=32, channels=1, patch=4, width=64, depth=2, blocks=3, head_dim=16, scan=False, scale=False),
        TarFlow(image=16, channels=3, patch=4, width=256, depth=2, blocks=2, head_dim=64, classes=10, remat="full"),
    ],
    ids=["scan", "unrolled", "remat"],
)
def test_the_figure_of_tarflow_agrees_with_its_loss(task: TarFlow) -> None:
    """12 %: the plain products compute the masked half of the attention too."""
    assert training_example(task) == task.flops()
    assert training_example(Untold(task)) == pytest.approx(task.flops(), rel=0.12)
    twice = replace(task, blocks=2 * task.blocks)
    assert twice.flops() == 2 * task.flops()


def test_a_gradient_of_tarflow_counts_three_times_its_loss() -> None:
    task = TarFlow(image=16, channels=3, patch=4, width=64, depth=2, blocks=2, head_dim=32)

    def of(task: TarFlow, gradient: bool) -> float:
        params = jax.eval_shape(lambda: dist.unbox(task.init(jax.random.key(0))))

        def loss(params: Any, batch: Any) -> jax.Array:
            return task.loss(params, batch, jax.random.key(0))[0]

        return counted(jax.grad(loss) if gradient else loss, params, task.spec(2))

    forward, tokens, width = of(task, False), 2 * task.tokens, task.width  # two images
    image = 2 * tokens * task.dims * width  # nobody asks for its gradient
    assert of(task, True) == 3 * forward - image
    assert of(replace(task, scan=False), True) == 3 * forward - image
    # Computed again: all of a layer but the last product of its MLP, a third of its weights.
    layer = 2 * tokens * 8 * width**2 + 2 * 2 * tokens * task.tokens * width
    assert of(replace(task, remat="full"), True) == 3 * forward - image + task.blocks * task.depth * layer
