"""Inference: compiled programs, prefill, decoding in a running batch, sampling, text in and text out."""

from efla_jax.errors import UserError


class InferenceError(UserError, ValueError):
    """A request, a model's folder or a saved state that does not fit; the message names it and what it must be."""
