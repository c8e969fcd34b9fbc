"""Every test runs on eight simulated CPU devices, set up before jax is imported anywhere.

Programs are compiled with LLVM's optimisations off: they compile three times faster, and test sizes need no speed.
`XLA_FLAGS=--xla_backend_optimization_level=3 pytest` runs the suite on the code that users run.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
_WANTED = {"xla_force_host_platform_device_count": 8, "xla_backend_optimization_level": 0}
_GIVEN = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = " ".join([_GIVEN, *(f"--{k}={v}" for k, v in _WANTED.items() if k not in _GIVEN)]).strip()

import pytest


@pytest.fixture(scope="session", autouse=True)
def _compile_cache() -> None:
    """One persistent compilation cache: a second run of the suite spends its time on tests."""
    from zoo import dist

    dist.start()
