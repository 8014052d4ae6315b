"""The base of all errors that are for whoever runs a command."""


class UserError(Exception):
    """What the user can put right: the message is one line or a few, and says what was wrong and what must be."""
