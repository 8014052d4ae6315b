"""What the study of errors measures: points of sizes, keys, rule and type, and who is measured there."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from experiments.numerics.draws import Keys, Sizes

EFLA, SLOW, UNIT = Keys(0.1, 10.0), Keys(1e-4, 1e-4), Keys(1.0, 1.0)
NORMS = [Keys(10.0**n, 10.0**n) for n in range(-6, 4)] + [Keys(1e-6, 1e3)]
RAW = [Keys(x, x) for x in (0.1, 1.0, 2.0, 3.0, 4.0, 10.0, 100.0, 1000.0)]


@dataclass(frozen=True)
class Point:
    """Numbers that several implementations are measured on."""

    part: str
    sizes: Sizes
    keys: Keys
    rule: str
    kind: str

    def __str__(self) -> str:
        return f"{self.part}/{self.rule}/{self.keys}/{self.sizes.length}/{self.kind}"


def points(chosen: list[str], lengths: list[int], middle: int, kinds: list[str], heads: int, dim: int) -> list[Point]:
    """What the parts measure, oracle apart; the longest sequences last."""

    def every() -> Iterator[Point]:
        sized = lambda length: Sizes(length, heads, dim)
        if "norms" in chosen:
            for keys, kind in itertools.product(NORMS, kinds):
                yield Point("norms", sized(middle), keys, "exact", kind)
        if "rules" in chosen:
            for keys, rule, kind in itertools.product(RAW, ("exact", "euler"), kinds):
                yield Point("rules", sized(middle), keys, rule, kind)
        if "lengths" in chosen:
            for length, (rule, keys), kind in itertools.product(
                sorted(lengths), (("exact", EFLA), ("exact", SLOW), ("euler", UNIT)), kinds
            ):
                yield Point("lengths", sized(length), keys, rule, kind)

    return list(every())


def implementations_for(kind: str, names: list[str]) -> list[str]:
    """`xla` for float32 and bfloat16; kernels for the 16-bit types and what they hold."""
    serves = {"xla": ("float32", "bfloat16"), "scan": ("float32",)}
    return [name for name in names if kind in serves.get(name, ("bfloat16", "float16", "float8"))]
