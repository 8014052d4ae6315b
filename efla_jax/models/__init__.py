"""Models in Flax NNX. `build` makes the one that a config describes."""

from collections.abc import Callable

from flax import nnx

from efla_jax.models.classifier import Classifier, ClassifierConfig
from efla_jax.models.last_state import LastStateClassifier, LastStateConfig

ModelConfig = ClassifierConfig | LastStateConfig


def build(config: ModelConfig, *, rngs: nnx.Rngs) -> nnx.Module:
    """The model of this config, with fresh parameters."""
    kinds: dict[type, Callable[..., nnx.Module]] = {
        ClassifierConfig: Classifier,
        LastStateConfig: LastStateClassifier,
    }
    return kinds[type(config)](config, rngs=rngs)


__all__ = ["Classifier", "ClassifierConfig", "LastStateClassifier", "LastStateConfig", "ModelConfig", "build"]
