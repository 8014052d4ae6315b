"""How fast the implementations of the op are, forward and forward + backward, and how much memory they take."""
