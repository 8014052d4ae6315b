"""Error-Free (Exact-Flow) Linear Attention in JAX: the op, its layers and models, and what trains them."""

import os
from typing import TYPE_CHECKING

from efla_jax.ops.attention import delta_rule_attention, efla_attention, efla_step

if TYPE_CHECKING:
    from efla_jax.inference.text import TextModel

__all__ = ["delta_rule_attention", "efla_attention", "efla_step", "load"]
__version__ = "0.1.0"


def load(path: str | os.PathLike[str], tokenizer: str | os.PathLike[str] | None = None) -> "TextModel":
    """The language model in a folder, ready to generate text; see `efla_jax.inference.load.load`."""
    from efla_jax.inference.load import load as load_model  # here: the ops alone need none of its imports

    return load_model(path, tokenizer)
