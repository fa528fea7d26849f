"""Random arrays, and a comparison of two results with a tolerance."""

import jax
import jax.numpy as jnp
import numpy as np

# Both sides round f32 sums of up to 1,000 terms (1e-6 of the result's scale). Winograd's transforms add at most 1e-4 in
# the worst of many entries (6.5e-6 root mean square, see `ops/winograd.py`). A wrong coefficient or window is off by
# 1e-1.
TOLERANCE = 2e-4


def assert_near(actual: jax.Array, expected: jax.Array, tolerance: float = TOLERANCE) -> None:
    """Checks that the difference is less than the tolerance times the largest expected value."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    actual64, expected64 = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    scale = max(float(np.abs(expected64).max(initial=0)), 1e-6)
    np.testing.assert_allclose(actual64 / scale, expected64 / scale, rtol=0, atol=tolerance)


def normal(seed: int, *shape: int) -> jax.Array:
    """Normal values that are exact in bfloat16. NumPy draws them: JAX would compile a program for every shape."""
    values = np.random.default_rng(seed).normal(size=shape).astype(jnp.bfloat16).astype(np.float32)
    return jax.device_put(values)
