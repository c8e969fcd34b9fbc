"""Every test runs on eight simulated CPU devices, set up before jax is imported anywhere.

Programs are compiled with LLVM's optimisations off: they compile three times faster, and test sizes need no speed.
`XLA_FLAGS=--xla_backend_optimization_level=3 pytest` runs the suite on the code that users run.
"""

import os

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
for flag in ("xla_force_host_platform_device_count=8", "xla_backend_optimization_level=0"):
    if flag.partition("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{flag}".strip()


@pytest.fixture(scope="session", autouse=True)
def _compile_cache() -> None:
    """One persistent compilation cache: a second run of the suite spends its time on tests."""
    from zoo import dist

    dist.start()
