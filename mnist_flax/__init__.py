"""A clean, fast, exactly resumable MNIST CNN in JAX and Flax linen."""

__version__ = "0.1.0"
