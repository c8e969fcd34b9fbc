"""Every test runs on eight simulated CPU devices, set up before jax is imported anywhere."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

import pytest


@pytest.fixture(scope="session", autouse=True)
def _compile_cache() -> None:
    """One persistent compilation cache: a second run of the suite spends its time on tests."""
    from zoo import dist

    dist.start()
