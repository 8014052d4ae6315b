"""The byte and FLOP model against counts made by hand."""

import dataclasses

import pytest

from experiments.kernels.roofline import (
    BENCHMARK,
    CHUNK,
    DESIGNS,
    DEVICES,
    MATRICES,
    VECTORS,
    Device,
    Kernel,
    Products,
    Shape,
    parse_shape,
    passes,
    report,
    table,
)

SHAPE = Shape(8, 2048, 16, 128, 128)
UNIT = CHUNK * 128 * 128  # multiply-adds of a chunk's product with the state


def matrix_bytes(kernels, saving=False):
    """Bytes per token and value head that are matrices', by kernel."""
    return [kernel.bytes(SHAPE, MATRICES, saving=saving) for kernel in kernels]


def units(kernels):
    """Products in units, without those of the inverse ([C, C] by [C, C])."""
    plain = [dataclasses.replace(kernel.products, ccc=0) for kernel in kernels]
    return sum(products.macs(SHAPE) for products in plain) / UNIT


def test_bytes_of_two_forward_kernels():
    """Keys in and the inverse out; then q, k, v and the inverse in, the output out: 256 bytes each, the inverse 128."""
    forward = DESIGNS["split"].forward
    assert matrix_bytes(forward) == [384, 1152]
    assert matrix_bytes(forward, saving=True) == [384, 1152 + 512]


def test_bytes_of_one_forward_kernel_are_those_of_query_key_value_and_output():
    assert matrix_bytes(DESIGNS["fused"].forward) == [1024]


def test_bytes_of_the_backward_with_saved_and_with_recomputed_states():
    assert matrix_bytes(DESIGNS["split"].backward) == [1664, 2944]
    assert matrix_bytes(DESIGNS["fused"].backward) == [2432]
    assert matrix_bytes(DESIGNS["recomputed"].backward) == [1152, 1664, 2944]


def test_vectors_add_their_bytes():
    """Three float32 coefficients a token with decay, and float32 states of 64 KiB at both ends of 2048 tokens."""
    (kernel,) = DESIGNS["fused"].forward
    gated = dataclasses.replace(SHAPE, gated=True)
    assert kernel.bytes(SHAPE) == 1024 + 8 + 2 * 32
    assert kernel.bytes(gated) == 1024 + 12 + 2 * 32


def test_value_heads_share_the_bytes_of_their_key_head():
    shared = dataclasses.replace(SHAPE, key_heads=4)
    prepare, scan = DESIGNS["split"].forward
    assert prepare.bytes(shared, MATRICES) == 64 + 128
    assert scan.bytes(shared, MATRICES) == 2 * 64 + 2 * 256 + 128


def test_products_of_forward_and_backward():
    """5 units forward, 11½ backward with saved states, 2½ more where they are made again."""
    split, recomputed = DESIGNS["split"], DESIGNS["recomputed"]
    assert units(split.forward) == units(DESIGNS["fused"].forward) == 5
    assert units(DESIGNS["fused"].backward) == 10.5
    assert units(split.backward) == 11.5
    assert units(recomputed.backward) == 14


def test_products_follow_their_sizes():
    shape = Shape(1, 64, 1, 32, 16)
    assert Products(ckv=1).macs(shape) == 64 * 32 * 16
    assert Products(cck=2).macs(shape) == 2 * 64 * 64 * 32
    assert Products(ccv=3).macs(shape) == 3 * 64 * 64 * 16
    assert Products(ccc=1).macs(shape) == 64**3


def test_design_moves_only_arrays_that_exist_and_were_made():
    given = {"q", "k", "v", "erase", "write", "decay", "initial", "do", "dfinal"}
    for design in DESIGNS.values():
        made = set(given)
        for kernel, saving in passes(design)["training"]:
            assert made.issuperset(kernel.reads), kernel.name
            made |= set(kernel.writes) | (set(kernel.saves) if saving else set())
        assert {"o", "final", "dq", "dk", "derase", "dwrite", "ddecay", "dinitial"} <= made
        assert made <= set(MATRICES | VECTORS)


def test_time_is_bytes_over_bandwidth_and_flops_over_rate():
    kernel = Kernel("copy", ("q",), ("o",), Products(ckv=1), "head")
    shape = Shape(2, 64, 1, 128, 128)
    memory, products = kernel.seconds(shape, Device(1e9, 1e12, 2))
    assert memory == pytest.approx(128 * 512 / 1e9)
    assert products == pytest.approx(2 * 2 * UNIT / 1e12)


@pytest.mark.parametrize(("blocks", "busy"), [("head", 16 / 132), ("columns", 32 / 132), ("chunk", 1)])
def test_multiprocessors_without_a_block_do_not_multiply(blocks, busy):
    kernel = Kernel("kernel", (), (), Products(ckv=1), blocks)
    shape = Shape(1, 16384, 16, 128, 128)
    assert kernel.busy(shape, DEVICES["H100"]) == busy
    assert kernel.seconds(shape, DEVICES["H100"])[1] == pytest.approx(kernel.flops(shape) * 262144 / 798e12 / busy)


def test_table_sums_kernels():
    lines = table(SHAPE, DESIGNS["split"], DEVICES["H100"]).splitlines()[4:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    names = [row[0] for row in cells]
    assert names == [
        "inference: prepare",
        "inference: forward",
        "**inference**",
        "training: prepare",
        "training: forward, saving",
        "training: backward_scan",
        "training: gradients",
        "**training**",
    ]
    total = lambda rows, column: sum(float(row[column]) for row in rows)
    for part, row in ((cells[:2], cells[2]), (cells[3:7], cells[7])):
        for column in (1, 2):
            assert float(row[column]) == pytest.approx(total(part, column), abs=0.3)
        for column in (3, 4, 5, 6, 7):
            assert float(row[column]) == pytest.approx(total(part, column), rel=0.01, abs=0.003)


def test_report_covers_the_benchmark():
    shapes = [parse_shape(text) for text in BENCHMARK]
    text = report(shapes, "fused", "H200")
    assert text.startswith("Design fused, H200 at 4.3 TB/s and 788 TFLOP/s, 132 multiprocessors")
    assert all(f"{shape}:" in text for shape in shapes)


@pytest.mark.parametrize("text", ["8,2048,16,128", "8,2048,16,128,x", "8,0,16,128,128", ""])
def test_malformed_shape_is_refused(text):
    with pytest.raises(ValueError, match="shape: expected"):
        parse_shape(text)


@pytest.mark.parametrize("key_heads", [0, 3, 32])
def test_key_heads_that_do_not_divide_the_heads_are_refused(key_heads):
    with pytest.raises(ValueError, match="key_heads"):
        parse_shape("1,64,16,128,128", key_heads)


@pytest.mark.parametrize(("batch", "busy"), [(8, 128 / 132), (4, 128 / 132), (5, 80 / 132), (1, 32 / 132)])
def test_columns_where_they_fit(batch, busy):
    """16 heads of 128 columns a row: two blocks of threads each, unless they would not all run at once."""
    kernel = DESIGNS["fused"].forward[0]
    shape = Shape(batch, 2048, 16, 128, 128)
    assert kernel.busy(shape, DEVICES["H100"]) == pytest.approx(busy)
