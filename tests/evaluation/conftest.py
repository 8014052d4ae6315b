"""Small programs that run once; optimized ones are run by the tests of training and of the commands."""

from collections.abc import Iterator

import pytest

from tests.optimization import unoptimized


@pytest.fixture(autouse=True, scope="module")
def compiled_fast() -> Iterator[None]:
    with unoptimized():
        yield
