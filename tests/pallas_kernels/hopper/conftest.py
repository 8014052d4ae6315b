"""The tests of this folder are of one implementation."""

import pytest


@pytest.fixture
def implementation() -> str:
    return "pallas_gpu"
