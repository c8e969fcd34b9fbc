"""The clock: determinism, position = step, host rows, augmentation, and what is said when data and task differ."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from mistakes import told

from zoo.data.images import Digits, ImageSource
from zoo.data.pipeline import Data, Source, _local_rows, batches, epoch
from zoo.data.synthetic import Synthetic
from zoo.errors import UserError

pytestmark = pytest.mark.devices8

SPEC = {
    "image": jax.ShapeDtypeStruct((4, 8, 8, 1), np.float32),
    "label": jax.ShapeDtypeStruct((4,), np.int32),
}


@dataclass(frozen=True)
class Counted(Data):
    """Image i is left half 0, right half 1; its label is i."""

    count: int = 20
    flip: bool = False
    broken: int = -1

    def source(self, split, spec=None):
        def read(i):
            if i == self.broken:
                raise UserError(f"row {i} is broken; mend it")
            return np.repeat(np.float32([[[0.0], [1.0]]]), 2, axis=0), i

        return ImageSource(self.count, read, (), self.flip)


def take(n, *args, **kw):
    it = batches(*args, **kw)
    out = list(itertools.islice(it, n))
    it.close()
    return out


def test_batches_depend_on_seed_and_position_alone():
    whole = take(8, Counted(flip=True), 6, seed=3)
    again = take(3, Counted(flip=True), 6, seed=3, start=5, threads=1)
    for a, b in zip(whole[5:], again):
        np.testing.assert_array_equal(a["label"], b["label"])
        np.testing.assert_array_equal(a["image"], b["image"])
    other = take(8, Counted(flip=True), 6, seed=4)
    assert any((a["label"] != b["label"]).any() for a, b in zip(whole, other))


def test_every_epoch_holds_each_example_once_in_a_new_order():
    labels = np.concatenate([b["label"] for b in take(10, Counted(), 6)])  # three epochs, cut across batches
    epochs = labels.reshape(3, 20)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(20), (3, 1)))
    assert (epochs[0] != epochs[1]).any()
    assert (epochs[1] != epochs[2]).any()
    (b,) = take(1, Counted(3), 70)  # a batch larger than the data, and of many chunks
    assert (b["image"].shape, set(b["label"])) == ((70, 2, 2, 1), {0, 1, 2})


def test_flip_is_drawn_anew_each_epoch_and_off_elsewhere():
    def mirrored(**kw):
        seen = {}
        for b in take(8, Counted(), 5) if not kw else take(8, Counted(flip=True), 5, **kw):
            for image, label in zip(b["image"], b["label"]):
                seen.setdefault(int(label), []).append(bool(image[0, 0, 0] == 1))
        return seen

    flips = mirrored(seed=0)
    assert all(len(f) == 2 for f in flips.values())
    assert 0 < sum(f[0] != f[1] for f in flips.values()) < 20  # an example is not flipped the same way for ever
    assert not any(sum(f) for f in mirrored().values())
    assert not any(sum(f) for f in mirrored(split="test").values())
    assert all(b["image"][:, 0, 0, 0].sum() == 0 for b, _ in epoch(Counted(flip=True), 5))


def test_epoch_pads_the_last_batch_and_counts():
    got = list(epoch(Counted(), 8))
    assert [real for _, real in got] == [8, 8, 4]
    np.testing.assert_array_equal(np.concatenate([b["label"] for b, _ in got]), [*range(20), 19, 19, 19, 19])
    limited = list(epoch(Counted(), 8, limit=9))
    assert [real for _, real in limited] == [8, 1]
    np.testing.assert_array_equal(limited[1][0]["label"], [8] * 8)


def mesh(*shape):
    devices = np.array(jax.devices()[:8]).reshape(shape)
    return Mesh(devices, ("data", "fsdp", "tensor")[: len(shape)], axis_types=(AxisType.Auto,) * len(shape))


def test_sharded_batches_equal_the_plain_ones():
    sharding = NamedSharding(mesh(2, 2, 2), P(("data", "fsdp")))
    plain = take(3, Counted(), 8, start=2, seed=1)
    for a, b in zip(take(3, Counted(), 8, start=2, seed=1, sharding=sharding), plain):
        assert a["image"].sharding.is_equivalent_to(sharding, 4)
        assert a["label"].addressable_shards[0].data.shape == (2,)
        for key in b:
            np.testing.assert_array_equal(np.asarray(a[key]), b[key])
    for a, b in zip(take(4, Grouped((16, 8)), 8, seed=1, sharding=sharding), take(4, Grouped((16, 8)), 8, seed=1)):
        np.testing.assert_array_equal(np.asarray(a["label"]), b["label"])
    devices = np.array(jax.devices()[:8])[[3, 0, 7, 5, 1, 2, 6, 4]]
    sharding = NamedSharding(Mesh(devices, ("data",)), P("data"))
    (a,), (b,) = take(1, Counted(), 8, sharding=sharding), take(1, Counted(), 8)
    np.testing.assert_array_equal(np.asarray(a["label"]), b["label"])


def test_a_host_reads_the_rows_of_its_own_devices():
    grid = mesh(4, 2)  # rows over "data"; two devices hold the same rows
    where = NamedSharding(grid, P("data")).devices_indices_map((16,))

    def host(*numbers):
        mine = {d: where[d] for d in grid.devices.flat if d.id in numbers}
        return _local_rows(SimpleNamespace(addressable_devices_indices_map=lambda shape: mine), 16)

    np.testing.assert_array_equal(host(0, 1), range(4))
    np.testing.assert_array_equal(host(1), host(0))  # two hosts of one row block
    np.testing.assert_array_equal(host(2, 3, 4, 5), range(4, 12))
    np.testing.assert_array_equal(host(0, 1, 4, 5), [0, 1, 2, 3, 8, 9, 10, 11])  # not one block


def test_batch_that_devices_do_not_divide_is_refused():
    with told("batch=12 ", " 8 devices (mesh axes data, fsdp)", " e.g. batch=16"):
        batches(Counted(), 12, sharding=NamedSharding(mesh(2, 4), P(("data", "fsdp"))))


def test_spec_selects_keys_and_differences_are_named_before_the_first_batch():
    (b,) = take(1, Digits(), 4, spec={"image": SPEC["image"]})
    assert list(b) == ["image"]
    rgb = {"image": jax.ShapeDtypeStruct((4, 16, 16, 3), np.float32), "tokens": SPEC["label"]}
    gives = "the data gives float32[8, 8, 1], the task wants float32[16, 16, 3]"
    with told(gives, "task.channels=1", "task.image=8", "'tokens'") as error:
        batches(Digits(), 4, spec=rgb)
    assert "data.channels" not in str(error.value)  # Digits has no such field
    with told("int32[], the task wants int16[]"):
        epoch(Digits(), 4, spec={"label": jax.ShapeDtypeStruct((4,), np.int16)})


def test_senseless_arguments_and_examples_that_cannot_be_read_end_in_a_sentence():
    with told("batch=0"):
        batches(Counted(), 0)
    with told("seed=-1"):
        batches(Counted(), 2, seed=-1)
    with told("batch=0"):
        epoch(Counted(), 0)
    with told("row 7 is broken"):
        take(4, Counted(broken=7), 6)
    with told("row 7 is broken"):
        list(epoch(Counted(broken=7), 6))


def test_synthetic_makes_what_the_task_asks_for():
    spec = {**SPEC, "tokens": jax.ShapeDtypeStruct((4, 5), np.int32)}
    a, b = take(2, Synthetic(values=3), 4, spec=spec)
    assert {k: (v.shape, v.dtype) for k, v in a.items()} == {k: (v.shape, v.dtype) for k, v in spec.items()}
    assert -1 <= a["image"].min() < -0.5 < 0.5 < a["image"].max() <= 1
    assert set(a["tokens"].flat) <= {0, 1, 2}
    assert (a["image"] != b["image"]).any()
    np.testing.assert_array_equal(take(2, Synthetic(values=3), 4, spec=spec)[1]["image"], b["image"])
    assert Synthetic().source("train", spec).labels == ("0", "1")
    with told("spec=task.spec"):
        batches(Synthetic(), 4)


# groups


@dataclass(frozen=True)
class Grouped(Data):
    """Examples of several sizes, in turn: those of group g are [2 + g, 2, 1], their labels 100 g + i."""

    counts: tuple[int, ...] = (13, 3, 9)

    def source(self, split, spec=None):
        order = [(g, i) for i in range(max(self.counts)) for g, count in enumerate(self.counts) if i < count]

        class Rows(Source):
            groups = tuple(np.flatnonzero([g == at for at, _ in order]) for g in range(len(self.counts)))

            def __len__(self):
                return len(order)

            def __getitem__(self, index):
                g, i = order[index]
                return {"image": np.zeros((2 + g, 2, 1), np.float32), "label": np.int32(100 * g + i)}

        return Rows()


def test_a_batch_comes_from_one_group_and_follows_from_its_number():
    whole = take(20, Grouped(), 4, seed=3)
    for b in whole:
        (g,) = set(b["label"] // 100)
        assert b["image"].shape == (4, 2 + g, 2, 1)
    for a, b in zip(whole[7:], take(13, Grouped(), 4, seed=3, start=7, threads=1)):
        np.testing.assert_array_equal(a["label"], b["label"])
    epochs = [np.sort(np.concatenate([b["label"] for b in whole[e : e + 5]])) for e in range(0, 20, 5)]
    for seen in epochs:  # three batches of 13, none of 3, two of 9
        assert len(np.unique(seen)) == 20
        assert [(seen // 100 == g).sum() for g in range(3)] == [12, 0, 8]
    assert len({tuple(seen) for seen in epochs}) > 1  # what was left over comes another time
    orders = {tuple(b["label"][0] // 100 for b in whole[e : e + 5]) for e in range(0, 20, 5)}
    assert len(orders) > 1  # groups alternate, in an order of each epoch
    other = take(5, Grouped(), 4, seed=4)
    assert any((a["label"] != b["label"]).any() for a, b in zip(whole, other))


def test_groups_smaller_than_a_batch_are_told(caplog):
    take(1, Grouped(), 3)
    assert not caplog.records
    take(1, Grouped(), 10)
    left = "2 of 3 groups of equal shapes have fewer examples and are left out (3, 9; 12 of 25 examples)"
    assert caplog.messages == [f"batch=10: {left}"]


def test_evaluation_goes_through_the_first_group():
    got = list(epoch(Grouped(), 8))
    assert [real for _, real in got] == [8, 5]
    np.testing.assert_array_equal(np.concatenate([b["label"] for b, _ in got])[:13], range(13))
    ((b, real),) = epoch(Grouped(), 8, limit=3)
    assert (real, b["label"].max()) == (3, 2)


def test_of_groups_only_axes_and_channels_are_compared():
    spec = {"image": jax.ShapeDtypeStruct((4, 7, 7, 1), np.float32), "label": SPEC["label"]}
    assert list(take(1, Grouped(), 4, spec=spec)[0]) == ["image", "label"]
    for shape in ((4, 7, 7, 3), (4, 7, 1)):
        with told("'image': the data gives float32[2, 2, 1]"):
            batches(Grouped(), 4, spec={"image": jax.ShapeDtypeStruct(shape, np.float32)})
    with told("'image': the data gives"):  # one shape: all of it
        batches(Grouped((9,)), 4, spec=spec)
    with told("batch=16 is more than any group ", " (13, 3, 9 examples); choose batch=13"):
        batches(Grouped(), 16)
