"""Lets `python -m mnist_flax main --config=default` stand for `python -m mnist_flax.main --config=default`."""

from mnist_flax import cli

if __name__ == "__main__":
    cli.main()
