"""Tables and plots of the numerical study, of made-up measurements."""

import json

import numpy as np
import pytest

from experiments.numerics.plan import EFLA, NORMS, RAW, SLOW, UNIT, implementations_for, points
from experiments.numerics.report import RESULTS, write
from experiments.numerics.results import Rows

KINDS = ["float32", "bfloat16", "float16", "float8"]
FACTS = {"command": "make it", "device": "a card", "commit": "abc"}


def error_row(point, name, bad=None):
    error = None if bad is not None else {"float32": 1e-7}.get(point.kind, 3e-3)
    result = {"error": error, "floor": 1e-3, "norm_ratio": 1.0, "nonfinite": 0, "by_position": [1.0] * 16}
    return {
        "part": point.part, "length": point.sizes.length, "keys": [point.keys.low, point.keys.high],
        "rule": point.rule, "type": point.kind, "implementation": name, "errors": dict.fromkeys(RESULTS, result),
        "reason": None, "first_nonfinite": bad, "oracle_first_nonfinite": None,
    }  # fmt: skip


def training_row(task, rule, dtype):
    rng = np.random.default_rng(0)
    bins = lambda: rng.uniform(0.1, 1, (3, 2, 16)).tolist()
    losses: list[float | None] = [2.0 - 0.01 * n for n in range(100)]
    losses[50] = None if dtype == "float16" else losses[50]
    return {
        "task": task, "rule": rule, "type": dtype, "steps": 1000, "nonfinite_steps": 7 * (dtype == "float16"),
        "first_nonfinite_step": 500 if dtype == "float16" else None, "loss_every_10": losses,
        "grad_norm_every_10": losses, "final_loss": None if dtype == "float16" else 1.25,
        "layer_norms": {"embed": [1.0, None], "blocks/0/mixer": [2.0, 3.0]}, "every": 500,
        "value_gradient_norms": bins(), "value_gradient_zeros": bins(), "evaluation": {"loss": 1.5, "accuracy": 0.5},
        "seconds": 10.0, "seconds_a_step": 0.01, "at_least_a_step": {"flops": 2e9, "bytes": 3e6}, "kernels": True,
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    errors = Rows(tmp_path / "error.json", FACTS)
    for point in points(["lengths", "norms", "rules"], [1024, 4096], 1024, KINDS, 2, 128):
        for name in implementations_for(point.kind, ["xla", "pallas_gpu"]):
            bad = 64 if point.rule == "euler" and point.keys.high > 4 else None
            errors.add(f"{point}/{name}", error_row(point, name, bad))
    errors.add("oracle", {"part": "oracle", "rule": "exact", "length": 1024, "loop_errors": {"output": 1e-15}})
    training = Rows(tmp_path / "training.json", FACTS)
    for task in ("smnist", "wikitext2"):
        for rule in ("efla", "deltanet"):
            for dtype in ("float32", "bfloat16", "float16"):
                training.add(f"{task}/{rule}/{dtype}", training_row(task, rule, dtype))
    return tmp_path


def test_points():
    every = points(["lengths", "norms", "rules"], [1024, 4096], 1024, KINDS, 2, 128)
    assert len(every) == len({str(point) for point in every}) == 4 * (len(NORMS) + 2 * len(RAW) + 2 * 3)
    assert [keys.low for keys in NORMS[:10]] == pytest.approx(np.logspace(-6, 3, 10))
    assert [(EFLA.low, EFLA.high), (SLOW.low, SLOW.high), (UNIT.low, UNIT.high)] == [(0.1, 10), (1e-4, 1e-4), (1, 1)]
    served = {kind: implementations_for(kind, ["xla", "pallas_gpu"]) for kind in KINDS}
    kernels = ["pallas_gpu"]
    assert served == {"float32": ["xla"], "bfloat16": ["xla", *kernels], "float16": kernels, "float8": kernels}


def test_report(folder):
    written = write(folder)
    assert [path.name for path in written] == ["results.md", "error.png", "norms.png", "training.png", "gradients.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written[1:])
    text = written[0].read_text()
    assert text.count("- commit: abc") == 2
    assert "| EFLA, ‖k‖² 0.1 … 10 | bfloat16, pallas_gpu | 4,096 | 1.00e-03 | 3.00e-03 |" in text
    assert "| 10 | euler | bfloat16, pallas_gpu | token 64 | all finite |" in text
    assert "| exact | 1,024 | 1.00e-15 | – |" in text
    assert "| smnist | efla | float16 | kernels | 1,000 | 7, first 500 | – | loss 1.5000, accuracy 0.5000 |" in text


def test_report_of_one_half(folder):
    (folder / "error.json").unlink()
    (folder / "training.json").rename(folder / "training-a.json")
    assert [path.name for path in write(folder)] == ["results.md", "training.png", "gradients.png"]
    rows = json.loads((folder / "training-a.json").read_text())["rows"]
    assert len(rows) == 12
