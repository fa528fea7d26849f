"""Evaluates a run, or a population as one network, on a whole split, and prints the scores with their intervals.

    python -m mnist_flax.evaluate --workdir=runs/default [--split=train|holdout|test] [--checkpoint=best|latest|STEP]

`--config.data.name=kmnist` evaluates on another dataset; only the fields that say which data, and where, can be given.
"""

import json
import pathlib
from collections.abc import Sequence

from absl import flags

from mnist_flax import cli
from mnist_flax.analysis import run_data
from mnist_flax.analysis.scores import evaluate_workdir, evaluation_table, save_evaluation
from mnist_flax.errors import ConfigError
from mnist_flax.run import workdir as workdirs

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of this verb."""
    flags.DEFINE_string("workdir", None, "the folder of a run or a population")
    flags.DEFINE_string("checkpoint", "latest", "latest, best (on hold-out rows) or a step")
    flags.DEFINE_enum("split", "test", run_data.SPLITS, "train: the rows trained on; holdout: those held out; test")
    flags.DEFINE_boolean("json", False, "print the result as JSON, as it is saved")
    cli.define_output()
    run_data.define_data_flags()


def main(argv: Sequence[str]) -> None:
    """Evaluates what the flags describe."""
    if argv[1:]:
        raise ConfigError(f"{argv[1]!r}: is no flag; a flag starts with two dashes")
    if not FLAGS.workdir:
        raise ConfigError("--workdir is missing: name the folder of a run, such as --workdir=runs/default")
    workdir = pathlib.Path(FLAGS.workdir)
    result = evaluate_workdir(
        workdir, checkpoint=FLAGS.checkpoint, split=FLAGS.split, overrides=run_data.given_overrides()
    )
    print(json.dumps(result, indent=2) if FLAGS.json else evaluation_table(result), flush=True)
    save_evaluation(result, workdirs.output_folder(workdir, FLAGS.output))


if __name__ == "__main__":
    define_flags()
    cli.run(main)
