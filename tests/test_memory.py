"""Sizes that cannot fit in memory are refused in one line, before anything is allocated."""

import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from jax import Array

from mnist_flax import memory
from mnist_flax.analysis import evaluation
from mnist_flax.analysis.evaluation import make_predictor, predict_logits
from mnist_flax.config import Config, Program, replace
from mnist_flax.data.registry import DATASETS
from mnist_flax.errors import ConfigError
from mnist_flax.memory import check_memory
from mnist_flax.models import MODELS
from mnist_flax.models.cnn import CNNConfig
from mnist_flax.run.checkpoint import load_run
from mnist_flax.sections import EvalConfig
from mnist_flax.step import Teacher, Variables, eval_variables
from mnist_flax.train import fit

pytestmark = pytest.mark.smoke


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model__dense": (1_000_000_000,)}, r"config.model: .*its weights and their optimizer state need [\d,.]+ GiB"),
        (
            {"eval__batch_size": 1_000_000, "model__widths": (5000, 64, 64)},
            r"config.eval.batch_size = 1000000: an eval",
        ),
        (
            {"train__batch_size": 60_000, "model__widths": (5000, 64, 64)},
            r"config.train.batch_size = 60000: a training",
        ),
    ],
)
def test_sizes_that_cannot_fit_are_refused(fields: dict[str, Any], message: str, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match=message):
        fit(replace(Config(), **fields), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("epochs", [10**9, 2**62])
def test_steps_that_cannot_be_counted_are_refused(epochs: int) -> None:
    with pytest.raises(ConfigError, match=r"config.train.epochs = .*: steps are counted in 32 bits"):
        replace(Config(), optimizer__schedule="one_cycle", train__epochs=epochs)


def test_the_weights_of_a_teacher_count() -> None:
    weights = jax.ShapeDtypeStruct((2**40,), np.float32)
    with pytest.raises(ConfigError, match=r"config.train.batch_size = 64: a training step needs at least 4,096.\d GiB"):
        check_memory(Config(), Teacher({"params": weights}, np.float32(1), Config().program))


def test_batch_is_divided_over_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(Config(), train__batch_size=8192, model__widths=(64, 64, 64), train__num_devices=4)
    monkeypatch.setattr(memory, "available_bytes", lambda: 2**30)
    with pytest.raises(ConfigError, match=r"train.batch_size = 8192"):
        check_memory(config)  # the devices of a CPU share its memory
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    check_memory(config)


def test_layers_whose_sizes_multiply_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 2**34)
    config = replace(Config(), model__widths=(4096,), model__pools=(2,), model__dense=(4096,))
    with pytest.raises(ConfigError, match=r"config.model: .*its weights and their optimizer state need 3\d.\d GiB"):
        check_memory(config)


def test_a_network_without_products_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Scales(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
            return x.reshape(x.shape[0], -1)[:, :10] * self.param("scale", nn.initializers.ones, (1, 10))

    class ScalesConfig(CNNConfig):
        def module(self, num_classes: int, *, train: bool = False) -> nn.Module:
            return Scales()

    monkeypatch.setitem(MODELS, "scales", ScalesConfig)
    check_memory(Config(model=ScalesConfig(), eval=EvalConfig(batch_size=5000)))


def test_ordinary_sizes_pass() -> None:
    for name in ("mnist", "emnist/byclass"):
        assert name in DATASETS
        check_memory(replace(Config(), data__name=name, train__batch_size=1024, eval__batch_size=10_000))


def test_the_largest_evaluation_batch_of_the_default_network_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 2 * 2**30)  # 10,000 images; 60,000 need 5 GiB
    check_memory(replace(Config(), eval__batch_size=1_000_000))


def test_a_large_evaluation_batch_is_cut_to_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    run = load_run(tiny_run.workdir())
    predictor = make_predictor(replace(run.config, eval__batch_size=1_000_000), eval_variables(run.state))
    sizes = []

    def forward(program: Program, variables: Variables, batch: Array) -> Array:
        sizes.append(len(batch))
        return jnp.zeros((len(batch), program.num_classes))

    monkeypatch.setattr(evaluation, "jit_forward", forward)
    for examples in (3, 2_500):
        assert predict_logits(predictor, np.zeros((examples, 28, 28, 1), np.uint8)).shape == (examples, 10)
    assert sizes == [2_000, 2_500]
