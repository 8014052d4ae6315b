"""The kernels: what they compile to, what they must move and compute, how fast they are."""
