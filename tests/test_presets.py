"""Every file in configs/ loads, has a complete docstring, equals its golden text, and trains."""

import ast
import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import jit_train_step

from mnist_flax import preset, rng
from mnist_flax.config import Config, replace
from mnist_flax.data.splits import Examples
from mnist_flax.drivers import jit_init_state
from mnist_flax.models.cnn import CNNConfig

pytestmark = pytest.mark.smoke

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden_presets"
PRESETS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


def load(name: str) -> tuple[Config, str]:
    path = ROOT / "configs" / f"{name}.py"
    return preset.load_config(path), ast.get_docstring(ast.parse(path.read_text())) or ""


def test_the_presets_are_all_there() -> None:
    expected = {
        "default",
        "digits",
        "flax_example",
        "keras_example",
        "one_conv_sgd",
        "three_conv_adam",
        "tiny",
        "two_conv_adam",
    }
    assert expected <= set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_equals_its_golden_text(name: str) -> None:
    config, _ = load(name)
    assert Config.from_dict(json.loads(config.to_json())).to_dict() == config.to_dict()
    golden = GOLDEN / f"{name}.json"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(config.to_json())
    assert golden.exists(), "a new preset: write its golden text with UPDATE_GOLDEN=1 scripts/test -k preset"
    assert config.to_json() == golden.read_text(), "if the change is meant: UPDATE_GOLDEN=1 scripts/test -k preset"


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_says_what_it_is_what_it_reaches_and_how_to_run_it(name: str) -> None:
    _, doc = load(name)
    assert "Measured: " in doc, "its docstring needs a line that starts with Measured:"
    assert f"scripts/train --config=configs/{name}.py" in doc
    assert "@@" not in doc, "a figure is missing"


# `small` has the kinds of layers that `robust` has, so its test is slow.
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "small")) for name in PRESETS])
def test_a_preset_trains(name: str) -> None:
    config, _ = load(name)
    # Narrow layers and a small batch compile and run fast; everything else is as in the preset.
    model: Any = config.model
    narrow = {"model__widths": tuple(4 for _ in model.widths)}
    if isinstance(model, CNNConfig):
        narrow["model__dense"] = tuple(8 for _ in model.dense)
    config = replace(config, **narrow)
    key = rng.root_key(0)
    state = jit_init_state(config.program, key)
    before = jax.device_get(state.params)
    images = jax.random.randint(key, (8, 28, 28, 1), 0, 256).astype(jnp.uint8)
    batch = Examples(images, jnp.arange(8))
    for _ in range(2):
        state, sums = jit_train_step(config.program, state, batch, key)
        assert np.isfinite(sums["loss"])
    assert any(
        (one != other).any()
        for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(jax.device_get(state.params)), strict=True)
    )
