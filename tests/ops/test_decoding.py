"""Prefill in pieces and decoding token by token equal one forward pass."""

import contextlib
import functools
import itertools
import warnings
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from efla_jax import efla_attention, efla_step
from efla_jax.ops.coefficients import INTEGRATORS
from tests.ops.helpers import EPS, draw, errors, on_gpu

LENGTH = 40


@functools.cache
def attend(**options):
    return jax.jit(lambda inputs: efla_attention(**inputs, **options))


@functools.cache
def step(**options):
    return jax.jit(lambda inputs, state: efla_step(**inputs, state=state, **options))


def pieces(inputs, splits, options):
    """Output and state: prefill up to each split, then `efla_step` for every token after the last."""
    state, outs = inputs["initial_state"], []
    tokens = {name: x for name, x in inputs.items() if name != "initial_state"}
    for start, stop in itertools.pairwise((0, *splits)):
        out, state = attend(**options)({n: x[:, start:stop] for n, x in tokens.items()} | dict(initial_state=state))
        outs.append(out)
    for t in range(splits[-1], LENGTH):
        out, state = step(**options)({name: x[:, t] for name, x in tokens.items()}, state)
        outs.append(out[:, None])
    return dict(output=np.concatenate(outs, 1), state=np.asarray(state))


@pytest.mark.parametrize("implementation", ["scan", "xla"])
@pytest.mark.parametrize("splits", [(37,), (20, 37), (1, 36), (0,), (40,)], ids=str)
def test_pieces(splits, implementation):
    inputs = draw(length=LENGTH, decay=True)
    options = dict(implementation=implementation, scale=0.5)
    want = dict(zip(("output", "state"), attend(**options)(inputs), strict=True))
    assert max(errors(pieces(inputs, splits, options), want).values()) < 20 * EPS


@pytest.mark.parametrize("decay", [False, True], ids=["no decay", "decay"])
@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_every_integrator(integrator, decay):
    inputs = draw(length=LENGTH, decay=decay)
    options = dict(implementation="scan", integrator=integrator)
    want = dict(zip(("output", "state"), attend(**options)(inputs), strict=True))
    assert max(errors(pieces(inputs, (38,), options), want).values()) < 10 * EPS


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, np.float64])
def test_types(dtype):
    """The output has value's type; the state stays float32, float64 for float64 inputs, however low the inputs."""
    inputs = draw(length=LENGTH, decay=True, dtype=dtype)
    accumulator = np.float64 if dtype == np.float64 else np.float32
    inputs["initial_state"] = inputs["initial_state"].astype(accumulator)
    with jax.enable_x64(dtype == np.float64):
        want = dict(zip(("output", "state"), map(np.asarray, attend(implementation="scan")(inputs)), strict=True))
        got = pieces(inputs, (38,), dict(implementation="scan"))
    assert got["output"].dtype == dtype
    assert got["state"].dtype == accumulator
    assert errors(got, want)["output"] < 4 * float(jnp.finfo(dtype).eps)
    assert errors(got, want)["state"] < 10 * float(jnp.finfo(accumulator).eps)


def test_numpy_float64():
    """Float32 unless x64 is on, without a warning."""
    inputs = draw(length=1, decay=True)
    tokens = {name: x[:, 0] for name, x in inputs.items() if name != "initial_state"}
    # Named: on a GPU the default would warn of the kernel that declines.
    want = efla_step(**tokens, state=inputs["initial_state"], implementation="xla")
    wide = {name: x.astype(np.float64) for name, x in tokens.items()}
    got = efla_step(**wide, state=inputs["initial_state"].astype(np.float64), implementation="xla")
    assert all(x.dtype == np.float32 for x in got)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_gradient_of_a_step():
    """Decoding is differentiable: the gradient of a step is that of a sequence of one token."""
    inputs = draw(length=1, decay=True)
    tokens = {name: x for name, x in inputs.items() if name != "initial_state"}

    def by_step(tokens, state):
        out, state = efla_step(**{name: x[:, 0] for name, x in tokens.items()}, state=state, implementation="xla")
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.sin(state))

    def by_sequence(tokens, state):
        out, state = efla_attention(**tokens, initial_state=state, implementation="scan")
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.sin(state))

    got, want = (jax.jit(jax.grad(f, (0, 1)))(tokens, inputs["initial_state"]) for f in (by_step, by_sequence))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), got, want)


@contextlib.contextmanager
def interpreted():
    """Runs GPU kernels on the CPU. Races are looked for in the kernel's own tests; on several simulated devices the
    interpreter takes a thread's read and its own later write of the state for one. On a GPU they just run."""
    if on_gpu():
        yield
        return
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        yield


def one_token(batch=2, **options) -> dict[str, Any]:
    inputs = draw(batch=batch, length=1, key_dim=64, value_dim=64, decay=True, **options)
    state = inputs.pop("initial_state")
    return {name: x[:, 0] for name, x in inputs.items()} | dict(state=state)


def by_kernel_and_plain(run, inputs):
    """run(step, inputs) with the decode kernel, interpreted, and with the plain form; outputs and state by name."""
    results = []
    for name, context in (("pallas_gpu", interpreted()), ("scan", contextlib.nullcontext())):
        with context:
            step_of = functools.partial(efla_step, implementation=name, scale=0.5)
            leaves = jax.tree.leaves(jax.block_until_ready(run(step_of, inputs)))
        results.append({str(i): np.asarray(x) for i, x in enumerate(leaves)})
    return results


def token_by_token(step_of, inputs):
    def step(state, _):
        out, state = step_of(**inputs | dict(state=state))
        return state, out

    return jax.lax.scan(step, inputs["state"], None, length=3)


TRANSFORMS = dict(
    eager=lambda step_of, inputs: step_of(**inputs),
    jit=lambda step_of, inputs: jax.jit(lambda x: step_of(**x))(inputs),
    vmap=lambda step_of, inputs: jax.jit(jax.vmap(lambda x: step_of(**x)))(
        jax.tree.map(lambda x: np.stack([x, 0.5 * x, x[::-1]]), inputs)
    ),
    scan=lambda step_of, inputs: jax.jit(functools.partial(token_by_token, step_of))(inputs),
)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_kernel(name):
    got, want = by_kernel_and_plain(TRANSFORMS[name], one_token())
    assert max(errors(got, want).values()) < 4 * EPS
    # Else the kernel did not run: no two orders of summing 64 numbers give the same bits throughout.
    assert any(np.any(got[key] != want[key]) for key in want)


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_kernel_with_every_integrator(integrator):
    run = lambda step_of, inputs: jax.jit(lambda x: step_of(**x, integrator=integrator))(inputs)
    got, want = by_kernel_and_plain(run, one_token())
    assert max(errors(got, want).values()) < 4 * EPS


def test_derivatives_beside_the_kernel():
    """Both modes are those of the plain form, to the last bit, also of a vmapped step."""
    loss = lambda step_of, x: sum(jnp.sum(jnp.sin(y)) for y in jax.vmap(lambda x: step_of(**x))(x))

    def run(step_of, inputs):
        stacked = jax.tree.map(lambda x: np.stack([x, 0.5 * x]), inputs)
        forward = jax.jit(lambda x: jax.jvp(lambda x: step_of(**x), (x,), (x,)))(inputs)
        return forward, jax.jit(jax.grad(functools.partial(loss, step_of)))(stacked)

    got, want = by_kernel_and_plain(run, one_token())
    assert len(want) == 4 + 6
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.cpu("needs four devices")
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_kernel_on_a_mesh(kind):
    """Every device steps its own batch and heads; nothing is gathered."""
    inputs = one_token(batch=4)
    on = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(kind,) * 2)
    split = NamedSharding(on, PartitionSpec("data", "tensor"))
    placed = {name: jax.device_put(x, split) for name, x in inputs.items()}

    def run(step_of, inputs):
        options = dict(partition_spec=PartitionSpec("data", None, "tensor")) if kind == AxisType.Auto else {}
        with jax.set_mesh(on):
            compiled = jax.jit(lambda x: step_of(**x, **options)).lower(inputs).compile()
            results = compiled(inputs)
        assert "all-gather" not in str(compiled.as_text())
        assert all(x.sharding.is_equivalent_to(split, x.ndim) for x in results)
        return results

    got, want = by_kernel_and_plain(run, placed)
    assert max(errors(got, want).values()) < 4 * EPS


@pytest.mark.cpu("needs four devices")
@pytest.mark.parametrize("check_vma", [True, False])
def test_kernel_inside_a_callers_shard_map(check_vma):
    on = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    spec = PartitionSpec("data", "tensor")

    def run(step_of, inputs):
        local = jax.shard_map(
            lambda x: step_of(**x), mesh=on, in_specs=spec, out_specs=spec, check_vma=check_vma
        )  # fmt: skip
        return jax.jit(local)(inputs)

    got, want = by_kernel_and_plain(run, one_token())
    assert max(errors(got, want).values()) < 4 * EPS


def test_export_of_the_kernel():
    """On a machine without the GPU, for it; the donated state is updated in place."""
    inputs = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in one_token().items()}
    state = inputs.pop("state")
    step_of = jax.jit(lambda x, state: efla_step(**x, state=state, implementation="pallas_gpu"), donate_argnums=1)
    text = jax.export.export(step_of, platforms=("cuda",))(inputs, state).mlir_module()
    assert "mosaic_gpu" in text
    assert "output_operand_alias" in text
    assert "tf.aliasing_output" in text


@pytest.mark.cpu("what is chosen where there is no GPU")
def test_choice_of_a_step():
    """The rules of `efla_attention`: a name serves or raises, a sequence warns, None is silent where no GPU is."""
    inputs = one_token()
    want = efla_step(**inputs, implementation="scan")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in (None, "xla"):
            jax.tree.map(np.testing.assert_array_equal, efla_step(**inputs, implementation=name), want)
    with pytest.warns(UserWarning, match="falls back to 'xla'.*Hopper"):
        efla_step(**inputs, implementation=("pallas_gpu", "xla"))
    for name, reason in (("triton", "no such kernel"), ("pallas_gpu", "Hopper GPU")):
        with pytest.raises(NotImplementedError, match=reason):
            efla_step(**inputs, implementation=name)
    unknown: Any = "cuda"
    with pytest.raises(ValueError, match="implementation"):
        efla_step(**inputs, implementation=unknown)
    narrow = one_token() | {name: one_token()[name][..., :40] for name in ("query", "key")}
    narrow["state"] = narrow["state"][:, :, :40]
    with interpreted(), pytest.raises(NotImplementedError, match="K=40"):
        efla_step(**narrow, implementation="pallas_gpu")


def test_no_rows():
    inputs = {name: x[:0] for name, x in one_token().items()}
    with interpreted():
        out, state = efla_step(**inputs, implementation="pallas_gpu")
    assert (out.shape, state.shape) == (inputs["value"].shape, inputs["state"].shape)


@pytest.mark.parametrize("decay", [False, True], ids=["no decay", "decay"])
@pytest.mark.parametrize("length", [1, 3])
def test_a_few_tokens_at_once(length, decay):
    """`efla_attention` after a state takes tokens one by one, exact to the last rounding of the output; the chunked
    kernel's products, of rounded numbers, would not be."""
    inputs = draw(batch=1, length=length, heads=2, key_heads=1, key_dim=64, value_dim=64, decay=decay)
    for name in ("query", "key", "value"):
        inputs[name] = jnp.asarray(inputs[name], jnp.bfloat16)
    run = lambda name: jax.jit(lambda x: efla_attention(**x, implementation=name))
    want = dict(zip(("output", "state"), map(np.asarray, run("scan")(inputs)), strict=True))
    with interpreted():
        out, state = map(np.asarray, run("pallas_gpu")(inputs))
    assert errors(dict(state=state), dict(state=want["state"]))["state"] < 4 * EPS
    assert errors(dict(output=out), dict(output=want["output"]))["output"] < float(jnp.finfo(jnp.bfloat16).eps) / 2
