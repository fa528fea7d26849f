"""How the report shows networks: layers of every family, weights, activations and training images."""

import dataclasses
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from PIL import Image
from report_page import Page, made_up, made_up_split

from mnist_flax.analysis.report import layers, pictures
from mnist_flax.config import Config, replace
from mnist_flax.data.load import load_splits
from mnist_flax.data.registry import DATASETS
from mnist_flax.drivers import jit_forward, jit_init_state
from mnist_flax.models import MODELS
from mnist_flax.models.base import ModelConfig
from mnist_flax.step import eval_variables, init_state


@pytest.mark.parametrize(
    "fields",
    [
        {"model__widths": (), "model__pools": (1,), "model__dense": (20,), "model__activation": "tanh"},
        {"model__dense": (), "model__pooling": "avg", "model__batch_norm": True},
    ],
    ids=["perceptron", "batch norm"],
)
def test_report_of_other_networks_without_a_log_has_no_curves(tmp_path: pathlib.Path, fields: dict[str, Any]) -> None:
    numbers, text = made_up(tmp_path / "run", "mnist", **fields)
    Page(text)
    assert 'id="curves"' not in text and not (tmp_path / "run" / "report" / "loss.svg").exists()
    assert numbers["activations"]["stages"][-1]["name"] == "logits"


@pytest.mark.parametrize(
    "fields",
    [{}, {"model__widths": (), "model__pools": (1,)}, {"model__batch_norm": True, "model__pooling": "avg"}],
    ids=["default", "perceptron", "batch norm"],
)
def test_activations_equal_the_networks(fields: dict[str, Any]) -> None:
    config = replace(Config(), **{"model__widths": (4, 5, 6), "model__dense": (7,), **fields})
    model: Any = config.model
    state = jit_init_state(config.program, jax.random.key(0))
    variables = eval_variables(state)
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 1), dtype=np.uint8)
    found = layers.layer_inputs(config.program, variables, images)
    np.testing.assert_allclose(found[-1][1], jit_forward(config.program, variables, images), rtol=1e-4, atol=1e-5)
    names = ["Conv_1", "Conv_2", "Dense_0"] * bool(model.widths) + ["Dense_1", "logits"]
    assert [name for name, _ in found] == names
    if model.widths:
        side = 13 if model.batch_norm else 12  # without batch norm two rows and columns are cropped
        assert [values.shape for _, values in found[:3]] == [(3, side, side, 4), (3, 5, 5, 5), (3, 3, 3, 6)]
    assert all(values.min() >= 0 for _, values in found[:-1])  # after the ReLU
    # The last layer turns the stage before the logits into the logits.
    last = variables["params"][f"Dense_{len(model.dense)}"]
    np.testing.assert_allclose(
        found[-2][1] @ np.asarray(last["kernel"]) + np.asarray(last["bias"]), found[-1][1], rtol=1e-4, atol=1e-5
    )
    rows = layers.layers(config.program, variables)
    assert sum(row.parameters for row in rows) == sum(leaf.size for leaf in jax.tree.leaves(state.params))


class ToyBlock(nn.Module):
    """A residual block whose branch has a stride and whose shortcut is a projection of the same input."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.relu(nn.Conv(6, (3, 3), strides=2, padding="SAME")(x))
        y = nn.Conv(6, (3, 3), padding="SAME")(y)
        return nn.relu(y + nn.Conv(6, (1, 1), strides=2)(x))


class Toy(nn.Module):
    """A network of a family that the package does not know."""

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        x = nn.relu(nn.Conv(4, (5, 5), padding="VALID")(x))
        x = ToyBlock()(x)
        return nn.Dense(self.num_classes)(x.mean((1, 2)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyConfig(ModelConfig):
    """The config of `Toy`."""

    def module(self, num_classes: int, *, train: bool = False) -> nn.Module:
        """Builds the network."""
        return Toy(num_classes)


def test_network_of_an_unknown_family_is_shown(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "toy", ToyConfig)
    numbers, text = made_up(tmp_path / "run", "kmnist", examples=300, model=ToyConfig())
    Page(text)
    assert [(row["name"], tuple(row["output_shape"]), row["multiply_adds"]) for row in numbers["network"]] == [
        ("Conv_0", (24, 24, 4), 24 * 24 * 25 * 4),
        ("ToyBlock_0/Conv_0", (12, 12, 6), 12 * 12 * 9 * 4 * 6),
        ("ToyBlock_0/Conv_1", (12, 12, 6), 12 * 12 * 9 * 6 * 6),
        ("ToyBlock_0/Conv_2", (12, 12, 6), 12 * 12 * 4 * 6),
        ("Dense_0", (10,), 60),
    ]
    # The two convolutions with the same input are shown once.
    assert [(stage["name"], tuple(stage["shape"])) for stage in numbers["activations"]["stages"]] == [
        ("ToyBlock_0/Conv_0", (24, 24, 4)),
        ("ToyBlock_0/Conv_1", (12, 12, 6)),
        ("Dense_0", (6,)),
        ("logits", (10,)),
    ]
    with Image.open(tmp_path / "run" / "report" / "filters.png") as filters:
        assert filters.size == (12 * (4 * 5 + 3), 12 * 5)
    assert "default_config_dict('toy')" in numbers["config_file"]


def test_resnet_is_shown(tmp_path: pathlib.Path) -> None:
    config = Config(model=MODELS["resnet"]())
    variables = eval_variables(jit_init_state(config.program, jax.random.key(0)))
    rows = layers.layers(config.program, variables)
    assert sum(row.parameters for row in rows) == sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert {"Conv_0", "BatchNorm_0", "Dense_0"} <= {row.name for row in rows}
    filters = layers.first_filters(config.program, variables)
    assert filters is not None and filters.shape[1:] == (3, 3)


def test_training_images_are_shown_with_their_augmentation(tmp_path: pathlib.Path) -> None:
    numbers, text = made_up(tmp_path / "run", "kmnist", examples=300, augment__rotate=30.0, data__num_train=200)
    assert 'id="trained-on"' in text and len(numbers["augmented"]) == pictures.TRAINING_IMAGES
    with Image.open(tmp_path / "run" / "report" / "augmented.png") as image:
        drawn = np.asarray(image)[::2, ::2]
    first = drawn[:28, :28]
    assert drawn.shape == (10 * 30 - 2, 8 * 30 - 2)
    _, split = made_up_split(10, 300)
    np.testing.assert_array_equal(first, split.image[numbers["augmented"][0], :, :, 0])
    assert not np.array_equal(first, drawn[:28, 30:58])


def test_layers_equal_values_by_hand() -> None:
    config = Config()
    shapes = jax.eval_shape(lambda: init_state(config.program, jax.random.key(0)))  # `layers` needs only shapes
    rows = {row.name: row for row in layers.layers(config.program, eval_variables(shapes))}
    assert list(rows) == ["Conv_0", "Conv_1", "Conv_2", "Dense_0", "Dense_1"]
    assert rows["Conv_1"] == layers.Layer(
        "Conv_1", "Conv", (12, 12, 32), (5, 5, 64), 9 * 32 * 64 + 64, 10 * 10 * 9 * 32 * 64
    )
    assert rows["Dense_1"].multiply_adds == 640 and rows["Dense_1"].parameters == 650


def test_first_filters_are_the_weights() -> None:
    config = replace(Config(), model__widths=(), model__pools=(1,), model__dense=(5,))
    variables = eval_variables(jit_init_state(config.program, jax.random.key(0)))
    filters = layers.first_filters(config.program, variables)
    assert filters is not None and filters.shape == (5, 28, 28)
    assert filters[2, 1, 3] == variables["params"]["Dense_0"]["kernel"][28 + 3, 2]
    config = replace(Config(), model__widths=(4,), model__pools=(1,))
    variables = eval_variables(jit_init_state(config.program, jax.random.key(0)))
    filters = layers.first_filters(config.program, variables)
    assert filters is not None
    np.testing.assert_array_equal(filters[1], variables["params"]["Conv_0"]["kernel"][:, :, 0, 1])


def test_doubtful_labels_of_another_dataset_cite_no_paper(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DATASETS, "kmnist", dataclasses.replace(DATASETS["kmnist"], doubtful_test_rows=(3, 7)))
    _, text = made_up(tmp_path / "run", "kmnist", examples=300)
    assert "labels of these 2 test images are doubtful. They count" in " ".join(text.split())
    assert "Northcutt" not in text


def test_the_largest_seed_can_be_reported() -> None:
    config = replace(tiny_run.CONFIG, seed=2**32 - 1, augment__rotate=10.0)
    rows, images = pictures.augmented(config, load_splits(config.data))
    assert len(images) == len(rows) * (1 + pictures.VARIANTS)


class Heads(nn.Module):
    """A dense layer with two output axes, and weights of the network itself, which belong to no layer."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        x = nn.DenseGeneral((4, 16))(x[..., 0])
        weights = self.param("weights", nn.initializers.normal(), (28 * 64, 10))
        return x.reshape(x.shape[0], -1) @ weights


class Bare(nn.Module):
    """No layer at all."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        return x.reshape(x.shape[0], -1) @ self.param("weights", nn.initializers.normal(), (784, 10))


@dataclasses.dataclass(frozen=True, kw_only=True)
class OddConfig(ModelConfig):
    """The family of both."""

    bare: bool = False

    def module(self, num_classes: int, *, train: bool = False) -> nn.Module:
        return Bare() if self.bare else Heads()


@pytest.mark.parametrize("bare", [False, True])
def test_network_with_weights_outside_of_layers_is_shown(
    bare: bool, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODELS, "odd", OddConfig)
    numbers, text = made_up(tmp_path / "run", "kmnist", examples=300, model=OddConfig(bare=bare))
    Page(text)
    assert [stage["name"] for stage in numbers["activations"]["stages"]] == ["logits"]
    dense = [row["multiply_adds"] for row in numbers["network"] if row["name"] == "DenseGeneral_0"]
    assert dense == ([] if bare else [28 * 28 * 64])


class Recurrent(nn.Module):
    """Layers that the report must be able to list: called twice, with a keyword, or with several results."""

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        shared = nn.Dense(28)
        x = shared(inputs=shared(x[..., 0]))
        states = jnp.asarray(nn.RNN(nn.OptimizedLSTMCell(8))(x))
        return jnp.asarray(nn.Dense(10)(states[:, -1]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecurrentConfig(ModelConfig):
    """Its family."""

    def module(self, num_classes: int, *, train: bool = False) -> nn.Module:
        return Recurrent()


def test_layers_of_any_linen_module_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "recurrent", RecurrentConfig)
    config = Config(model=RecurrentConfig())
    variables = eval_variables(jit_init_state(config.program, jax.random.key(0)))
    listed = layers.layers(config.program, variables)
    assert [one.name for one in listed][:2] == ["Dense_0", "Dense_0"]
    total = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert sum(one.parameters for one in listed) == total
    assert layers.layer_table(listed).splitlines()[-1].split()[:2] == ["total", f"{total:,}"]
