"""The train step: a pure function from (state, batch) to (state, metrics)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec

from efla_jax.models import ModelConfig, build
from efla_jax.training.config import Config, OptimizerConfig
from efla_jax.training.sharding import leaf_name

State = dict[str, Any]  # step int32, params nnx.State, opt_state, key: a typed PRNG key
Batch = dict[str, jax.Array]  # image uint8 or float [B, 28, 28], label int32 [B]


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate of each of `steps` steps, the first being step 0."""
    warmup = optax.linear_schedule(0.0, config.peak_lr, config.warmup_steps)
    main = optax.constant_schedule(config.peak_lr)
    if config.schedule == "cosine":
        decay_steps = max(steps - config.warmup_steps, 1)
        alpha = config.end_lr / config.peak_lr if config.peak_lr else 0.0
        main = optax.cosine_decay_schedule(config.peak_lr, decay_steps, alpha)
    return optax.join_schedules([warmup, main], [config.warmup_steps]) if config.warmup_steps else main


def make_optimizer(config: OptimizerConfig, learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """AdamW behind clipping of the global gradient norm."""
    adamw = optax.adamw(learning_rate, config.beta1, config.beta2, weight_decay=config.weight_decay)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw) if config.clip_norm else adamw


def graph_of(model: ModelConfig) -> nnx.GraphDef:
    """The model's static part. All of its variables must be parameters."""
    return nnx.eval_shape(lambda: nnx.split(build(model, rngs=nnx.Rngs(0)), nnx.Param))[0]


def initial_state(config: Config, key: jax.Array, optimizer: optax.GradientTransformation) -> State:
    """Fresh parameters and optimizer moments; key is split between them and what training draws."""
    init_key, train_key = jax.random.split(key)
    params = nnx.state(build(config.model, rngs=nnx.Rngs(init_key)), nnx.Param)
    return dict(step=jnp.int32(0), params=params, opt_state=optimizer.init(params), key=train_key)


def classification_loss(graph: nnx.GraphDef, params: Any, batch: Batch, **call: Any) -> tuple[jax.Array, jax.Array]:
    """(mean cross-entropy in nats, accuracy) of a batch; `call` goes to the model."""
    logits = nnx.merge(graph, params)(batch["image"], **call)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return losses.mean(), jnp.mean(jnp.argmax(logits, -1) == batch["label"])


def make_train_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    partition_spec: PartitionSpec | None = None,
) -> Callable[[State, Batch], tuple[State, dict[str, jax.Array]]]:
    """The step as a function that can be jitted, and vmapped over states and batches.

    Its metrics are those of the state that came in: loss, accuracy, learning_rate, grad_norm, and leaf_norms, the
    squared gradient norm of each parameter in the order of `parameter_names`.
    """

    def train_step(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        call = dict(dropout_key=jax.random.fold_in(state["key"], state["step"]), partition_spec=partition_spec)
        loss_of = lambda params: classification_loss(graph, params, batch, **call)
        (loss, accuracy), gradient = jax.value_and_grad(loss_of, has_aux=True)(state["params"])
        updates, opt_state = optimizer.update(gradient, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        leaf_norms = jnp.stack([jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(gradient)])
        metrics = dict(
            loss=loss,
            accuracy=accuracy,
            learning_rate=jnp.asarray(learning_rate(state["step"])),
            grad_norm=jnp.sqrt(jnp.sum(leaf_norms)),
            leaf_norms=leaf_norms,
        )
        return dict(step=state["step"] + 1, params=params, opt_state=opt_state, key=state["key"]), metrics

    return train_step


def parameter_names(params: Any) -> list[str]:
    """Names of the parameters in the order of `leaf_norms`."""
    return [leaf_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
