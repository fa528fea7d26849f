"""Compares sets of views (test-time augmentation) for a run, on the rows that it holds out.

    python scripts/study_views.py --workdir=runs/default >> scripts/results/study_views.jsonl

Prints one JSON line for each set: the errors, the loss, and the loss with the temperature that fits these rows best.
"""

import dataclasses
import json
from collections.abc import Sequence

import numpy as np
from absl import flags

from mnist_flax import cli, metrics
from mnist_flax.analysis.calibration import calibration_scores, fit_temperature
from mnist_flax.analysis.evaluation import load_predictor, predict_logits
from mnist_flax.analysis.run_data import load_data, select_examples
from mnist_flax.errors import UserError
from mnist_flax.run.provenance import provenance

View = tuple[float, float, float, float]  # shift down and right in pixels, rotation in degrees, scale

ONE: tuple[View, ...] = ((0, 0, 0, 1),)
ALONG_AXES: tuple[View, ...] = ((-1, 0, 0, 1), (1, 0, 0, 1), (0, -1, 0, 1), (0, 1, 0, 1))
DIAGONAL: tuple[View, ...] = ((-1, -1, 0, 1), (-1, 1, 0, 1), (1, -1, 0, 1), (1, 1, 0, 1))
BY_TWO: tuple[View, ...] = ((-2, 0, 0, 1), (2, 0, 0, 1), (0, -2, 0, 1), (0, 2, 0, 1))
SETS = {
    "1": ONE,
    "5": ONE + ALONG_AXES,
    "9": ONE + ALONG_AXES + DIAGONAL,
    "13": ONE + ALONG_AXES + DIAGONAL + BY_TWO,
    "5 and rotations": ONE + ALONG_AXES + tuple((0, 0, degrees, 1) for degrees in (-8, -4, 4, 8)),
    "5 and scales": ONE + ALONG_AXES + tuple((0, 0, 0, scale) for scale in (0.92, 0.96, 1.04, 1.08)),
}


def viewed(images: np.ndarray, view: View) -> np.ndarray:
    """Returns the images, `u8[N,28,28,1]`, moved, rotated around their centre and scaled, with linear interpolation."""
    from scipy import ndimage

    down, right, degrees, scale = view
    angle = np.deg2rad(degrees)
    matrix = np.eye(3)  # of an output pixel (image, row, column), to the input
    matrix[1:, 1:] = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / scale
    centre = np.array([0.0, *((size - 1) / 2 for size in images.shape[1:3])])
    offset = centre - matrix @ (centre + np.array([0.0, down, right]))
    moved = ndimage.affine_transform(images[..., 0].astype(np.float32), matrix, offset, order=1)
    return np.clip(np.rint(moved), 0, 255).astype(np.uint8)[..., None]


def main(_: Sequence[str]) -> None:
    """Scores every set."""
    workdir = cli.workdir()
    predictor, info = load_predictor(workdir)
    if not info.config.num_holdout_rows:
        raise UserError(f"--workdir={workdir}: the run held out no rows; name one with config.data.holdout")
    examples = select_examples(*load_data(info.config, info.fingerprint, {}), "holdout")
    images, labels = examples.image[: flags.FLAGS.rows], examples.label[: flags.FLAGS.rows]
    single = dataclasses.replace(predictor, views=1, temperature=1.0)
    logits = {view: predict_logits(single, viewed(images, view)) for view in {*sum(SETS.values(), ())}}
    made = {"workdir": workdir.name, **provenance()}
    for name, views in SETS.items():
        together = metrics.log_mean_probabilities(np.stack([logits[view] for view in views])).astype(np.float32)
        temperature = fit_temperature(together, labels)
        result = {
            "views": name,
            "rows": len(labels),
            "errors": int((together.argmax(1) != labels).sum()),
            "loss": calibration_scores(together, labels)["loss"],
            "temperature": temperature,
            "loss_scaled": calibration_scores(together / temperature, labels)["loss"],
        }
        print(json.dumps({**result, **made}), flush=True)


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "the folder of a run")
    flags.DEFINE_integer("rows", None, "use only the first rows that are held out", lower_bound=1)
    cli.run(main)
