"""The programs that `compile_tpu` compiles: the op in three implementations, and a training step.

python -m experiments.kernels.tpu_programs NAME GENERATION FOLDER

compiles one program in a process whose LIBTPU_INIT_ARGS dump to FOLDER (`tpu_schedule.init_args`) and prints its row.
"""

import dataclasses
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",  # libtpu else asks a metadata server
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no TPU here to keep for one process
}

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding

from experiments.kernels.tpu_schedule import Schedule, estimated_cycles, issued, operations, schedules

jax.config.update("jax_enable_compilation_cache", False)  # a program from a cache would leave no dump

BATCH, LENGTH, HEADS, DIM = 1, 1024, 8, 128
TOKEN_HEADS = BATCH * LENGTH * HEADS
ROW = 2048  # tokens of a row of the training step: no size of a parameter is a multiple of it


def compile_for(topology: str, function: Callable, *arguments: Any) -> Any:
    """function compiled for one chip of the topology; arguments are trees of shapes."""
    chip = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[0]
    sharding = SingleDeviceSharding(chip)
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    # Some kernels ask what chip they are lowered for.
    device = jax.sharding.AbstractDevice(device_kind=chip.device_kind, num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("one",), axis_types=(AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(lambda *xs: function(*xs)).trace(*jax.tree.map(place, arguments)).lower().compile()


# ---- the op ----


def _ours(query, key, value, beta):
    from efla_jax import efla_attention

    return efla_attention(query, key, value, beta, integrator="euler", implementation="pallas_tpu")


def _xla(query, key, value, beta):
    from efla_jax import efla_attention

    return efla_attention(query, key, value, beta, integrator="euler", implementation="xla")


def _deltanet(query, key, value, beta):
    from deltanet_tpu import variants

    return variants.chunk_delta_rule(query, key, value, beta, scale=1.0, output_final_state=True)


def _with_gradients(function, *arguments):
    """Output, state and gradients, cotangents given."""
    *inputs, d_output, d_state = arguments
    out, pullback = jax.vjp(function, *inputs)
    return out, pullback((d_output, d_state))


def programs() -> dict[str, tuple[Callable, bool]]:
    """Name -> the op, and whether with its gradients. Of the delta rule itself, which all three have."""
    functions = {"pallas_tpu": _ours, "xla": _xla, "deltanet-tpu 0.3.0": _deltanet}
    directions = {"forward": False, "forward + backward": True}
    return {
        f"{name}, {direction}": (function, gradients)
        for direction, gradients in directions.items()
        for name, function in functions.items()
    }


HEADING = (
    f"{BATCH}×{LENGTH}×{HEADS}×{DIM}, bfloat16, no log-decay; per token and value head.",
    "",
    "| program | TPU | bundles of kernels | MXU | VALU | XLU | spills | cycles around, by XLA |",
    "|---|---|---|---|---|---|---|---|",
)


def _shapes(gradients: bool) -> list[jax.ShapeDtypeStruct]:
    tokens = jax.ShapeDtypeStruct((BATCH, LENGTH, HEADS, DIM), jnp.bfloat16)
    beta = jax.ShapeDtypeStruct((BATCH, LENGTH, HEADS), jnp.float32)
    state = jax.ShapeDtypeStruct((BATCH, HEADS, DIM, DIM), jnp.float32)
    return [tokens, tokens, tokens, beta] + [tokens, state] * gradients


def _equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from _equations(inner)


def _grids(function: Callable, arguments: list) -> dict[str, int]:
    """Grid steps of each kernel by its name."""
    calls = [e for e in _equations(jax.make_jaxpr(function)(*arguments).jaxpr) if e.primitive.name == "pallas_call"]
    return {call.params["name"]: int(np.prod(call.params["grid_mapping"].grid)) for call in calls}


def row(name: str, generation: str, folder: Path) -> str:
    """A line of the table, from the dump that compiling the program leaves in folder."""
    from experiments.kernels.compile_tpu import TOPOLOGIES

    jax.default_backend = lambda: "tpu"  # what decides on chunks, and on interpreting
    op, gradients = programs()[name]
    function = partial(_with_gradients, op) if gradients else op
    arguments = _shapes(gradients)
    hlo = compile_for(TOPOLOGIES[generation], function, *arguments).as_text()
    found = schedules(folder)
    trips = LENGTH // 64 if name.startswith("xla") else 1  # of loops over chunks; the others have none
    cycles = estimated_cycles(hlo, trips) / TOKEN_HEADS
    if name.startswith("xla"):
        least = issued(hlo, found, trips, lambda _: 1) / TOKEN_HEADS
        return f"| {name} | {generation} | none; of fusions ≥ {least:.2f} | | | | | {cycles:.0f} |"
    grids = _grids(function, arguments)
    steps_of = lambda operation: next((steps for kernel, steps in grids.items() if kernel in operation), 0)
    kernels = [(found[x], steps_of(x)) for x, _, _ in operations(hlo, 1) if x in found and steps_of(x)]
    assert len(kernels) >= len(grids), f"kernels {list(grids)} in a dump of {list(found)}"
    bundles = sum(kernel.bundles * steps for kernel, steps in kernels)
    share = lambda unit: f"{_use(kernels, unit):.0%}"
    spills = sum(kernel.used["VSTORE:SPILL"] * steps for kernel, steps in kernels) / TOKEN_HEADS
    shares = " | ".join(map(share, ("MXU", "VALU", "XLU")))
    return f"| {name} | {generation} | {bundles / TOKEN_HEADS:.2f} | {shares} | {spills:.2f} | {cycles:.2f} |"


def _use(kernels: list[tuple[Schedule, int]], unit: str) -> float:
    """Mean share of a unit's slots, by bundles issued."""
    issued_bundles = sum(kernel.bundles * steps for kernel, steps in kernels)
    return sum(kernel.use(unit) * kernel.bundles * steps for kernel, steps in kernels) / issued_bundles


# ---- the training step ----


def compiled_step(topology: str, fsdp: int = 4, tensor: int = 4) -> tuple[Any, Mesh]:
    """The step of configs/lm_paper.py:efla/340m, compiled for a mesh that splits rows and heads."""
    from configs import lm_paper
    from efla_jax.models import LanguageModelConfig, build
    from efla_jax.training.objectives import objective_of
    from efla_jax.training.sharding import AXES, BATCH, TOKENS, state_shardings
    from efla_jax.training.step import initial_state, make_optimizer, make_train_step, schedule

    config = lm_paper.get_config("efla/340m")
    model = cast(LanguageModelConfig, config.model)
    mixer = dataclasses.replace(model.mixer, implementation="pallas_tpu")
    config = dataclasses.replace(config, model=dataclasses.replace(model, mixer=mixer))
    devices = np.array(topologies.get_topology_desc(platform="tpu", topology_name=topology).devices)
    mesh = Mesh(devices.reshape(-1, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3)
    rates = schedule(config.optimizer, config.train.steps)
    optimizer = make_optimizer(config.optimizer, rates)
    graph = nnx.graphdef(nnx.eval_shape(lambda: build(config.model, rngs=nnx.Rngs(0))))
    step = make_train_step(graph, optimizer, rates, TOKENS, objective=objective_of(config), parts=config.train.parts)
    place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    state = jax.eval_shape(lambda: initial_state(config, jax.random.key(0), optimizer))
    shardings = state_shardings(mesh, state)
    state = jax.tree.map(place, state, shardings)
    rows = jax.ShapeDtypeStruct((config.train.batch_size, ROW), jnp.int32, sharding=NamedSharding(mesh, BATCH))
    batch = dict(inputs=rows, targets=rows, segment_ids=rows)
    with jax.set_mesh(mesh):
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
        return jitted.trace(state, batch).lower(lowering_platforms=("tpu",)).compile(), mesh


if __name__ == "__main__":
    print(row(sys.argv[1], sys.argv[2], Path(sys.argv[3])))
