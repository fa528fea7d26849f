"""`CleanedCNN`: its cleaning equals SciPy's filters, and its parameters are those of `CNN`."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from mnist_flax.config import Config, replace
from mnist_flax.data.embedded import embedded_digits
from mnist_flax.errors import ConfigError
from mnist_flax.models.cleaned import CleanedCNNConfig, cleaned, despeckled
from mnist_flax.models.cnn import CNNConfig

jit_cleaned, jit_despeckled = jax.jit(cleaned), jax.jit(despeckled)


def test_a_pixel_mean_is_refused_because_it_would_have_no_effect() -> None:
    with pytest.raises(ConfigError, match=r"config.model.pixel_mean = 0.5: must be 0"):
        replace(Config(), model__name="cleaned_cnn", model__pixel_mean=0.5)


def test_cleaning_is_a_rank_filter_and_a_top_hat() -> None:
    x = np.random.default_rng(0).random((5, 28, 28), np.float32)
    low, high = (ndimage.rank_filter(x, rank, footprint=np.ones((1, 3, 3)), mode="nearest") for rank in (2, -3))
    specks = np.clip(x, low, high)
    np.testing.assert_array_equal(jit_despeckled(jnp.asarray(x[..., None]))[..., 0], specks)
    opened = ndimage.grey_opening(specks, (1, 9, 9), mode="nearest")
    ink = specks - opened
    smooth = ndimage.convolve(ink, np.outer([1, 2, 1], [1, 2, 1])[None] / 16, mode="constant")
    expected = smooth / smooth.max(axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(jit_cleaned(jnp.asarray(x[..., None]))[..., 0], expected, atol=1e-6)


def test_clean_digits_hardly_change_and_a_grey_background_is_removed() -> None:
    digits = np.asarray(embedded_digits()[1].image)[:40].astype(np.float32) / 255
    once = np.asarray(jit_cleaned(jnp.asarray(digits)))
    assert np.abs(once - digits).mean() < 0.06
    np.testing.assert_allclose(jit_cleaned(jnp.asarray(0.4 + digits / 2)), once, atol=0.01)
    for grey in (0.0, 1.0):
        assert not np.asarray(jit_cleaned(jnp.full((1, 28, 28, 1), grey))).any()


def test_parameters_are_those_of_cnn_and_the_whole_image_is_seen() -> None:
    x = jnp.zeros((1, 28, 28, 1))
    families = (CNNConfig, CleanedCNNConfig)
    plain, cleaning = (jax.eval_shape(family().module(10).init, jax.random.key(0), x) for family in families)
    assert plain == cleaning
    assert CleanedCNNConfig().seen_size(28) == 28 != CNNConfig().seen_size(28)


@pytest.mark.parametrize("name", ["cnn", "cleaned_cnn"])
def test_config_round_trips_through_json(name: str) -> None:
    config = Config.from_dict({"model": {"name": name}})
    assert config.to_dict()["model"]["name"] == name
    assert Config.from_dict(json.loads(config.to_json())) == config
