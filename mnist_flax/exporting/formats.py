"""The export formats, one entry each, and the check that every file must pass before it is saved."""

import importlib.util
import json
import logging
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np

from mnist_flax import metrics
from mnist_flax.analysis.evaluation import Predictor, RunInfo, load_predictor, predict_logits
from mnist_flax.analysis.run_data import DEFAULT_DATA, load_data
from mnist_flax.data.load import load_splits
from mnist_flax.data.registry import DATASETS
from mnist_flax.errors import DataError, failures_as
from mnist_flax.exporting import card, numpy_program, onnx, stablehlo
from mnist_flax.exporting.graph import ExportError
from mnist_flax.exporting.inference import graph_of, in_float32
from mnist_flax.run import workdir as workdirs
from mnist_flax.sections import DataConfig

logger = logging.getLogger(__name__)

FOLDER = "export"
STEM = "model"
TOLERANCE = 1e-4  # of logits and probabilities
NUM_IMAGES = 1_000


class Format(NamedTuple):
    """A way to write a predictor to `model.<name of the format>`."""

    packages: tuple[str, ...]  # the optional packages that it imports
    # returns the content of each file by suffix; formats without metadata ignore the second argument
    write: Callable[[Predictor, dict[str, str]], dict[str, bytes]]
    # loads the file as a function `u8[N,28,28,1] -> {"logits", "probabilities"}`
    load: Callable[[pathlib.Path], Callable[[np.ndarray], Mapping[str, np.ndarray]]]


FORMATS: dict[str, Format] = {
    "onnx": Format(
        ("onnx", "onnxruntime"),
        lambda predictor, metadata: {".onnx": onnx.to_onnx(graph_of(predictor), metadata)},
        onnx.load_onnx,
    ),
    "stablehlo": Format(
        ("flatbuffers",),
        lambda predictor, metadata: {".stablehlo": stablehlo.to_stablehlo(predictor)},
        stablehlo.load_stablehlo,
    ),
    "npz": Format(
        (), lambda predictor, metadata: numpy_program.to_numpy(graph_of(predictor)), numpy_program.load_program
    ),
}


class Exported(NamedTuple):
    """The files written, the largest difference of a logit or probability, and the images it was measured on."""

    paths: tuple[pathlib.Path, ...]
    difference: float
    num_images: int
    images: str  # what they are, such as "test images of mnist"

    def line(self) -> str:
        """Returns a line to print about the result."""
        files = " and ".join(f"{path} ({path.stat().st_size / 1000:,.0f} kB)" for path in self.paths)
        difference = f"largest difference of a logit or probability {self.difference:.1e}"
        return f"{files}: {difference}, over {self.num_images:,} {self.images}"


def export_workdir(
    workdir: pathlib.Path,
    format_name: str,
    *,
    checkpoint: str = "latest",
    folder: pathlib.Path | None = None,
    overrides: Mapping[str, Any] = DEFAULT_DATA,
) -> Exported:
    """Exports a run, or a population as a committee, to one format, and writes a model card beside it.

    See `load_predictor` for the checkpoints and `load_data` for the overrides. The default folder is `export` in the
    workdir, or `export-<checkpoint>` if the checkpoint is not the latest.

    Raises:
      UserError: a package is missing, the run cannot be read, the network cannot be expressed in the format, or the
        file's outputs differ from the network's: then nothing is written. Or a file cannot be written.
    """
    chosen = FORMATS[format_name]
    missing = [name for name in chosen.packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"--format={format_name}: needs packages that are missing: pip install {' '.join(missing)}")
    predictor, info = load_predictor(workdir, checkpoint)
    images, source = images_to_compare(info, overrides)
    dataset = info.config.data.name
    classes = json.dumps(DATASETS[dataset].class_names)
    with _as_export_error(format_name):
        contents = chosen.write(predictor, {"dataset": dataset, "classes": classes, "steps": str(max(info.steps))})
    difference = check_outputs(format_name, contents, predictor, images)
    model_card = card.text(workdir, predictor, info)
    folder = folder or workdirs.results_folder(workdir, FOLDER, checkpoint)
    paths = tuple(folder / f"{STEM}{suffix}" for suffix in contents)
    for path, content in zip(paths, contents.values(), strict=True):
        workdirs.write_bytes(path, content, remedy=workdirs.REMEDY_OUTPUT)
    workdirs.write_text(folder / card.FILE, model_card, remedy=workdirs.REMEDY_OUTPUT)
    return Exported(paths, difference, len(images), source)


def _as_export_error(format_name: str) -> AbstractContextManager[None]:
    """Converts what the libraries of a format raise for networks that they do not support."""
    return failures_as(ExportError, f"--format={format_name}: does not support this network", "; try another format")


def images_to_compare(info: RunInfo, overrides: Mapping[str, Any]) -> tuple[np.ndarray, str]:
    """Returns up to 1,000 test images, or scikit-learn's digits if the data are unavailable, and a description.

    Raises:
      UserError: the data that `overrides` name cannot be loaded, or are not those of the run.
    """
    try:
        _, splits = load_data(info.config, info.fingerprint, overrides)
        return splits.test.image[:NUM_IMAGES], f"test images of {splits.name}"
    except DataError as error:
        if overrides:  # the user has named the data
            raise
        logger.warning("%s", error)
        digits = load_splits(DataConfig(name="digits"))
        source = f"of scikit-learn's digits, because {info.config.data.name} cannot be loaded here"
        return digits.train.image[:NUM_IMAGES], source


def check_outputs(format_name: str, contents: Mapping[str, bytes], predictor: Predictor, images: np.ndarray) -> float:
    """Runs an exported file in batches of several sizes; returns the largest difference of a logit or probability.

    Raises:
      ExportError: the difference is above `TOLERANCE`, or not a number.
    """
    with tempfile.TemporaryDirectory() as staging, _as_export_error(format_name):
        for suffix, content in contents.items():
            pathlib.Path(staging, STEM + suffix).write_bytes(content)
        run = FORMATS[format_name].load(pathlib.Path(staging, f"{STEM}.{format_name}"))
        batches = [images[:1], *(images[start : start + 333] for start in range(1, len(images), 333))]
        outputs = [run(batch) for batch in batches]
    logits = predict_logits(in_float32(predictor), images)
    expected = {"logits": logits, "probabilities": metrics.probabilities(logits)}
    found = {name: np.concatenate([output[name] for output in outputs]) for name in expected}
    difference = float(np.max([np.max(np.abs(found[name] - expected[name])) for name in expected]))  # or NaN
    if not difference <= TOLERANCE:
        raise ExportError(
            f"--format={format_name}: the file differs from the network by {difference:.1e}, more than the"
            f" {TOLERANCE:.0e} allowed, so it was not written"
        )
    return difference
