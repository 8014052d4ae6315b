"""Decoding steps on a small shape: a row for each, its errors, and why another library has none."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*options):
    command = [sys.executable, "-m", "experiments.kernels.decode_speed", *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)


def test_rows(tmp_path):
    names = ("xla", "pallas_gpu", "fla")
    done = run(
        "--shapes=2x3x16", f"--implementations={','.join(names)}", "--steps=3", "--repeats=2", "--commit=abc",
        f"--output={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "decode.json").read_text())["rows"]
    assert [row["implementation"] for row in rows] == list(names)
    assert rows[0]["seconds"]["median"] > 0
    assert rows[0]["error_output"] < 2**-8  # rounded to bfloat16
    assert rows[0]["error_state"] < 2**-20
    assert "pallas_gpu" in rows[1]["reason"]
    assert rows[2]["reason"].startswith("No module")
    assert "- commit: abc" in (tmp_path / "decode.md").read_text()


def test_refuses_a_malformed_shape():
    assert "shape is '8x2048'; it must be BxHxD" in run("--shapes=8x2048").stderr
