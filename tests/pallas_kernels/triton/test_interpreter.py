"""Plants bugs in a copy of the Triton kernels and sees the interpreter's check find each.

Runs in the environment of `make check-gpu-compile`, which checks the kernels themselves.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PYTHON = ROOT / ".cache" / "gpu-compile" / "bin" / "python"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="`make check-gpu-compile` makes the environment"),
]

# file, what stands there, what is planted, cases that must fail, a word of the message
BUGS = {
    "decay of the state": ("scan", "state_KV *= total", "state_KV *= 1.0", "T150", "is "),
    "half of a group": (
        "gradients",
        "h = key_head * group + shared",
        "h = key_head * group",
        "H2/4",
        "NaN or nothing",
    ),
    "diagonal of M": ("prepare", "i_C[:, None] != i_C[None, :], erase", "i_C[:, None] >= 0, erase", "T64", "is "),
    "last merge": ("prepare", "if C > 32:", "if C > 64:", "T64", "is "),
    "document before": (
        "tiles",
        "tl.where(start > 0, tl",
        "tl.where(start < 0, tl",
        "sm_90 |k|²=1 scale=0.5 decay borders=(1, 64",
        "is ",
    ),
    "leak": ("tiles", "(doc_C[:, None] == doc_C[None, :])", "(doc_C[:, None] >= 0)", "borders=(99,)", "leaks"),
    "read past T": ("tiles", "mask=(start + i_C < T)[:, None], other=0.0", "", "T9", "NaN or nothing"),
    "write past T": ("tiles", "x, mask=(start + i_C < T)[:, None]", "x", "T9", "wrote outside"),
    "sums of parts": (
        "gradients",
        "at_part = at + part * ",
        "at_part = at + 0 * ",
        "K128 V128 sm_80",
        "NaN or nothing",
    ),
    "sign of dM": ("gradients", "d_gram_CC = (-erase_C", "d_gram_CC = (erase_C", "T64", "d_key is"),
    "one coefficient": ("launch", "d_erase + d_write, None", "d_erase, None", "borders=(70,) bare", "d_erase is"),
    "log-decay": ("gradients", "2.0 * erase_C * d_erase_C", "erase_C * d_erase_C", "T9", "d_log_decay is"),
}


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_found(name, tmp_path):
    module, right, wrong, only, message = BUGS[name]
    for folder in ("efla_jax", "experiments"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    shutil.copytree(ROOT / "pallas_kernels", tmp_path / "pallas_kernels")
    path = tmp_path / "pallas_kernels" / "triton" / f"{module}.py"
    text = path.read_text()
    assert right in text, "the place to plant the bug in is gone"
    path.write_text(text.replace(right, wrong))
    command = [PYTHON, "-m", "experiments.kernels.check_triton", "interpret", f"--only={only}"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "XLA_FLAGS": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert message in done.stdout + done.stderr
