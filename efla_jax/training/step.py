"""The train step: a pure function from (state, batch) to (state, metrics)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec

from efla_jax.models import build
from efla_jax.training.config import Config, OptimizerConfig
from efla_jax.training.objectives import CLASSIFICATION, Batch, Objective
from efla_jax.training.sharding import leaf_name

State = dict[str, Any]  # step int32, params nnx.State, opt_state, key: a typed PRNG key


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate of each of `steps` steps, the first being step 0."""
    warmup = optax.linear_schedule(config.start_lr, config.peak_lr, config.warmup_steps)
    main = optax.constant_schedule(config.peak_lr)
    if config.schedule == "cosine":
        decay_steps = max(steps - config.warmup_steps, 1)
        alpha = config.end_lr / config.peak_lr if config.peak_lr else 0.0
        main = optax.cosine_decay_schedule(config.peak_lr, decay_steps, alpha)
    return optax.join_schedules([warmup, main], [config.warmup_steps]) if config.warmup_steps else main


def make_optimizer(config: OptimizerConfig, learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """AdamW behind clipping of the global gradient norm."""
    matrices = lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)
    mask = matrices if config.decayed == "matrices" else None
    adamw = optax.adamw(learning_rate, config.beta1, config.beta2, weight_decay=config.weight_decay, mask=mask)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw) if config.clip_norm else adamw


def initial_state(config: Config, key: jax.Array, optimizer: optax.GradientTransformation) -> State:
    """Fresh parameters and optimizer moments; key is split between them and what training draws."""
    init_key, train_key = jax.random.split(key)
    params = nnx.state(build(config.model, rngs=nnx.Rngs(init_key)), nnx.Param)
    return dict(step=jnp.int32(0), params=params, opt_state=optimizer.init(params), key=train_key)


def make_train_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    partition_spec: PartitionSpec | None = None,
    *,
    objective: Objective = CLASSIFICATION,
    parts: int = 1,
) -> Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]:
    """The step as a function that can be jitted, and vmapped over states and batches.

    Its metrics are those of the state that came in: the objective's (loss, …), learning_rate, grad_norm, and
    leaf_norms, the squared gradient norm of each parameter in the order of `parameter_names`. The batch is worked off
    in so many parts, one after the other, and their gradients are summed.
    """

    def train_step(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        count = objective.count(batch)

        def mean_of(params, part, key):
            minimised, sums = objective.sums(graph, params, part, dropout_key=key, partition_spec=partition_spec)
            return minimised / count, jax.tree.map(lambda x: x / count, sums)

        key = jax.random.fold_in(state["key"], state["step"])
        of_part = lambda part, key: jax.grad(mean_of, has_aux=True)(state["params"], part, key)
        gradient, metrics = of_part(batch, key) if parts == 1 else _sum_over_parts(of_part, batch, key, parts)
        updates, opt_state = optimizer.update(gradient, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        leaf_norms = jnp.stack([jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(gradient)])
        metrics |= dict(
            learning_rate=jnp.asarray(learning_rate(state["step"])),
            grad_norm=jnp.sqrt(jnp.sum(leaf_norms)),
            leaf_norms=leaf_norms,
        )
        return dict(step=state["step"] + 1, params=params, opt_state=opt_state, key=state["key"]), metrics

    return train_step


def _sum_over_parts(of_part: Callable, batch: Batch, key: jax.Array, parts: int) -> Any:
    """Sum of of_part(part, key of the part). A part takes every parts-th row: rows stay on the device they are on."""
    rows = jax.tree.map(lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch)
    keys = jax.random.split(key, parts)
    take = lambda number: of_part(jax.tree.map(lambda x: x[number], rows), keys[number])
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(take, 0))
    add = lambda number, total: jax.tree.map(jnp.add, total, take(number))
    return jax.lax.fori_loop(0, parts, add, zeros)


def parameter_names(params: Any) -> list[str]:
    """Names of the parameters in the order of `leaf_norms`."""
    return [leaf_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
