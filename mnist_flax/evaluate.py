"""Evaluates a run on a whole split and prints the numbers with their intervals.

    python -m mnist_flax.evaluate --workdir=runs/default [--split=train|holdout|test] [--checkpoint=best|latest|STEP]

`--config.data.name=kmnist` evaluates on another dataset; only the fields that say where the data are can be overridden.
"""

import json
import pathlib
from collections.abc import Sequence

from absl import flags

from mnist_flax import cli
from mnist_flax.analysis.evaluation import OVERRIDES, SPLITS, evaluate_run, table
from mnist_flax.errors import ConfigError

FLAGS = flags.FLAGS


def main(argv: Sequence[str]) -> None:
    """Judges what the flags describe."""
    if argv[1:]:
        raise ConfigError(f"{argv[1]!r}: is no flag; a flag starts with two dashes")
    if not FLAGS.workdir:
        raise ConfigError("--workdir is missing: name the folder of a run, such as --workdir=runs/default")
    given = {field: FLAGS[f"config.{field}"].value for field in OVERRIDES}
    result = evaluate_run(
        pathlib.Path(FLAGS.workdir),
        checkpoint=FLAGS.checkpoint,
        split=FLAGS.split,
        overrides={field: value for field, value in given.items() if value is not None},
    )
    print(json.dumps(result, indent=2) if FLAGS.json else table(result))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "the run's folder")
    flags.DEFINE_string("checkpoint", "latest", "latest, best (on hold-out rows) or a step")
    flags.DEFINE_enum("split", "test", SPLITS, "train: the rows trained on; holdout: those held out; test")
    flags.DEFINE_boolean("json", False, "print the result as JSON, as it is saved")
    for field in OVERRIDES:  # spelled as for training; of all fields of the config these alone make sense here
        flags.DEFINE_string(f"config.{field}", None, f"instead of the run's own config.{field}")
    cli.run(main)
