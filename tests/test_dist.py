"""Laws of zoo.dist: meshes, axis rules, shardings, constrain, and the compilation cache."""

import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from mistakes import told

from zoo import dist, weights
from zoo.papers.tarflow import TarFlow
from zoo.train import optim
from zoo.train.step import abstract_state

pytestmark = pytest.mark.devices8

MESH = dist.Mesh(data=2, fsdp=2, tensor=2)


def box(shape: tuple[int, ...], *names: str | None, dtype: str = "float32") -> Any:
    """An abstract parameter with logical axes."""
    return nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)), names)


# meshes


@pytest.mark.parametrize(
    "mesh, shape",
    [
        (dist.Mesh(), (8, 1, 1, 1)),
        (dist.Mesh(data=2, fsdp=-1, tensor=2), (2, 2, 1, 2)),
        (dist.Mesh(data=1, sequence=2, tensor=-1), (1, 1, 2, 4)),
    ],
)
def test_a_mesh_holds_every_device_once(mesh: dist.Mesh, shape: tuple[int, ...]):
    built = mesh.build()
    assert built.axis_names == ("data", "fsdp", "sequence", "tensor")
    assert built.devices.shape == shape
    assert {d.id for d in built.devices.flat} == set(range(8))
    assert mesh.abstract(8).shape == built.shape
    assert mesh.abstract(8).axis_types == built.axis_types


def test_a_mesh_that_does_not_fit():
    assert dist.Mesh().abstract(4096).size == 4096
    for mesh, words in (
        (
            dist.Mesh(data=3),
            "mesh data=3 x fsdp=1 x sequence=1 x tensor=1 does not fill the 8 devices here; their product must be 8",
        ),
        (dist.Mesh(fsdp=-1), "only one axis may be -1, but data and fsdp are"),
    ):
        with told(words):
            mesh.build()
    with told("mesh data=-1 x fsdp=3", "does not fill the 4096 devices"):
        dist.Mesh(fsdp=3).abstract(4096)


def test_an_abstract_mesh_in_use_places_and_traces_and_does_not_run():
    mesh = dist.Mesh(data=16, fsdp=4, tensor=2).abstract(128)
    assert jax.sharding.get_abstract_mesh().empty
    with dist.use(mesh, {"mlp": None}):
        assert jax.sharding.get_abstract_mesh() == mesh
        assert dist.platform() == "cpu"  # that of this process: an abstract mesh has none
        assert dist.spec((64, 6, 4), "batch", "mlp", "heads") == P(("data", "fsdp"), None, ("tensor",))
        assert dist.batch_axes(64) == ("data", "fsdp")
        traced = str(jax.make_jaxpr(lambda x: dist.constrain(x, "batch"))(jnp.ones((64, 2))))
    assert "sharding_constraint" in traced
    assert jax.sharding.get_abstract_mesh().empty
    assert dist.spec((64,), "batch") is None


@pytest.fixture(scope="module")
def states() -> list[Any]:
    """The abstract state of a flow on a mesh that is here, and on one like it that is not."""
    task, optimizer = (
        TarFlow(image=4, channels=1, patch=2, width=8, depth=1, blocks=2, head_dim=4),
        optim.AdamW().build(4),
    )
    return [abstract_state(task, optimizer, mesh, ema=0.9) for mesh in (MESH.build(), MESH.abstract(8))]


def test_the_state_of_a_mesh_that_is_not_here_lies_as_on_one_that_is(states: list[Any]):
    here, there = states
    for name, leaf in weights.flatten(here.params).items():
        other = weights.flatten(there.params)[name]
        assert other.sharding.spec == leaf.sharding.spec, name
        assert dist.shard_bytes(other) == dist.shard_bytes(leaf), name
    up = weights.flatten(there.params)["block0/trunk/block/mlp/up/kernel"]  # [1, 8, 32], cut by fsdp and by tensor
    assert dist.shard_bytes(up) == 8 * 32 * 4 / 4
    assert dist.shard_bytes(there.rng) == 8  # a typed key is two numbers
    assert dist.shard_bytes(jax.ShapeDtypeStruct((3, 5), jnp.bfloat16)) == 30


# rules and shardings


def test_rules_become_shardings():
    mesh = MESH.build()
    tree = {
        "up": box((4, 8), "embed", "mlp"),
        "qkv": box((4, 3, 2, 5), "embed", None, "heads", None),
        "norm": box((4,), None),
        "odd": box((4,), "no such axis"),
        "plain": jax.ShapeDtypeStruct((7,), jnp.float32),
    }
    specs = jax.tree.map(lambda s: s.spec, dist.shardings(tree, mesh))
    assert specs["up"] == P("fsdp", "tensor")
    assert specs["qkv"] == P("fsdp", None, "tensor", None)
    assert specs["norm"] == specs["odd"] == P(None)
    assert specs["plain"] == P()
    with dist.use(mesh, {"embed": None, "mlp": ("data", "tensor")}):
        specs = jax.tree.map(lambda s: s.spec, dist.shardings(tree, mesh))
    assert specs["up"] == P(None, ("data", "tensor"))
    assert specs["qkv"] == P(None, None, "tensor", None)  # rules add to the table, they do not replace it
    assert dist.shardings(tree, mesh)["up"].spec == P("fsdp", "tensor")  # and end with their block


def test_the_whole_state_follows_its_parameters(states: list[Any]):
    state, _ = states
    params, average = (weights.flatten(tree) for tree in (state.params, state.ema))
    specs = {name: leaf.sharding.spec for name, leaf in params.items()}
    assert specs["block0/trunk/block/mlp/up/kernel"] == P(None, "fsdp", "tensor")  # layers, embed, mlp
    assert specs["block0/trunk/block/mlp/down/kernel"] == P(None, "tensor", "fsdp")
    for name, leaf in average.items():
        assert leaf.sharding.spec == specs[name], name
    moments = [s.nu for s in jax.tree.leaves(state.opt, is_leaf=lambda s: hasattr(s, "nu")) if hasattr(s, "nu")]
    assert moments
    for name, leaf in weights.flatten(moments[0]).items():
        assert leaf.sharding.spec == specs[name], name
    assert state.step.sharding.spec == P()


def test_an_axis_that_does_not_divide_or_is_used_twice_names_its_parameter():
    with told("['net']['up']: axis 1 ('mlp') has size 6, which mesh axes ('tensor',) = 4 do not divide"):
        dist.shardings({"net": {"up": box((4, 6), "embed", "mlp")}}, dist.Mesh(tensor=4).build())
    with told("['net']['square']", "('mlp', 'heads') use mesh axis 'tensor' twice"):
        dist.shardings({"net": {"square": box((4, 4), "mlp", "heads")}}, MESH.build())


def test_a_large_parameter_that_stays_whole_is_named(caplog: pytest.LogCaptureFixture):
    large = {
        "table": box((2048, 4096), None, None),
        "split": box((2048, 4096), "embed", None),
        "small": box((2,), None),
    }
    dist.shardings(large, dist.Mesh(data=8).build())
    assert not caplog.records  # nothing is meant to be split here
    dist.shardings(large, MESH.build())
    assert [("table" in r.message, "whole on every device" in r.message) for r in caplog.records] == [(True, True)]


# constrain


def test_constrain_does_nothing_without_a_mesh():
    x = np.ones((8, 2))  # any operation would make it a jax array
    assert dist.constrain(x, "batch", None) is x
    with dist.use(dist.Mesh(data=1).build(jax.devices()[:1])):
        assert dist.constrain(x, "batch", None) is x
    assert "sharding_constraint" not in str(jax.make_jaxpr(lambda x: dist.constrain(x, "batch", None))(x))


def test_constrain_follows_mesh_and_rules():
    def placed(rows: int, rules: dist.Rules | None = None) -> Any:
        with dist.use(MESH.build(), rules):
            return jax.jit(lambda x: dist.constrain(x, "batch", "mlp"))(jnp.ones((rows, 2))).sharding.spec

    assert placed(8) == P(("data", "fsdp"), "tensor")
    assert placed(8, {"mlp": None, "batch": "data"}) == P("data")
    assert "data" not in str(placed(6))  # 6 rows do not divide by 4: left to the compiler, no error


def test_a_spec_names_the_axes_that_share_out_tokens():
    assert dist.spec((8, 4, 2), "batch", "tokens", None) is None  # no mesh
    with dist.use(dist.Mesh(data=1).build(jax.devices()[:1])):
        assert dist.spec((8, 4), "batch", "tokens") is None  # nothing to share out
    with dist.use(dist.Mesh(data=2, sequence=4).build()):
        assert dist.spec((8, 4, 2), "batch", "tokens", None) == P(("data", "fsdp"), ("sequence",), None)
        assert dist.spec((8, 6, 2), "batch", "tokens") == P(("data", "fsdp"), None)  # four do not divide six tokens
        assert dist.spec((8, 4, 2), "batch") == P(("data", "fsdp"))
        assert dist.spec((3, 4), "batch", "no such axis") == P(None, None)
        assert dist.batch_axes(8) == ("data", "fsdp")
        assert dist.batch_axes(3) is None
        assert (dist.ways(("sequence",)), dist.ways("data"), dist.ways(("data", "sequence")), dist.ways(None)) == (
            4, 2, 8, 1,
        )  # fmt: skip
        placed = jax.jit(lambda x: dist.constrain(x, "batch", "tokens", None))(jnp.ones((8, 4, 2)))
        assert {x.data.shape for x in placed.addressable_shards} == {(4, 1, 2)}
    assert dist.batch_axes(8) is None


def test_what_does_not_divide_is_told_with_a_mesh_that_does():
    dist.check_divides(7, "heads", "the number of heads")  # no mesh, nothing to divide
    with dist.use(dist.Mesh(data=2, tensor=4).build()):
        dist.check_divides(8, "heads", "the number of heads")
        dist.check_divides(7, "no such axis", "the number of things")
        with told("('tensor',) = 4 do not divide; choose a mesh that does, e.g. mesh.tensor=3, or another size"):
            dist.check_divides(6, "heads", "the number of heads")
        with told("choose a mesh that does, or another size"):
            dist.check_divides(5, "batch", "the batch")  # two axes share it: no one number to name


# parameters that are made whole


GATHERED = dist.Mesh(data=1, fsdp=4, tensor=2)


def sharded(mesh: jax.sharding.Mesh, x: jax.Array, *spec: Any) -> jax.Array:
    return jax.device_put(x, NamedSharding(mesh, P(*spec)))


def test_the_gradient_of_a_gathered_parameter_is_that_of_the_plain_one_and_cut():
    rng = np.random.default_rng(0)
    kernel, x = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((8, 8), (16, 8)))

    def loss(kernel: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.square(jnp.tanh(x @ dist.gathered(kernel, ("embed", "mlp")))).sum()

    expected = jax.grad(lambda k: jnp.square(jnp.tanh(x @ k)).sum())(kernel)
    mesh = GATHERED.build()
    assert dist.gathered(kernel, ("embed", "mlp")) is kernel  # no mesh
    with dist.use(mesh):
        whole = jax.jit(lambda x: dist.gathered(x, ("embed", "mlp")))(sharded(mesh, kernel, "fsdp", "tensor"))
        found = jax.jit(jax.grad(loss))(sharded(mesh, kernel, "fsdp", "tensor"), sharded(mesh, x, "fsdp"))
    np.testing.assert_array_equal(whole, kernel)
    assert {x.data.shape for x in whole.addressable_shards} == {(8, 4)}  # the tensor axis still cuts it
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert {x.data.shape for x in found.addressable_shards} == {(2, 4)}  # as the parameter lies


def test_a_whole_tree_is_gathered_over_what_shares_the_batch():
    tree = {"a": jnp.arange(16.0), "b": {"c": jnp.ones((4, 2))}, "plain": jnp.ones(8)}
    names = {"a": ("embed",), "b": {"c": (None, "heads")}}

    def boxed():
        a, c = nn.LogicallyPartitioned(tree["a"], names["a"]), nn.LogicallyPartitioned(tree["b"]["c"], names["b"]["c"])
        return {"a": a, "b": {"c": c}, "plain": tree["plain"]}

    assert dist.gather_before_loop(tree, boxed) is tree
    mesh = GATHERED.build()
    with dist.use(mesh):
        cut = {"c": sharded(mesh, tree["b"]["c"], None, "tensor")}
        placed = {**tree, "a": sharded(mesh, tree["a"], "fsdp"), "b": cut}
        whole = jax.jit(lambda t: dist.gather_before_loop(t, boxed))(placed)
        # what keeps the compiler from gathering it inside a loop that uses it
        assert "optimization_barrier" in str(jax.make_jaxpr(lambda t: dist.gather_before_loop(t, boxed))(placed))
    jax.tree.map(np.testing.assert_array_equal, whole, tree)
    assert whole["a"].sharding.is_fully_replicated
    assert whole["plain"].sharding.is_fully_replicated
    assert whole["b"]["c"].sharding.is_equivalent_to(cut["c"].sharding, 2)  # tensor parallelism stays


# batches


def test_batches_that_divide_and_do_not():
    mesh = MESH.build()
    for batch, accumulate, words in (
        (6, 1, "4 devices; choose a multiple of 4, e.g. batch=8"),
        (4, 2, "a multiple of 8, e.g. batch=8"),
    ):
        with told(f"batch={batch} does not divide", words):
            dist.check_batch(batch, accumulate, mesh)
    dist.check_batch(4, 1, mesh)
    dist.check_batch(16, 2, mesh)
    assert dist.batch_sharding(mesh).spec == P(("data", "fsdp"))
    with dist.use(mesh, {"batch": "data"}):
        dist.check_batch(6, 1, mesh)
        assert dist.batch_sharding(mesh).spec == P(("data",))


# the cores of a CPU


@pytest.mark.parametrize(
    "cores, batch, mesh, devices",
    [
        (6, 64, None, 4),
        (64, 64, dist.Mesh(), 8),
        (8, 12, dist.Mesh(), 4),
        (8, 7, dist.Mesh(), 1),
        (4, 8, dist.Mesh(fsdp=2), 4),
        (1, 8, dist.Mesh(fsdp=2), 2),  # what the mesh asks for, whatever there is
        (8, 8, dist.Mesh(data=1), 1),
    ],
)
def test_cores_become_devices_that_share_the_batch(
    cores: int, batch: int, mesh: dist.Mesh | None, devices: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)), raising=False)
    assert dist._cpu_devices(batch, mesh) == devices


def test_a_number_of_devices_that_the_user_set_stays(monkeypatch: pytest.MonkeyPatch):
    asked: list[Any] = []
    monkeypatch.setattr("zoo.dist.jax.config.update", lambda *a: asked.append(a))
    dist._share_cores(8, None)  # the tests run on simulated devices
    assert not asked
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1}, raising=False)
    dist._share_cores(8, None)
    assert asked == [("jax_num_cpu_devices", 2)]


def test_late_devices_are_waited_for_but_as_long_as_the_user_says(monkeypatch: pytest.MonkeyPatch):
    flag = "--xla_cpu_collective_call_terminate_timeout_seconds"
    for given, there in ("--a=1", f"--a=1 {flag}=86400"), (f"{flag}=5", f"{flag}=5"):
        monkeypatch.setenv("XLA_FLAGS", given)
        dist._wait_for_late_devices()
        assert os.environ["XLA_FLAGS"] == there


def test_spread_cuts_parameters_that_fill_a_device(monkeypatch):
    boxed = jax.eval_shape(lambda: {"w": nn.with_logical_partitioning(jnp.zeros, ("embed", None))((16, 4))})
    params = {"w": np.arange(64.0, dtype=np.float32).reshape(16, 4)}
    assert dist.spread(params, 12)[0].shape["data"] == 4  # devices that get rows
    for room, cut in ((None, False), (10_000, False), (500, True)):
        monkeypatch.setattr(dist, "_memory", lambda device, room=room: room)
        mesh, placed = dist.spread(params, 8, boxed)
        assert mesh.shape["fsdp"] == (8 if cut else 1)
        assert placed["w"].addressable_shards[0].data.shape == ((2, 4) if cut else (16, 4))
        np.testing.assert_array_equal(placed["w"], params["w"])


# the compilation cache


@pytest.fixture
def own_cache() -> Iterator[None]:
    """Lets a test point the persistent compilation cache elsewhere."""
    names = ("compilation_cache_dir", "persistent_cache_min_compile_time_secs", "persistent_cache_min_entry_size_bytes")
    before = {f"jax_{name}": jax.config.values[f"jax_{name}"] for name in names}
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_a_damaged_cache_entry_is_compiled_again(tmp_path: Path, own_cache: None):
    dist.start(str(tmp_path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    x = np.arange(16, dtype=np.float32).reshape(4, 4)

    def damaged_program() -> Any:
        return jax.jit(lambda x: jnp.sin(x) @ x)(x)

    first = damaged_program()
    entries = [p for p in (tmp_path / "xla").iterdir() if p.stat().st_size]
    assert entries, "the cache was not written"
    for entry in entries:
        data = entry.read_bytes()
        entry.write_bytes(data[: len(data) // 2])
    jax.clear_caches()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again = damaged_program()
    assert any("cache" in str(w.message) for w in caught), "the damaged entry was not read"
    np.testing.assert_array_equal(first, again)


def test_a_cache_that_cannot_be_written_only_warns(
    tmp_path: Path, own_cache: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "file").touch()
    before = jax.config.jax_compilation_cache_dir
    with caplog.at_level(logging.WARNING, "zoo"):
        dist.start(str(tmp_path / "file"))
        monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "file" / "below"))
        dist.start()
    assert len(caplog.records) == 2
    assert all("cannot be written" in r.message and "ZOO_CACHE" in r.message for r in caplog.records)
    assert jax.config.jax_compilation_cache_dir == before
