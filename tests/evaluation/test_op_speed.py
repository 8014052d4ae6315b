"""Times of programs, what a call must move and multiply, and the profiler's events."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from efla_jax.evaluation import op_speed
from efla_jax.evaluation.op_accuracy import Case
from efla_jax.evaluation.op_speed import (
    BOTH,
    FORWARD,
    DoesNotFit,
    Program,
    call_seconds,
    compile_jax,
    floor_seconds,
    spread,
    work,
)


def test_spread():
    assert spread([4.0, 1.0, 2.0, 3.0, 10.0]) == {"median": 3.0, "first_quartile": 2.0, "third_quartile": 4.0}


class Clock:
    """Stands in for the clock and for a device: calls queue up, and waiting takes `seconds` for each."""

    def __init__(self, seconds, monkeypatch):
        self.now, self.queued, self.log = 0.0, 0, []
        self.seconds = seconds
        monkeypatch.setattr(op_speed, "time", SimpleNamespace(perf_counter=lambda: self.now))

    def program(self):
        return Program(self.run, self.wait, 3, 0.0)

    def run(self, n):
        self.log.append(n % 3)
        self.queued += 1
        return len(self.log)

    def wait(self, result):
        assert result == len(self.log)  # of the last call
        self.now += self.seconds * self.queued
        self.queued = 0


def test_calls_are_queued_and_inputs_taken_in_turn(monkeypatch):
    clock = Clock(3e-3, monkeypatch)
    samples = call_seconds(clock.program(), repeats=4)
    np.testing.assert_allclose(samples, [3e-3] * 4)
    assert clock.log[:3] == [0, 0, 0]  # before anything is timed
    assert clock.log[3:] == [0, 1, 2, 0, 1, 2, 0] * 4  # 7 calls last 0.02 s


def test_long_calls_are_repeated_less(monkeypatch):
    clock = Clock(0.6, monkeypatch)
    assert len(call_seconds(clock.program(), repeats=9)) == 3
    assert len(call_seconds(clock.program(), repeats=2)) == 2


def test_compiled_programs():
    sets = [(jnp.full((64, 64), float(n)),) for n in (1, 2)]
    program = compile_jax(lambda x: x @ x, sets)
    for n, value in ((0, 64), (1, 256), (2, 64)):
        result = program.run(n)
        program.wait(result)
        np.testing.assert_array_equal(result, np.full((64, 64), float(value)))
    assert program.compile_seconds > 0
    assert program.peak_bytes is not None
    assert 2 * 64 * 64 * 4 <= program.peak_bytes < 1 << 20


def test_a_program_that_does_not_fit_is_not_run(monkeypatch):
    monkeypatch.setattr(op_speed, "device_memory", lambda: 1 << 14)
    with pytest.raises(DoesNotFit, match=r"it needs 0\.0 GiB, the device has 0\.0"):
        compile_jax(lambda x: x @ x, [(jnp.ones((64, 64)),)])


def test_work_by_hand():
    """8 × 2048 × 16 heads of 128 in bfloat16: 262144 token-heads."""
    case, token_heads, state = Case(8, 2048, 16, 128, 128), 262144, 4 * 8 * 16 * 128 * 128
    assert work(case, FORWARD)["bytes"] == token_heads * (4 * 256 + 4) + state
    assert work(case, BOTH)["bytes"] == token_heads * (4 * 256 + 7 * 256 + 3 * 4) + state
    unit = 64 * 128 * 128 / 64  # multiply-adds a token-head of C·D², a C×C×D product being half of it
    assert work(case, FORWARD)["flops"] == 2 * token_heads * (3 + 4 / 2) * unit
    assert work(case, BOTH)["flops"] == 2 * token_heads * (10 + 14 / 2) * unit
    grouped = Case(8, 2048, 16, 128, 128, key_heads=4, log_decay=True, state=True)
    assert work(grouped, FORWARD)["bytes"] == token_heads * (256 / 2 + 2 * 256 + 8) + 2 * state
    assert work(grouped, BOTH)["bytes"] == token_heads * (256 * 3 / 2 + 5 * 256 + 24) + 4 * state


def test_the_floor_is_the_slower_of_moving_and_multiplying():
    case = Case(1, 64, 1, 64, 64)
    need = work(case, FORWARD)
    slow, fast = dict(bytes_per_second=1.0, flops_per_second=1e30), dict(bytes_per_second=1e30, flops_per_second=1.0)
    assert floor_seconds(case, FORWARD, slow) == need["bytes"]
    assert floor_seconds(case, FORWARD, fast) == need["flops"]


def test_events_of_streams_alone_are_summed():
    event = lambda name, nanoseconds: SimpleNamespace(name=name, duration_ns=nanoseconds)
    line = lambda name, *events: SimpleNamespace(name=name, events=events)
    gpu = SimpleNamespace(
        name="/device:GPU:0",
        lines=[
            line("Stream #7(Compute)", event("solve", 100.0), event("scan", 300.0), event("scan", 500.0)),
            line("Stream #8(MemcpyD2D)", event("copy" * 100, 50.0)),
            line("XLA Modules", event("jit_forward", 1e6)),
        ],
    )
    host = SimpleNamespace(name="/host:CPU", lines=[line("Stream #1", event("python", 1e6))])
    kernels = op_speed._sum_events([host, gpu], calls=2)
    assert list(kernels) == ["scan", "solve", ("copy" * 100)[:160]]
    assert kernels["scan"] == {"launches": 1.0, "seconds": pytest.approx(400e-9)}
    assert kernels["solve"] == {"launches": 0.5, "seconds": pytest.approx(50e-9)}


def test_no_kernel_times_without_a_gpu(monkeypatch):
    clock = Clock(1.0, monkeypatch)
    assert op_speed.kernel_seconds(clock.program()) is None
    assert clock.log == []
