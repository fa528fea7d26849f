"""The config sections for the data, the training loop, evaluation and checkpoints."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from mnist_flax.checks import among, within
from mnist_flax.losses import LOSSES

SOURCES = ("auto", "tfds", "raw", "download")
HOLDOUT_ROWS = ("spread", "last")
DRIVERS = ("scan", "stream")


def not_compared(default: Any) -> Any:
    """Declares a field that may differ when a run resumes.

    Either its value affects results by rounding at most, or what it names is compared instead: the fingerprint of the
    data, the digest of the teacher.
    """
    return dataclasses.field(default=default, metadata={"compared": False})


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images to use and where to get them.

    Attributes:
      name: a key of `DATASETS`.
      source: `auto` tries the other three in this order: `tfds` (a copy prepared in `data_dir`), `raw` (the official
        files in `raw_dir`), `download` (the official files from the URLs that TFDS uses).
      data_dir: the TFDS folder; empty means `$TFDS_DATA_DIR`, else `~/tensorflow_datasets`.
      raw_dir: a folder with the official files; empty means `$MNIST_FLAX_RAW_DIR`.
      on_missing: if the dataset is unavailable and `source` is `auto`, `digits` falls back to the digits bundled with
        scikit-learn; `error` stops. Populations, resumed runs and runs with a teacher always stop.
      num_train: how many training rows to use, a stratified sample that includes the hold-out rows; 0 means all.
      holdout: how many of these rows to hold out for validation; 0 means none.
      holdout_rows: `spread` holds out a stratified sample from the whole file, and `last` the last rows. MNIST's rows
        are in order of their writers, so nearly all of its last rows are from writers unknown to the network.
      folds: instead of `holdout`, split the rows into this many stratified folds and hold out one; 0 turns this off.
      fold: which fold to hold out, from 0.
    """

    name: str = "mnist"
    source: str = not_compared("auto")
    data_dir: str = not_compared("")
    raw_dir: str = not_compared("")
    on_missing: str = not_compared("digits")
    num_train: int = 0
    holdout: int = 0
    holdout_rows: str = "spread"
    folds: int = 0
    fold: int = 0

    def check(self, dataset_rows: int, num_classes: int) -> Iterator[str]:
        """Yields a message for each invalid value, given the dataset's number of training rows and classes."""
        yield from among("data.source", self.source, SOURCES)
        yield from among("data.on_missing", self.on_missing, ("digits", "error"))
        yield from among("data.holdout_rows", self.holdout_rows, HOLDOUT_ROWS)
        yield from within("data.num_train", self.num_train, 0, dataset_rows)
        rows = self.num_train or dataset_rows
        needed = 2 * num_classes if self.folds else num_classes + 1 if self.holdout else 0
        if rows < needed:
            field = "folds" if self.folds else "holdout"
            remedy = f"use at least {needed}" if needed <= dataset_rows else f"set config.data.{field} to 0"
            yield f"config.data.num_train = {self.num_train}: {rows} rows are too few to hold some out; {remedy}"
        if self.folds:
            yield from within("data.folds", self.folds, 2, rows // num_classes)
            if self.holdout:
                yield f"config.data.holdout = {self.holdout}: must be 0 with config.data.folds: a fold is held out"
        if self.fold and not self.folds:
            yield f"config.data.fold = {self.fold}: is used only with config.data.folds; set that, or leave it at 0"
        yield from within("data.fold", self.fold, 0, max(self.folds, 1), open_high=True)
        if self.holdout:
            for message in within("data.holdout", self.holdout, num_classes, rows, open_high=True):
                yield f"{message}, or 0 to hold out none"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training loop.

    Attributes:
      batch_size: examples per step. The last batch of an epoch may be smaller; no row is dropped.
      epochs: passes over the training rows.
      loss: a key of `LOSSES`.
      label_smoothing: this fraction of each one-hot label is spread over all classes.
      augment_until: the share of the steps that augment their images. The remaining steps, at the end, train on the
        original images, which improves accuracy on unaugmented images (He et al., 2019).
      teacher: the folder of a finished run or population to distil from: the network learns the teacher's
        probabilities for the same augmented images. Empty means none. The folder may move: a resumed run compares the
        weights in it, not its path.
      teacher_weight: the weight of the cross-entropy with the teacher's probabilities; the loss on the labels has the
        weight 1 minus this.
      driver: `scan` (many steps per compiled call, with the data on the device) or `stream` (one batch per call, sent
        from the host). Both train on the same batches, but XLA may round differently, which changes the last bits.
        Populations always use `scan`.
      epochs_per_dispatch: how many epochs to train per device call, so that a fast device does not wait for the host;
        hold-out evaluation, epoch checkpoints, signals and console output then wait until the call returns. 0 means
        calls of about half a second, and of one epoch at most. It changes the speed and how often hold-out rows are
        evaluated, never the weights.
      num_devices: devices to train and evaluate on, counted over all processes; each batch is split evenly over them.
        0 means all accelerators, or one CPU device per process, because CPU devices share the cores.
      log_every_steps: write a line to `metrics.jsonl` after every so many steps and at the end of every epoch, averaged
        over the steps since the last line; 0 means one line per epoch.
      tensorboard: write TensorBoard events.
      report: write `report/index.html` at the end.
      demo: write `demo.html`, a page to draw digits on, at the end.
    """

    batch_size: int = 64
    epochs: int = 5
    loss: str = "cross_entropy"
    label_smoothing: float = 0.0
    augment_until: float = 1.0
    teacher: str = not_compared("")
    teacher_weight: float = 1.0
    driver: str = not_compared("scan")
    epochs_per_dispatch: int = not_compared(0)
    num_devices: int = not_compared(0)
    log_every_steps: int = not_compared(100)
    tensorboard: bool = not_compared(True)
    report: bool = not_compared(True)
    demo: bool = not_compared(True)

    def check(self, num_train: int) -> Iterator[str]:
        """Yields a message for each invalid value, given the number of rows to train on."""
        yield from within("train.batch_size", self.batch_size, 1)
        if self.batch_size > num_train:
            yield f"config.train.batch_size = {self.batch_size}: more than the {num_train} rows to train on"
        yield from within("train.epochs", self.epochs, 1)
        yield from among("train.loss", self.loss, LOSSES, is_registry=True)
        yield from within("train.label_smoothing", self.label_smoothing, 0, 1, open_high=True)
        yield from within("train.augment_until", self.augment_until, 0, 1, open_low=True)
        yield from within("train.teacher_weight", self.teacher_weight, 0, 1, open_low=True)
        yield from among("train.driver", self.driver, DRIVERS)
        for name in ("epochs_per_dispatch", "num_devices", "log_every_steps"):
            yield from within(f"train.{name}", getattr(self, name), 0)
        if self.batch_size > 0 and self.epochs * -(-num_train // self.batch_size) >= 2**31:
            yield f"config.train.epochs = {self.epochs}: steps are counted in 32 bits; at most 2,147,483,647"


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation, both during training and at the end.

    Attributes:
      batch_size: images per call; each shifted view is a call of its own.
      views: 1, or 5 to average the probabilities of an image and of its shifts by one pixel up, down, left and right.
    """

    batch_size: int = not_compared(2000)
    views: int = 1

    def check(self) -> Iterator[str]:
        """Yields a message for each invalid value."""
        yield from within("eval.batch_size", self.batch_size, 1, 1_000_000)
        if self.views not in (1, 5):
            yield f"config.eval.views = {self.views}: must be 1 or 5"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save the state, and how many checkpoints to keep.

    Attributes:
      every_epochs: save after every so many epochs; 0 turns this off. The final state is always saved.
      every_steps: also save after every so many steps, even in the middle of an epoch; 0 turns this off.
      every_seconds: also save when this many seconds have passed since the last save; 0 turns this off.
      keep_latest: how many of the newest checkpoints to keep.
      keep_best: how many of the best (on hold-out rows) to keep as well, if rows are held out.
    """

    every_epochs: int = not_compared(1)
    every_steps: int = not_compared(0)
    every_seconds: float = not_compared(0.0)
    keep_latest: int = not_compared(2)
    keep_best: int = not_compared(1)

    def check(self) -> Iterator[str]:
        """Yields a message for each invalid value."""
        for name in ("every_epochs", "every_steps", "every_seconds", "keep_best"):
            yield from within(f"checkpoint.{name}", getattr(self, name), 0)
        yield from within("checkpoint.keep_latest", self.keep_latest, 1)
