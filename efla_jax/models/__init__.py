"""Models in Flax NNX. `build` makes the one that a config describes, `graph_of` its static part."""

from collections.abc import Callable

from flax import nnx

from efla_jax.models.classifier import Classifier, ClassifierConfig
from efla_jax.models.language_model import LanguageModel, LanguageModelConfig
from efla_jax.models.last_state import LastStateClassifier, LastStateConfig

ModelConfig = ClassifierConfig | LastStateConfig | LanguageModelConfig


def build(config: ModelConfig, *, rngs: nnx.Rngs) -> nnx.Module:
    """The model of this config, with fresh parameters."""
    kinds: dict[type, Callable[..., nnx.Module]] = {
        ClassifierConfig: Classifier,
        LastStateConfig: LastStateClassifier,
        LanguageModelConfig: LanguageModel,
    }
    return kinds[type(config)](config, rngs=rngs)


def graph_of(config: ModelConfig) -> nnx.GraphDef:
    """The static part of the model: nnx.merge(graph, params) is the model. All of its variables are parameters."""
    return nnx.eval_shape(lambda: nnx.split(build(config, rngs=nnx.Rngs(0)), nnx.Param))[0]


__all__ = [
    "Classifier",
    "ClassifierConfig",
    "LanguageModel",
    "LanguageModelConfig",
    "LastStateClassifier",
    "LastStateConfig",
    "ModelConfig",
    "build",
    "graph_of",
]
