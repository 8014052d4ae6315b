"""Hardware kernels: arrays in, arrays out. Imports jax alone, never efla_jax."""
