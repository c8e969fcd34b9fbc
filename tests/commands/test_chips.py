"""The table of chips: which one a device is, and figures that cannot be mistaken in their units."""

import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

from zoo.commands.chips import CHIPS, Chip, chip_of, chip_of_topology, count_chips


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v5 lite", "TPU v5e"),
        ("TPU v5", "TPU v5p"),
        ("TPU v5p", "TPU v5p"),
        ("TPU v6 lite", "TPU v6e"),
        ("TPU v4", "TPU v4"),
        ("TPU7x", "TPU7x"),
        ("NVIDIA A100-SXM4-80GB", "A100 SXM 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200 SXM"),
        ("NVIDIA H200 NVL", "H200 NVL"),
    ],
)
def test_the_longest_matching_kind_is_the_chip(kind: str, name: str) -> None:
    chip = chip_of(kind)
    assert chip is not None
    assert chip.name == name


@pytest.mark.parametrize(
    "kind", ["cpu", "TPU v3", "NVIDIA A100X", "NVIDIA A100-SXM-64GB", "NVIDIA H100 80GB HBM3 MIG 3g.40gb", ""]
)
def test_what_the_table_does_not_know_is_none(kind: str) -> None:
    assert chip_of(kind) is None


def test_the_simulated_devices_are_no_chip() -> None:
    assert chip_of(jax.devices()[0].device_kind) is None


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_figures_are_in_single_units_and_have_a_source(chip: Chip) -> None:
    for value, low, high in (
        (chip.peak, 1e14, 1e16),
        (chip.memory, 1e10, 1e12),
        (chip.bandwidth, 5e11, 1e13),
        (chip.interconnect, 1e11, 1e12),
        (chip.network, 1e9, 1e11),
    ):
        assert value is None or low < value < high
    assert len(chip.source) > 20
    missing = [chip.memory, chip.bandwidth, chip.interconnect, chip.peak].count(None)
    assert not missing or any(word in chip.source for word in ("found", "differ", "disagree"))


def test_kinds_and_prefixes_name_one_chip_each() -> None:
    kinds = [c.kind for c in CHIPS]
    prefixes = [p for c in CHIPS for p in c.prefixes]
    assert len(set(kinds)) == len(kinds)
    assert len(set(prefixes)) == len(prefixes)


def test_topologies_find_their_chip_and_have_its_dimensions() -> None:
    for chip in (c for c in CHIPS if not c.kind.startswith("NVIDIA")):
        for topology in chip.topologies:
            assert chip_of_topology(topology) is chip
            assert len(topology.partition(":")[2].split("x")) == chip.dimensions
    assert chip_of_topology("v5:2x2x1") is chip_of_topology("v5p:2x2x1")
    assert chip_of_topology("v9:2x2") is None


@pytest.mark.devices8
def test_cores_that_share_coordinates_are_one_chip() -> None:
    cores = [SimpleNamespace(coords=[x, 0, 0], slice_index=s) for s in (0, 1) for x in (0, 1) for _ in (0, 1)]
    assert count_chips(cores) == 4
    assert count_chips(jax.devices()[:3]) == 3


# In its own process: libtpu is loaded once per process and its log would fill the report.
_ASK = """
from jax.experimental import topologies
from zoo.commands.chips import CHIPS, chip_of, count_chips
for chip in (c for c in CHIPS if not c.kind.startswith("NVIDIA")):
    for name in chip.topologies:
        devices = topologies.get_topology_desc(name, "tpu").devices
        sides = [int(n) for n in name.partition(":")[2].split("x")]
        chips = 1
        for side in sides:
            chips *= side
        assert chip_of(devices[0].device_kind) is chip, (name, devices[0].device_kind)
        assert count_chips(devices) == chips, (name, count_chips(devices))
        assert len(devices) == chips * chip.devices, (name, len(devices))
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the aot extra")
def test_the_compiler_knows_these_topologies_and_kinds() -> None:
    env = {**os.environ, "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"}
    done = subprocess.run([sys.executable, "-c", _ASK], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda12_plugin") is None, reason="needs the aot-cuda extra")
def test_the_compiler_for_gpus_takes_our_description() -> None:
    """An interface of jax that may change: a sampler of a few numbers, compiled for an H100 that is not here."""
    code = """
import jax, jax.numpy as jnp
from zoo import dist
from zoo.commands import aot
to = aot.target("h100:8")
assert len(to.devices) == 8 and to.chip.name == "H100 SXM", to
x = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(to.devices[0]))
needs = aot._compile(jax.jit(lambda x: x @ x).trace(x).lower(), to.chip).memory_analysis()
assert needs.argument_size_in_bytes == 64 * 64 * 4, needs
"""
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
