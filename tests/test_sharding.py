"""Many devices: the same data, the same random numbers and, up to rounding, the same result as with one."""

import functools
import pathlib
import re
import shutil
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from small_run import SMALL, lines, summary

from mnist_flax import drivers, rng, sharding
from mnist_flax.analysis.evaluation import make_predictor, predict_logits
from mnist_flax.config import Config, replace
from mnist_flax.data.augment import AugmentConfig, augment
from mnist_flax.data.splits import Examples
from mnist_flax.drivers import Job, compile_driver, jit_init_state, job_mesh, stack
from mnist_flax.errors import ConfigError
from mnist_flax.models.layers import Dropout
from mnist_flax.run import checkpoint
from mnist_flax.run.progress import Progress
from mnist_flax.step import TrainState, eval_variables, forward, train_step
from mnist_flax.train import fit, fit_population

KEY = rng.root_key(0)
COUNTS = [2, pytest.param(4, marks=pytest.mark.slow), 8]
# Plain SGD: Adam's first steps divide by the size of the gradient, which would magnify rounding errors.
SGD: dict[str, Any] = {"optimizer__name": "sgd", "optimizer__learning_rate": 0.05}
RUN = replace(SMALL, checkpoint__every_steps=5, **SGD)
# Everything random, stateful or averaged, at once.
CONFIG = replace(
    Config(),
    model__widths=(4,),
    model__pools=(2,),
    model__dense=(8,),
    model__batch_norm=True,
    model__dropout=0.2,
    augment__shift=1,
    data__num_train=92,
    train__batch_size=16,
    train__augment_until=0.5,
    optimizer__ema_decay=0.9,
    **SGD,
)


def test_one_cpu_device_is_used_unless_more_are_asked_for() -> None:
    assert jax.device_count() == 8
    assert sharding.make_mesh().size == 1
    assert [device.id for device in sharding.make_mesh(3).devices] == [0, 1, 2]


@pytest.mark.parametrize(("num_devices", "counts"), [(4, (1, 3)), (3, (2, 2)), (0, (1, 2))])
def test_devices_that_processes_cannot_share_are_refused(
    monkeypatch: pytest.MonkeyPatch, num_devices: int, counts: tuple[int, int]
) -> None:
    devices = [SimpleNamespace(platform="gpu", process_index=index) for index in (0, 1) for _ in range(counts[index])]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    message = rf"= {num_devices}: {num_devices or 3} devices cannot be shared evenly .* have {counts[0]}, {counts[1]};"
    with pytest.raises(ConfigError, match=message):
        sharding.make_mesh(num_devices)


@pytest.mark.parametrize("train", [fit, functools.partial(fit_population, seeds=2)])
def test_devices_that_are_not_there_are_refused(train: Callable[..., Any], tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match=r"config.train.num_devices = 9: there are only 8 here; use at most as many"):
        train(replace(SMALL, train__num_devices=9), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("batch_size", "nearest"), [(50, "48 or 52"), (3, "4"), (33, "32 or 36")])
def test_a_batch_that_cannot_be_split_is_refused_before_anything_is_written(
    tmp_path: pathlib.Path, batch_size: int, nearest: str
) -> None:
    config = replace(SMALL, train__batch_size=batch_size, train__num_devices=4)
    message = f"batch_size = {batch_size}: cannot be split evenly over 4 devices; use {nearest},"
    with pytest.raises(ConfigError, match=message):
        fit(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_batch_is_split_and_the_weights_are_replicated() -> None:
    mesh = sharding.make_mesh(8)
    order = sharding.place(np.arange(48).reshape(3, 16), sharding.split(mesh, axis=1))
    assert {shard.data.shape for shard in order.addressable_shards} == {(3, 2)}
    variables = sharding.place(eval_variables(jit_init_state(CONFIG.program, KEY)), sharding.replicated(mesh))
    assert all(leaf.addressable_shards[5].data.shape == leaf.shape for leaf in jax.tree.leaves(variables))


def test_the_form_for_accelerators_exchanges_only_sums_between_devices(
    examples: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    # XLA splits its own convolution by examples. Not all CPU forms are split: their inputs are gathered first.
    monkeypatch.setattr("jax.lax.platform_dependent", lambda *args, cpu, default: default(*args))
    mesh = sharding.make_mesh(8)
    everywhere, split = sharding.replicated(mesh), sharding.split(mesh)
    config = replace(CONFIG, model__widths=(4, 6), model__pools=(2, 1))
    state, key = sharding.place((jit_init_state(config.program, KEY), KEY), everywhere)
    batch = sharding.place(Examples(examples.image[:16], examples.label[:16]), split)
    logits = jax.jit(forward, static_argnums=0)(config.program, eval_variables(state), batch.image)
    assert {shard.data.shape for shard in logits.addressable_shards} == {(2, 10)}  # each device computes its own
    step = jax.jit(train_step, static_argnums=0, out_shardings=everywhere)
    program = str(step.lower(config.program, state, batch, key).compile().as_text())
    assert set(re.findall(r" (all-[a-z]+|collective-permute|reduce-scatter)[(-]", program)) == {"all-reduce"}


@pytest.mark.parametrize("count", COUNTS)
def test_distortions_and_dropout_masks_do_not_depend_on_the_number_of_devices(examples: Examples, count: int) -> None:
    config = AugmentConfig(shift=2, rotate=10.0, scale=0.1, shear=5.0)
    dropout = Dropout(0.3, train=True)

    def random(images: jax.Array, key: jax.Array) -> Any:
        ones, labels = jnp.ones((len(images), 7, 5)), jnp.zeros(len(images), jnp.int32)
        return augment(config, images, labels, key), dropout.apply({}, ones, rngs={"dropout": key})

    def on(count: int) -> Any:
        split = sharding.split(sharding.make_mesh(count))
        # The outputs are split too: JAX's own random values may depend on that (jax issue 40232).
        return jax.device_get(jax.jit(random, out_shardings=split)(sharding.place(examples.image, split), KEY))

    for one, many in zip(on(1), on(count), strict=True):
        np.testing.assert_array_equal(one, many)


# The examples, augmentations and dropout masks are the same, but a batch is summed in parts, so the last bits of f32
# (6e-8) differ, and the difference grows over twelve steps with batch norm. One wrong example of 16, or another mask,
# changes the second digit.
RTOL, ATOL = 1e-4, 1e-5


def assert_close(state: Any, other: Any) -> None:
    for one, another in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(one, another, rtol=RTOL, atol=ATOL)


def train_on(count: int, name: str, examples: Examples, num_steps: int) -> tuple[TrainState, dict[str, np.ndarray]]:
    rows = np.arange(CONFIG.num_train_rows, dtype=np.int32)
    job = Job(CONFIG.program, [0], [rows], examples, num_devices=count)
    state = stack([jit_init_state(CONFIG.program, KEY)], job)
    advance = compile_driver(name, job, state)
    history = []
    for _ in range(0, num_steps, 6):
        state, metrics = advance(state, 6)
        history.append(metrics)
    assert {leaf.sharding.num_devices for leaf in jax.tree.leaves(state)} == {count}
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(state))
    return jax.device_get(state), jax.tree.map(lambda *columns: np.concatenate(columns, 1)[0], *history)


@pytest.mark.parametrize("name", ["scan", pytest.param("stream", marks=pytest.mark.slow)])
def test_one_and_many_devices_agree(examples: Examples, name: str) -> None:
    state, sums = train_on(1, name, examples, 12)
    assert sums["examples"].tolist() == [16, 16, 16, 16, 16, 12] * 2
    for count in (2, 8):
        other_state, other_sums = train_on(count, name, examples, 12)
        np.testing.assert_array_equal(sums["examples"], other_sums["examples"])
        np.testing.assert_allclose(sums["loss"], other_sums["loss"], rtol=RTOL)
        assert_close(state, other_state)


@pytest.mark.parametrize("count", [2, 3, 8])
def test_evaluation_splits_its_batches_and_counts_every_example_once(examples: Examples, count: int) -> None:
    variables = eval_variables(jit_init_state(CONFIG.program, KEY))
    one = predict_logits(make_predictor(replace(CONFIG, eval__batch_size=20), variables), examples.image)
    config = replace(CONFIG, eval__batch_size=20, train__num_devices=count)
    many = predict_logits(make_predictor(config, variables), examples.image)
    np.testing.assert_allclose(many, one, atol=1e-5)  # other batches


def test_a_run_of_more_devices_than_there_are_can_be_evaluated(examples: Examples) -> None:
    variables = eval_variables(jit_init_state(CONFIG.program, KEY))
    config = replace(CONFIG, train__num_devices=64)
    assert predict_logits(make_predictor(config, variables), examples.image).shape == (96, 10)


class Died(Exception):
    """Raised in the middle of a run."""


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A run on 8 devices that died in its second epoch; tests that continue it make a copy first."""
    workdir = tmp_path_factory.mktemp("half") / "run"

    def die(*_: Any, **__: Any) -> None:
        raise Died

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "epoch_line", die)
        with pytest.raises(Died):
            fit(replace(RUN, train__num_devices=8), workdir)
    assert checkpoint.steps_in(workdir / "checkpoints") == [5]
    return workdir


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The same run, undisturbed."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    fit(replace(RUN, train__num_devices=8), workdir)
    return workdir


@pytest.mark.parametrize("count", [1, *COUNTS])
def test_a_checkpoint_of_eight_devices_resumes_on_any_number(
    half: pathlib.Path, whole: pathlib.Path, tmp_path: pathlib.Path, count: int
) -> None:
    workdir = shutil.copytree(half, tmp_path / "run")
    fit(replace(RUN, train__num_devices=count), workdir)
    state, expected = (checkpoint.load_run(folder).state for folder in (workdir, whole))
    assert_close(state, expected)
    if count == 8:
        assert jax.tree.all(jax.tree.map(lambda a, b: (np.asarray(a) == np.asarray(b)).all(), state, expected))
    logs = lines(workdir), lines(whole)
    places, expected_places = ([(line["step"], line["split"], line["examples"]) for line in log] for log in logs)
    assert places == expected_places


def test_members_are_spread_over_as_many_devices_as_can_have_equal_shares() -> None:
    assert [job_mesh(SMALL.program, runs, 8).size for runs in (6, 8, 12, 30, 7)] == [6, 8, 6, 6, 7]
    assert job_mesh(SMALL.program, 6, 0).size == 1
    assert job_mesh(SMALL.program, 1, 8).size == 8  # a single run splits its batches


def test_members_on_separate_devices_equal_members_on_one(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for count in (1, 2):
        fit_population(replace(RUN, train__epochs=1, train__num_devices=count), tmp_path / str(count), seeds=2)
    for name in ("seed-0", "seed-1"):
        one, other = (checkpoint.load_run(tmp_path / str(count) / "members" / name).state for count in (1, 2))
        assert_close(one, other)  # XLA fuses loops of other lengths differently

    # A third member, which trains alone, uses one device too.
    sizes = []

    def record(*arguments: Any) -> Mesh:
        mesh = job_mesh(*arguments)
        sizes.append(mesh.size)
        return mesh

    monkeypatch.setattr(drivers, "job_mesh", record)
    fit_population(replace(RUN, train__epochs=1, train__num_devices=2), tmp_path / "2", seeds=3)
    assert set(sizes) == {1}
    assert [summary(tmp_path / "2" / "members" / f"seed-{seed}")["num_devices"] for seed in range(3)] == [1, 1, 1]
