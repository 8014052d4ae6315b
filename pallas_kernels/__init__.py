"""Hardware kernels: arrays in, arrays out. Imports jax, and in triton/, once called, jax-triton; never efla_jax."""
