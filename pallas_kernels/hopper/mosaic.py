"""What the Hopper kernels are built from: tiles in shared memory, products on the tensor cores, masks.

Letters: a tile of a chunk has C = 64 tokens. Registers of a warpgroup hold a tile in the layout of a wgmma
accumulator; ROWS and COLS are its reductions, one value per row or per column.
"""

from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import mlir

CHUNK = 64
PROCESSORS = 132  # of an H100 or H200; a block of threads has one to itself
SQUARE = (CHUNK, CHUNK)
F32 = jnp.float32
TILE = plgpu.Layout.WGMMA
ROWS = TILE.reduce(1)
COLS = TILE.reduce(0)


def interpret_params():
    """What a kernel traced here is interpreted with: False outside an interpret context, else its parameters.

    JAX offers no public way to ask; a kernel that does nothing is traced and its parameter read.
    """
    same_everywhere = jax.typeof(0.0).manual_axis_type  # asked for inside a caller's shard_map
    x = jax.ShapeDtypeStruct((1,), jnp.float32, manual_axis_type=same_everywhere)
    jaxpr = jax.make_jaxpr(pl.pallas_call(lambda in_ref, out_ref: None, out_shape=x))(x)
    return next(eqn.params["interpret"] for eqn in jaxpr.eqns if "interpret" in eqn.params)


def interpreting() -> bool:
    """Whether kernels traced here are interpreted as GPU kernels."""
    return isinstance(interpret_params(), plgpu.InterpretGPUParams)


def smem(shape, dtype):
    """Shared memory laid out for TMA and wgmma alike: swizzled tiles of 8 rows."""
    itemsize = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(shape[-1] * itemsize * 8)
    tiling = plgpu.TilingTransform((8, swizzle // itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))


def stage(dtype, warpgroups=1):
    """Where a register operand goes when interpreting, which knows wgmma from shared memory only; None on a card.

    A place [C, 128] for each warpgroup.
    """
    return plgpu.SMEM((warpgroups, CHUNK, 128), dtype) if interpreting() else None


def part_of(ref, warpgroup):
    """What of ref, which has a place for each warpgroup, is this one's; None of None."""
    return None if ref is None else ref.at[warpgroup]


def product(acc, a, b, staged=None):
    """acc += a @ b, asynchronous. a: shared memory, or 16-bit registers in TILE layout; b: shared memory."""
    if staged is not None and isinstance(a, jax.Array):
        staged.at[:, pl.ds(0, a.shape[1])][...] = a
        plgpu.commit_smem()
        a = staged.at[:, pl.ds(0, a.shape[1])]
    plgpu.wgmma(acc, a, b)


def matmul(a, b, shape, init=None, staged=None, meanwhile=None):
    """init + a @ b in float32, waited for. a and b may be equally long lists of terms, added up.

    meanwhile() is called between the start of the product and the wait; what it returns is lost.

    The barrier keeps the compiler from moving arithmetic on the result before the wait, on which it does not depend.
    """
    pairs = list(zip(a, b, strict=True)) if isinstance(a, list) else [(a, b)]

    def accumulate(acc):
        for left, right in pairs:
            product(acc, left, right, staged)
        if meanwhile is not None:
            meanwhile()

    if init is not None and staged is None:
        return lax.optimization_barrier(pl.run_state(accumulate)(plgpu.ACC.init(init)))

    def scoped(acc):
        accumulate(acc)
        return plgpu.wgmma_accumulator_load(acc, wait_n=0)

    out = lax.optimization_barrier(pl.run_scoped(scoped, plgpu.ACC(shape, F32)))
    return out if init is None else init + out  # the interpreter knows no accumulator with a first value


def iota(axis, columns=CHUNK):
    """Row (0) or column (1) number in a [C, columns] tile."""
    return plgpu.broadcasted_iota(jnp.int32, (CHUNK, columns), axis, layout=TILE)


def per_row(x, shape):
    """x [rows] in ROWS layout over a tile."""
    return lax.broadcast_in_dim(x, shape, [0])


def per_column(x, shape):
    """x [columns] in COLS layout over a tile."""
    return lax.broadcast_in_dim(x, shape, [1])


def write_numbers(r):
    """0 … 63 to r.numbers_r and r.numbers_c, for `place`; the first of them is a zero that no compiler knows."""
    r.numbers_r[...] = plgpu.broadcasted_iota(jnp.int32, (CHUNK,), 0, layout=ROWS)
    r.numbers_c[...] = plgpu.broadcasted_iota(jnp.int32, (CHUNK,), 0, layout=COLS)


def place(r, columns=CHUNK):
    """Row and column numbers of a tile. Loaded: made from the thread's number, they would be kept in registers."""
    shape = (CHUNK, columns)
    rows = plgpu.load(r.numbers_r, layout=ROWS)
    return per_row(rows, shape), per_column(plgpu.load(r.numbers_c, layout=COLS)[:columns], shape)


def store(ref, value):
    """ref[...] = value in device memory, where rows may be shorter than a cache line: JAX 0.12 wants that said."""
    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def copy_out(source, target, wanted=None):
    """Copies shared to device memory, where `wanted` says so: without a branch, which costs the compiler registers."""
    if wanted is None or not interpreting():
        plgpu.copy_smem_to_gmem(source, target, wanted)
    else:  # the interpreter knows no predicates
        pl.when(wanted)(lambda: plgpu.copy_smem_to_gmem(source, target))


def copy_in(source, target, barrier, wanted=None):
    """Copies device to shared memory, where `wanted` says so; where not, only the barrier is told, without a branch."""
    if wanted is None or not interpreting():
        plgpu.copy_gmem_to_smem(source, target, barrier, predicate=wanted)
    else:  # the interpreter knows no predicates
        pl.when(wanted)(lambda: plgpu.copy_gmem_to_smem(source, target, barrier))


class Ring(NamedTuple):
    """`slots` places in shared memory through which the chunks pass: chunk n has place n % slots, barriers n % turns.

    Of a barrier, a warpgroup must wait for all phases or for none. Helper i waits for chunks i, i + helpers, …; so
    turns is a multiple of the helpers. Who waits until the place of chunk n is free then sends for chunk n + slots.
    """

    name: str
    slots: int
    turns: int

    @classmethod
    def of(cls, name, slots, helpers):
        return cls(name, slots, -(-slots // helpers) * helpers)

    def barriers(self, arrivals, writers=None, clustered=False):
        """writers: warpgroups that give a place back, None if another ring tells when it is free.
        clustered: a place is free once it is in all blocks of the cluster. One thread then arrives for a warpgroup,
        all of which must have been waited for."""
        full = plgpu.Barrier(num_arrivals=arrivals, num_barriers=self.turns)
        if writers is None:
            return {f"{self.name}_full": full}
        free = dict(num_arrivals=writers, num_barriers=self.turns)
        free = plgpu.ClusterBarrier(collective_axes=("c",), **free) if clustered else plgpu.Barrier(**free)
        return {f"{self.name}_full": full, f"{self.name}_free": free}

    def place(self, n):
        return modulo(n, self.slots)

    def full(self, r, n):
        return getattr(r, f"{self.name}_full").at[modulo(n, self.turns)]

    def free(self, r, n):
        return getattr(r, f"{self.name}_free").at[modulo(n, self.turns)]

    def wait_place(self, r, n):
        """Until the place of chunk n is free of the chunk that had it before."""
        pl.when(n >= self.slots)(lambda: plgpu.barrier_wait(self.free(r, n - self.slots)))

    def wait_last(self, r, count):
        """Who has waited for the places of all of `count` chunks waits until those too are done with them."""
        for back in range(self.slots, 0, -1):
            pl.when(count >= back)(lambda back=back: plgpu.barrier_wait(self.free(r, count - back)))


def recycle(r, loads, n, count):
    """Waits until the places of chunk n are free, and sends for the chunks that have them next, if there are `count`.

    loads: (ring, function of n that sends for what of chunk n goes through it), the first to get free first.
    """
    for ring, load in loads:
        plgpu.barrier_wait(ring.free(r, n))
        plgpu.commit_smem()  # what read the place is done before the copy, which is another proxy, writes it
        pl.when(n + ring.slots < count)(lambda ring=ring, load=load: load(n + ring.slots))


def given_registers(warpgroups):
    """What a launch of so many warpgroups gives each thread."""
    return 65536 // (128 * warpgroups) // 8 * 8


def check_registers(*roles):
    """roles: (how many warpgroups, registers of a thread or None for what the launch gives).

    Raises:
        ValueError: together they would take more than the launch gave. On a card who asks for more waits for ever.
    """
    warpgroups = sum(count for count, _ in roles)
    given = given_registers(warpgroups)
    asked = sum(count * (given if registers is None else registers) for count, registers in roles)
    if asked > given * warpgroups:
        raise ValueError(f"registers are {roles}, {asked} in all; a launch gives {warpgroups} warpgroups {given} each")


def set_registers(registers, warpgroups):
    """Of a thread of the calling warpgroup, in place of what the launch gave; None keeps that. See check_registers."""
    given = given_registers(warpgroups)
    if registers not in (None, given):
        plgpu.set_max_registers(registers, action="increase" if registers > given else "decrease")


def modulo(n, count):
    """n % count for n ≥ 0."""
    return n & (count - 1) if count & (count - 1) == 0 else lax.rem(n, jnp.int32(count))


def lookup(table, index):
    """table[index] of known numbers, for an index that is traced; the first of them for one that is too large."""
    found = jnp.int32(table[0])
    for place_of, number in enumerate(table[1:], 1):
        found = jnp.where(index == place_of, jnp.int32(number), found)
    return found


def launch(name, config, inputs, outputs, scratch, grid, *roles, clustered=False):
    """Runs a kernel whose blocks have for each of the roles (count, run) so many warpgroups, run(config, r, number).

    inputs, outputs (shapes) and scratch map the names that refs have in r; scratch that is None is absent, and None in
    r too. r.b, r.h, r.c: the block's place in the grid; r.rank: in its cluster. Indices are 32 bits wide,
    also where a program has enabled x64.
    clustered: blocks along the last axis of the grid run at a time and reach each other's shared memory.

    Returns: name -> array, of outputs.
    """
    names = (*inputs, *outputs)
    warpgroups = sum(count for count, _ in roles)
    done = plgpu.ClusterBarrier(collective_axes=("c",), num_arrivals=warpgroups) if clustered else None
    scratch = scratch | dict(done=done or plgpu.Barrier(num_arrivals=warpgroups))
    apart = 2 if clustered else 3  # axes of the grid whose blocks know nothing of each other

    def body(*refs, **scratch_refs):
        r = SimpleNamespace(**dict.fromkeys(scratch), **dict(zip(names, refs, strict=True)))
        r.__dict__.update(scratch_refs)
        r.b, r.h, r.c = (lax.axis_index(axis) for axis in "bhc")
        r.rank = r.c
        r.first = 0 * r.b  # traced: lowering takes no constant as an index, and refuses known slices over the end
        if warpgroups == 1:  # whose number is no traced one
            roles[0][1](config, r, r.first)
            return
        warpgroup = lax.axis_index("warpgroup")
        # One program for all warpgroups of a kind: the cache of instructions is small.
        first = 0
        for count, run in roles:
            mine = (warpgroup >= first) & (warpgroup < first + count)
            pl.when(mine)(lambda run=run, first=first: run(config, r, warpgroup - first))
            first += count
        # A warpgroup that ends while another still multiplies stops the kernel with an illegal instruction. No block
        # of a cluster may end while another still reaches for its memory.
        plgpu.barrier_arrive(r.done)
        plgpu.barrier_wait(r.done)

    run = plgpu.kernel(
        body,
        out_type=tuple(outputs.values()),
        grid=grid[:apart],
        grid_names=("b", "h", "c")[:apart],
        cluster=grid[apart:],
        cluster_names=("b", "h", "c")[apart:],
        num_threads=warpgroups,
        thread_name="warpgroup",
        scratch_types={key: value for key, value in scratch.items() if value is not None},
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name=name,
    )
    arrays = inputs.values()
    axes = frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays))
    with jax.enable_x64(False):
        out = run(*(_unmarked_p.bind(x) if axes else x for x in arrays))
    if axes:
        out = [lax.pcast(x, tuple(sorted(axes)), to="varying") for x in out]
    return dict(zip(outputs, out, strict=True))


# Inside a caller's shard_map the type of an array says over which mesh axes it varies. In a kernel, where a loop's
# carry must keep its type, the marks of what is read from memory would have to be given to all that is made there.
_unmarked_p = Primitive("efla_unmarked")
_unmarked_p.def_impl(lambda x: x)
_unmarked_p.def_abstract_eval(lambda x: x.update(manual_axis_type=jax.typeof(0.0).manual_axis_type))
mlir.register_lowering(_unmarked_p, lambda context, x: [x])
