"""`efla compare`: rows of implementations, their table and plot, and the command's refusals."""

import json

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest

from efla_jax.cli import main
from efla_jax.evaluation import EvaluationError, comparison
from efla_jax.evaluation.comparison import Bench, Candidate, implementation, measure, split_name
from efla_jax.evaluation.op_accuracy import Case
from efla_jax.evaluation.op_report import COLUMNS, HEADING, cells, error_table, line, plot, table
from efla_jax.evaluation.op_speed import BOTH, FORWARD, DoesNotFit, Program

BEST = {"bytes_per_second": 1e9, "flops_per_second": 1e11}


@pytest.fixture(scope="module")
def bench():
    return Bench(Case(1, 70, 2, 4, 4, state=True, dtype="float32"), gradients=True)


# ---- measuring ----


@pytest.mark.parametrize("name", ["xla", "scan:euler", "xla:delta_rule"])
def test_right_implementations_have_small_errors(bench, name):
    gradients = {"d_query", "d_key", "d_value", "d_initial_state"}
    gradients |= {"d_erase", "d_write"} if name.endswith("delta_rule") else {"d_beta"}
    for direction, extra in ((FORWARD, set()), (BOTH, gradients)):
        row = measure(bench, name, direction, BEST, repeats=2)
        assert row["reason"] is None
        assert set(row["errors"]) == {"output", "state"} | extra
        assert all(0 < result["error"] < 1e-5 for result in row["errors"].values())
        assert row["suspects"] == []
        assert row["kernels"] is None  # there is no GPU
        assert 0 < row["seconds"]["first_quartile"] <= row["seconds"]["median"] <= row["seconds"]["third_quartile"]
        assert row["compile_seconds"] > 0
        assert row["peak_bytes"] > 4 * 4 * 70 * 2 * 4
        json.dumps(row)


def test_a_wrong_rule_has_a_large_error(bench):
    """euler against the reference of exact: what is compared is the function that was asked for."""
    build = lambda name, *where: implementation("xla:euler", *where)
    row = measure(bench, "xla", FORWARD, BEST, build=build, repeats=1)
    assert row["errors"]["output"]["error"] > 0.05


@pytest.mark.parametrize("known", [True, False])
def test_documents(monkeypatch, known):
    """Whose ids the program is given, or knows when tracing."""
    given = []
    compile_jax = comparison.compile_jax
    monkeypatch.setattr(comparison, "compile_jax", lambda fn, sets: given.append(sets[0][0]) or compile_jax(fn, sets))
    bench = Bench(Case(1, 70, 2, 4, 4, documents=3, known=known, dtype="float32"), gradients=True)
    assert str(bench.case).endswith("3 documents known when tracing" if known else "3 documents")
    for direction in (FORWARD, BOTH):
        row = measure(bench, "xla", direction, BEST, repeats=1)
        assert all(0 < result["error"] < 1e-5 for result in row["errors"].values())
    assert ["segment_ids" in inputs for inputs in given] == [not known] * 2


def test_only_documents_are_known():
    with pytest.raises(EvaluationError, match="known is True; documents must be more than 1"):
        Case(1, 70, 2, 4, 4, known=True)


def test_silent_zeros_are_suspected(bench):
    def build(name, bench, direction):
        program, results = implementation(name, bench, direction)
        halved = lambda found: {n: x.at[..., :2].set(0) if n == "d_value" else x for n, x in found.items()}
        return Candidate(program, lambda found: results(halved(found)))

    row = measure(bench, "xla", BOTH, BEST, build=build, repeats=1)
    assert row["suspects"] == ["d_value"]
    assert "wrong norm: d_value" in line(row)


def raising(error):
    def build(name, bench, direction):
        raise error

    return build


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (NotImplementedError("not on this device"), "not on this device"),
        (DoesNotFit("it needs too much"), "it needs too much"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: of 9 GiB\nmore"), "RESOURCE_EXHAUSTED: of 9 GiB"),
    ],
)
def test_what_is_not_served_is_a_row_with_the_reason(bench, error, reason):
    row = measure(bench, "xla", FORWARD, BEST, build=raising(error), repeats=1)
    assert row["reason"] == reason
    assert reason in line(row)
    assert line(row).startswith("xla ")


@pytest.mark.parametrize("error", [jax.errors.JaxRuntimeError("INTERNAL: a kernel failed"), TypeError("a bug")])
def test_errors_of_the_program_itself_are_not_hidden(bench, error):
    with pytest.raises(type(error)):
        measure(bench, "xla", FORWARD, BEST, build=raising(error), repeats=1)


def test_another_function_has_times_and_no_errors(bench):
    program = Program(lambda n: jnp.ones(3), jax.block_until_ready, 1, 0.5)
    row = measure(bench, "softmax", FORWARD, BEST, build=lambda *_: Candidate(program, lambda _: {}), repeats=1)
    assert row["errors"] == {}
    assert cells(row)[3:] == ["other function", "–", "–", "0.5"]


def test_names():
    assert split_name("xla") == ("xla", "exact")
    assert split_name("pallas_gpu:delta_rule") == ("pallas_gpu", "delta_rule")
    with pytest.raises(EvaluationError, match=r"implementation is 'xal'; .*did you mean 'xla'\?"):
        split_name("xal")
    with pytest.raises(EvaluationError, match=r"rule is 'eulre'; .*did you mean 'euler'\?"):
        split_name("xla:eulre")


def test_accelerators_get_sets_of_inputs_larger_than_a_cache(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(comparison, "_CACHES", 20_000)
    bench = Bench(Case(1, 64, 2, 8, 8), gradients=False)  # 4 × 2 KiB and beta
    assert len(bench.draws) == 3
    assert len({np.asarray(draw.inputs["key"]).tobytes() for draw in bench.draws}) == 3


# ---- the report ----


def row(name, median, direction=FORWARD, shape="1×2×3×4", **changes):
    seconds = {"median": median, "first_quartile": 0.9 * median, "third_quartile": 1.2 * median}
    errors = {"output": {"error": 1e-3, "norm_ratio": 1.0}, "d_key": {"error": 2e-3, "norm_ratio": 1.0}}
    found = dict(shape=shape, direction=direction, implementation=name, floor_seconds=1e-3, reason=None, suspects=[])
    found |= dict(errors=errors, seconds=seconds, kernels=None, compile_seconds=2.0, peak_bytes=3 << 20)
    return found | changes


KERNELS = {"a": {"launches": 1.0, "seconds": 1e-3}, "b": {"launches": 2.0, "seconds": 5e-4}}
ROWS = [
    row("pallas_gpu", 0.0, reason="not here", errors={}),
    row("xla", 2e-3),
    row("scan", 6e-3, kernels=KERNELS),
    row("xla", 4e-3, BOTH),
    row("xla", 1e-3, shape="9×9×9×9"),
]


def test_cells_of_a_row():
    assert cells(ROWS[2]) == ["6 (5.4 … 7.2)", "1.5", "6.00", "1.0e-03", "2.0e-03 d_key", "3", "2.0"]
    assert cells(ROWS[0]) == ["not here"] + [""] * (len(COLUMNS) - 1)
    start = HEADING.index("error of output")
    assert line(ROWS[2])[start:].startswith("1.0e-03")


def test_tables():
    parts = table(ROWS).split("\n\n")
    assert parts[0] == "**1×2×3×4, forward**; floor 1 ms"
    lines = parts[1].splitlines()
    assert [text.split(" | ")[:2] for text in lines[2:]] == [
        ["| pallas_gpu", ""],
        ["| xla", "1.00×"],  # the first with a time
        ["| scan", "3.00×"],
    ]
    assert len({text.count("|") for text in lines}) == 1
    assert parts[2] == "**1×2×3×4, forward + backward**; floor 1 ms"
    assert parts[4] == "**9×9×9×9, forward**; floor 1 ms"
    assert error_table(ROWS).splitlines() == [
        "| error | output | d_key |", "|---|---|---|", "| xla | 1.0e-03 | 2.0e-03 |", "| scan | 1.0e-03 | 2.0e-03 |",
    ]  # fmt: skip
    assert error_table(ROWS[:1]) == ""


def test_plot_draws_every_measured_row(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    plot(ROWS, tmp_path / "times.png")
    monkeypatch.undo()
    (fig,) = drawn
    forward, both = fig.axes
    assert [axis.get_ylabel() for axis in fig.axes] == ["forward, ms", "forward + backward, ms"]
    points = {bars.get_label(): bars.lines[0].get_xydata() for bars in forward.containers}
    np.testing.assert_allclose(points["xla"], [[-0.2, 2], [0.8, 1]])
    np.testing.assert_allclose(points["scan"], [[0.2, 6]])
    spreads = forward.containers[1].lines[2][0].get_segments()
    np.testing.assert_allclose(spreads[0], [[0.2, 5.4], [0.2, 7.2]])
    assert [text.get_text() for text in forward.get_xticklabels()] == ["1×2×3×4", "9×9×9×9"]
    assert len(both.containers[0].lines[0].get_xydata()) == 1
    plt.close(fig)
    assert (tmp_path / "times.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(EvaluationError, match="cannot be written"):
        plot(ROWS, tmp_path / "no" / "times.png")


# ---- the command ----


def test_the_command(capsys, tmp_path):
    arguments = ["--implementations=scan,xla,pallas_tpu", "--shape=2,70,4,8,16", "--backward", "--packed=3"]
    arguments += ["--key_heads=2", "--log_decay", "--repeats=2", "--dtype=float32", f"--output={tmp_path / 'new'}"]
    main(["compare", *arguments])
    out = capsys.readouterr().out
    results = json.loads((tmp_path / "new" / "compare.json").read_text())
    rows = {(row["implementation"], row["direction"]): row for row in results["rows"]}
    assert len(rows) == 6
    assert {row["shape"] for row in rows.values()} == {"2×70×4×8×16, 2 key heads, 3 documents, log-decay"}
    for name in ("scan", "xla"):
        both = rows[name, BOTH]["errors"]
        gradients = {f"d_{input}" for input in ("query", "key", "value", "beta", "log_decay", "initial_state")}
        assert set(both) == {"output", "state"} | gradients
        assert all(result["error"] < 1e-5 for result in both.values())
        assert f"| {name} | {both['output']['error']:.1e} |" in out
    for direction in (FORWARD, BOTH):
        assert "it needs a TPU" in rows["pallas_tpu", direction]["reason"]
        assert rows["pallas_tpu", direction]["reason"] in out
    assert results["ceilings"]["bytes_per_second"] > 1e8
    assert results["ceilings"]["flops_per_second"] > 1e9
    assert results["errors"].endswith("for 2 of 2 rows and 2 of 2 key heads")
    assert (tmp_path / "new" / "compare.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--shape=… is missing"),
        (["--shape=1,2,3"], "--shape is '1,2,3'; it must be five positive sizes B,T,H,K,V"),
        (["--shape=1,2,3,x,5"], "--shape is '1,2,3,x,5'"),
        (["--shape=1,2,0,4,5"], "--shape is '1,2,0,4,5'"),
        (["--shape=1,8,1,4,4", "--implementations=scan,xal"], "'xal'; it must be one of pallas_gpu, triton"),
        (["--shape=1,8,1,4,4", "--implementations="], "--implementations needs a value"),
        (["--shape=1,8,1,4,4", "--dtype=float8"], "dtype is 'float8'; it must be one of bfloat16"),
        (["--shape=1,8,1,4,4", "--packed=9"], "9 documents do not fit into length=8"),
        (["--shape=1,8,1,4,4", "--packed=0"], "--packed is 0; it must be at least 1"),
        (["--shape=1,8,4,4,4", "--key_heads=3"], "key_heads is 3; it must divide heads=4"),
        (["--shape=1,8,4,4,4", "--key_heads=0"], "--key_heads is 0; it must be at least 1"),
        (["--shape=1,8,1,4,4", "--repeats=0"], "--repeats is 0; it must be at least 1"),
        (["--shape=1,8,1,4,4", "--repeats=many"], "--repeats is 'many'; it must be an integer"),
        (["--shape=1,8,1,4,4", "--backwards"], "unknown option '--backwards'; did you mean '--backward'?"),
        (["--shape=1,8,1,4,4", "backward"], "unknown option 'backward'"),
        (["--shape=1,8,1,4,4", "--output=file/in"], "--output is 'file/in', which cannot be made a folder"),
    ],
)
def test_refusals_of_the_command(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as error:
        main(["compare", *arguments])
    assert error.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("efla compare: ")
    assert message in err
    assert err.count("\n") == 1
