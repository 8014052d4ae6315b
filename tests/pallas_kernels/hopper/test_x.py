import importlib

import pytest

from pallas_kernels.hopper import pieces
from pallas_kernels.hopper.pieces import Plan
from tests.pallas_kernels.hopper.helpers import assert_accurate, documents, rounded


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(
    ("sizes", "starts"),
    [
        (dict(length=440), (10, 64, 150, 290)),
        (dict(length=440, key_dim=128, value_dim=128), None),
        (dict(length=264, decay=True, value_dim=128), None),
    ],
)
@pytest.mark.parametrize("share", [2, 1])
def test_both(monkeypatch, sizes, starts, share):
    monkeypatch.setattr(pieces, "plan", lambda *call: Plan(True, share, share))
    monkeypatch.setattr(importlib.import_module("pallas_kernels.hopper.forward"), "PROCESSORS", 1)
    inputs, cotangent = rounded(batch=1, **sizes)
    ids = None if starts is None else documents(starts, *inputs["key"].shape[:2])
    assert_accurate(inputs, cotangent, segment_ids=ids)
