"""Gradients of the loss with respect to the values that the op reads, by layer and position.

A parameter of zeros, shaped as the values, is added to them: its gradient is theirs, in the type that the model
computes in, and nothing else of the model changes.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from efla_jax.layers import EFLA
from efla_jax.models import LanguageModel, LastStateClassifier
from efla_jax.training.objectives import Batch, Objective

BINS = 16  # of positions


class ProbedMixer(EFLA):
    """An EFLA layer whose values have `probe` [B, T, H, V] added."""

    probe: nnx.Param

    def project(self, *args, **options):
        query, key, value, beta, history = super().project(*args, **options)
        return query, key, value + self.probe[...], beta, history


class ProbedLinear(nnx.Linear):
    """A linear layer whose outputs have `probe` [B, T, V] added."""

    probe: nnx.Param

    def __call__(self, inputs):
        return super().__call__(inputs) + self.probe[...]


def _probed(model: Any, batch: int, length: int) -> nnx.Module:
    """model with a probe at the values of each of its ops, in the order of the layers."""
    if isinstance(model, LastStateClassifier):
        value: Any = model.value
        value.__class__ = ProbedLinear
        value.probe = nnx.Param(jnp.zeros((batch, length, model.config.features), model.config.dtype))
        return model
    assert isinstance(model, LanguageModel)
    mixers: list[Any] = [block.mixer for block in model.blocks]
    for mixer in mixers:
        shape = (batch, length, mixer.config.heads, mixer.config.value_dim)
        mixer.__class__ = ProbedMixer
        mixer.probe = nnx.Param(jnp.zeros(shape, model.config.dtype))
    return model


def value_gradients(graph: nnx.GraphDef, objective: Objective) -> Callable[[Any, Batch], dict[str, jax.Array]]:
    """(parameters, batch) -> of the mean loss, by layer and bin of positions, [layers, BINS]: "norm", that of the
    gradient by the values, and "zeros", the part of its numbers that are exactly 0."""

    def measure(params, batch):
        tokens = batch.get("inputs")
        model = nnx.merge(graph, params, copy=True)
        rows = jax.tree.leaves(batch)[0].shape[0]
        length = tokens.shape[1] if tokens is not None else model.config.tokens
        probed_graph, probed = nnx.split(_probed(model, rows, length), nnx.Param)

        def loss(probed):
            minimised, _ = objective.sums(probed_graph, probed, batch)
            return minimised / objective.count(batch)

        gradients = jax.tree_util.tree_flatten_with_path(jax.grad(loss)(probed))[0]
        found = [leaf for path, leaf in gradients if "probe" in jax.tree_util.keystr(path)]
        binned = [x.astype(jnp.float32).reshape(rows, BINS, -1).swapaxes(0, 1).reshape(BINS, -1) for x in found]
        return {
            "norm": jnp.stack([jnp.sqrt(jnp.sum(jnp.square(x), -1)) for x in binned]),
            "zeros": jnp.stack([jnp.mean(x == 0, axis=-1) for x in binned]),
        }

    return measure
