"""`python -m efla_jax` is the `efla` command."""

from efla_jax.cli import main

if __name__ == "__main__":
    main()
