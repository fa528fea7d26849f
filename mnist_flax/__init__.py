"""Convolutional networks on MNIST in JAX and Flax: fast, calibrated, resumable bit for bit."""

__version__ = "0.2.0"
