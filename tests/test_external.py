"""Code from outside the package: mistakes get one message, changes are noticed, and unusual networks train."""

import dataclasses
import functools
import importlib.util
import json
import logging
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import Array

from mnist_flax import external, rng
from mnist_flax.analysis.evaluation import load_predictor
from mnist_flax.config import Config, differences, replace
from mnist_flax.data.augment import AUGMENTATIONS, Augmentation
from mnist_flax.data.splits import Examples
from mnist_flax.drivers import jit_init_state
from mnist_flax.errors import ConfigError
from mnist_flax.logged import METRICS
from mnist_flax.losses import LOSSES
from mnist_flax.models import MODELS
from mnist_flax.models.base import ModelConfig
from mnist_flax.optimizer import OPTIMIZERS, SCHEDULES, Optimizer, Schedule, schedule
from mnist_flax.step import init_state, loss_fn, train_step, try_step
from mnist_flax.train import fit

TINY = replace(
    Config(),
    data__name="digits",
    data__num_train=64,
    model__widths=(4,),
    model__pools=(4,),
    model__dense=(),
    train__batch_size=32,
    train__epochs=1,
    train__tensorboard=False,
)
KEY = rng.root_key(0)


class Gate(nn.Module):
    """Its first keyword, in alphabetical order, is no array."""

    @nn.compact
    def __call__(self, x: Array, doubled: bool) -> Array:
        return x * self.param("gate", nn.initializers.ones, (1, 1, 1, 1)) * (2 if doubled else 1)


class Unusual(nn.Module):
    """Rematerialised, with random numbers of its own, and a penalty on its features."""

    penalty: str

    @nn.compact
    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        x = nn.relu(nn.remat(nn.Conv)(4, (3, 3), strides=4)(x))
        x = Gate()(doubled=True, x=x).reshape(x.shape[0], -1)
        x = x @ jax.random.normal(jax.random.key(0), (x.shape[1], 8))
        if self.penalty:
            self.sow("losses", "features", jnp.square(x).mean() if self.penalty == "scalar" else jnp.square(x))
        return nn.Dense(10)(x)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnusualConfig(ModelConfig):
    """The config of `Unusual`."""

    penalty: str = "scalar"

    def module(self, num_classes: int, *, train: bool = False) -> nn.Module:
        return Unusual(self.penalty)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "unusual", UnusualConfig)


def unusual(penalty: str) -> Config:
    return replace(TINY, model__name="unusual", model__penalty=penalty)


def test_an_unusual_network_trains_to_the_end_with_report_and_demo(tmp_path: pathlib.Path) -> None:
    fit(unusual("scalar"), tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 2
    assert (tmp_path / "demo.html").is_file() and (tmp_path / "report" / "index.html").is_file()


def test_what_a_network_sows_into_losses_is_added_to_the_loss() -> None:
    with_penalty, without = unusual("scalar").program, unusual("").program
    state = jit_init_state(without, KEY)
    image = np.random.default_rng(0).integers(0, 256, (4, 28, 28, 1), dtype=np.uint8)
    batch = Examples(jnp.asarray(image), jnp.array([3, 1, 4, -1]))
    (loss, (_, losses, penalty, _)), (bare, _) = (
        loss_fn(program, state.params, {}, batch, KEY) for program in (with_penalty, without)
    )
    assert penalty > 0 and loss == pytest.approx(float(bare + penalty), rel=1e-6)  # one rounding of float32
    assert losses.sum() / 3 == pytest.approx(float(bare), rel=1e-6)
    assert losses[3] == 0  # padding
    one, other = (train_step(program, state, batch, KEY)[0].params for program in (with_penalty, without))
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))


def test_a_penalty_that_is_no_scalar_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"UnusualConfig sows an array of shape \(3, 8\) into 'losses'"):
        try_step(unusual("array").program)


def broken_loss(logits: Array, labels: Array) -> Array:
    return jnp.zeros(len(labels))


def broken_change(share: float, image: Array, key: Array) -> Array:
    return image + jnp.zeros((3, 3))


def grown(share: float, image: Array, key: Array) -> Array:
    return jnp.pad(image, ((1, 1), (0, 0), (0, 0)))


def scaled(share: float, image: Array, key: Array) -> Array:
    return image / 255


def broken_rule(config: Any, rate: Any) -> optax.GradientTransformation:
    return optax.GradientTransformation(lambda params: optax.EmptyState(), lambda grads, *_: grads["none"])


def with_a_key(config: Any, rate: Any) -> optax.GradientTransformation:
    return optax.noisy_sgd(rate, key=jax.random.key(0))


@pytest.mark.parametrize(
    ("registry", "entry", "fields", "message"),
    [
        (
            LOSSES,
            broken_loss,
            {"train__loss": "own"},
            r"config.train.loss = 'own' fails \(test_external.+: TypeError: ",
        ),
        (
            METRICS,
            lambda view: view.probs,
            {},
            r"METRICS\['own'\] fails \(test_external.py, line \d+: AttributeError: ",
        ),
        (AUGMENTATIONS, broken_change, {"augment__own": 1}, r"config.augment.own fails \(test_external.py, line \d+: "),
        (AUGMENTATIONS, lambda share, image, key: None, {"augment__own": 1}, r"config.augment.own fails \(.*Attribute"),
        (LOSSES, lambda *_, **__: None, {"train__loss": "own"}, r"config.train.loss = 'own' fails \(.*AttributeError"),
        (OPTIMIZERS, Optimizer(lambda config, rate: 1 / 0, ()), {"optimizer__name": "own"}, r"name = 'own' fails"),
        (OPTIMIZERS, Optimizer(broken_rule, ()), {"optimizer__name": "own"}, r"name = 'own' fails \(.*: KeyError: "),
        (OPTIMIZERS, broken_rule, {}, r"OPTIMIZERS\['own'\] is a function; make it Optimizer\(...\)"),
        (SCHEDULES, broken_rule, {}, r"SCHEDULES\['own'\] is a function; make it Schedule\(...\)"),
        (OPTIMIZERS, Optimizer(with_a_key, ()), {"optimizer__name": "own"}, r"name = 'own': keeps a random key"),
        (
            SCHEDULES,
            Schedule(lambda config, run: lambda step: 0.1 if step < 9 else 0.01),
            {"optimizer__schedule": "own"},
            r"schedule = 'own' fails \(.*, line \d+: TracerBool.*\); use jnp.where instead of if",
        ),
        (
            SCHEDULES,
            Schedule(lambda config, run: lambda step: jnp.ones(2)),
            {"optimizer__schedule": "own"},
            r"schedule = 'own' fails \(.*the rate has the shape \(2,\); return a scalar",
        ),
        (AUGMENTATIONS, grown, {"augment__own": 1}, r"config.augment.own: returns uint8\[30, 28, 1\] for an image of"),
        (AUGMENTATIONS, scaled, {"augment__own": 1}, r"config.augment.own: returns float32\[28, 28, 1\] for an image"),
    ],
)
def test_a_mistake_in_an_entry_gets_one_message_before_anything_is_written(
    registry: Any,
    entry: Any,
    fields: dict[str, Any],
    message: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = Augmentation("a share", 1, change=entry) if registry is AUGMENTATIONS else entry
    monkeypatch.setitem(registry, "own", made)
    with pytest.raises(ConfigError, match=message):
        fit(replace(TINY, **fields), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_entry_without_its_type_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(AUGMENTATIONS, "own", scaled)
    with pytest.raises(ConfigError, match=r"AUGMENTATIONS\['own'\] is a function; make it Augmentation\(...\)"):
        Config.from_dict({"augment": {"shift": 1}})


@pytest.mark.parametrize("name", ["loss", "accuracy", "examples"])
def test_a_metric_cannot_replace_one_that_the_package_reads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METRICS, name, lambda view: view.is_example.sum())
    with pytest.raises(ConfigError, match=rf"METRICS\['{name}'\]: every log line has this entry already"):
        try_step(TINY.program)


def test_entries_of_the_package_are_not_external() -> None:
    config = replace(Config(), augment__shift=1, augment__erase=3, augment__pens=0.5, optimizer__name="muon")
    assert external.entries(config.program.code) == [] and external.digests(config.program.code) == {}


def load(path: pathlib.Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkey = pytest.MonkeyPatch()
    monkey.setitem(__import__("sys").modules, path.stem, module)  # where `inspect` looks for it
    spec.loader.exec_module(module)
    return module


def test_a_change_of_own_code_is_noticed(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = (
        "import optax\n\n\n"
        "def own(logits, labels, *, label_smoothing):\n"
        "    return 1.0 * optax.softmax_cross_entropy_with_integer_labels(logits, labels)\n"
    )
    caplog.set_level(logging.WARNING)
    config = {"train__loss": "own", "train__report": False, "train__demo": False}
    for number in (1, 2):
        (tmp_path / "own_loss.py").write_text(source.replace("1.0", f"{number}.0"))
        monkeypatch.setitem(LOSSES, "own", load(tmp_path / "own_loss.py").own)
        fit(replace(TINY, **config, train__epochs=number), tmp_path / "run")
        noticed = [line for line in caplog.messages if "another setup, so its result may differ: own_loss.py" in line]
        assert len(noticed) == number - 1
    caplog.clear()
    load_predictor(tmp_path / "run")
    (line,) = caplog.messages
    assert "this code has changed since the run began: own_loss.py" in line


def stable_decay(config: Any, run: Any) -> optax.Schedule:
    """Constant, then linear to 0 over the last fifth of the run."""
    rate, start = config.learning_rate, round(0.8 * run.num_steps)
    pieces = [optax.constant_schedule(rate), optax.linear_schedule(rate, 0.0, run.num_steps - start)]
    return optax.join_schedules(pieces, [start])


def test_an_own_schedule_that_depends_on_the_length_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCHEDULES, "own", Schedule(stable_decay))
    config = replace(TINY, optimizer__schedule="own", train__epochs=5)
    assert differences(config, replace(config, train__epochs=6)) == {"train.epochs": (5, 6)}


def test_an_own_schedule_gets_a_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCHEDULES, "own", Schedule(lambda config, run: optax.constant_schedule(config.learning_rate)))
    for own_warmup, first in ((False, 0.0), (True, 1e-3)):
        monkeypatch.setitem(SCHEDULES, "own", SCHEDULES["own"]._replace(own_warmup=own_warmup))
        optimizer = replace(TINY, optimizer__schedule="own", optimizer__warmup_epochs=1.0).optimizer
        assert float(schedule(optimizer, 4, 2)(0)) == pytest.approx(first)
        assert optimizer.unused() == (["warmup_epochs"] if own_warmup else [])


def test_a_partial_is_named_by_its_function() -> None:
    assert external.is_external(functools.partial(broken_loss, labels=KEY))
    assert not external.is_external(functools.partial(init_state, key=KEY))


def short_warm_up(config: Any, run: Any) -> optax.Schedule:
    return optax.linear_schedule(0.0, config.learning_rate, min(6, run.num_steps // 2))


def test_a_schedule_that_depends_on_the_length_of_short_runs_only_is_recognised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(SCHEDULES, "own", Schedule(short_warm_up, own_warmup=True))
    short, long = (replace(TINY, optimizer__schedule="own", train__epochs=epochs) for epochs in (3, 12))
    assert not long.length_matters  # 24 steps: the warm-up has 6, as in all longer runs
    assert differences(short, long) == {"train.epochs": (3, 12)}
