"""Error-Free (Exact-Flow) Linear Attention in JAX: the op, its layers and models, and what trains them."""

from efla_jax.ops.attention import delta_rule_attention, efla_attention, efla_step

__all__ = ["delta_rule_attention", "efla_attention", "efla_step"]
__version__ = "0.1.0"
