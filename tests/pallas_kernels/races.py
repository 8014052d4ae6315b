"""Races that JAX's interpreters of kernels have found."""


def keep_states(monkeypatch, interpreter, name: str) -> list:
    """A list that gets the race detection state, of class `name`, of each kernel that the module interprets. JAX itself
    keeps only the last kernel's."""
    states = []
    original = getattr(interpreter, name)

    def watched(**options):
        states.append(original(**options))
        return states[-1]

    monkeypatch.setattr(interpreter, name, watched)
    return states
