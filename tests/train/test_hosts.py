"""Runs of several real processes on this machine: the same curve as one, agreed stops, lost processes, other numbers of them.

Four devices in all, whoever holds them. Most are slow: many processes share the cores of one machine.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
import processes
import pytest
from mistakes import told

from zoo import cli, hosts

pytestmark = pytest.mark.devices8

CONFIG = '''
"""A normal density of real digits that come slowly, split over two axes of a mesh."""

import math
import os
import time
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import linen as nn

from zoo.data.images import Digits
from zoo.data.pipeline import Data, Source
from zoo.dist import Mesh
from zoo.errors import UserError
from zoo.metrics.likelihood import Bits
from zoo.papers.tarflow import TarFlow
from zoo.run import Checkpoint, Run, Samples
from zoo.task import About, Likelihood, Metric, image_spec, sample_keys
from zoo.train.averages import Power
from zoo.train.optim import AdamW


@dataclass(frozen=True)
class Plain:
    pass


@dataclass(frozen=True)
class Density:
    Sampling = Plain
    about = About(likelihood=Likelihood((8, 8, 1), bins=8))

    def spec(self, batch):
        return image_spec(batch, 8, 1, 0)

    def init(self, rng):
        kernel = 0.1 * jax.random.normal(rng, (64, 64))
        return {"net": {"kernel": nn.LogicallyPartitioned(kernel, ("embed", "mlp")), "log_std": jnp.zeros(64)}}

    def nll(self, params, batch, keys):
        x = batch["image"].reshape(-1, 64) + jax.vmap(lambda key: jax.random.uniform(key, (64,)))(keys) / 8
        net = params["net"]
        return -jax.scipy.stats.norm.logpdf(x, jnp.tanh(net["kernel"].sum(0)), jnp.exp(net["log_std"])).sum(1)

    def loss(self, params, batch, rng):
        loss = self.nll(params, batch, sample_keys(rng, len(batch["image"]))).mean() / 64
        return loss, {"bits": loss / math.log(2) + 3}

    def sample(self, params, rng, n, conditions=None, options=None):
        noise = jax.vmap(lambda key: jax.random.normal(key, (64,)))(sample_keys(rng, n))
        net = params["net"]
        return {"image": (jnp.tanh(net["kernel"].sum(0)) + jnp.exp(net["log_std"]) * noise).reshape(n, 8, 8, 1)}


class Rows(Source):
    def __init__(self, inner):
        self.inner, self.labels, self.augment = inner, inner.labels, inner.augment

    def __len__(self):
        return len(self.inner)

    def __getitem__(self, index):
        time.sleep(float(os.environ.get("PAUSE", 0)))
        return self.inner[index]


@dataclass(frozen=True)
class Slow(Data):
    def source(self, split, spec=None):
        if os.environ.get("WITHOUT_DATA") == os.environ.get("JAX_PROCESS_ID", "none"):
            raise UserError("the digits are not on this host")
        return Rows(Digits().source(split, spec))


config = Run(
    task=Density(),
    data=Slow(),
    steps=16,
    batch=16,
    optim=AdamW(lr=0.003, schedule="constant", clip=1.0),
    ema=Power(0.1),
    mesh=Mesh(data=2, fsdp=2),
    checkpoint=Checkpoint(every=4, snapshots=4),
    samples=Samples(n=4),
    evals=(Bits(batch=32, limit=64),),
    log_every=1,
)

plain = replace(config, samples=Samples(n=0), evals=())
flow = replace(
    config,
    task=TarFlow(
        image=8, channels=1, patch=4, width=8, depth=1, blocks=1, head_dim=8, noise_type="uniform", levels=17
    ),
)


@dataclass(frozen=True)
class Sick(Metric):
    every: int = 6
    name = "sick"

    def __call__(self, task, params, data, rng):
        if os.environ.get("SICK") == os.environ.get("JAX_PROCESS_ID", "none"):
            raise OSError("no room for the figure")
        return {"fine": 1.0}


sick = replace(plain, evals=(Sick(),))

if os.environ.get("UNREADABLE", "") == os.environ.get("JAX_PROCESS_ID", "none"):
    from zoo.train.checkpoint import Checkpoints

    read = Checkpoints._read

    def unreadable(self, step, like):
        if step == 8:
            raise OSError("a cable is loose")
        return read(self, step, like)

    Checkpoints._read = unreadable
'''
STEPS, DEVICES, LIMIT = 16, 4, 180
TIMEOUT = 8  # seconds after which a process counts as lost


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Cluster:
    """The processes of one run."""

    def __init__(self, root: Path, name: str, count: int, fields: Sequence[Sequence[str]], **environ: Any) -> None:
        self.root, self.name, self.count = root, name, count
        address = f"127.0.0.1:{free_port()}"
        known = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        known |= {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES // count} --xla_backend_optimization_level=0",
            "ZOO_CACHE": str(root / "cache"),
            "ZOO_PEER_TIMEOUT": str(TIMEOUT),
            **{k.upper(): str(v) for k, v in environ.items()},
        }
        self.processes = []
        for i in range(count):
            kind = "" if name in ("one", "two", "four", "stopped") else name if name in ("sick", "flow") else "plain"
            which = f"config.py:{kind}".removesuffix(":")
            joined = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(i)}
            with (root / f"{name}.{i}.txt").open("wb") as out:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "zoo.cli", "train", which, f"workdir=runs/{name}", *fields[i]],
                        cwd=root,
                        env=known | (joined if count > 1 else {}),
                        stdout=out,
                        stderr=subprocess.STDOUT,
                    )
                )

    def said(self, i: int) -> str:
        return (self.root / f"{self.name}.{i}.txt").read_text(errors="replace")

    def codes(self) -> list[int]:
        """Exit codes, once all have ended."""
        end = time.monotonic() + LIMIT
        return [p.wait(max(1, end - time.monotonic())) for p in self.processes]

    def until(self, true: Callable[[], bool]) -> None:
        end = time.monotonic() + LIMIT
        while not true():
            assert all(p.poll() is None for p in self.processes), self.said(0)
            assert time.monotonic() < end, "they do not get there"
            time.sleep(0.02)


class Runs(processes.Runs):
    """Several processes train each of them."""

    def start(self, name: str, count: int, *fields: str, each: Sequence[str] = (), **environ: Any) -> Cluster:
        own = [[*fields, *([each[i]] if each else [])] for i in range(count)]
        cluster = Cluster(self.root, name, count, own, **environ)
        self.children += cluster.processes
        return cluster

    def finish(self, name: str, count: int, *fields: str) -> Cluster:
        cluster = self.start(name, count, *fields)
        assert cluster.codes() == [0] * count, [cluster.said(i)[-2000:] for i in range(count)]
        return cluster

    def curve(self, name: str) -> np.ndarray:
        """Bits (the loss, but far from zero) and gradient norm of every step, each logged once."""
        train = [r for r in self.records(name) if "loss" in r]
        assert [r["step"] for r in train] == list(range(1, STEPS + 1))
        return np.array([*(r["bits"] for r in train), *(r["grad_norm"] for r in train)])

    def held_out(self, name: str) -> list[float]:
        return [r["bpd"] for r in self.records(name) if "bpd" in r]

    def assert_same_bits(self, name: str, other: str) -> None:
        chex.assert_trees_all_equal(self.state(name, STEPS), self.state(other, STEPS))
        np.testing.assert_array_equal(self.curve(name), self.curve(other))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """With a run `one` of this process alone."""
    made = Runs(tmp_path_factory.mktemp("hosts"))
    (made.root / "config.py").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made.root)
        devices = jax.devices()[:DEVICES]
        for name in ("devices", "local_devices"):
            patch.setattr(jax, name, lambda *_: devices)
        assert cli.main(["train", "config.py", "workdir=runs/one", "--quiet"]) == 0
    yield made
    for process in made.children:
        process.kill()


@pytest.fixture(scope="module")
def calm(runs: Runs) -> Runs:
    """With a run `two` of two processes that nothing disturbed."""
    runs.finish("two", 2)
    return runs


@pytest.fixture(scope="module")
def stopped(runs: Runs) -> Cluster:
    """A run of two processes, of which one gets a SIGTERM; then it is started again."""
    cluster = runs.start("stopped", 2, pause=0.03)
    cluster.until(lambda: runs.reached("stopped") >= 5)
    cluster.processes[1].send_signal(signal.SIGTERM)
    assert cluster.codes() == [0, 0], [cluster.said(i)[-2000:] for i in range(2)]
    last = runs.saved("stopped")[-1]
    assert 5 <= last < STEPS
    assert runs.reached("stopped") == last
    assert f"step {last} is saved" in cluster.said(0)
    cluster = runs.finish("stopped", 2)
    assert f"step {last} of" in cluster.said(0)
    return cluster


def test_sigterm_to_one_stops_all_after_the_same_step_and_two_follow_the_curve_of_one(
    runs: Runs, stopped: Cluster
) -> None:
    np.testing.assert_allclose(runs.curve("stopped"), runs.curve("one"), rtol=1e-6)
    np.testing.assert_allclose(runs.held_out("stopped"), runs.held_out("one"), rtol=1e-6)
    sheets = [sorted(p.name for p in (runs.folder(n) / "samples").iterdir()) for n in ("one", "stopped")]
    assert sheets[0] == sheets[1] != []
    assert "step 16/16" in stopped.said(0)  # process 0 speaks for all
    assert "step 16/16" not in stopped.said(1)


@pytest.mark.slow
def test_a_stopped_run_ends_as_one_that_nothing_disturbed(calm: Runs, stopped: Cluster) -> None:
    calm.assert_same_bits("stopped", "two")


@pytest.mark.slow
def test_a_killed_process_ends_the_others_soon_and_the_run_goes_on(calm: Runs) -> None:
    cluster = calm.start("killed", 2, pause=0.03)
    cluster.until(lambda: calm.reached("killed") >= 6 and bool(calm.saved("killed")))
    cluster.processes[1].kill()
    begin = time.monotonic()
    assert cluster.codes() == [3, -signal.SIGKILL]  # 3: start it again
    assert time.monotonic() - begin < 5 * TIMEOUT
    assert "process 1 has not answered" in cluster.said(0)
    assert "Start the same command again" in cluster.said(0)
    assert f"step {calm.saved('killed')[-1]} of" in calm.finish("killed", 2).said(0)
    calm.assert_same_bits("killed", "two")


@pytest.mark.slow
def test_the_first_process_killed_ends_the_others_and_fewer_go_on_with_the_same_batches(runs: Runs) -> None:
    cluster = runs.start("headless", 2, pause=0.03)
    cluster.until(lambda: runs.reached("headless") >= 6 and bool(runs.saved("headless")))
    cluster.processes[0].kill()
    begin = time.monotonic()
    codes = cluster.codes()
    assert time.monotonic() - begin < 5 * TIMEOUT
    assert codes[0] == -signal.SIGKILL
    assert codes[1] not in (0, 2), "a launcher would not start it again"
    assert re.search("another task died|process 0 has not answered", cluster.said(1))
    runs.finish("headless", 1)
    np.testing.assert_allclose(runs.curve("headless"), runs.curve("one"), rtol=1e-6)


def test_different_configs_are_refused_before_the_first_step(runs: Runs) -> None:
    cluster = runs.start("differ", 2, each=["optim.lr=0.003", "optim.lr=0.004"])
    assert cluster.codes() == [2, 2]
    assert "optim.lr: 0.003 -> 0.004" in cluster.said(1)
    assert "process 1 says" in cluster.said(0)
    assert "optim.lr: 0.003 -> 0.004" in cluster.said(0)
    assert not runs.folder("differ").exists()


@pytest.mark.slow  # it is told as other configs are
def test_a_mistake_on_one_host_stops_all(runs: Runs) -> None:
    cluster = runs.start("mistake", 2, without_data=1)
    assert cluster.codes() == [2, 2]
    assert "the digits are not on this host" in cluster.said(1)
    assert "process 1 says: the digits are not on this host" in cluster.said(0)
    assert not runs.folder("mistake").exists()


@pytest.mark.slow
def test_a_figure_that_fails_on_one_process_ends_all(runs: Runs) -> None:
    cluster = runs.start("sick", 2, sick=1)
    codes = cluster.codes()
    assert codes[0] == 3
    assert codes[1] not in (0, 2)
    assert "process 1 says: step 6 cannot be taken (no room for the figure)" in cluster.said(0)
    assert "no room for the figure" in cluster.said(1)
    assert runs.saved("sick") == [4]


@pytest.mark.slow
def test_a_checkpoint_that_one_process_cannot_read_is_left_at_the_next_start(calm: Runs) -> None:
    calm.finish("loose", 2, "steps=8")
    cluster = calm.start("loose", 2, unreadable=1)
    assert cluster.codes() == [3, 3]
    assert "a cable is loose" in cluster.said(0)
    assert "8.broken" in cluster.said(1)
    assert calm.saved("loose") == [4]
    assert "step 4 of" in calm.finish("loose", 2).said(0)
    calm.assert_same_bits("loose", "two")


@pytest.mark.slow
def test_a_flow_whose_layers_are_scanned_and_gathered_follows_the_curve_of_one_process(runs: Runs) -> None:
    runs.finish("flow", 1)
    runs.folder("flow").rename(runs.folder("flow of one"))
    runs.finish("flow", 2)
    np.testing.assert_allclose(runs.curve("flow"), runs.curve("flow of one"), rtol=1e-6)
    np.testing.assert_allclose(runs.held_out("flow"), runs.held_out("flow of one"), rtol=1e-6)
    sheets = [sorted(p.name for p in (runs.folder(n) / "samples").iterdir()) for n in ("flow", "flow of one")]
    assert sheets[0] == sheets[1] != []


@pytest.mark.slow
def test_four_processes(runs: Runs) -> None:
    runs.finish("four", 4)
    np.testing.assert_allclose(runs.curve("four"), runs.curve("one"), rtol=1e-6)
    np.testing.assert_allclose(runs.held_out("four"), runs.held_out("one"), rtol=1e-6)
    for count in (1, 2):
        name = f"from4to{count}"
        runs.finish(name, 4, "steps=8")
        runs.finish(name, count)
        np.testing.assert_allclose(runs.curve(name)[:STEPS], runs.curve("one")[:STEPS], rtol=1e-6)
    cluster = runs.start("killed4", 4, pause=0.03)
    cluster.until(lambda: runs.reached("killed4") >= 6 and bool(runs.saved("killed4")))
    cluster.processes[2].kill()
    codes = cluster.codes()
    assert all(code not in (0, 2) for code in codes)
    runs.finish("killed4", 4)
    runs.assert_same_bits("killed4", "four")


# ------------------------------------------------------------------------------------------------ what the environment says


def test_the_environment_says_who_takes_part() -> None:
    address = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    srun = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"}
    for environ, wanted in (
        ({}, None),
        (address, {"coordinator_address": "a:1", "num_processes": 2, "process_id": 1}),
        ({**address, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        (
            {**srun, "CUDA_VISIBLE_DEVICES": "0,1,2"},
            {"cluster_detection_method": "slurm", "local_device_ids": [0, 1, 2]},
        ),
        (
            {**srun, "SLURM_STEP_TASKS_PER_NODE": "4(x2)"},
            {"cluster_detection_method": "slurm", "local_device_ids": None},
        ),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, None),
        ({"TPU_WORKER_HOSTNAMES": "h0,h1"}, {}),
    ):
        assert hosts._wanted(environ) == wanted, environ


def test_half_an_address_is_refused() -> None:
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    for values, words in (
        (("a:1",), "JAX_COORDINATOR_ADDRESS set but not JAX_NUM_PROCESSES, JAX_PROCESS_ID"),
        (("a", "2", "0"), "JAX_COORDINATOR_ADDRESS=a must be HOST:PORT"),
        (("a:1", "2", "2"), "JAX_PROCESS_ID=2 must be below JAX_NUM_PROCESSES=2"),
    ):
        with told(words):
            hosts.start(dict(zip(names, values)))


def test_alone_everything_is_agreed() -> None:
    assert hosts.main()
    assert not hosts.several()
    assert hosts.all_agree(True, "x")
    assert not hosts.all_agree(False, "x")
    assert hosts.run_on_main(lambda: 3) == 3
    assert not hosts.asked_to_stop(1)
    hosts.same({"a": 1})
    hosts.stop(1)
    np.testing.assert_array_equal(hosts.fetch({"x": jax.numpy.arange(3)})["x"], [0, 1, 2])
