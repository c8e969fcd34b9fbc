"""`zoo bench` compiles a step twice, the second time with what the first has kept, and leaves the user's cache alone."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zoo.commands import bench as module

CACHE = (
    "jax_compilation_cache_dir",
    "jax_enable_compilation_cache",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)
EYE = np.eye(3, dtype=np.float32)  # jax.numpy would compile small programs of its own, and keep them


@pytest.fixture
def users_cache(tmp_path: Path) -> Iterator[Path]:
    """A cache that no other process writes to, in the place of the user's."""
    before = {name: jax.config.values[name] for name in CACHE}
    try:
        for name, value in zip(CACHE, (str(tmp_path), True, 0.0, -1)):
            jax.config.update(name, value)
        yield tmp_path
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        module.compilation_cache.reset_cache()


@pytest.mark.parametrize("enabled", [True, False])
def test_the_second_compilation_reads_what_the_first_kept_and_the_users_cache_stays(
    enabled: bool, users_cache: Path
) -> None:
    jax.config.update("jax_enable_compilation_cache", enabled)
    settings = {name: jax.config.values[name] for name in CACHE}
    program, figures = module.compile_twice(jax.jit(lambda x: jnp.sin(x) @ x), EYE)
    assert {name: jax.config.values[name] for name in CACHE} == settings
    assert isinstance(figures["train compile s, warm"], float)
    assert not list(users_cache.iterdir())
    np.testing.assert_allclose(program(EYE), np.sin(EYE), rtol=1e-6)


def test_later_programs_go_to_the_users_cache(users_cache: Path) -> None:
    module.compile_twice(jax.jit(lambda x: jnp.cos(x) @ x), EYE)
    assert not list(users_cache.iterdir())
    jax.jit(lambda x: jnp.tan(x) @ x).lower(EYE).compile()
    assert list(users_cache.iterdir())


def test_a_program_that_no_cache_keeps_has_no_warm_compilation(
    users_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_new_cache", contextlib.nullcontext)
    jax.config.update("jax_enable_compilation_cache", False)
    module.compilation_cache.reset_cache()
    _, figures = module.compile_twice(jax.jit(lambda x: x + 1), jnp.ones(3))
    assert figures["train compile s"] > 0
    assert str(figures["train compile s, warm"]).startswith("not measured")
