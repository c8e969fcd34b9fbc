"""Every test runs on simulated CPU devices, set up before jax is imported anywhere: two, or eight where it is marked `devices8`.

Programs are compiled with LLVM's optimisations off: they compile three times faster, and test sizes need no speed.
`XLA_FLAGS=--xla_backend_optimization_level=3 pytest` runs the suite on the code that users run. Every program is kept in the
persistent cache. The seconds of processor time of every file are written to `$ZOO_SECONDS`, a JSON object a line.
"""

import gc
import json
import os
import resource
import time
from collections.abc import Iterator
from importlib.metadata import version

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
flags = ["xla_force_host_platform_device_count=8", "xla_backend_optimization_level=0"]
if tuple(map(int, version("jaxlib").split(".")[:2])) < (
    0,
    12,
):  # where it is no longer there, the default compiles as fast
    flags.append("xla_cpu_use_fusion_emitters=false")
for flag in flags:
    if flag.partition("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{flag}".strip()

_DEFAULT = 2  # devices that tests see: what is cut in two is cut, and compiles in half the time of eight parts
_seen = _DEFAULT


@pytest.fixture(scope="session", autouse=True)
def _house() -> Iterator[None]:
    """One persistent compilation cache, and as many devices as the test that runs asks for."""
    import jax

    from zoo import dist

    dist.start()
    jax.config.update("jax_traceback_in_locations_limit", 0)  # lines of source in programs take time and are not read
    gc.freeze()  # what is imported by now stays
    devices, local = jax.devices, jax.local_devices
    patch = pytest.MonkeyPatch()
    patch.setattr(jax, "devices", lambda *a, **k: devices(*a, **k)[:_seen])
    patch.setattr(jax, "local_devices", lambda *a, **k: local(*a, **k)[:_seen])
    patch.setattr(jax, "device_count", lambda *a: len(jax.devices(*a)))
    patch.setattr(jax, "local_device_count", lambda *a: len(jax.local_devices()))
    yield
    patch.undo()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before the fixtures, those of a whole file too: so a file whose fixtures place arrays is marked whole."""
    global _seen
    _seen = 8 if item.get_closest_marker("devices8") else _DEFAULT


@pytest.fixture(scope="module", autouse=True)
def _forget() -> Iterator[None]:
    """The programs of a file are forgotten with it: all of them together would take gigabytes."""
    import jax

    yield
    jax.clear_caches()
    gc.collect()


# --- seconds by file ------------------------------------------------------------------------------


def _processor() -> float:
    """Seconds of processor time of this process and of those it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """One line a test: file, test, seconds of processor and clock, largest memory of the worker in MiB."""
    used, clock = _processor(), time.perf_counter()
    yield
    if "ZOO_SECONDS" in os.environ:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        name, _, test = item.nodeid.partition("::")
        record = {
            "file": name,
            "test": test,
            "cpu": _processor() - used,
            "wall": time.perf_counter() - clock,
            "MiB": memory,
        }
        with open(os.environ["ZOO_SECONDS"], "a") as f:
            f.write(json.dumps(record) + "\n")
