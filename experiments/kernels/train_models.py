"""The training steps that `train_step` times, of this library and of others, on the same model and token batches; and
the rows of its table.

A step is built by build(sizes, batches) and run by step(number), which starts it and returns something to wait for.
`sizes` are those of the model; batches are int32 [N, B, T + 1] on the host, the last token a target alone.
"""

import dataclasses
import importlib
import json
import math
import time
import tomllib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app

from efla_jax.models import LanguageModelConfig, graph_of
from efla_jax.models.presets import preset
from efla_jax.training.config import Config, DataConfig, OptimizerConfig, TrainConfig
from efla_jax.training.objectives import objective_of
from efla_jax.training.step import initial_state, make_optimizer, make_train_step, schedule
from experiments.kernels.isolated import Row, card, spread, spread_text

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12}  # dense bfloat16, SXM
HEADING = (
    "| B×T | implementation | ms a step, median (quartiles) | tokens/s | MFU | peak memory | ready in | loss |\n"
    + ("|---|---|---|---|---|---|---|---|")
)
LEARNING_RATE, WEIGHT_DECAY, BETAS, CLIP = 3e-4, 0.1, (0.9, 0.95), 1.0


@dataclass(frozen=True)
class Sizes:
    """Of a language model without softmax blocks: keys and values of each head have head_dim."""

    layers: int = 24
    features: int = 1024
    heads: int = 8
    head_dim: int = 128
    hidden: int = 2816
    vocabulary: int = 32_000
    convolution: int = 4

    def matrix_parameters(self) -> int:
        """Those that are multiplied with every token: not the embedding, norms and convolutions."""
        inner = self.heads * self.head_dim
        layer = 4 * self.features * inner + self.features * self.heads + 3 * self.features * self.hidden
        return self.layers * layer + self.features * self.vocabulary

    def flops_per_token(self) -> int:
        """Of a training step: 2 a parameter forward and 4 backward, and three times the delta rule's own 6 K V a head
        (Sᵀk, k uᵀ and Sᵀq, token by token). Nothing is counted for what is computed again."""
        return 6 * self.matrix_parameters() + 18 * self.layers * self.heads * self.head_dim**2


def sizes_of(changes: list[str]) -> Sizes:
    """Sizes with those given as NAME=NUMBER changed.

    Raises:
        app.UsageError: no such size, or no number.
    """
    try:
        return Sizes(**{name: int(number) for name, _, number in (text.partition("=") for text in changes if text)})
    except (TypeError, ValueError) as error:
        raise app.UsageError(f"--sizes is {','.join(changes)!r}: {error}") from error


class Step(NamedTuple):
    """run(number) starts a step and returns something whose value `wait` waits for and gives as the loss."""

    run: Callable[[int], Any]
    wait: Callable[[Any], float]
    peak_bytes: Callable[[], int | None]
    parameters: int
    compile_seconds: float | None = None
    note: str = ""


def model_config(sizes: Sizes, rule: str, implementation: str | None) -> LanguageModelConfig:
    """This library's config: rule "efla", or "deltanet" with unit keys and, as others have it, unit queries."""
    base = preset("340m", mixers=(rule,))
    mixer = dataclasses.replace(
        base.mixer, heads=sizes.heads, key_dim=sizes.head_dim, value_dim=sizes.head_dim, scale=sizes.head_dim**-0.5,
        conv_width=sizes.convolution, implementation=implementation, normalize_queries=rule == "deltanet",
    )  # fmt: skip
    return dataclasses.replace(
        base, vocab_size=sizes.vocabulary, features=sizes.features, layers=sizes.layers, hidden=sizes.hidden,
        mixer=mixer,
    )  # fmt: skip


def _peak_bytes() -> int | None:
    stats = jax.local_devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] if stats else None


def ours(sizes: Sizes, batches: np.ndarray, rule: str, implementation: str | None) -> Step:
    """The step of `efla_jax.training`, its state donated, as its loop runs it on one device."""
    model = model_config(sizes, rule, implementation)
    config = Config(
        model=model,
        data=DataConfig(source="none", sequence_length=batches.shape[2] - 1),
        optimizer=OptimizerConfig(
            peak_lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, beta1=BETAS[0], beta2=BETAS[1], clip_norm=CLIP,
            decayed="matrices",
        ),
        train=TrainConfig(batch_size=batches.shape[1]),
    )  # fmt: skip
    learning_rate = schedule(config.optimizer, config.train.steps)
    optimizer = make_optimizer(config.optimizer, learning_rate)
    state = jax.jit(lambda: initial_state(config, jax.random.key(0), optimizer))()
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state["params"]))
    on_device = [jax.device_put(dict(inputs=x[:, :-1], targets=x[:, 1:])) for x in batches]
    step = make_train_step(graph_of(model), optimizer, learning_rate, objective=objective_of(config))
    begun = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=0).lower(state, on_device[0]).compile()
    held = [state]

    def run(number):
        held[0], metrics = compiled(held[0], on_device[number % len(on_device)])
        return metrics["loss"]

    return Step(run, float, _peak_bytes, parameters, time.perf_counter() - begun)


# ---- jax-linear-attention ----

# Its trainer's options for this model; the optimizer's are its defaults, which are those above.
_JLA = """
name = "deltanet"
[model]
vocab_size = {vocabulary}
d_model = {features}
n_layers = {layers}
d_ff = {hidden}
tie_embeddings = false
layer_types = {kinds}
remat = "none"
lean_vjp = {lean}
scan_layers = {scan}
[model.attention]
num_heads = {heads}
num_kv_heads = {heads}
head_dim = {head_dim}
[model.linear_attention]
num_k_heads = {heads}
num_v_heads = {heads}
head_k_dim = {head_dim}
head_v_dim = {head_dim}
conv_size = {convolution}
output_gate = false
[optim]
lr = {rate}
schedule = "constant"
[train]
max_steps = 1000
seq_len = {length}
micro_batch_per_replica = {batch}
ce_impl = "{ce}"
ce_grad_in_forward = {in_forward}
final_eval = false
[data]
synthetic_kind = "uniform"
"""


def jla_config(sizes: Sizes, batch: int, length: int, tuned: bool) -> Any:
    """Its experiment config: `lean_vjp` and no rematerialisation, all else as it defaults to. tuned: its fused
    cross-entropy and blocks that are not scanned, too."""
    text = _JLA.format(
        **dataclasses.asdict(sizes), kinds=json.dumps(["deltanet"] * sizes.layers), rate=LEARNING_RATE, length=length,
        batch=batch, lean="true", scan="false" if tuned else "true", ce="auto" if tuned else "xla",
        in_forward="true" if tuned else "false",
    )  # fmt: skip
    return importlib.import_module("jla.config").config_from_mapping(tomllib.loads(text))


def jla(sizes: Sizes, batches: np.ndarray, tuned: bool = False) -> Step:
    """The step of its `Trainer`, built by the trainer's own parts in the trainer's order, for one device."""
    eqx = importlib.import_module("equinox")
    config = jla_config(sizes, batches.shape[1], batches.shape[2] - 1, tuned)
    part = lambda module, name: getattr(importlib.import_module(f"jla.{module}"), name)
    plan = part("distributed.mesh", "plan_from_config")(config.mesh, 1)
    mesh = part("distributed.mesh", "build_mesh")(plan, jax.devices()[:1])
    rules = part("distributed.sharding", "resolve_rules")(config.mesh.rules)
    trainer = part("training.trainer", "Trainer")(config, devices=jax.devices()[:1])
    model = trainer._init_model(mesh, rules, jax.random.key(0))
    params = eqx.filter(model, eqx.is_inexact_array)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
    rate = part("training.schedulers", "create_schedule")(
        config.optim.lr,
        config.optim.schedule,
        total_steps=config.schedule_steps,
        warmup_steps=0,
    )
    optimizer = part("training.optimizers", "optimizer_from_config")(config.optim, rate)
    places = jax.tree.map(lambda leaf: leaf.sharding, params)
    opt_places = part("distributed.sharding", "opt_state_shardings")(
        jax.eval_shape(optimizer.init, params), params, places, mesh
    )
    opt_state = jax.jit(optimizer.init, out_shardings=opt_places)(params)
    key = part("training.trainer", "_replicated_key")(jax.random.key(1), mesh)
    batch_place = part("distributed.sharding", "grouped_batch_sharding")(mesh, rules)
    loss = part("training.step", "lm_loss")(part("training.step", "LossConfig").from_train_config(config.train))
    step = part("training.step", "build_train_step")(
        optimizer, loss, batch_sharding=batch_place, param_shardings=places, opt_shardings=opt_places
    )
    split = [dict(input_ids=x[None, :, :-1], labels=x[None, :, 1:]) for x in batches]
    on_device = [jax.device_put(x, batch_place) for x in split]
    begun = time.perf_counter()
    with jax.set_mesh(mesh), part("distributed.kernel_sharding", "use_rules")(rules):
        step.use_compiled(step.lower(model, opt_state, on_device[0], key).compile())
    held = [(model, opt_state, key)]
    del model, opt_state, params  # the step takes their buffers

    def run(number):
        model, opt_state, key = held[0]
        model, opt_state, metrics, key = step(model, opt_state, on_device[number % len(on_device)], key)
        held[0] = (model, opt_state, key)
        return metrics["loss"]

    return Step(run, float, _peak_bytes, parameters, time.perf_counter() - begun)


# ---- flash-linear-attention ----


def fla_model(sizes: Sizes, dtype: str = "float32") -> Any:
    """Its DeltaNetForCausalLM of these sizes, on the GPU, its fused norms, SwiGLU and cross-entropy as they default."""
    torch = importlib.import_module("torch")
    models = importlib.import_module("fla.models.delta_net")
    if sizes.heads * sizes.head_dim != sizes.features:
        raise NotImplementedError("its heads are the model's width together")
    config = models.DeltaNetConfig(
        hidden_size=sizes.features, num_heads=sizes.heads, num_hidden_layers=sizes.layers,
        intermediate_size=sizes.hidden, vocab_size=sizes.vocabulary, conv_size=sizes.convolution,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return models.DeltaNetForCausalLM(config).to(device="cuda", dtype=getattr(torch, dtype))


def _tune_side_by_side() -> None:
    """Triton compiles the candidates of a kernel one after the other, minutes for all of fla's: here, side by side."""
    autotuner = importlib.import_module("triton.runtime.autotuner").Autotuner
    mode = importlib.import_module("triton").AsyncCompileMode
    run = autotuner.run

    def run_compiled(self, *args, **kwargs):
        if len(self.configs) > 1 and not self.cache:
            with ThreadPoolExecutor() as pool, mode(pool, ignore_errors=True):
                self.warmup(*args, **{name: x for name, x in kwargs.items() if name != "warmup"})
        return run(self, *args, **kwargs)

    autotuner.run = run_compiled


def fla(sizes: Sizes, batches: np.ndarray, dtype: str = "float32") -> Step:
    """As its users train: autocast to bfloat16 over float32 parameters, or all in bfloat16; PyTorch's fused AdamW."""
    torch = importlib.import_module("torch")
    _tune_side_by_side()
    model = fla_model(sizes, dtype).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
    )
    inputs = [torch.tensor(x[:, :-1], dtype=torch.int64, device="cuda") for x in batches]

    def run(number):
        tokens = inputs[number % len(inputs)]
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=dtype == "float32"):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss  # it shifts the labels itself
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    parameters = sum(x.numel() for x in model.parameters())
    return Step(run, float, torch.cuda.max_memory_allocated, parameters)


def build(name: str, sizes: Sizes, batches: np.ndarray) -> Step:
    """The step of "ours:RULE[:IMPLEMENTATION]", "jla", "jla:tuned", "fla" or "fla:bfloat16".

    Raises:
        ImportError: it is not installed.
        ValueError: there is none of this name.
    """
    library, *options = name.split(":")
    if library == "ours" and options and options[0] in ("efla", "deltanet") and len(options) < 3:
        return ours(sizes, batches, options[0], options[1] if options[1:] else None)
    if library == "jla" and options in ([], ["tuned"]):
        return jla(sizes, batches, tuned=bool(options))
    if library == "fla" and options in ([], ["bfloat16"]):
        return fla(sizes, batches, *options)
    raise ValueError(
        f"implementation is {name!r}; it must be ours:efla, ours:deltanet (with :xla or another behind), jla, "
        "jla:tuned, fla or fla:bfloat16"
    )


def draw_batches(sizes: Sizes, batch: int, length: int, count: int = 4) -> np.ndarray:
    """int32 [count, B, T + 1], uniform over the vocabulary; the same for every implementation."""
    return np.random.default_rng(0).integers(0, sizes.vocabulary, (count, batch, length + 1), dtype=np.int32)


# ---- rows of the table ----


def measure(name: str, sizes: Sizes, shape: tuple[int, int], steps: int, repeats: int) -> Row:
    """Times, memory and losses of one implementation."""
    begun = time.perf_counter()
    step = build(name, sizes, draw_batches(sizes, *shape))
    losses = [step.wait(step.run(number)) for number in range(3)]
    ready = time.perf_counter() - begun
    seconds, number = [], len(losses)
    for _ in range(repeats):
        begun = time.perf_counter()
        started = [step.run(number + later) for later in range(steps)]
        losses.append(step.wait(started[-1]))
        number += steps
        seconds.append((time.perf_counter() - begun) / steps)
    return dict(
        milliseconds=spread(seconds), parameters=step.parameters, peak_bytes=step.peak_bytes(), losses=losses,
        compile_seconds=step.compile_seconds, ready_seconds=ready,
    )  # fmt: skip


def completed(row: Row, name: str, sizes: Sizes, shape: tuple[int, int]) -> Row:
    """row with its name and what follows from the times."""
    named = {"implementation": name, "shape": "×".join(map(str, shape)), "flops_per_token": sizes.flops_per_token()}
    row = {**named, **row}
    if "milliseconds" in row:
        row["tokens_per_second"] = 1e3 * math.prod(shape) / row["milliseconds"]["median"]
        peak = next((flops for kind, flops in PEAK_FLOPS.items() if kind in (card() or "")), None)
        row["mfu"] = peak and row["tokens_per_second"] * row["flops_per_token"] / peak
        if not all(map(math.isfinite, row["losses"])):
            row["suspect"] = "a loss is not finite"
    return row


def line(row: Row) -> str:
    """A line of the table."""
    begin = f"| {row['shape']} | {row['implementation']} | "
    if "reason" in row:
        return f"{begin}{row['reason']} | | | | | |"
    mfu = f"{100 * row['mfu']:.1f} %" if row["mfu"] else ""
    peak = f"{row['peak_bytes'] / 2**30:.1f} GiB" if row["peak_bytes"] else ""
    losses = f"{row['losses'][0]:.3f} … {row['losses'][-1]:.3f}{' SUSPECT' if 'suspect' in row else ''}"
    cells = (spread_text(row["milliseconds"]), f"{row['tokens_per_second']:,.0f}", mfu, peak)
    return begin + " | ".join((*cells, f"{row['ready_seconds']:.0f} s", losses)) + " |"
