"""Few heads and long rows: which kernels run, and into how many pieces a row is cut, which then run side by side.

Over a piece the state goes through an affine map, S_end = M S_start + E. The pieces are summed up as their M and E, the
chain over those gives every piece its first state, and the cotangents of the last states likewise from the far end.
That costs two more passes, which work on the state only; of two pieces it needs no M.
"""

from typing import Literal, NamedTuple

from pallas_kernels.hopper import blocks
from pallas_kernels.hopper.mosaic import CHUNK, PROCESSORS

LEAD = 4  # chunks that a piece is walked from before its own; where it would be more, they are summed up
SHORTEST = 8  # chunks of a piece; below, what pieces cost besides is more than they save
FUSED = 16  # chunks of a piece of the fused kernel; below, that of few heads, in half as many pieces, was faster


class Plan(NamedTuple):
    """How a call is served.

    kernel: of the forward pass. "fused" makes the inverse and walks the chunks; "apart", that of few heads, too, with
        the halves of the columns in blocks of their own; "scan" walks them, the inverse being there.
    forward, backward: chunks of a piece in either pass. Pieces of the forward pass are one or several of the backward
        pass, which are those that summaries are made of; not several where the kernel is "apart".
    """

    kernel: Literal["fused", "apart", "scan"]
    forward: int
    backward: int


class Parts(NamedTuple):
    """What is summed up of a row.

    bounds: the first chunk of every part, and behind them the first one that is not summed up.
    walks: the first part of each run of parts that a block of threads walks without a break, and behind them the number
    of parts.
    twice: whether the last run has one block for its values and its map, one after the other.
    """

    bounds: tuple[int, ...]
    walks: tuple[int, ...]
    twice: bool = False


def parts(share: int, chunks: int, *, blocks: int = 0, twice: bool = False) -> Parts:
    """All pieces of `share` chunks but the last, which nothing follows.

    blocks: of threads that a row has to itself. Runs that are not the pieces give each of them as much to walk, if that
        is less by more than the longer chain takes, a step of which is as long as a chunk or two. Not for documents: of
        a part only what follows the last beginning of one is walked, and the fewer parts the less.
    twice: and half a run besides, for one more block, so that all of them walk as much.
    """
    count = -(-chunks // share) - 1
    end = count * share
    pieces = range(0, end + 1, share)
    alone = Parts(tuple(pieces), tuple(range(count + 1)))
    runs = (blocks + 1) // 2  # each has one block of values and one of its map, but for the first
    if not count or not runs:
        return alone
    twice = twice and blocks % 2 == 0
    walk = -(-2 * end // (2 * runs + 1)) if twice else -(-end // runs)
    twice = twice and _snapped(runs * walk, share) < end
    firsts = [_snapped(n * walk, share) for n in range(runs + 1)] if twice else [*range(0, end, walk)]
    bounds = sorted({*pieces, *firsts})
    longest = share * -(-(2 * count - 1) // blocks)  # of a block, if pieces are what is summed up
    if longest - walk < len(bounds) - len(pieces):
        return alone
    return Parts(tuple(bounds), tuple(bounds.index(first) for first in (*firsts, end)), twice)


def _snapped(chunk: int, share: int) -> int:
    """The bound of pieces next to the chunk if it is near, so that no part is tiny."""
    nearest = round(chunk / share) * share
    return nearest if abs(chunk - nearest) <= share // 16 else chunk


def plan(direction: str, heads: int, length: int, key_dim: int, value_dim: int, *, decayed: bool, few: bool) -> Plan:
    """As measured, else by what fills the card.

    direction: "forward", or "both" where a backward pass follows. heads: B·H. value_dim: 64 or 128. decayed: with
    decay, of which nothing was measured. few: whether the kernel of few heads serves the call.
    """
    choice = {} if decayed else blocks.lookup(direction, key_dim, value_dim, heads, length)
    return chosen(direction, heads, length, value_dim, choice, decayed=decayed, few=few)


def chosen(
    direction: str,
    heads: int,
    length: int,
    value_dim: int,
    choice: dict[str, int],
    *,
    decayed: bool = False,
    few: bool = False,
) -> Plan:
    """The plan of a choice as `blocks` has it: how many "pieces" of a row, or "apart", those of the kernel of few
    heads. Without one, or one whose kernel does not serve the call, that of `default`."""
    if not choice or ("apart" in choice and not few):
        choice = default(direction, heads, length, few=few)
    if "apart" in choice:
        share = -(-_chunks(length) // choice["apart"])
        return Plan("apart", share, share)
    return cut(direction, length, value_dim, choice["pieces"], decayed=decayed)


def default(direction: str, heads: int, length: int, *, few: bool) -> dict[str, int]:
    """As many pieces as fill the card; of the kernel of few heads, each of which takes two blocks, where those of the
    fused kernel would be short, or two: for these the first one must be summed up whole."""
    count = fill(heads, length)
    if few and direction == "forward" and (count <= 2 or _chunks(length) < FUSED * count):
        return dict(apart=max(1, count // 2))
    return dict(pieces=count)


def cut(direction: str, length: int, value_dim: int, pieces: int, *, decayed: bool = False) -> Plan:
    """The plan for a row in so many pieces, or as many as whole chunks and pieces give."""
    chunks = _chunks(length)
    share = -(-chunks // min(pieces, chunks))
    if -(-chunks // share) <= 2:
        return Plan("fused", chunks, share if direction == "both" else chunks)
    if not decayed:
        return Plan("fused", share, share)
    longer = share * (value_dim // 64)  # groups of columns, which the scan has in blocks of their own
    return Plan("scan", longer, share if direction == "both" else longer)


def _chunks(length: int) -> int:
    return max(1, -(-length // CHUNK))


def fill(heads: int, length: int) -> int:
    """As many pieces of a row as fill the card."""
    pieces = 1
    while 2 * pieces * heads <= PROCESSORS and length >= 2 * pieces * SHORTEST * CHUNK:
        pieces *= 2
    return pieces
