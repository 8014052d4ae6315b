"""Text: documents (`sources`), tokens of them (`tokenizers`), their cache (`store`), rows (`packing`)."""

from efla_jax.errors import UserError


class TextError(UserError, ValueError):
    """A source, a tokenizer or a token cache is not what it must be, or cannot be had."""
