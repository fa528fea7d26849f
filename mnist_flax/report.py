"""Writes the report of a run into its folder: report/index.html, with its data and pictures beside it.

    python -m mnist_flax.report --workdir=runs/default [--checkpoint=latest|best|STEP] [--output=DIR]

Training writes a report when it finishes. Use this verb to rewrite it, or to report an unfinished run or another
checkpoint.
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from mnist_flax import cli
from mnist_flax.analysis import run_data
from mnist_flax.analysis.report.write import report_workdir
from mnist_flax.errors import ConfigError
from mnist_flax.run import workdir as workdirs

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of this verb."""
    flags.DEFINE_string("workdir", None, "the run's folder")
    flags.DEFINE_string("checkpoint", "latest", "latest, best (on hold-out rows) or a step")
    cli.define_output()
    run_data.define_data_flags()


def main(argv: Sequence[str]) -> None:
    """Writes the report that the flags ask for, and prints its path."""
    if argv[1:]:
        raise ConfigError(f"{argv[1]!r}: is no flag; a flag starts with two dashes")
    if not FLAGS.workdir:
        raise ConfigError("--workdir is missing: name the folder of a run, such as --workdir=runs/default")
    workdir = pathlib.Path(FLAGS.workdir)
    folder = workdirs.output_folder(workdir, FLAGS.output) if FLAGS.output else None
    print(report_workdir(workdir, FLAGS.checkpoint, folder=folder, overrides=run_data.given_overrides()))


if __name__ == "__main__":
    define_flags()
    cli.run(main)
