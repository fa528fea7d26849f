"""Evaluates a network on a whole split: every example once, none dropped, none counted twice."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from mnist_flax import config as config_lib
from mnist_flax import metrics, sharding
from mnist_flax.config import IMAGE_SIZE, Config
from mnist_flax.data import batches, labels
from mnist_flax.data.batches import NO_LABEL
from mnist_flax.data.datasets import Examples
from mnist_flax.data.load import Splits, load_splits
from mnist_flax.drivers import jit_forward
from mnist_flax.errors import ConfigError, DataError
from mnist_flax.run import workdir as workdirs
from mnist_flax.step import Variables, eval_variables, forward

SPLITS = ("train", "holdout", "test")
OVERRIDES = ("data.name", "data.source", "data.data_dir", "data.raw_dir")  # which of a run's fields may be other ones


class Evaluation(NamedTuple):
    """What a network says about a split.

    Attributes:
      loss: mean cross-entropy in nats, without label smoothing.
      accuracy: share of examples whose likeliest class is the label.
      examples: how many were judged: all of them.
      logits: `f32[N,C]`, in the order of the split.
    """

    loss: float
    accuracy: float
    examples: int
    logits: np.ndarray

    def scores(self) -> dict[str, Any]:
        """Returns what the log holds."""
        return {"loss": self.loss, "accuracy": self.accuracy, "examples": self.examples}


class Predictor(NamedTuple):
    config: Config
    variables: Variables


def run_predictor(config: Config, variables: Variables) -> Predictor:
    return Predictor(config, variables)


def predict_logits(config: Config, variables: Variables, images: np.ndarray) -> np.ndarray:
    """Computes the logits of any number of images, `u8[N,28,28,1] -> f32[N,C]`.

    A batch is split over the devices: those of training, or as many of them as there are here. The last batch is filled
    up and its filling cut off again, so one compiled program serves every N.
    """
    mesh = sharding.make_mesh(min(config.train.num_devices, jax.device_count()))
    size = -(-config.eval.batch_size // mesh.size) * mesh.size
    variables = sharding.place(variables, sharding.replicated(mesh))
    batches = []
    for start in range(0, len(images), size):
        batch = images[start : start + size]
        padding = [(0, size - len(batch))] + [(0, 0)] * (images.ndim - 1)
        batch = sharding.place(np.pad(batch, padding), sharding.split(mesh))
        batches.append(_views(config, variables, batch))
    logits = np.concatenate(sharding.gather(batches)) if batches else np.zeros((0, config.num_classes), np.float32)
    return logits[: len(images)]


def _views(config, variables, images):
    if config.eval.views == 1:
        return jit_forward(config.program, variables, images)
    return jit_views(config.program, variables, images)


def views(program, variables, images):
    padded = jax.numpy.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    corners = ((1, 1), (0, 1), (2, 1), (1, 0), (1, 2))
    height, width = images.shape[1:3]
    v = jax.numpy.stack([padded[:, i : i + height, j : j + width] for i, j in corners], 1)
    logits = jax.nn.log_softmax(forward(program, variables, v.reshape(-1, *images.shape[1:]))).reshape(*v.shape[:2], -1)
    return jax.nn.logsumexp(logits, 1) - jax.numpy.log(5)


jit_views = jax.jit(views, static_argnames="program")


def evaluate(predictor: Predictor, examples: Examples) -> Evaluation:
    """Judges `variables` on all of `examples`.

    Raises:
      ValueError: there are no examples, or a label is no class of the config's dataset.
    """
    config, variables = predictor
    labels = np.asarray(examples.label)
    if not len(labels) or labels.min() <= NO_LABEL or labels.max() >= config.num_classes:
        raise ValueError(f"evaluation needs examples with labels from 0 to {config.num_classes - 1}")
    logits = predict_logits(config, variables, np.asarray(examples.image))
    return Evaluation(
        loss=float(np.mean(metrics.negative_log_likelihood(logits, labels))),
        accuracy=float(np.mean(np.argmax(logits, axis=-1) == labels)),
        examples=len(labels),
        logits=logits,
    )


def scores(evaluation: Evaluation, label: np.ndarray, dataset: str) -> dict[str, Any]:
    """Turns an evaluation into numbers with 95 % intervals, ready for JSON.

    Args:
      evaluation: of a split.
      label: `i32[N]`, of the same split.
      dataset: its name, for those of its classes.
    """
    probs = np.exp(metrics.log_probabilities(evaluation.logits))
    confusion = metrics.confusion_matrix(label, probs.argmax(axis=-1), probs.shape[-1])
    right = int(np.trace(confusion))
    classes = metrics.per_class(confusion)
    return {
        "examples": evaluation.examples,
        "correct": right,
        "accuracy": evaluation.accuracy,
        "accuracy_interval": metrics.wilson_interval(right, evaluation.examples).tolist(),
        "loss": evaluation.loss,
        "brier": metrics.brier_score(probs, label),
        "ece": metrics.expected_calibration_error(metrics.reliability(probs, label)),
        "per_class": [
            {
                "class": number,
                "name": name,
                "examples": int(confusion[number].sum()),
                "predictions": int(confusion[:, number].sum()),
                "correct": int(confusion[number, number]),
                **{
                    field: None if np.isnan(column[number]).any() else column[number].tolist()
                    for field, column in classes._asdict().items()
                },
            }
            for number, name in enumerate(labels.class_names(dataset))
        ],
    }


def load_data(config: Config, fingerprint: str, overrides: Mapping[str, Any]) -> tuple[Config, Splits]:
    """Loads the data of a run, or others for it to be judged on.

    Args:
      config: of the run.
      fingerprint: of the data that it was trained on.
      overrides: some of `OVERRIDES`, and their values.

    Returns:
      The config with the overrides, and what it describes.

    Raises:
      ConfigError: a field is none of `OVERRIDES`, or the other dataset does not fit the network.
      DataError: the data cannot be had, or are not those of the run.
    """
    for name, value in overrides.items():
        if name not in OVERRIDES:
            raise ConfigError(
                f"config.{name} = {value!r}: a trained run keeps its own; only these can be overridden:"
                f" {', '.join('config.' + field for field in OVERRIDES)}"
            )
    changed: dict[str, Any] = {name.replace(".", "__"): value for name, value in overrides.items()}
    changed["data__on_missing"] = "error"  # the results of another dataset than the one asked for would be no results
    name = changed.get("data__name", config.data.name)
    if name != config.data.name:
        refuse_other_classes(config, name)
        # None of its rows was trained on or held out.
        changed |= dict.fromkeys(("data__num_train", "data__holdout", "data__folds", "data__fold"), 0)
    used = config_lib.replace(config, **changed)
    splits = load_splits(used)
    for split in (splits.train, splits.test):
        if split.image.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE, 1):
            raise DataError(f"{name}: has images of shape {split.image.shape[1:]}; the network takes 28x28 grey ones")
    if name == config.data.name and splits.fingerprint != fingerprint:
        raise DataError(
            f"{name}: its fingerprint is {splits.fingerprint}, but the run was trained on {fingerprint}; name the"
            " folder of the same data with --config.data.data_dir=DIR"
        )
    return used, splits


def refuse_other_classes(config: Config, name: str) -> None:
    """Stops when a network cannot be judged on a dataset.

    Raises:
      ConfigError: there is no such dataset, or it has another number of classes.
    """
    if name not in config_lib.DATASETS:
        hint = config_lib.nearest(name, config_lib.DATASETS)
        raise ConfigError(f"config.data.name = {name!r}: {hint}")
    wanted = config_lib.DATASETS[name].num_classes
    if wanted != config.num_classes:
        fitting = [other for other, info in config_lib.DATASETS.items() if info.num_classes == config.num_classes]
        raise ConfigError(
            f"config.data.name = {name!r}: has {wanted} classes, but this network was trained on {config.data.name} and"
            f" tells {config.num_classes} apart; datasets that fit: {', '.join(fitting)}"
        )


def choose(config: Config, splits: Splits, split: str) -> Examples:
    """Returns the examples that a choice of split means.

    Args:
      config: with the rows to train on and to hold out.
      splits: the data.
      split: one of `SPLITS`. On the run's own dataset `train` means the rows that it was trained on.

    Raises:
      ConfigError: no rows were held out.
    """
    if split == "test":
        return splits.test
    train, held_out = batches.rows_of(splits.train.label, config.data)
    rows = {"train": train, "holdout": held_out}[split]
    if not len(rows):
        raise ConfigError(f"--split={split}: the run held out no rows of {splits.name}; choose train or test")
    return Examples(splits.train.image[rows], splits.train.label[rows])


def evaluate_run(
    workdir: pathlib.Path, *, checkpoint: str = "latest", split: str = "test", overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """Judges a checkpoint of a run, and saves the result in its folder.

    Args:
      workdir: of the run.
      checkpoint: `latest`, `best` (on hold-out rows) or a step.
      split: one of `SPLITS`.
      overrides: fields of the config, some of `OVERRIDES`.

    Returns:
      What is saved as `evaluation-<split>-<dataset>.json`.

    Raises:
      UserError: the run, the checkpoint or the data cannot be had, or do not fit each other.
    """
    from mnist_flax.run.checkpoint import load_run  # only a verb looks into a workdir; the functions above need none

    run = load_run(workdir, checkpoint)
    config, splits = load_data(run.config, run.record["fingerprint"], overrides)
    examples = choose(config, splits, split)
    evaluation = evaluate(run_predictor(config, eval_variables(run.state)), examples)
    result = {
        "dataset": splits.name,
        "dataset_fingerprint": splits.fingerprint,
        "split": split,
        "trained_on": run.config.data.name,
        "checkpoint": checkpoint,
        "step": int(run.state.step),
        **scores(evaluation, examples.label, splits.name),
    }
    workdirs.write_text(workdir / result_file(split, splits.name), json.dumps(result, indent=2) + "\n")
    return result


def result_file(split: str, dataset: str) -> str:
    """Returns the name under which `evaluate_run` saves its result in the workdir."""
    return f"evaluation-{split}-{dataset.replace('/', '-')}.json"


def table(result: Mapping[str, Any]) -> str:
    """Returns what `evaluate_run` found, as text to read."""
    low, high = result["accuracy_interval"]
    lines = [
        f"{result['dataset']}, {result['split']}: {result['correct']} of {result['examples']} right at step"
        f" {result['step']} ({result['checkpoint']})",
        f"accuracy {result['accuracy']:.2%} (95 % interval {low:.2%} to {high:.2%})   loss {result['loss']:.4f}  "
        f" Brier {result['brier']:.4f}   ECE {result['ece']:.4f}",
        "",
        f"{'class':<12}{'examples':>9}  {'precision':<24}{'recall':<24}{'F1':<24}",
    ]
    for row in result["per_class"]:
        if row["examples"] or row["predictions"]:
            cells = "".join(f"{_with_interval(row, field):<24}" for field in ("precision", "recall", "f1"))
            lines.append(f"{row['name']:<12}{row['examples']:>9}  {cells}".rstrip())
    return "\n".join(lines)


def _with_interval(row: Mapping[str, Any], field: str) -> str:
    if row[field] is None:
        return "-"
    low, high = row[f"{field}_interval"]
    return f"{row[field]:7.2%} [{low:.2%}, {high:.2%}]".replace("%", "")
