"""Keys depend only on the root key, the name and the indices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mnist_flax import rng

pytestmark = pytest.mark.smoke


def data(key: jax.Array) -> tuple[int, ...]:
    return tuple(np.asarray(jax.random.key_data(key)).ravel().tolist())


def test_streams_differ_by_name_and_by_every_index() -> None:
    key = rng.root_key(0)
    streams = [rng.stream(key, "a"), rng.stream(key, "b"), rng.stream(key, "a", 0), rng.stream(key, "a", 1)]
    streams += [rng.stream(key, "a", 0, 1), rng.stream(key, "a", 1, 0), rng.stream(rng.root_key(1), "a")]
    assert len({data(stream) for stream in streams}) == len(streams)


def test_an_environment_variable_does_not_change_the_random_numbers() -> None:
    before = rng.root_key(3)
    with jax.default_prng_impl("rbg"):  # as JAX_DEFAULT_PRNG_IMPL does
        assert rng.root_key(3).dtype == before.dtype != jax.random.key(3).dtype


def test_a_stream_is_the_same_inside_and_outside_jit() -> None:
    key = rng.root_key(3)
    inside = jax.jit(lambda key, step: rng.stream(key, "dropout", step))(key, jnp.int32(7))
    assert data(inside) == data(rng.stream(key, "dropout", 7))


def test_the_names_of_streams_are_part_of_the_format() -> None:
    # Checkpoints of older versions resume exactly only if these numbers stay the same.
    assert data(rng.stream(rng.root_key(0), "order", 1)) == (4015091507, 3024637096)


def test_each_place_in_a_batch_has_a_key_of_its_own_whatever_the_batch_size() -> None:
    key = rng.root_key(0)
    small, large = rng.per_example(key, 4), rng.per_example(key, 8)
    assert len({data(k) for k in large}) == 8
    assert [data(k) for k in small] == [data(k) for k in large[:4]]
