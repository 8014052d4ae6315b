"""Few heads and long rows: which kernels run, and into how many pieces a row is cut, which then run side by side.

Over a piece the state goes through an affine map, S_end = M S_start + E. The pieces are summed up as their M and E, the
chain over those gives every piece its first state, and the cotangents of the last states likewise from the far end.
That costs two more passes, which work on the state only; of two pieces it needs no M.
"""

from typing import NamedTuple

from pallas_kernels.hopper import blocks
from pallas_kernels.hopper.mosaic import CHUNK, PROCESSORS

LEAD = 4  # chunks that a piece is walked from before its own; where it would be more, they are summed up
SHORTEST = 8  # chunks of a piece; below, what pieces cost besides is more than they save


class Plan(NamedTuple):
    """How a call is served.

    fused: one kernel makes the inverse and walks the chunks; else `prepare` and `scan` do.
    forward, backward: chunks of a piece in either pass. Pieces of the forward pass are one or several of the backward
    pass, which are those that summaries are made of.
    apart: chunks of a piece of the kernel of few heads, to which a call goes that it `serves`, whatever else is said
    here; 0 for none.
    """

    fused: bool
    forward: int
    backward: int
    apart: int = 0


class Parts(NamedTuple):
    """What is summed up of a row.

    bounds: the first chunk of every part, and behind them the first one that is not summed up.
    walks: the first part of each run of one or two parts that a block of threads walks, and behind them the first part
    that is in none.
    twice: whether the last part is in none, but has a block for its values and its map, one after the other.
    """

    bounds: tuple[int, ...]
    walks: tuple[int, ...]
    twice: bool = False


def parts(share: int, chunks: int, *, even: bool, twice: bool = False) -> Parts:
    """All pieces of `share` chunks but the last, which nothing follows.

    even: as many runs as there are pieces, that one included, so that each is shorter than a piece; where it is by more
        than the chain, which gets longer, takes. Not for documents: of a part only what follows the last beginning of
        one is walked, and the fewer parts the less.
    twice: and half a run besides, for one more block, so that all of them walk as much.
    """
    count = -(-chunks // share) - 1
    end = count * share
    if not count:
        return Parts((0,), (0,))
    if not (even and share >= (count + 1) ** 2):
        firsts, twice = [*range(0, end, share)], False
    else:
        walk = -(-2 * end // (2 * count + 3))
        twice = twice and (count + 1) * walk < end
        if twice:
            firsts = [_snapped(n * walk, share) for n in range(count + 2)]
        else:
            firsts = [*range(0, end, -(-end // (count + 1)))]
    bounds = sorted({*range(0, end, share), *firsts, end})
    walks = [bounds.index(first) for first in (firsts if twice else [*firsts, end])]
    return Parts(tuple(bounds), tuple(walks), twice)


def _snapped(chunk: int, share: int) -> int:
    """The bound of pieces next to the chunk if it is near, so that no part is tiny."""
    nearest = round(chunk / share) * share
    return nearest if abs(chunk - nearest) <= share // 16 else chunk


def plan(direction: str, heads: int, length: int, key_dim: int, value_dim: int) -> Plan:
    """As measured, else by what fills the card.

    direction: "forward", or "both" where a backward pass follows. heads: B·H. value_dim: 64 or 128.
    """
    return chosen(direction, heads, length, value_dim, blocks.lookup(direction, key_dim, value_dim, heads, length))


def chosen(direction: str, heads: int, length: int, value_dim: int, choice: dict[str, int]) -> Plan:
    """The plan of a choice as `blocks` has it: "pieces" of a row, or "apart", those of the kernel of few heads. Without
    one, as many as fill the card, which for the latter, two blocks of threads a head, are half as many."""
    count = fill(heads, length)
    whole = cut(direction, heads, length, value_dim, choice.get("pieces", count))
    apart = choice.get("apart", 0 if choice else count // 2) if direction == "forward" else 0
    return whole._replace(apart=-(-max(1, -(-length // CHUNK)) // apart)) if apart else whole


def cut(direction: str, heads: int, length: int, value_dim: int, pieces: int) -> Plan:
    """The plan for a row in so many pieces, or as many as whole chunks and pieces give."""
    chunks = max(1, -(-length // CHUNK))
    share = -(-chunks // min(pieces, chunks))
    groups = value_dim // 64  # of columns, which the scan has in blocks of their own
    pieces = -(-chunks // share)
    if pieces <= 2:
        return Plan(True, chunks, share if direction == "both" else chunks)
    if direction == "both":
        return Plan(False, share * groups, share)
    return Plan(False, share * groups, share * groups)


def fill(heads: int, length: int) -> int:
    """As many pieces of a row as fill the card."""
    pieces = 1
    while 2 * pieces * heads <= PROCESSORS and length >= 2 * pieces * SHORTEST * CHUNK:
        pieces *= 2
    return pieces
