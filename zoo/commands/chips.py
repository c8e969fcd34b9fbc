"""What chips can do: one table, each figure with its source; whatever no source states is None."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Chip:
    """Facts about one kind of chip. Rates are per chip and per second, in one direction, in units of 1 and not of 1,000."""

    name: str
    kind: str  # what JAX's `device_kind` begins with
    peak: float | None  # dense FLOP/s of matrix products in bfloat16
    memory: float | None  # bytes of device memory that a program may use
    bandwidth: float | None  # bytes/s of that memory
    interconnect: float | None  # bytes/s that a chip can send over all its links to other chips
    network: float | None  # bytes/s of the data-centre network
    source: str
    prefixes: tuple[str, ...] = ()  # names of the generation in a topology such as v5e:4x4, the usual one first
    devices: int = 1  # JAX devices per chip, as a topology describes them
    dimensions: int = 0  # of a topology; 0: there is none
    topologies: tuple[str, ...] = ()  # some that exist, for sentences that say what to write instead


_GIB = 2**30
_CLOUD = "Google Cloud TPU documentation"
# The compiler's own limit is what decides whether a program fits; the documentation rounds it up to the chip's memory.
_LIMIT = "memory is the limit that libtpu 0.0.42 compiles against"
# ICI figures of the documentation count both directions and are halved here; GPU servers differ in their network.
_SHEET = "NVIDIA data sheet; NVLink counts both directions there and is halved here; the network depends on the server"

CHIPS = (
    Chip(
        name="TPU v4",
        kind="TPU v4",
        peak=275e12,
        memory=30.75 * _GIB,
        bandwidth=1200e9,
        interconnect=270e9,
        network=None,
        source=f"{_CLOUD}, page v4; ICI: six links of 45 GB/s each way from the JAX scaling book, as the page's all-reduce "
        f"bandwidth of 1.1 PB/s per 4,096 chips says too; {_LIMIT}; no figure found for its network",
        prefixes=("v4",),
        devices=2,  # a TPU VM joins the two cores to one device ("megacore"), a topology does so only when asked
        dimensions=3,
        topologies=("v4:2x2x1", "v4:2x2x2", "v4:2x2x4", "v4:2x4x4", "v4:4x4x4"),
    ),
    Chip(
        name="TPU v5e",
        kind="TPU v5 lite",
        peak=197e12,
        memory=15.75 * _GIB,
        bandwidth=819e9,
        interconnect=200e9,
        network=6.4e12 / 8 / 256,
        source=f"{_CLOUD}, page v5e (another version of it says 800 GB/s of memory bandwidth); network: 6.4 Tbit/s per "
        f"256 chips; {_LIMIT}",
        prefixes=("v5e",),
        dimensions=2,
        topologies=("v5e:2x2", "v5e:2x4", "v5e:4x4", "v5e:4x8", "v5e:8x8", "v5e:8x16", "v5e:16x16"),
    ),
    Chip(
        name="TPU v5p",
        kind="TPU v5",
        peak=459e12,
        memory=95.74 * _GIB,
        bandwidth=2765e9,
        interconnect=600e9,
        network=50e9 / 8,
        source=f"{_CLOUD}, page v5p; {_LIMIT}",
        prefixes=("v5p", "v5"),
        dimensions=3,
        topologies=("v5p:2x2x1", "v5p:2x2x2", "v5p:2x4x4", "v5p:4x4x4", "v5p:4x4x8", "v5p:8x8x8"),
    ),
    Chip(
        name="TPU v6e",
        kind="TPU v6 lite",
        peak=918e12,
        memory=31.25 * _GIB,
        bandwidth=1600e9,
        interconnect=400e9,
        network=25.6e12 / 8 / 256,
        source=f"{_CLOUD}, page v6e (page tpu7x says 1,638 GB/s of memory bandwidth); network: 25.6 Tbit/s per 256 chips; "
        f"{_LIMIT}",
        prefixes=("v6e",),
        dimensions=2,
        topologies=("v6e:2x2", "v6e:2x4", "v6e:4x4", "v6e:4x8", "v6e:8x8", "v6e:8x16", "v6e:16x16"),
    ),
    Chip(
        name="TPU7x",
        kind="TPU7x",
        peak=2307e12,
        memory=2 * 94.75 * _GIB,
        bandwidth=7380e9,
        interconnect=600e9,
        network=100e9 / 8,
        source=f"{_CLOUD}, page tpu7x; {_LIMIT}, 94.75 GiB for each of the two devices",
        prefixes=("tpu7x",),
        devices=2,
        dimensions=3,
        topologies=("tpu7x:2x2x1", "tpu7x:2x2x2", "tpu7x:2x2x4", "tpu7x:2x4x4", "tpu7x:4x4x4"),
    ),
    Chip("A100 SXM 40GB", "NVIDIA A100-SXM4-40GB", 312e12, 40e9, 1555e9, 300e9, None, _SHEET),
    Chip("A100 SXM 80GB", "NVIDIA A100-SXM4-80GB", 312e12, 80e9, 2039e9, 300e9, None, _SHEET),
    Chip(
        "A100 PCIe 40GB", "NVIDIA A100-PCIE-40GB", 312e12, 40e9, 1555e9, 300e9, None, f"{_SHEET}; with an NVLink bridge"
    ),
    Chip(
        "A100 PCIe 80GB", "NVIDIA A100 80GB PCIe", 312e12, 80e9, 1935e9, 300e9, None, f"{_SHEET}; with an NVLink bridge"
    ),
    Chip(
        name="H100 SXM",
        kind="NVIDIA H100 80GB HBM3",
        peak=989e12,
        memory=80e9,
        bandwidth=3350e9,
        interconnect=450e9,
        network=None,
        source=_SHEET,
        prefixes=("h100",),
        dimensions=1,
        topologies=("h100:1", "h100:8"),
    ),
    Chip(
        name="H100 PCIe",
        kind="NVIDIA H100 PCIe",
        peak=756e12,
        memory=80e9,
        bandwidth=2000e9,
        interconnect=None,
        network=None,
        source="NVIDIA data sheet and product brief PB-11133; no figure found for its bridge",
    ),
    Chip(
        name="H100 NVL",
        kind="NVIDIA H100 NVL",
        peak=835e12,
        memory=94e9,
        bandwidth=None,
        interconnect=None,
        network=None,
        source="NVIDIA data sheet; sources disagree on the bandwidths of one card of the pair",
    ),
    Chip(
        name="H200 SXM",
        kind="NVIDIA H200",
        peak=989e12,
        memory=141e9,
        bandwidth=4800e9,
        interconnect=450e9,
        network=None,
        source=_SHEET,
        prefixes=("h200",),
        dimensions=1,
        topologies=("h200:1", "h200:8"),
    ),
    Chip(
        name="H200 NVL",
        kind="NVIDIA H200 NVL",
        peak=None,
        memory=141e9,
        bandwidth=4800e9,
        interconnect=None,
        network=None,
        source="NVIDIA data sheet; no figure found for its peak and its bridge",
    ),
)


def chip_of(device_kind: str) -> Chip | None:
    """The chip behind JAX's `device_kind`; None for a CPU, an unknown chip, or a slice of a GPU (MIG).

    GPUs are named down to their memory: cards of one family differ in their peak too.
    """
    if " MIG " in device_kind:
        return None  # the figures are those of a whole chip
    # "TPU v5 lite" begins with "TPU v5" too: the longest match is meant
    matches = [chip for chip in CHIPS if device_kind.startswith(chip.kind)]
    return max(matches, key=lambda chip: len(chip.kind), default=None)


def chip_of_topology(topology: str) -> Chip | None:
    """The chip of a topology such as `v5e:4x4`; None where no generation has that name."""
    prefix = topology.partition(":")[0].lower()
    return next((chip for chip in CHIPS if prefix in chip.prefixes), None)


def read_topology(text: str) -> tuple[Chip, tuple[int, ...]] | None:
    """Chip and shape of a topology such as `v5e:4x4`; None where that is no name of one."""
    chip, sizes = chip_of_topology(text), text.partition(":")[2].split("x")
    if chip is None or not all(s.isdecimal() and int(s) for s in sizes) or len(sizes) != chip.dimensions:
        return None
    return chip, tuple(map(int, sizes))


def count_chips(devices: Iterable[Any]) -> int:
    """How many chips these JAX devices are: the cores of a TPU chip share its coordinates, a GPU is a chip of its own."""
    return len({(getattr(d, "slice_index", 0), *d.coords) if hasattr(d, "coords") else d for d in devices})
