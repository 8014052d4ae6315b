"""What each kind of model is trained for: sums over a batch, so that a batch may be worked off in parts."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import PartitionSpec

from efla_jax.models import LanguageModelConfig
from efla_jax.models.cross_entropy import summed_loss
from efla_jax.training.config import Config

Batch = dict[str, jax.Array]
Sums = dict[str, jax.Array]


@dataclass(frozen=True)
class Objective:
    """count(batch) is how many terms a loss has; sums(graph, params, batch, dropout_key=, partition_spec=) gives
    (what is minimised, metrics), both summed over the terms."""

    count: Callable[[Batch], jax.Array]
    sums: Callable[..., tuple[jax.Array, Sums]]


def objective_of(config: Config) -> Objective:
    """The objective of the config's kind of model."""
    if isinstance(config.model, LanguageModelConfig):
        return Objective(_targets, partial(language_model_sums, z_loss=config.train.z_loss))
    return CLASSIFICATION


def classification_sums(
    graph: nnx.GraphDef,
    params: Any,
    batch: Batch,
    *,
    dropout_key: jax.Array | None = None,
    partition_spec: PartitionSpec | None = None,
) -> tuple[jax.Array, Sums]:
    """Cross-entropy in nats and right answers; batch: image uint8 or float [B, 28, 28], label int32 [B]."""
    model = nnx.merge(graph, params)
    logits = model(batch["image"], dropout_key=dropout_key, partition_spec=partition_spec)
    loss = jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]))
    return loss, dict(loss=loss, accuracy=jnp.sum(jnp.argmax(logits, -1) == batch["label"]))


CLASSIFICATION = Objective(lambda batch: jnp.float32(batch["label"].shape[0]), classification_sums)


def _targets(batch: Batch) -> jax.Array:
    return jnp.maximum(jnp.sum(batch["targets"] >= 0), 1).astype(jnp.float32)


def language_model_sums(
    graph: nnx.GraphDef,
    params: Any,
    batch: Batch,
    *,
    dropout_key: jax.Array | None = None,
    partition_spec: PartitionSpec | None = None,
    z_loss: float = 0.0,
) -> tuple[jax.Array, Sums]:
    """Cross-entropy in nats over targets that are not -1; batch: inputs, targets and, where rows hold several
    documents, segment_ids, int32 [B, T].

    The metrics have the gate strength of every block that has a gate as gate/NN, summed over the tokens with a target.
    """
    del dropout_key  # the model has no dropout
    model = nnx.merge(graph, params)
    hidden_BTE, _, strengths = model.trace(
        batch["inputs"], segment_ids=batch.get("segment_ids"), partition_spec=partition_spec
    )
    objective, loss = summed_loss(hidden_BTE, model.head_kernel(partition_spec), batch["targets"], z_loss)
    gates = {
        f"gate/{number:02d}": jnp.sum(jnp.where(batch["targets"] >= 0, strengths[number], 0))
        for number, block in enumerate(model.blocks)
        if block.has_gate
    }
    return objective, dict(loss=loss) | gates
