"""Models in Flax NNX. `build` makes the one that a config describes."""

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


__all__ = [
    "Classifier",
    "ClassifierConfig",
    "LanguageModel",
    "LanguageModelConfig",
    "LastStateClassifier",
    "LastStateConfig",
    "ModelConfig",
    "build",
]
