"""Other libraries' delta-rule kernels, computing the exact rule on the same numbers.

They know S_t = (I - b u uᵀ) S_{t-1} + b u vᵀ. With key = p u, p the power of two that `draw` gave the key, it is the
exact rule for b = α p² and value / p, both without any rounding of u and value / p. That form is made outside of what
is timed, and gradients are led back through it to those of query, key, value and beta before they are compared.
"""

import importlib
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from efla_jax.evaluation.comparison import Bench, Candidate
from efla_jax.evaluation.op_speed import BOTH, FORWARD, Program, compile_jax
from efla_jax.ops.coefficients import erase_and_write

_INPUTS = ("query", "key", "value", "beta")


# ---- the unit-key form ----


def _unit_form(power, query, key, value, beta):
    """(query, u, value / p, b) of power [B, T, H]."""
    erase, _ = erase_and_write(key, beta)
    scale = power[..., None]
    divide = lambda x: (x.astype(scale.dtype) / scale).astype(x.dtype)
    return query, divide(key), divide(value), erase * power**2


def _power(key):
    """Of key [B, T, H, K], whose unit vector was rounded: the nearest power of two to its norm."""
    return jnp.exp2(jnp.round(jnp.log2(jnp.linalg.norm(key.astype(jnp.float32), axis=-1))))


@jax.jit
def unit_form(inputs: Mapping[str, jax.Array]) -> tuple[jax.Array, ...]:
    """(query, unit keys, values, gate): inputs as the delta rule of others wants them; the gate in float32."""
    return _unit_form(_power(inputs["key"]), *(inputs[name] for name in _INPUTS))


def lead_back(part: Mapping[str, np.ndarray], gradients: tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
    """Gradients of the inputs from those of their unit-key form, in float64; `part` are sampled inputs."""
    power = np.asarray(_power(part["key"]))
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        wide = [np.asarray(part[name], np.float64) for name in _INPUTS]
        _, pullback = jax.vjp(partial(_unit_form, np.asarray(power, np.float64)), *wide)
        led = pullback(tuple(np.asarray(x, np.float64) for x in gradients))
    return {f"d_{name}": np.asarray(x) for name, x in zip(_INPUTS, led, strict=True)}


def _named(bench: Bench, forms: dict[str, Any]) -> dict[str, np.ndarray]:
    """Sampled results of the first draw; gradients, which are those of the unit form, led back."""
    taken = bench.sample.take(forms)
    gradients = tuple(taken.pop(f"d_{name}") for name in _INPUTS if f"d_{name}" in taken)
    return taken | (lead_back(bench.sample.take(bench.draws[0].inputs), gradients) if gradients else {})


# ---- JAX ----


def jla(bench: Bench, direction: str) -> Candidate:
    """jax-linear-attention: Pallas Mosaic GPU kernels for Hopper, run with no decay."""
    linear_attention = importlib.import_module("jla.ops").linear_attention

    def run(form, segment_ids, final):
        query, key, value, gate = form
        return linear_attention(
            "deltanet", query, key, value, beta=gate, scale=1.0, impl="mosaic_gpu", output_final_state=final,
            segment_ids=segment_ids,
        )  # fmt: skip

    def forward(form, segment_ids, d_output):
        return dict(zip(("output", "state"), run(form, segment_ids, True), strict=True))

    def both(form, segment_ids, d_output):
        output, pullback = jax.vjp(lambda form: run(form, segment_ids, False)[0], form)
        return {"output": output} | {f"d_{n}": x for n, x in zip(_INPUTS, pullback(d_output)[0], strict=True)}

    sets = [(unit_form(d.inputs), d.inputs.get("segment_ids"), d.cotangents["output"]) for d in bench.draws]
    program = compile_jax(forward if direction == FORWARD else both, sets)
    return Candidate(program, partial(_named, bench))


def cudnn_softmax(bench: Bench, direction: str) -> Candidate:
    """Causal softmax attention by cuDNN: another function, for orientation."""
    if bench.case.documents > 1:
        raise NotImplementedError("softmax attention is run without documents")
    run = partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")

    def both(query, key, value, d_output):
        output, pullback = jax.vjp(run, query, key, value)
        return output, pullback(d_output)

    sets = [(*(d.inputs[name] for name in _INPUTS[:3]), d.cotangents["output"]) for d in bench.draws]
    if direction == FORWARD:
        return Candidate(compile_jax(run, [arguments[:3] for arguments in sets]), lambda results: {})
    return Candidate(compile_jax(both, sets), lambda results: {})


# ---- PyTorch ----


class _TorchSet(NamedTuple):
    """Inputs of one call as tensors: [B, T, H, …], and where sequences begin in the rows laid end to end."""

    form: tuple[Any, ...]
    d_output: Any
    borders: Any


def _torch_sets(bench: Bench, direction: str) -> list[_TorchSet]:
    torch, case = importlib.import_module("torch"), bench.case
    rows = case.batch * case.length
    borders = [row + border for row in range(0, rows, case.length) for border in case.borders[:-1]] + [rows]

    def tensors(draw):
        arrays = jax.block_until_ready((*unit_form(draw.inputs), draw.cotangents["output"]))
        *form, d_output = (torch.from_dlpack(x) for x in arrays)
        if direction == BOTH:
            form = [x.requires_grad_() for x in form]
        return _TorchSet(tuple(form), d_output, torch.tensor(borders, dtype=torch.int64, device=d_output.device))

    return [tensors(draw) for draw in bench.draws]


def _torch_peer(bench: Bench, direction: str, run: Callable[[_TorchSet, bool], tuple[Any, Any]]) -> Candidate:
    """run(inputs, final) -> (output, final states if wanted: [sequences, H, K, V])."""
    torch, documents = importlib.import_module("torch"), bench.case.documents
    sets = _torch_sets(bench, direction)

    def call(n):
        inputs = sets[n % len(sets)]
        output, state = run(inputs, direction == FORWARD)
        if direction == FORWARD:
            return {"output": output, "state": state}
        gradients = torch.autograd.grad(output, inputs.form, inputs.d_output)
        return {"output": output} | {f"d_{name}": x for name, x in zip(_INPUTS, gradients, strict=True)}

    def results(found):
        if "state" in found:  # of each row's last document
            found = found | {"state": found["state"][documents - 1 :: documents]}
        return _named(bench, {name: x.detach().float().cpu().numpy() for name, x in found.items()})

    begun = time.perf_counter()
    call(0)
    torch.cuda.synchronize()
    program = Program(call, lambda _: torch.cuda.synchronize(), len(sets), time.perf_counter() - begun)
    return Candidate(program, results)


def _packed_row(bench: Bench) -> bool:
    """Whether there are documents, which these libraries pack in a batch of 1."""
    if bench.case.documents > 1 and bench.case.batch > 1:
        raise NotImplementedError("it packs documents in a batch of 1")
    return bench.case.documents > 1


def fla(bench: Bench, direction: str) -> Candidate:
    """flash-linear-attention's Triton kernels."""
    chunk_delta_rule = importlib.import_module("fla.ops.delta_rule").chunk_delta_rule
    packed = _packed_row(bench)

    def run(inputs, final):
        borders = inputs.borders if packed else None
        return chunk_delta_rule(*inputs.form, scale=1.0, output_final_state=final, cu_seqlens=borders)

    return _torch_peer(bench, direction, run)


def flash_qla(bench: Bench, direction: str) -> Candidate:
    """FlashQLA's TileLang kernels of the gated rule, with log-decay 0."""
    torch = importlib.import_module("torch")
    gated_delta_rule = importlib.import_module("flash_qla").chunk_gated_delta_rule
    packed = _packed_row(bench)
    no_decay = torch.zeros((bench.case.batch, bench.case.length, bench.case.heads), device="cuda")

    def run(inputs, final):
        query, key, value, gate = inputs.form
        borders = inputs.borders if packed else None
        return gated_delta_rule(
            query, key, value, no_decay, gate, scale=1.0, output_final_state=final, cu_seqlens=borders
        )

    return _torch_peer(bench, direction, run)


def flashinfer(bench: Bench, direction: str) -> Candidate:
    """FlashInfer's CuTe kernel for prefill: forward only, without gate, on sequences laid end to end."""
    if direction == BOTH:
        raise NotImplementedError("forward only")
    gated_delta_rule = importlib.import_module("flashinfer.gdn_prefill").chunk_gated_delta_rule
    tokens = (bench.case.batch, bench.case.length)

    def run(inputs, final):
        query, key, value, gate = (x.flatten(0, 1) for x in inputs.form)
        output, state = gated_delta_rule(
            query, key, value, None, gate, scale=1.0, output_final_state=True, cu_seqlens=inputs.borders
        )
        return output.unflatten(0, tokens), state.transpose(-1, -2)  # it keeps [V, K]

    return _torch_peer(bench, direction, run)


PEERS: dict[str, Callable[[Bench, str], Candidate]] = {
    "jla": jla,
    "flashinfer": flashinfer,
    "flash_qla": flash_qla,
    "fla": fla,
    "cudnn_softmax": cudnn_softmax,
}
TIMES_ITSELF = ("flash_qla", "fla")  # its first call times variants of its kernels, so nothing else may run then
PACKAGES = ("jax-linear-attention", "flashinfer-python", "flash-qla", "flash-linear-attention", "fla-core")


def peer(name: str, bench: Bench, direction: str) -> Candidate:
    """A peer of PEERS.

    Raises:
        ImportError: it is not installed.
        NotImplementedError: it does not serve the case.
    """
    return PEERS[name](bench, direction)
