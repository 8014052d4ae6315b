"""Programs that are compiled faster than they run."""

import contextlib
from collections.abc import Iterator

import jax
import pytest


@contextlib.contextmanager
def unoptimized() -> Iterator[None]:
    """Compiles without most optimizations: for small programs that run once, most of the time is the compiler's."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(autouse=True, scope="module")
def compiled_fast() -> Iterator[None]:
    """For every test of a folder whose conftest.py imports it."""
    with unoptimized():
        yield
