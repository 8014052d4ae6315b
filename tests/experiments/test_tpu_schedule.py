"""What is read from the TPU compiler's dumps."""

import pytest

from experiments.kernels.tpu_schedule import (
    SUFFIX,
    collectives,
    estimated_cycles,
    issued,
    operations,
    read_schedule,
    schedules,
)

DUMP = """== CAPACTIY:
MXU, VALU, VSTORE:SPILL
    4     4     1
== UTILIZATION:
1 2 0
3 0 1
0 0 0
"""
HLO = """HloModule jit_step

%body.1 (p.1: f32[8]) -> f32[8] {
  %p.1 = f32[8] parameter(0)
  ROOT %inner.2 = f32[8]{0:T(128)} fusion(%p.1), calls=%other, backend_config={"c":{"estimated_cycles":"10"}}
}

%condition.1 (p.2: f32[8]) -> pred[] {
  ROOT %less = pred[] fusion(%p.2), backend_config={"window_config":{"estimated_cycles":"1000"}}
}

ENTRY %main.3_spmd (a: f32[8]) -> f32[8] {
  %a = f32[8] parameter(0)
  %gathered.1 = (f32[2,8]{1,0}, f32[16,8]{1,0}) all-gather-start(%a), replica_groups={{0,1}}
  %kernel.4 = f32[8] custom-call(%a), custom_call_target="tpu_custom_call"
  %sum = f32[8] all-reduce(%kernel.4), to_apply=%add
  ROOT %while.5 = f32[8] while(%kernel.4), condition=%condition.1, body=%body.1
}
"""


def test_units():
    schedule = read_schedule("kernel", DUMP)
    assert schedule.bundles == 3
    assert schedule.used == {"MXU": 4, "VALU": 2, "VSTORE:SPILL": 1}
    assert schedule.use("MXU") == pytest.approx(4 / 12)


def test_rows_of_other_lengths_are_refused():
    with pytest.raises(ValueError, match="kernel: 3 units, but rows of other lengths"):
        read_schedule("kernel", DUMP + "1 2\n")


def test_folder(tmp_path):
    (tmp_path / f"123-kernel.4-70-{SUFFIX}").write_text(DUMP)
    (tmp_path / "124-kernel.4-71-final_bundles.txt").write_text("")
    assert list(schedules(tmp_path)) == ["kernel.4"]
    (tmp_path / f"kernel-{SUFFIX}").write_text(DUMP)
    with pytest.raises(ValueError, match="name of a file"):
        schedules(tmp_path)


def test_loops_are_opened():
    """The body runs as often as is said; what a fusion calls, and the condition, do not count."""
    names = {name: times for name, _, times in operations(HLO, 16)}
    assert names["inner.2"] == 16
    assert names["kernel.4"] == 1
    assert "less" not in names
    assert estimated_cycles(HLO, 16) == 160
    found = {"kernel.4": read_schedule("kernel.4", DUMP), "inner.2": read_schedule("inner.2", DUMP)}
    assert issued(HLO, found, 16, lambda name: 5 if name == "kernel.4" else 1) == 3 * 5 + 3 * 16


def test_no_program():
    with pytest.raises(ValueError, match="no entry"):
        estimated_cycles("HloModule nothing", 1)


def test_collectives():
    assert collectives(HLO) == [("all-gather", [(2, 8), (16, 8)]), ("all-reduce", [(8,)])]
