"""Evaluation: accuracy of a classifier on clean and corrupted digits; perplexity and benchmarks of a language model."""


class EvaluationError(ValueError):
    """What is to be measured does not fit: an argument, a benchmark or its file. The message names it."""
