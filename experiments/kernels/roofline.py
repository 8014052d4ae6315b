"""What each kernel must move and multiply at least, and the time that no card can go below.

python -m experiments.kernels.roofline [--shape=B,T,H,K,V ...] [--key-heads=N] [--gated] [--design=fused]
                                       [--device=H100]

Prints for every kernel of a design and every shape: bytes and FLOPs per token and value head, in all, and the time
that each takes on the card at its measured rates; the larger of the two is the kernel's floor. A kernel's arrays and
products are data: `DESIGNS`. Bytes are those of main memory, each array once; what a cache serves again, rows of
padding and everything that is no matrix product (exponentials, masks, sums) are free. Products are counted whole, as
the tensor cores take them: the masked half of a triangle is multiplied too.

Per token and value head, with C = 64 tokens a chunk: a [T, K] array in bfloat16 is 2 K bytes, of which value heads
that share a key head share one; a [C, C] array 2 C; the states of all chunks 2 K V / C; a coefficient 4; a float32
state at either end 4 K V / T. What pieces of a row hand on, a state and a map each, is not counted.
"""

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

CHUNK = 64
COLUMNS = 64  # of the state, where a kernel splits it


@dataclass(frozen=True)
class Device:
    """Rates that a card was measured at, not those of its data sheet."""

    bytes_per_second: float
    flops_per_second: float  # bfloat16 in, float32 out, on the tensor cores
    multiprocessors: int


# Measured on the cards themselves: a large copy in device memory, counting bytes read and written, and a large product
# of bfloat16 matrices.
DEVICES = {
    "H100": Device(3.0e12, 798e12, 132),
    "H200": Device(4.3e12, 788e12, 132),
}


@dataclass(frozen=True)
class Shape:
    """Sizes of one call, bytes of an element, and whether it has log-decay."""

    batch: int
    length: int
    heads: int
    key_dim: int
    value_dim: int
    key_heads: int | None = None  # None: as many as heads
    itemsize: int = 2
    gated: bool = False

    @property
    def token_heads(self) -> int:
        return self.batch * self.length * self.heads

    @property
    def share(self) -> float:
        """A value head's share of its key head."""
        return (self.key_heads or self.heads) / self.heads

    def __str__(self) -> str:
        dims = f"K={self.key_dim} V={self.value_dim}"
        return f"B={self.batch} T={self.length} H={self.heads} Hk={self.key_heads or self.heads} {dims}"


def _keys(shape: Shape) -> float:
    return shape.itemsize * shape.key_dim * shape.share


def _values(shape: Shape) -> float:
    return shape.itemsize * shape.value_dim


def _square(shape: Shape) -> float:
    return shape.itemsize * CHUNK


def _chunk_states(shape: Shape) -> float:
    return shape.itemsize * shape.key_dim * shape.value_dim / CHUNK


def _state(shape: Shape) -> float:
    return 4 * shape.key_dim * shape.value_dim / shape.length


# Bytes per token and value head of every array that kernels exchange. T is the inverse of I + diag(c) M, U what is
# added to the state along k, Y its cotangent behind T.
MATRICES: dict[str, Callable[[Shape], float]] = {
    **dict.fromkeys(("q", "k", "dq", "dk"), _keys),
    **dict.fromkeys(("v", "o", "do", "dv", "U", "Y"), _values),
    "T": _square,
    **dict.fromkeys(("states", "dstates"), _chunk_states),
}
VECTORS: dict[str, Callable[[Shape], float]] = {
    **dict.fromkeys(("erase", "write", "derase", "dwrite"), lambda shape: 4),
    **dict.fromkeys(("decay", "ddecay"), lambda shape: 4 if shape.gated else 0),
    **dict.fromkeys(("initial", "final", "dinitial", "dfinal"), _state),
}


@dataclass(frozen=True)
class Products:
    """Matrix products of a chunk and value head, by the sizes multiplied."""

    ckv: int = 0  # [C, K] by [K, V] in any order, such as K S
    cck: int = 0  # such as K Kᵀ
    ccv: int = 0  # such as P U
    ccc: float = 0  # a fraction where blocks are left out

    def macs(self, shape: Shape) -> float:
        """Multiply-adds of a chunk and value head."""
        key, value = shape.key_dim, shape.value_dim
        return CHUNK * (self.ckv * key * value + CHUNK * (self.cck * key + self.ccv * value + self.ccc * CHUNK))


@dataclass(frozen=True)
class Kernel:
    """A kernel as data: the arrays that it reads and writes, what it writes besides for a backward pass, its products,
    and what its blocks of threads are: one per "head" of a row, "columns" of a head's state, "chunk", "piece" of at
    least eight chunks, or "either": "columns" where they all run side by side, else "head"."""

    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    products: Products
    blocks: str
    saves: tuple[str, ...] = ()

    def bytes(self, shape: Shape, arrays=MATRICES | VECTORS, *, saving: bool = False) -> float:
        """Bytes moved per token and value head, counting those of its arrays that are in `arrays`."""
        moved = self.reads + self.writes + (self.saves if saving else ())
        return sum(arrays[name](shape) for name in moved if name in arrays)

    def flops(self, shape: Shape) -> float:
        """FLOPs per token and value head."""
        return 2 * self.products.macs(shape) / CHUNK

    def busy(self, shape: Shape, device: Device) -> float:
        """The share of the multiprocessors that have a block at all."""
        heads, columns = shape.batch * shape.heads, -(-shape.value_dim // COLUMNS)
        either = columns if heads * columns <= device.multiprocessors else 1
        chunks = -(-shape.length // CHUNK)
        per_head = {"head": 1, "columns": columns, "chunk": chunks, "piece": -(-chunks // 8), "either": either}
        return min(1.0, heads * per_head[self.blocks] / device.multiprocessors)

    def seconds(self, shape: Shape, device: Device, *, saving: bool = False) -> tuple[float, float]:
        """Least time for (memory, tensor cores)."""
        moved = self.bytes(shape, saving=saving) * shape.token_heads / device.bytes_per_second
        rate = device.flops_per_second * self.busy(shape, device)
        return moved, self.flops(shape) * shape.token_heads / rate


@dataclass(frozen=True)
class Design:
    """Kernels in the order in which they run."""

    forward: tuple[Kernel, ...]
    backward: tuple[Kernel, ...]


# Of a triangle of 64: merges of 2, 4, 8, 16, 32 rows, two products each.
_INVERSE = 10

_PREPARE = Kernel("prepare", ("k", "erase", "decay"), ("T",), Products(cck=1, ccc=_INVERSE), "chunk")
# K S, T R, Kᵀ U; Q S, Q Kᵀ, P U
_SCAN = Kernel(
    "forward",
    ("q", "k", "v", "T", "erase", "write", "decay", "initial"),
    ("o", "final"),
    Products(ckv=3, cck=1, ccv=2),
    "columns",
    saves=("states",),
)
# The inverse by blocks of 16: three merges within the four diagonal ones and one of neighbours, two products each, then
# the links of the lower left half.
_FUSED_INVERSE = 3 * 2 / 16 + 2 / 16 + 7 / 16
_FUSED = Kernel(
    "forward",
    ("q", "k", "v", "erase", "write", "decay", "initial"),
    ("o", "final"),
    Products(ckv=3, cck=2, ccv=2, ccc=_FUSED_INVERSE),
    "either",
    saves=("states", "T", "U"),
)
# K dS, Qᵀ dO, Kᵀ X, dO Sᵀ, U dSᵀ, Y Sᵀ; Q Kᵀ, dP K, dPᵀ Q, Z K, Zᵀ K; Pᵀ dO, Tᵀ dU, dO Uᵀ, Y Uᵀ
_FUSED_BACKWARD = Kernel(
    "backward",
    ("q", "k", "do", "U", "T", "states", "erase", "decay", "dfinal"),
    ("dq", "dk", "dv", "derase", "dwrite", "ddecay", "dinitial"),
    Products(ckv=6, cck=5, ccv=4),
    "head",
)
# K S, T R, Kᵀ U
_STATES = Kernel(
    "states",
    ("k", "v", "T", "erase", "write", "decay", "initial"),
    ("states",),
    Products(ckv=2, ccv=1),
    "columns",
)
# K dS, Qᵀ dO, Kᵀ X; Q Kᵀ, Pᵀ dO, Tᵀ dU
_BACKWARD_SCAN = Kernel(
    "backward_scan",
    ("q", "k", "do", "T", "erase", "decay", "dfinal"),
    ("dstates", "Y", "dinitial"),
    Products(ckv=3, cck=1, ccv=2),
    "columns",
)
# dO Sᵀ, U dSᵀ, Y Sᵀ, K S; T R, Y Uᵀ, dO Uᵀ; dP K, dPᵀ Q, (dM + dMᵀ) K. Where erase is write, dv is Y times that and
# stands in its place.
_GRADIENTS = Kernel(
    "gradients",
    ("q", "k", "v", "do", "T", "states", "dstates", "Y", "erase", "write", "decay"),
    ("dq", "dk", "derase", "dwrite", "ddecay"),
    Products(ckv=4, cck=3, ccv=3),
    "chunk",
)
# With U from the forward: neither K S nor T R; K Kᵀ for the cotangent of erase; dv apart from Y.
_GRADIENTS_OF_UPDATE = Kernel(
    "gradients",
    ("q", "k", "v", "do", "U", "states", "dstates", "Y", "erase", "write", "decay"),
    ("dq", "dk", "dv", "derase", "dwrite", "ddecay"),
    Products(ckv=3, cck=4, ccv=2),
    "chunk",
)
# Rows in pieces: the inverse of what is summed up, and again in the forward kernel; here of all pieces, the last one
# too. With decay the scan reads it. Saved it is made twice: what solves for the error is not what the gradients want.
_PREPARE_ALONE = replace(_PREPARE, products=Products(cck=1, ccc=_FUSED_INVERSE))
_FUSED_PIECES = replace(_FUSED, blocks="piece")
_PREPARE_BOTH = Kernel("prepare", ("k", "erase", "decay"), ("T",), Products(cck=1, ccc=_FUSED_INVERSE), "chunk", ("T",))
# K S, T R, Kᵀ U, of the values' columns and of as many of the map as there are of the keys; here K = V
_SUMMARIES = Kernel("summaries", ("k", "v", "T", "erase", "decay"), (), Products(ckv=4, ccv=2), "piece")
_SCAN_PIECES = Kernel(
    "scan",
    ("q", "k", "v", "T", "erase", "decay", "initial"),
    ("o", "final"),
    Products(ckv=3, cck=1, ccv=2),
    "piece",
    saves=("states", "U"),
)
# K dS, Qᵀ dO, Kᵀ X; Q Kᵀ, Pᵀ dO, Tᵀ dU
_REVERSE = Kernel("reverse", ("q", "k", "do", "T", "erase", "decay"), (), Products(ckv=3, cck=1, ccv=2), "piece")
_PIECES_BACKWARD = replace(_FUSED_BACKWARD, blocks="piece")
DESIGNS = {
    "fused": Design((_FUSED,), (_FUSED_BACKWARD,)),
    "pieces": Design((_PREPARE_ALONE, _SUMMARIES, _FUSED_PIECES), (_REVERSE, _PIECES_BACKWARD)),
    "scanned pieces": Design((_PREPARE_BOTH, _SUMMARIES, _SCAN_PIECES), (_REVERSE, _PIECES_BACKWARD)),
    "fused forward": Design((_FUSED,), (_BACKWARD_SCAN, _GRADIENTS_OF_UPDATE)),
    "split": Design((_PREPARE, _SCAN), (_BACKWARD_SCAN, _GRADIENTS)),
    "recomputed": Design((_PREPARE, _SCAN), (_STATES, _BACKWARD_SCAN, _GRADIENTS)),
}

# B,T,H,K,V
BENCHMARK = (
    "8,2048,16,128,128",
    "4,4096,16,128,128",
    "2,8192,16,128,128",
    "1,16384,16,128,128",
    "1,65536,16,128,128",
    "16,2048,16,64,64",
    "1,8192,8,128,128",
)


def passes(design: Design) -> dict[str, list[tuple[Kernel, bool]]]:
    """The kernels of each pass, and whether they save something for a backward pass."""
    backward = [(kernel, False) for kernel in design.backward]
    # A design that makes the states again saves none.
    saving = not any("states" in kernel.writes for kernel in design.backward)
    training = [(kernel, saving) for kernel in design.forward]
    return {"inference": [(kernel, False) for kernel in design.forward], "training": training + backward}


def _row(name: str, moved: float, flops: float, shape: Shape, times: tuple[float, float], floor: float) -> str:
    memory, tensor = (1e3 * time for time in times)
    bound = "memory" if memory >= tensor else "products"
    return (
        f"| {name} | {moved:.0f} | {flops / 1e3:.1f} | {moved * shape.token_heads / 1e9:.3f} "
        f"| {flops * shape.token_heads / 1e9:.1f} | {memory:.3f} | {tensor:.3f} | {1e3 * floor:.3f} | {bound} |"
    )


def table(shape: Shape, design: Design, device: Device) -> str:
    """Markdown: a row per kernel of inference and of a training step, and each one's sum."""
    lines = [
        f"{shape}{', log-decay' if shape.gated else ''}:",
        "",
        "| kernel | B/token-head | kFLOP/token-head | GB | GFLOP | memory, ms | products, ms | floor, ms | bound |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, kernels in passes(design).items():
        totals = [0.0] * 5
        for kernel, saving in kernels:
            moved, flops = kernel.bytes(shape, saving=saving), kernel.flops(shape)
            times = kernel.seconds(shape, device, saving=saving)
            label = f"{name}: {kernel.name}{', saving' if saving and kernel.saves else ''}"
            lines.append(_row(label, moved, flops, shape, times, max(times)))
            totals = [total + x for total, x in zip(totals, (moved, flops, *times, max(times)), strict=True)]
        moved, flops, memory, tensor, floor = totals
        lines.append(_row(f"**{name}**", moved, flops, shape, (memory, tensor), floor))
    return "\n".join(lines)


def report(shapes: Iterable[Shape], design: str, device: str) -> str:
    """The tables of all shapes under a heading that names rates and design."""
    rates = DEVICES[device]
    heading = (
        f"Design {design}, {device} at {rates.bytes_per_second / 1e12:.1f} TB/s and "
        f"{rates.flops_per_second / 1e12:.0f} TFLOP/s, {rates.multiprocessors} multiprocessors"
    )
    return "\n\n".join([heading, *(table(shape, DESIGNS[design], rates) for shape in shapes)])


def parse_shape(text: str, key_heads: int | None = None, gated: bool = False) -> Shape:
    """A shape from "B,T,H,K,V". Raises ValueError where that is malformed."""
    try:
        batch, length, heads, key_dim, value_dim = map(int, text.split(","))
    except ValueError:
        raise ValueError(f"shape: expected five integers B,T,H,K,V, got {text!r}") from None
    if min(batch, length, heads, key_dim, value_dim) < 1:
        raise ValueError(f"shape: expected sizes of at least 1, got {text!r}")
    if key_heads is not None and (key_heads < 1 or heads % key_heads):
        raise ValueError(f"key_heads: {heads} heads are no multiple of {key_heads}")
    return Shape(batch, length, heads, key_dim, value_dim, key_heads, gated=gated)


def main() -> None:
    parser = argparse.ArgumentParser(description="Least time of each kernel on a card.")
    parser.add_argument("--shape", action="append", metavar="B,T,H,K,V", help="default: those of the benchmark")
    parser.add_argument("--key-heads", type=int, help="heads of query and key; default: H")
    parser.add_argument("--gated", action="store_true", help="with log-decay")
    parser.add_argument("--design", choices=DESIGNS, default="fused")
    parser.add_argument("--device", choices=DEVICES, default="H100")
    given = parser.parse_args()
    texts = given.shape or BENCHMARK
    try:
        shapes = [parse_shape(text, given.key_heads, given.gated) for text in texts]
    except ValueError as error:
        parser.error(str(error))
    print(report(shapes, given.design, given.device))


if __name__ == "__main__":
    main()
