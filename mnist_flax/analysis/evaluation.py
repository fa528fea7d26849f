"""Applies a trained network, or a committee of several, to images; every example counts exactly once."""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mnist_flax import metrics, sharding
from mnist_flax.analysis.population_file import POPULATION, member_folders
from mnist_flax.config import Config, Program, differences
from mnist_flax.data.batches import NO_LABEL
from mnist_flax.data.splits import Examples, check_images
from mnist_flax.drivers import jit_forward
from mnist_flax.errors import WorkdirError
from mnist_flax.run import workdir as workdirs
from mnist_flax.run.checkpoint import Run, load_run
from mnist_flax.run.schema import NUMBER, mismatches
from mnist_flax.step import Variables, eval_variables

Facts = dict[str, Any]  # ready for JSON

VIEW_SHIFTS = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))  # by how many pixels each view is shifted down and right
FITTED = ("temperature", "doubtful_below", "most_ink")  # the fields of a predictor that are fitted on hold-out rows


@dataclasses.dataclass(frozen=True, eq=False)
class Predictor:
    """A trained network or committee, and how to apply it to images."""

    program: Program  # the network, and how to apply it
    # the variables of each network; several form a committee, whose probabilities are averaged
    members: tuple[Variables, ...]
    # 1, or 5 to average the probabilities of an image and its shifts by one pixel up, down, left and right
    views: int = 1
    temperature: float = 1.0  # what the logits are divided by, after averaging
    doubtful_below: float = 0.95  # an answer with a smaller probability is doubtful
    most_ink: float = 1.0  # an image with a larger `mean_grey` is doubtful, whatever the answer
    batch_size: int = 2000  # images per call, rounded up to a multiple of the number of devices
    # devices to split a batch over, capped at those available; 0 means all accelerators, or one CPU
    num_devices: int = 0

    @functools.cached_property
    def placed(self) -> tuple[Mesh, tuple[Variables, ...]]:
        """The devices and the members on them, placed once: for a single image, this takes longer than the network."""
        mesh = sharding.make_mesh(min(self.num_devices, jax.device_count()))
        return mesh, sharding.place(self.members, sharding.replicated(mesh))


def make_predictor(config: Config, *members: Variables, **fitted: float) -> Predictor:
    """Returns a predictor with the program, views, batch size and devices of a config, and the `fitted` values.

    Fitted values that are not given are those of `default_fit`.
    """
    return Predictor(
        program=config.program,
        members=members,
        views=config.eval.views,
        batch_size=config.eval.batch_size,
        num_devices=config.train.num_devices,
        **(default_fit(config.program) | fitted),
    )


def default_fit(program: Program) -> dict[str, float]:
    """Returns the values of the `FITTED` fields for a run that holds out no rows.

    Label smoothing makes probabilities too low: most correct answers of `fast.py` have less than 0.95.
    """
    return {"temperature": 1.0, "doubtful_below": 0.5 if program.label_smoothing else 0.95, "most_ink": 1.0}


def member_logits(predictor: Predictor, images: np.ndarray) -> np.ndarray:
    """Computes the logits of each member at temperature 1: `u8[N,28,28,1] -> f32[M,N,C]`.

    With several views, these are the logarithms of the mean probabilities.

    Raises:
      TypeError, ValueError: the images have another type or shape.
    """
    check_images(images)
    return mean_logits(np.stack([_logits_of_view(predictor, view) for view in views_of(images, predictor.views)]))


def _logits_of_view(predictor: Predictor, images: np.ndarray) -> np.ndarray:
    """Applies every member to `images` in batches; the last one is padded, so one compiled program serves every N.

    A batch size above the default is cut to the number of images, because padding to it could exhaust the memory.
    """
    mesh, members = predictor.placed
    size = min(predictor.batch_size, max(len(images), Predictor.batch_size))
    size = -(-size // mesh.size) * mesh.size
    outputs = []
    for start in range(0, len(images), size):
        batch = images[start : start + size]
        if len(batch) < size:
            batch = np.pad(batch, [(0, size - len(batch)), *[(0, 0)] * 3])
        batch = sharding.place(batch, sharding.split(mesh))
        outputs.append([jit_forward(predictor.program, variables, batch) for variables in members])
    none = np.zeros((len(members), 0, predictor.program.num_classes), np.float32)  # there may be no images
    return np.concatenate([none, *sharding.gather(outputs)], axis=1)[:, : len(images)]


def views_of(images: Any, count: int) -> list[Any]:
    """Returns the first views of images, NumPy's or JAX's: each is shifted by a pixel; the new border is background."""
    if count == 1:
        return [images]
    height, width = images.shape[1:3]
    padded = (np if isinstance(images, np.ndarray) else jnp).pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return [padded[:, 1 - y : 1 - y + height, 1 - x : 1 - x + width] for y, x in VIEW_SHIFTS[:count]]


def predict_logits(predictor: Predictor, images: np.ndarray) -> np.ndarray:
    """Computes the logits of the whole predictor, `u8[N,28,28,1] -> f32[N,C]`; see `mean_logits`."""
    return mean_logits(member_logits(predictor, images), predictor.temperature)


def fit_of(predictor: Predictor) -> dict[str, float]:
    """Returns the fitted values by name, to be stored with the run."""
    return {name: getattr(predictor, name) for name in FITTED}


def doubt(predictor: Predictor, log_probs: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Computes the doubt about each answer, from 0 to 1: `f64[N,C], u8[N,28,28,1] -> f64[N]`.

    Doubt is 1 minus the probability of the answer. It is 1 for an image with much more ink than any hold-out digit,
    because networks can be confident about noise and filled shapes.
    """
    return np.where(mean_grey(images) > predictor.most_ink, 1.0, -np.expm1(log_probs.max(axis=-1)))


def answer(predictor: Predictor, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Computes the log probabilities, and which answers are doubtful: `u8[N,28,28,1] -> f64[N,C], bool[N]`."""
    log_probs = metrics.log_probabilities(predict_logits(predictor, images))
    return log_probs, doubt(predictor, log_probs, images) > 1 - predictor.doubtful_below


def mean_grey(images: np.ndarray) -> np.ndarray:
    """Computes how much of an image is ink, from 0 (black) to 1 (white): `u8[N,28,28,1] -> f64[N]`."""
    return np.asarray(images.mean(axis=(1, 2, 3)) / 255)


def mean_logits(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Combines the logits of networks or views, and divides them by the temperature: `f32[K,...,C] -> f32[...,C]`.

    Several are combined to the logarithm of their mean probabilities; those of a single one do not change.
    """
    together = logits[0] if len(logits) == 1 else metrics.log_mean_probabilities(logits).astype(np.float32)
    return together if temperature == 1.0 else together / np.float32(temperature)


class Evaluation(NamedTuple):
    """The result of classifying N examples."""

    loss: float  # the mean cross-entropy in nats, without label smoothing
    accuracy: float  # the share of examples whose most probable class is the label
    examples: int  # N
    logits: np.ndarray  # `f32[N,C]`, already divided by the temperature
    temperature: float = 1.0

    @property
    def correct(self) -> int:
        """The number of examples whose most probable class is the label."""
        return round(self.accuracy * self.examples)

    def scores(self) -> Facts:
        """Returns the fields that go into the log."""
        return {"loss": self.loss, "accuracy": self.accuracy, "examples": self.examples}

    def line(self) -> str:
        """Returns the scores as text to print."""
        right = f"{self.correct} of {self.examples} right"
        return f"accuracy {100 * self.accuracy:.2f} % ({right}), loss {self.loss:.4f}"


def evaluate(predictor: Predictor, examples: Examples) -> Evaluation:
    """Classifies all examples and compares the result with their labels.

    Raises:
      ValueError: there are no examples, or a label is not one of the classes.
    """
    return evaluation_of(member_logits(predictor, np.asarray(examples.image)), examples.label, predictor.temperature)


def evaluation_of(logits: np.ndarray, labels: np.ndarray, temperature: float = 1.0) -> Evaluation:
    """Compares the combined answers of M networks with the labels, given `member_logits`: `f32[M,N,C], i32[N]`.

    Raises:
      ValueError: as for `evaluate`.
    """
    labels, num_classes = np.asarray(labels), logits.shape[-1]
    if not len(labels) or labels.min() <= NO_LABEL or labels.max() >= num_classes:
        raise ValueError(f"evaluation needs examples with labels from 0 to {num_classes - 1}")
    logits = mean_logits(logits, temperature)
    return Evaluation(
        loss=float(np.mean(metrics.negative_log_likelihood(logits, labels))),
        accuracy=float(np.mean(np.argmax(logits, axis=-1) == labels)),
        examples=len(labels),
        logits=logits,
        temperature=temperature,
    )


class RunInfo(NamedTuple):
    """Where a predictor comes from."""

    kind: str  # `run`, or `seeds` or `folds` for a population
    runs: tuple[Run, ...]  # the run, or all members
    is_final: bool  # whether the results stored in the folder belong to these weights

    def __repr__(self) -> str:
        return f"RunInfo(kind={self.kind!r}, steps={self.steps}, is_final={self.is_final})"  # not all the weights

    @property
    def config(self) -> Config:
        """The config of the run, or of the first member."""
        return self.runs[0].config

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the training data."""
        return str(self.runs[0].record["fingerprint"])

    @property
    def steps(self) -> tuple[int, ...]:
        """The number of finished updates of each member."""
        return tuple(int(run.state.step) for run in self.runs)


def load_predictor(workdir: workdirs.Folder, checkpoint: str | int = "latest") -> tuple[Predictor, RunInfo]:
    """Loads a checkpoint of a run, or of all members of a population: `latest`, `best` (on hold-out rows) or a step.

    The temperature and the thresholds of doubt are those fitted at the end of training if this is the last checkpoint,
    and the defaults otherwise.

    Raises:
      WorkdirError: the folder cannot be read, there is no such checkpoint, it is damaged, or the members differ in
        config or data.
    """
    workdir = pathlib.Path(workdir).expanduser()
    is_population = workdirs.MEMBERS in workdirs.names_in(workdir)
    result = workdirs.read_json(workdir / (POPULATION if is_population else workdirs.SUMMARY))
    folders = member_folders(workdir, result) if is_population else [workdir]
    runs = tuple(load_run(folder, str(checkpoint)) for folder in folders)
    info = RunInfo(str(result["kind"]) if is_population else "run", runs, is_final=False)
    for folder, run in zip(folders, runs, strict=True):
        changed = differences(info.config, run.config).keys() - {"seed", "data.fold"}
        same_length = run.config.train.epochs == info.config.train.epochs
        if changed or not same_length or run.record["fingerprint"] != info.fingerprint:
            raise WorkdirError(f"{folder}: its config or data differ from those of {folders[0]}")
    # Each member has its own number of steps if the folds differ in size.
    ends = [workdirs.read_json(folder / workdirs.SUMMARY).get("steps") for folder in folders]
    is_final = info.steps == (result.get("steps"), *ends[1:])
    variables = [eval_variables(run.state) for run in runs]
    predictor = make_predictor(info.config, *variables, **(stored_fit(result) if is_final else {}))
    return predictor, info._replace(is_final=is_final)


def stored_fit(result: Mapping[str, Any]) -> dict[str, float]:
    """Returns the fitted values in a summary or `population.json`, without those that are missing or invalid."""
    fitted = {}
    for name in FITTED:
        value = result.get(name)
        if value is not None and not any(mismatches(value, NUMBER, name)) and 0 < value < math.inf:
            fitted[name] = float(value)
    return fitted
