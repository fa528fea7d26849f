"""The augmentation `pens`: ones and sevens as other countries write them."""

import jax
import numpy as np
import pytest

from mnist_flax import rng
from mnist_flax.config import Config
from mnist_flax.data.pens import pens
from mnist_flax.errors import ConfigError

KEYS = jax.random.split(rng.root_key(0), 200)


write = jax.jit(jax.vmap(pens, in_axes=(None, None, None, 0)))


def stem() -> np.ndarray:
    """A vertical stroke three pixels wide, from row 5 to 23."""
    image = np.zeros((28, 28, 1), np.uint8)
    image[5:24, 13:16] = 255
    return image


def written(label: int, share: float = 1.0, image: np.ndarray | None = None) -> np.ndarray:
    """`i32[200,28,28]`: the ink that was added, for 200 keys."""
    image = stem() if image is None else image
    return np.asarray(write(share, image, label, KEYS), np.int32)[..., 0] - image[..., 0]


def test_a_one_gets_a_flag_at_its_top_left_and_sometimes_a_foot() -> None:
    added = written(1)
    assert (added >= 0).all()
    flag, right = added[:, :19, :13], added[:, :19, 17:]
    assert ((flag > 128).sum(axis=(1, 2)) > 3).all()
    assert not right.any()
    has_foot = added[:, 21:, 17:].any(axis=(1, 2))
    assert 0.2 < has_foot.mean() < 0.47


def test_a_seven_gets_a_bar_through_its_stem() -> None:
    added = written(7)
    for side in (added[:, :, :13], added[:, :, 16:]):
        assert (side.max(axis=(1, 2)) > 128).all()
        assert not side[:, :9].any()
        assert not side[:, 21:].any()


def test_only_a_share_is_changed_and_only_of_ones_and_sevens() -> None:
    for label in (0, 2, 3, 4, 5, 6, 8, 9):
        assert not written(label).any()
    changed = written(1, share=0.3).any(axis=(1, 2))
    assert 0.18 < changed.mean() < 0.42


def test_a_black_image_stays_black() -> None:
    assert not written(1, image=np.zeros((28, 28, 1), np.uint8)).any()


def test_pens_are_for_digits_only() -> None:
    with pytest.raises(ConfigError, match=r"augment.pens = 0.5: must be 0 for a dataset without the classes 1, 7"):
        Config.from_dict({"data": {"name": "fashion_mnist"}, "augment": {"pens": 0.5}})
