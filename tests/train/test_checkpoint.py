"""Checkpoints: every bit comes back, on any mesh and in either layout of layers, and damage costs no more than it must."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from processes import contents
from processes import leaves as plain

from zoo import dist
from zoo.errors import UserError
from zoo.task import About, Batch, Params
from zoo.train.checkpoint import Checkpoints
from zoo.train.optim import AdamW
from zoo.train.step import State, compile_step

pytestmark = pytest.mark.devices8


@dataclass(frozen=True)
class Layers:
    """Two layers, stacked under `trunk/block` or unrolled as `trunk/layer0` and `trunk/layer1`."""

    scan: bool = True
    width: int = 4

    about = About(buffers=("prior",))

    def spec(self, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
        return {"x": jax.ShapeDtypeStruct((batch, self.width), jnp.float32)}

    def init(self, rng: jax.Array) -> Params:
        kernel = jax.random.normal(rng, (2, self.width, self.width))
        if self.scan:
            trunk: Params = {"block": {"kernel": nn.LogicallyPartitioned(kernel, (None, "embed", "mlp"))}}
        else:
            trunk = {f"layer{i}": {"kernel": nn.LogicallyPartitioned(kernel[i], ("embed", "mlp"))} for i in range(2)}
        return {"trunk": trunk, "prior": {"var": jnp.ones(3)}}

    def loss(self, params: Params, batch: Batch, rng: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        trunk = params["trunk"]
        kernels = trunk["block"]["kernel"] if self.scan else [trunk[f"layer{i}"]["kernel"] for i in range(2)]
        x = batch["x"] + 0.1 * jax.random.normal(rng, batch["x"].shape)
        for i in range(2):
            x = jnp.tanh(x @ kernels[i])
        return jnp.square(x - 1).mean(), {}


OPTIMIZER = AdamW(lr=0.1).build(10)
ABOUT = {"format": 1, "run": {"steps": 10}}


@dataclass(frozen=True)
class Built:
    init: Callable[[int], State]
    step: Any
    abstract: State
    mesh: jax.sharding.Mesh

    def after(self, steps: int, state: State | None = None) -> State:
        """A state that no optimiser moment of which is zero any more."""
        with dist.use(self.mesh):
            state = self.init(0) if state is None else state
            for _ in range(steps):
                n = int(state.step)
                batch = {"x": np.random.default_rng(n).normal(size=(8, 4)).astype(np.float32)}
                state, _ = self.step(state, jax.device_put(batch, dist.batch_sharding(self.mesh)))
            return state


def build(scan: bool = True, mesh: dist.Mesh | None = None) -> Built:
    here = (mesh or dist.Mesh()).build(None if mesh else jax.devices()[:1])
    with dist.use(here):
        return Built(*compile_step(Layers(scan), OPTIMIZER, here, ema=0.9), here)


@pytest.fixture(scope="module")
def one() -> Built:
    return build()


def save(folder: Path, state: State, *steps: int, keep: int = 2) -> None:
    checkpoints = Checkpoints(folder, keep)
    for step in steps:
        checkpoints.save(step, state.replace(step=jnp.int32(step)), ABOUT)
    checkpoints.wait()
    checkpoints.close()


def restore(folder: Path, built: Built) -> State | None:
    checkpoints = Checkpoints(folder)
    with dist.use(built.mesh):
        state = checkpoints.restore(built.abstract)
    checkpoints.close()
    return state


# ------------------------------------------------------------------------------------------------------- there and back


def test_a_state_comes_back_to_the_bit_and_goes_on_as_if_nothing_had_happened(one: Built, tmp_path: Path) -> None:
    state = one.after(3)
    save(tmp_path, state, 3)
    expected = plain(state)
    found = restore(tmp_path, one)
    assert found is not None
    chex.assert_trees_all_equal(plain(found), expected)
    moments = [v for k, v in expected.items() if "/nu/" in k]
    assert len(moments) == 1
    assert (moments[0] > 0).all()
    straight = one.after(6)
    chex.assert_trees_all_equal(plain(one.after(3, found)), plain(straight))
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x.dtype, found), jax.tree.map(lambda x: x.dtype, straight))


def test_a_state_may_be_donated_as_soon_as_saving_has_begun(one: Built, tmp_path: Path) -> None:
    state = one.after(3)
    expected = plain(state)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, state, ABOUT)
    state = one.after(4, state)
    checkpoints.wait()
    checkpoints.close()
    found = restore(tmp_path, one)
    assert found is not None
    chex.assert_trees_all_equal(plain(found), expected)


def test_an_empty_folder_has_nothing_to_restore(one: Built, tmp_path: Path) -> None:
    assert restore(tmp_path, one) is None
    assert Checkpoints(tmp_path / "none", create=False).steps() == []
    assert not (tmp_path / "none").exists()


def test_a_checkpoint_is_restored_onto_another_mesh(one: Built, tmp_path: Path) -> None:
    many = build(mesh=dist.Mesh(data=2, fsdp=2, tensor=2))
    for source, target, name in ((one, many, "spread"), (many, one, "gathered")):
        state = source.after(2)
        save(tmp_path / name, state, 2)
        found = restore(tmp_path / name, target)
        assert found is not None
        chex.assert_trees_all_equal(plain(found), plain(state))
        places = jax.tree.map(lambda x, a: x.sharding.is_equivalent_to(a.sharding, x.ndim), found, target.abstract)
        assert jax.tree.all(places)
        assert found.params["trunk"]["block"]["kernel"].sharding.is_fully_replicated is (target is one)
        assert np.isfinite(plain(target.after(1, found))["params/trunk/block/kernel"]).all()


def test_stacked_and_unrolled_layers_restore_each_other(one: Built, tmp_path: Path) -> None:
    unrolled = build(scan=False)
    for source, target, name in ((one, unrolled, "stacked"), (unrolled, one, "unrolled")):
        state = source.after(2)
        save(tmp_path / name, state, 2)
        assert not [path for path in contents(tmp_path) if "layer0" in path], "the disk knows the stacked layout only"
        found = restore(tmp_path / name, target)
        assert found is not None
        for have, want in ((found.params, state.params), (found.ema, state.ema), (found.opt[0].nu, state.opt[0].nu)):
            stacked, rows = (want, have) if source is one else (have, want)
            assert set(rows["trunk"]) == {"layer0", "layer1"}
            for i in range(2):
                kernel = rows["trunk"][f"layer{i}"]["kernel"]
                np.testing.assert_array_equal(stacked["trunk"]["block"]["kernel"][i], kernel, strict=True)


def test_the_newest_ones_are_kept(one: Built, tmp_path: Path) -> None:
    save(tmp_path, one.after(1), 1, 2, 3, 5, keep=3)
    checkpoints = Checkpoints(tmp_path, 3)
    assert checkpoints.steps() == [2, 3, 5]
    assert checkpoints.config(5) == ABOUT
    checkpoints.close()
    found = restore(tmp_path, one)
    assert found is not None
    assert int(found.step) == 5


# -------------------------------------------------------------------------------------------------------------- damage


def halve(folder: Path) -> None:
    for path in (folder / "state").rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)


def lose_state(folder: Path) -> None:
    shutil.rmtree(folder / "state")


def lose_all(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGES = [halve, lose_state, lose_all]


@pytest.fixture(scope="module")
def saved(one: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save(folder, one.after(1), 3, 6)
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_checkpoint_is_moved_aside(
    one: Built, saved: Path, tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    damage(folder / "checkpoints" / "6")
    before = contents(folder / "checkpoints" / "6")
    checkpoints = Checkpoints(folder)
    with dist.use(one.mesh), caplog.at_level(logging.WARNING, "zoo"):
        state = checkpoints.restore(one.abstract)
    assert state is not None
    assert int(state.step) == 3
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["3", "6.broken"]
    assert contents(folder / "checkpoints" / "6.broken") == before
    (message,) = [r.getMessage() for r in caplog.records if r.name == "zoo"]
    assert "step 6 cannot be read" in message
    assert "6.broken" in message
    assert "\n" not in message
    # the step is free again: Orbax would skip a save that is not above the newest folder
    checkpoints.save(6, state.replace(step=jnp.int32(6)), ABOUT)
    checkpoints.wait()
    assert checkpoints.steps() == [3, 6]
    checkpoints.close()
    again = restore(folder, one)
    assert again is not None
    assert int(again.step) == 6


def test_broken_ones_pile_up_under_names_of_their_own_and_count_for_nothing(
    one: Built, saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    (folder / "checkpoints" / "6.broken").mkdir()
    halve(folder / "checkpoints" / "6")
    with caplog.at_level(logging.WARNING, "zoo"):
        assert restore(folder, one) is not None
    broken = {"6.broken", "6.broken1"}
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"3", *broken}
    (words,) = [r.getMessage() for r in caplog.records if r.name == "zoo"]
    assert "goes on from step 3" in words
    save(folder, one.after(1), 4, 5, 6, keep=2)
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"5", "6", *broken}


def test_where_none_can_be_read_nothing_is_changed_and_no_run_starts_over(
    one: Built, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    before = contents(folder)

    def no_memory(*_: object) -> None:
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(Checkpoints, "_read", no_memory)
    with pytest.raises(UserError, match=r"step 6 .*RESOURCE_EXHAUSTED.*nor can the 1 before it; nothing was changed"):
        restore(folder, one)
    with dist.use(one.mesh), pytest.raises(UserError, match=r"step 6 .* cannot be read"):
        Checkpoints(folder, create=False).restore(one.abstract)  # one that reads alone
    assert contents(folder) == before
    monkeypatch.undo()
    state = restore(folder, one)
    assert state is not None
    assert int(state.step) == 6
