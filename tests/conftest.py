"""Every test runs on simulated CPU devices, set up before jax is imported anywhere: two, or eight where it is marked `devices8`.

Programs are compiled with LLVM's optimisations off: they compile three times faster, and test sizes need no speed.
`XLA_FLAGS=--xla_backend_optimization_level=3 pytest` runs the suite on the code that users run, and `-m slow` does so by itself. Every
program is kept in the persistent cache. Seconds of processor time by file are written to `$ZOO_SECONDS`, and a whole run that
costs too much fails.
"""

import contextlib
import ctypes
import gc
import json
import os
import resource
import statistics
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import seconds

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# The second is what commands set: flags are read once, with the first array, and are part of what the cache knows programs by.
flags = ["xla_force_host_platform_device_count=8", "xla_cpu_collective_call_terminate_timeout_seconds=86400"]
if "slow" not in sys.argv:  # those train for minutes
    flags.append("xla_backend_optimization_level=0")
if tuple(map(int, version("jaxlib").split(".")[:2])) < (
    0,
    12,
):  # where it is no longer there, the default compiles as fast
    flags.append("xla_cpu_use_fusion_emitters=false")
for flag in flags:
    if flag.partition("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{flag}".strip()

_DEFAULT = 2  # devices that tests see: what is cut in two is cut, and compiles in half the time of eight parts
_WHOLE = 40  # files that a run must have more of for its cost to be judged
_seen = _DEFAULT
_reference = 0.0  # seconds of a program of known cost, timed with every file


@pytest.fixture(scope="session", autouse=True)
def _house() -> Iterator[None]:
    """One persistent compilation cache, and as many devices as the test that runs asks for."""
    import jax
    from fresh import placed

    from zoo import dist
    from zoo.train import step

    known = os.environ["XLA_FLAGS"]
    dist.start()
    jax.config.update("jax_traceback_in_locations_limit", 0)  # lines of source in programs take time and are not read
    gc.freeze()  # what is imported by now stays
    devices, local = jax.devices, jax.local_devices
    patch = pytest.MonkeyPatch()
    patch.setattr(jax, "devices", lambda *a, **k: devices(*a, **k)[:_seen])
    patch.setattr(jax, "local_devices", lambda *a, **k: local(*a, **k)[:_seen])
    patch.setattr(jax, "device_count", lambda *a: len(jax.devices(*a)))
    patch.setattr(jax, "local_device_count", lambda *a: len(jax.local_devices()))
    # What it gives, with JAX 0.12 to the bit, in a third of the time; tests with eight devices run the program itself.
    compiled = step.compile_init
    patch.setattr(step, "compile_init", lambda *args: (placed if _seen == _DEFAULT else compiled)(*args))
    yield
    patch.undo()
    assert os.environ["XLA_FLAGS"] == known, (
        "a test or a command changed the flags, and with them the keys of the cache"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Before the fixtures, those of a whole file too: so a file whose fixtures place arrays is marked whole."""
    global _seen, _began
    _began = _processor()
    _seen = 8 if item.get_closest_marker("devices8") else _DEFAULT


@pytest.fixture(scope="module", autouse=True)
def _forget() -> Iterator[None]:
    """The programs of a file are forgotten with it: all of them together would take gigabytes."""
    import jax

    global _reference
    _reference = seconds.reference()
    yield
    jax.clear_caches()
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc keeps what was freed, of hundreds of programs
        ctypes.CDLL(None).malloc_trim(0)


# --- seconds by file ------------------------------------------------------------------------------

_began = 0.0
_files: Counter[str] = Counter()
_speeds: list[float] = []
_memory = 0  # KiB that the largest worker has held


def _processor() -> float:
    """Seconds of processor time of this process and of those it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """What a test cost goes to the process that reports, which may be another."""
    outcome: Any = yield
    if call.when == "teardown":
        held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        used = {"seconds": _processor() - _began, "reference": _reference, "memory": held}
        outcome.get_result().user_properties += list(used.items())


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    global _memory
    found = dict(report.user_properties)
    if report.when == "teardown" and "seconds" in found:
        _files[report.nodeid.partition("::")[0]] += found["seconds"]
        _speeds.append(found["reference"])
        _memory = max(_memory, found["memory"])


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """A run of the whole suite fails where it costs too much."""
    if len(_files) > _WHOLE and seconds.report(_files, _speed())[1]:
        session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED
    if _files and "ZOO_SECONDS" in os.environ:
        Path(os.environ["ZOO_SECONDS"]).write_text(json.dumps({"reference": _speed(), "files": _files}, indent=1))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if len(_files) > _WHOLE:
        lines, over = seconds.report(_files, _speed())
        terminalreporter.section(f"seconds of processor time, reference {_speed():.3f} s")
        terminalreporter.write("\n".join([*lines, *over, f"{_memory / 2**20:.2f} GiB at most in one process", ""]))


def _speed() -> float:
    return statistics.mean(_speeds)
