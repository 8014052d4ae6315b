"""Settings of every test process. They must be in place before JAX is first imported.

On the CPU, unless JAX_PLATFORMS names a GPU (`make test-gpu`): kernels are then not interpreted. Tests marked cpu, with
the reason, are skipped there; tests marked gpu are skipped here.
"""

import os
import sys
from pathlib import Path

import pytest

DEVICES_FLAG = "--xla_force_host_platform_device_count"

if "jax" in sys.modules:
    raise pytest.UsageError("jax was imported before tests/conftest.py could set its options")


def _set_environment() -> None:
    """Environment variables rather than `jax.config`, so that child processes inherit them."""
    defaults = {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
        # Entries carry a checksum, so workers may share it: a torn one is compiled afresh.
        "JAX_COMPILATION_CACHE_DIR": str(Path(__file__).parents[1] / ".cache" / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        # OpenBLAS threads spin while they wait: two of them spend 4 to 10 times the CPU time of
        # one on small products, and the test workers (which inherit this) take it from each other.
        "OPENBLAS_NUM_THREADS": "1",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    flags = os.environ.get("XLA_FLAGS", "")
    if DEVICES_FLAG not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {DEVICES_FLAG}=8".strip()


_set_environment()


def _gpu_wanted() -> bool:
    platforms = os.environ["JAX_PLATFORMS"].split(",")
    return "cuda" in platforms or "gpu" in platforms


def pytest_configure() -> None:
    """Where a GPU was asked for and is not there, tests on the CPU would pass for it."""
    if not _gpu_wanted():
        return
    import jax

    if jax.default_backend() != "gpu":
        raise pytest.UsageError(
            f"JAX_PLATFORMS is {os.environ['JAX_PLATFORMS']}, but JAX finds no GPU: it runs on {jax.devices()[0]}"
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    wanted = _gpu_wanted()
    for item in items:
        of_cpu = item.get_closest_marker("cpu")
        if wanted and of_cpu is not None:
            item.add_marker(pytest.mark.skip(reason=f"not on a GPU: {of_cpu.args[0]}"))
        elif not wanted and item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU: make test-gpu"))
