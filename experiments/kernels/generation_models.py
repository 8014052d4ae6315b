"""What `generation` times: greedy generation of this library and of others, on a model of the same sizes; and the rows
of its table.

measure(sizes, prompts, tokens, repeats, …) -> a row; prompts are int32 [B, P] on the host, parameters random, in
bfloat16. "prefill" is milliseconds until the first token, "step" milliseconds for each further token of all rows.
"""

import importlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from efla_jax.evaluation.op_speed import ceilings
from efla_jax.inference.engine import Engine, Request
from efla_jax.inference.prefill import prefill
from efla_jax.inference.programs import JittedPrograms, decode_batch
from efla_jax.inference.sampling import fresh_rows
from efla_jax.models import LanguageModel
from experiments.kernels.isolated import Row, spread, spread_text
from experiments.kernels.train_models import Sizes, fla_model, jla_config, model_config

HEADING = (
    "| B | implementation | step, ms: median (quartiles) | floor, ms | tokens/s | prefill, ms | whole, ms "
    "| peak memory | remarks |\n|---|---|---|---|---|---|---|---|---|"
)


def _seconds(call: Callable[[], Any]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def floor_bytes(sizes: Sizes, batch: int) -> int:
    """Of a step: matrices once in bfloat16, an embedding's row for each token, every state read and written."""
    states = batch * sizes.layers * sizes.heads * sizes.head_dim**2 * 4
    return 2 * sizes.matrix_parameters() + 2 * batch * sizes.features + 2 * states


def _programs(sizes: Sizes, prompts: np.ndarray, rule: str, implementation: str | None) -> tuple[JittedPrograms, Any]:
    """Programs for these prompts alone, and random parameters as they take them."""
    config = model_config(sizes, rule, implementation)
    batch_sizes = (1, 2) if len(prompts) == 1 else (len(prompts),)  # for `decode_batch`
    programs = JittedPrograms(config, batch_sizes=batch_sizes, lengths=(1, prompts.shape[1]))
    draw = lambda: nnx.state(LanguageModel(config, rngs=nnx.Rngs(0)), nnx.Param)
    return programs, jax.block_until_ready(programs.prepare(jax.jit(draw)()))


def ours(
    sizes: Sizes,
    prompts: np.ndarray,
    tokens: int,
    repeats: int,
    *,
    rule: str,
    implementation: str | None = None,
    burst: int = 32,
    check: bool = False,
) -> Row:
    """By `efla_jax.inference`: prefill alone, bursts of the decoding loop alone, and the engine with both.

    check: compare the logits after the prompt and a token more with those of implementation "xla".
    """
    programs, params = _programs(sizes, prompts, rule, implementation)
    batch, states = len(prompts), [None] * len(prompts)
    begin = lambda: prefill(programs, params, list(prompts), states)
    begun = time.perf_counter()
    logits_BV, cache = jax.block_until_ready(begin())
    repeated = decode_batch(programs, batch) // batch
    again = lambda x: jnp.concatenate([x] * repeated) if repeated > 1 else x
    cache = jax.tree.map(again, cache)
    rows = fresh_rows(batch * repeated)._replace(token=again(jnp.argmax(logits_BV, -1).astype(jnp.int32)[:, None]))
    left_B = np.full(batch * repeated, burst, np.int32)
    decode = lambda rows, cache: programs.decode(
        params, rows, left_B, cache, count=burst, vocabulary=sizes.vocabulary, drawing=False
    )
    first_NB, rows, cache = decode(rows, cache)
    first_NB = np.asarray(first_NB)[:, :batch]
    ready = time.perf_counter() - begun
    prefills = [_seconds(lambda: jax.block_until_ready(begin()[0])) for _ in range(repeats)]
    steps = _step_seconds(decode, (rows, cache), repeats, max(tokens // burst, 1), burst)
    texts = _whole(programs, params, sizes, prompts, tokens, burst)  # compiles what the engine has beside
    whole = [_seconds(lambda: _whole(programs, params, sizes, prompts, tokens, burst)) for _ in range(repeats)]
    count = min(burst, tokens - 1)
    bandwidth = ceilings("bfloat16")["bytes_per_second"]
    row = dict(
        prefill=spread(prefills), step=spread(steps), whole=spread(whole), ready_seconds=ready, bandwidth=bandwidth,
        engine_agrees=bool(np.array_equal(np.array(texts)[:, 1 : 1 + count].T, first_NB[:count])),
        different_tokens=len(np.unique(first_NB)), peak_bytes=_peak_bytes(),
    )  # fmt: skip
    return row | (_check(sizes, prompts, rule, (programs, params)) if check else {})


def _step_seconds(decode: Callable, state: tuple[Any, Any], repeats: int, bursts: int, burst: int) -> list[float]:
    """Seconds of a step, in each of `repeats` rows of bursts; decode(rows, cache) -> (tokens, rows, cache)."""
    (rows, cache), found = state, []
    for _ in range(repeats):
        begun = time.perf_counter()
        for _ in range(bursts):
            _, rows, cache = decode(rows, cache)
        jax.block_until_ready(rows.token)
        found.append((time.perf_counter() - begun) / (bursts * burst))
    return found


def _whole(programs, params, sizes, prompts, tokens, burst) -> list[list[int]]:
    """The completions of the prompts by the engine."""
    engine = Engine(programs, params, sizes.vocabulary, slots=len(prompts), burst=burst)
    texts: dict[Request, list[int]] = {Request(prompt, tokens): [] for prompt in prompts}
    for request in texts:
        engine.submit(request)
    while engine.busy:
        for request, token in engine.step():
            texts[request].append(token)
    return list(texts.values())


def _check(sizes: Sizes, prompts: np.ndarray, rule: str, measured: tuple[JittedPrograms, Any]) -> Row:
    """Relative distance of the logits from those by "xla": after the prompt, and after a token more."""

    def logits(programs, params):
        after_BV, cache = prefill(programs, params, list(prompts), [None] * len(prompts))
        ones_B1 = np.ones((len(prompts), 1), np.int32)
        return np.stack([after_BV, programs.forward(params, ones_B1, ones_B1[:, 0], cache)[0]])

    config = model_config(sizes, rule, "xla")
    plain = JittedPrograms(config, measured[0].batch_sizes, measured[0].lengths)
    got, want = logits(*measured), logits(plain, measured[1])
    error = np.linalg.norm(got - want, axis=(1, 2)) / np.linalg.norm(want, axis=(1, 2))
    return {"logit_errors": [float(x) for x in error]}


def _peak_bytes() -> int | None:
    stats = jax.local_devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] if stats else None


def _by_difference(generate: Callable[[int], Any], tokens: int, repeats: int) -> Row:
    """Of a call that does all at once: one token, and what the others take beyond it. generate(count) waits."""
    begun = time.perf_counter()
    generate(1)
    generate(tokens)
    ready = time.perf_counter() - begun
    first = [_seconds(lambda: generate(1)) for _ in range(repeats)]
    whole = [_seconds(lambda: generate(tokens)) for _ in range(repeats)]
    least = float(np.median(first))
    steps = [(seconds - least) / max(tokens - 1, 1) for seconds in whole]
    return dict(prefill=spread(first), step=spread(steps), whole=spread(whole), ready_seconds=ready)


def fla(sizes: Sizes, prompts: np.ndarray, tokens: int, repeats: int) -> Row:
    """By its model's `generate`, as its users call it."""
    torch = importlib.import_module("torch")
    model = fla_model(sizes, "bfloat16").eval()
    prompts_BP = torch.tensor(prompts, dtype=torch.int64, device="cuda")

    def generate(count):
        with torch.inference_mode():
            out = model.generate(input_ids=prompts_BP, max_new_tokens=count, min_new_tokens=count, do_sample=False)
        torch.cuda.synchronize()
        if out.shape[1] != prompts.shape[1] + count:
            raise RuntimeError(f"{out.shape[1] - prompts.shape[1]} tokens came; {count} were asked for")

    row = _by_difference(generate, tokens, min(repeats, 3))
    return row | dict(peak_bytes=torch.cuda.max_memory_allocated())


def jla(sizes: Sizes, prompts: np.ndarray, tokens: int, repeats: int) -> Row:
    """By its `generate`, its loop on the device, with matrices in bfloat16."""
    eqx = importlib.import_module("equinox")
    config = jla_config(sizes, *prompts.shape, tuned=True).model
    build = importlib.import_module("jla.models").build_model
    run = importlib.import_module("jla.inference").generate
    narrow = lambda x: x.astype(jnp.bfloat16) if eqx.is_inexact_array(x) and x.ndim > 1 else x
    model = jax.tree.map(narrow, eqx.filter_jit(build)(config, key=jax.random.key(0)))
    lists = prompts.tolist()
    row = _by_difference(lambda count: run(model, lists, max_new_tokens=count), tokens, min(repeats, 3))
    return row | dict(peak_bytes=_peak_bytes())


def measure(name: str, sizes: Sizes, prompts: np.ndarray, tokens: int, repeats: int, **options: Any) -> Row:
    """The row of "ours:RULE[:IMPLEMENTATION]", "fla" or "jla"; options are those of `ours`.

    Raises:
        ImportError: it is not installed.
        ValueError: there is none of this name.
    """
    library, *given = name.split(":")
    if library == "ours" and given and given[0] in ("efla", "deltanet") and len(given) < 3:
        implementation = given[1] if given[1:] else None
        return ours(sizes, prompts, tokens, repeats, rule=given[0], implementation=implementation, **options)
    if name in ("fla", "jla"):
        return dict(fla=fla, jla=jla)[name](sizes, prompts, tokens, repeats)
    raise ValueError(f"implementation is {name!r}; it must be ours:efla, ours:deltanet (with :xla behind), fla or jla")


# ---- rows of the table ----


def completed(row: Row, name: str, sizes: Sizes, batch: int, bandwidth: float | None) -> Row:
    """row with its name and what follows from its numbers."""
    row = {"implementation": name, "batch": batch, "floor_bytes": floor_bytes(sizes, batch), **row}
    if bandwidth:
        row["floor_ms"] = 1e3 * row["floor_bytes"] / bandwidth
    if "step" in row:
        row["tokens_per_second"] = 1e3 * batch / row["step"]["median"]
    return row


def line(row: Row) -> str:
    """A line of the table."""
    begin = f"| {row['batch']} | {row['implementation']} | "
    if "reason" in row:
        return f"{begin}{row['reason']} | | | | | | |"
    floor = f"{row['floor_ms']:.3f}" if "floor_ms" in row else ""
    peak = f"{row['peak_bytes'] / 2**30:.1f} GiB" if row.get("peak_bytes") else ""
    remarks = [f"ready in {row['ready_seconds']:.0f} s"]
    if "logit_errors" in row:
        remarks.append("logits off xla's by " + ", ".join(f"{error:.1e}" for error in row["logit_errors"]))
    if not row.get("engine_agrees", True):
        remarks.append("SUSPECT: the engine drew other tokens than the loop")
    cells = (
        spread_text(row["step"]), floor, f"{row['tokens_per_second']:,.0f}", spread_text(row["prefill"]),
        spread_text(row["whole"]), peak, "; ".join(remarks),
    )  # fmt: skip
    return begin + " | ".join(cells) + " |"
