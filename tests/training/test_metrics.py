"""Metrics: exact numbers, strict JSON, and a resumed run's file equal to an unbroken run's."""

import io
import json
import re
import struct
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from efla_jax.training.metrics import MetricsWriter


def metrics_of(step):
    return {"loss": np.float32(1) / np.float32(3 * step), "tokens_per_second": 1e5 / step}


def write_steps(workdir, steps, resume_step=0):
    with MetricsWriter(workdir, total_steps=10, resume_step=resume_step) as writer:
        for step in steps:
            writer.write(step, metrics_of(step))


def strict_json(line):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(line, parse_constant=refuse)


def read_events(directory):
    """The events of all files in the order they were written in."""
    events = []
    for file in sorted(directory.iterdir(), key=lambda file: file.stat().st_mtime_ns):
        content = file.read_bytes()
        while content:
            [size] = struct.unpack("<Q", content[:8])
            event = event_pb2.Event()  # pyrefly: ignore[missing-attribute]
            event.ParseFromString(content[12 : 12 + size])
            events.append(event)
            content = content[16 + size :]
    return events


def test_values_come_back_exactly(tmp_path):
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 300, dtype=np.uint32).view(np.float32)
    values = [*bits[np.isfinite(bits)], np.float32(1e-45), np.float32(-0.0), np.float32(0.1)]
    with MetricsWriter(tmp_path, total_steps=1000) as writer:
        for step, value in enumerate(values, 1):
            # Through JAX half of the time, which flushes no subnormal on the way to the host.
            writer.write(step, {"loss": jnp.asarray(value) if step % 2 else value})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    read = np.array([strict_json(line)["loss"] for line in lines], np.float32)
    assert read.tobytes() == np.array(values, np.float32).tobytes()


def test_line_holds_step_first_and_python_numbers(tmp_path):
    metrics = {
        "loss": jnp.float32(0.1),
        "half": ml_dtypes.bfloat16(0.1),
        "accuracy": 0.1,
        "tokens": np.int64(2**40),
        "up": jnp.inf,
        "down": -np.float32(np.inf),
        "nan": jnp.float32(jnp.nan),
    }
    with MetricsWriter(tmp_path, total_steps=10) as writer:
        writer.write(3, metrics)
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"step": 3, "loss": 0.10000000149011612, "half": 0.10009765625, "accuracy": 0.1, '
        '"tokens": 1099511627776, "up": "Infinity", "down": "-Infinity", "nan": "NaN"}\n'
    )
    line = strict_json((tmp_path / "metrics.jsonl").read_text())
    assert [float(line[name]) for name in ("up", "down")] == [np.inf, -np.inf]
    assert np.isnan(float(line["nan"]))


def test_each_line_is_in_the_file_when_write_returns(tmp_path):
    with MetricsWriter(tmp_path, total_steps=10) as writer:
        for step in (1, 2, 3):
            writer.write(step, metrics_of(step))
            lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
            assert [json.loads(line)["step"] for line in lines] == list(range(1, step + 1))
            assert lines[-1].endswith("\n")


def test_resumed_file_equals_an_unbroken_runs_wherever_it_was_cut_off(tmp_path):
    """Checkpoint 4 was restored; the kill came at any byte written after it."""
    write_steps(tmp_path / "whole", range(2, 11, 2))
    whole = (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    at_four = whole.index(b'{"step": 6')
    file = tmp_path / "metrics.jsonl"
    for cut in [*range(at_four, at_four + 90, 6), len(whole) - 1, len(whole)]:
        file.write_bytes(whole[:cut])
        write_steps(tmp_path, [6, 8, 10], resume_step=4)
        assert file.read_bytes() == whole
    file.write_bytes(whole[: at_four - 1])  # by an editor: no line may be glued to this one
    write_steps(tmp_path, [6, 8, 10], resume_step=4)
    assert file.read_bytes() == whole[: whole.index(b'{"step": 4')] + whole[at_four:]
    file.write_bytes(whole[:at_four] + b"\0" * 50)  # what a power cut can leave
    write_steps(tmp_path, [6, 8, 10], resume_step=4)
    assert file.read_bytes() == whole
    write_steps(tmp_path, range(2, 11, 2))  # from scratch, over what a run without checkpoint left
    assert file.read_bytes() == whole


def test_damage_before_the_last_line_is_an_error(tmp_path):
    write_steps(tmp_path, [1, 2, 3])
    file = tmp_path / "metrics.jsonl"
    damaged = file.read_text().replace('"step": 2', '"stop": 2')
    file.write_text(damaged)
    with pytest.raises(ValueError, match=re.escape(f"{file}, line 2 is") + ".*must be an object"):
        write_steps(tmp_path, [4], resume_step=3)
    assert file.read_text() == damaged


def test_tensorboard_has_the_scalars_and_purges_on_resume(tmp_path):
    write_steps(tmp_path, [1, 2, 3])
    write_steps(tmp_path, [3, 4], resume_step=2)
    events = read_events(tmp_path / "tensorboard")
    start = 1  # of SessionLog's states
    restarts = [event.step for event in events if event.session_log.status == start]
    assert restarts == [1, 3]  # TensorBoard drops older events from these steps on
    logged = [(event.step, value.tag, value.simple_value) for event in events for value in event.summary.value]
    assert logged == [
        (step, name, np.float32(value)) for step in (1, 2, 3, 3, 4) for name, value in metrics_of(step).items()
    ]


def test_plain_lines_where_stderr_is_no_terminal(tmp_path, capsys):
    with MetricsWriter(tmp_path, total_steps=10) as writer:
        writer.write(4, {"loss": 0.123456, "tokens_per_second": 123456.7, "bad": np.inf})
        assert capsys.readouterr().err == ("step 4/10  loss 0.1235  tokens_per_second 123,457  bad inf\n")
    assert capsys.readouterr().out == ""


def test_bar_on_a_terminal(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with MetricsWriter(tmp_path, total_steps=10, resume_step=4) as writer:
        assert "4/10" in terminal.getvalue()
        writer.write(6, {"loss": 0.5})
        writer.write(10, {"loss": 0.25})
    last = terminal.getvalue().split("\r")[-1]
    assert "100%" in last
    assert "10/10" in last
    assert "loss=0.25" in last


def test_only_process_zero_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    write_steps(tmp_path, [1, 2])
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err == ""


def test_bad_input_is_named(tmp_path):
    with MetricsWriter(tmp_path, total_steps=10, resume_step=2) as writer:
        with pytest.raises(ValueError, match="step is 2; must be later than the last one, 2"):
            writer.write(2, {"loss": 1.0})
        writer.write(3, {"loss": 1.0})
        with pytest.raises(ValueError, match="step is 3; must be later than the last one, 3"):
            writer.write(3, {"loss": 1.0})
        with pytest.raises(ValueError, match=r"metric loss has shape \(2,\); must be a scalar"):
            writer.write(4, {"loss": jnp.zeros(2)})
        with pytest.raises(ValueError, match="a value named step"):
            writer.write(5, {"step": 5})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [3]
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=f"{tmp_path}/file"):
        MetricsWriter(tmp_path / "file", total_steps=10)
