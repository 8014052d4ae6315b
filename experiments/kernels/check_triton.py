"""Checks the Triton kernels where there is no GPU.

python -m experiments.kernels.check_triton [interpret compile lower] [--only=SUBSTRING]

`interpret` runs every kernel in Triton's interpreter, forward and backward, against the float64 token loop, within the
error model of `triton_cases.py`; nothing may be read or written outside an array, nothing left unwritten, and of two
packed documents neither may change the other by a bit. `compile` compiles every variant for sm_80, sm_89 and sm_90, in
as many processes as there are cores, and prints registers, spills and shared memory against their budgets. `lower`
lowers forward and backward for cuda through jax-triton itself, and exports the op with it. All three by default, each
in a process of its own: Triton interprets or compiles, not both.

It needs an environment with jax, its CUDA plugin, jax-triton and Triton; no GPU and no CUDA.
"""

import argparse
import multiprocessing
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any


def interpret(only: str) -> list[str]:
    """Every case in the interpreter; what failed, a sentence each."""
    import numpy as np

    from experiments.kernels import triton_cases as cases
    from experiments.kernels import triton_interpreter as interpreter
    from pallas_kernels.triton import launch

    def run(case, inputs):
        given = dict(inputs)
        cotangents = given.pop("d_output"), given.pop("d_state")
        x, options = launch.Inputs(**given), dict(scale=case.scale)
        output, state, residuals = launch.forward(interpreter.call, case.capability, x, save=True, **options)
        *plain, none = launch.forward(interpreter.call, case.capability, x, save=False, **options)
        if none or not all(map(np.array_equal, plain, (output, state))):
            raise AssertionError("saving states changes the results")
        gradients = launch.backward(interpreter.call, case.capability, x, residuals, cotangents, **options)
        results = dict(zip(cases.NAMES, (output, state, *gradients), strict=True))
        return {name: x for name, x in results.items() if x is not None}

    failures = []
    for case in cases.CASES:
        if only not in str(case):
            continue
        begun = time.perf_counter()
        inputs = cases.draw(case)
        got = run(case, inputs)
        want = cases.evaluate(inputs, case.scale, np.float64)
        limits = cases.allowed(case, inputs, want)
        found = cases.errors(got, want)
        share = {name: found[name] / limits[name] for name in want}
        worst = max(share, key=lambda name: share[name])
        print(
            f"{case}: {worst} at {share[worst]:.2f} of its limit, error {found[worst]:.1e};"
            f" {time.perf_counter() - begun:.0f} s",
            flush=True,
        )
        failures += [
            f"{case}: {n} is {found[n]:.1e} off, {limits[n]:.1e} allowed" for n, x in share.items() if not x <= 1
        ]
        if case.borders and case.length > max(case.borders):
            failures += [f"{case}: {line}" for line in _leaks(run, case, inputs, got)]
    return failures


def _leaks(run, case, inputs, got) -> list[str]:
    """What of the last document in the first row changed when everything before it did."""
    import numpy as np

    border = max(case.borders)
    changed = dict(inputs)
    for name in ("query", "key", "value", "erase", "write", "log_decay", "d_output"):
        if inputs[name] is not None:
            changed[name] = inputs[name].copy()
            changed[name][0, :border] = inputs[name][0, :border][::-1] * inputs[name].dtype.type(0.75)
    if inputs["initial_state"] is not None:
        changed["initial_state"] = inputs["initial_state"] * 2
    after = run(case, changed)
    per_token = [name for name in got if name not in ("state", "d_initial_state")]
    lines = [f"{n} leaks" for n in per_token if not np.array_equal(got[n][0, border:], after[n][0, border:])]
    if not np.array_equal(got["state"][0], after["state"][0]):
        lines.append("state leaks")
    if np.array_equal(got["output"][0, :border], after["output"][0, :border]):
        lines.append("nothing changed before the border: the check is void")
    return lines


def _shapes(dtype, sizes, decay, documents):
    """`launch.Inputs` and cotangents, as shapes, for sizes (B, T, Hk, H, K, V)."""
    import jax

    from pallas_kernels.triton.launch import Inputs

    batch, length, key_heads, heads, key_dim, value_dim = sizes
    key = jax.ShapeDtypeStruct((batch, length, key_heads, key_dim), dtype)
    value = jax.ShapeDtypeStruct((batch, length, heads, value_dim), dtype)
    vector = jax.ShapeDtypeStruct((batch, length, heads), "float32")
    state = jax.ShapeDtypeStruct((batch, heads, key_dim, value_dim), "float32")
    borders = jax.ShapeDtypeStruct((batch, length), "int32") if documents else None
    return Inputs(key, key, value, vector, vector, vector if decay else None, state, borders), (value, state)


def _kernels(only: str) -> dict[Any, str]:
    """Every kernel of every variant once, with the name of the first variant that runs it."""
    from experiments.kernels.triton_cases import VARIANTS
    from experiments.kernels.triton_compiler import recorder
    from pallas_kernels.triton import launch

    found: dict[Any, str] = {}
    for variant in VARIANTS:
        if only not in str(variant):
            continue
        seen: list[Any] = []
        call = recorder(variant.capability, variant.dtype, seen.append)
        sizes = (2, 100, variant.key_heads, 4, variant.key_dim, variant.value_dim)
        x, cotangents = _shapes(variant.dtype, sizes, variant.decay, variant.documents)
        launch.forward(call, variant.capability, x, scale=0.5, save=False)
        residuals = launch.forward(call, variant.capability, x, scale=0.5, save=True)[2]
        launch.backward(call, variant.capability, x, residuals, cotangents, scale=0.5)
        for kernel in seen:
            found.setdefault(kernel, str(variant))
    return found


def compile_all(only: str) -> list[str]:
    """Every kernel for every architecture; what breaks a budget, a sentence each."""
    from experiments.kernels import triton_compiler
    from experiments.kernels.triton_report import Compiled, summary

    found = _kernels(only)
    failures: list[str] = []
    seen: list[Compiled] = []
    # processes, not threads: Triton's compiler holds the interpreter's lock
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(os.cpu_count() or 1, len(found) or 1), mp_context=context) as pool:
        for name, kernel, got in zip(found.values(), found, pool.map(triton_compiler.compiled, found), strict=True):
            name += " save" * dict(kernel.constants).get("SAVE", False)
            print(f"{name}: {got}", flush=True)
            seen.append(got)
            failures += [f"{name}: {line}" for line in got.violations()]
    print(f"worst of {len(seen)} kernels", *summary(seen), sep="\n  ")
    return failures


def lower(only: str) -> list[str]:
    """Forward and backward through jax-triton for cuda; what is not there, a sentence each."""
    import jax

    from pallas_kernels.triton import host, launch

    failures = []
    # jax-triton makes a size of 1 a constant of the kernel
    for capability, sizes, options in (
        (80, (2, 150, 2, 4, 64, 128), (True, True)),
        (90, (2, 150, 4, 4, 128, 128), (False, False)),
        (80, (1, 1, 1, 1, 16, 16), (True, True)),
    ):
        name = f"lower sm_{capability} B, T, Hk, H, K, V = {sizes} decay, documents = {options}"
        if only not in name:
            continue

        def both(x, cotangents, capability=capability):
            call = host.caller(capability)
            output, state, residuals = launch.forward(call, capability, x, scale=0.5, save=True)
            return output, state, launch.backward(call, capability, x, residuals, cotangents, scale=0.5)

        shapes = _shapes("bfloat16", sizes, *options)
        text = jax.jit(both).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
        calls = text.count("custom_call @triton_kernel_call")
        print(f"{name}: {calls} kernels", flush=True)
        if calls != 4:
            failures.append(f"{name}: {calls} kernels, 4 expected")
    return failures + _exported(only)


def _exported(only) -> list[str]:
    """The public op by the name "triton", exported for cuda where there is no GPU; what is wrong, a sentence each."""
    import jax

    from efla_jax import efla_attention

    # JAX does not promise that a later version runs what was exported
    unchecked = [jax.export.DisabledSafetyCheck.custom_call("triton_kernel_call")]
    export = lambda f: jax.export.export(jax.jit(f), platforms=("cuda",), disabled_checks=unchecked)
    attend = lambda *inputs: efla_attention(*inputs, implementation="triton")
    loss = lambda *inputs: sum(x.astype("float32").sum() for x in attend(*inputs))
    (query, key, value, beta, *_), _ = _shapes("bfloat16", (2, 100, 1, 2, 64, 32), False, False)
    shapes = query, key, value, beta
    failures = []
    for name, function, expected in (
        ("forward", attend, 2),
        ("gradient", jax.grad(loss, argnums=(0, 1, 2, 3)), 4),
        ("gradient with remat", jax.value_and_grad(jax.checkpoint(loss)), 6),
        ("forward under vmap", jax.vmap(attend), 2),
    ):
        if only not in f"export {name}":
            continue
        rows = [jax.ShapeDtypeStruct((3, *x.shape), x.dtype) for x in shapes] if "vmap" in name else shapes
        calls = export(function)(*rows).mlir_module().count("custom_call @triton_kernel_call")
        print(f"export {name}: {calls} kernels", flush=True)
        if calls != expected:
            failures.append(f"export {name}: {calls} kernels, {expected} expected")
    try:
        jax.jit(attend).lower(*shapes)
        failures.append("it is lowered for the CPU")
    except NotImplementedError as error:
        if "NVIDIA GPU" not in str(error):
            failures.append(f"refused for the CPU without the reason: {error}")
    return failures


_STEPS = {"interpret": interpret, "compile": compile_all, "lower": lower}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", choices=[*_STEPS, []], help="default: all, each in its own process")
    parser.add_argument("--only", default="", help="what a variant's name must hold")
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TRITON_CACHE_DIR", str(Path(__file__).parents[2] / ".cache" / "triton"))
    if len(args.steps) != 1:
        command = [sys.executable, "-m", "experiments.kernels.check_triton", f"--only={args.only}"]
        codes = [subprocess.run([*command, step], check=False).returncode for step in args.steps or _STEPS]
        return max(codes)
    (step,) = args.steps
    failures = _STEPS[step](args.only)
    print(f"{step}: {len(failures)} failed", *failures, sep="\n  ")
    return min(len(failures), 1)


if __name__ == "__main__":
    sys.exit(main())
