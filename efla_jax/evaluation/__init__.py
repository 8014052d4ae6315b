"""Evaluation: accuracy of a classifier on clean and corrupted digits; perplexity and benchmarks of a language model."""

from efla_jax.errors import UserError


class EvaluationError(UserError, ValueError):
    """What is to be measured does not fit: an argument, a benchmark or its file. The message names it."""
