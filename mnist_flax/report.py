"""Writes the report of a run into its folder: report/index.html, and its pieces beside it.

    python -m mnist_flax.report --workdir=runs/default [--checkpoint=latest|best|STEP] [--output=DIR]

Training does this at its end; this verb does it again, or for an unfinished run, or for another checkpoint.
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from mnist_flax import cli
from mnist_flax.analysis import run_data
from mnist_flax.errors import ConfigError

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of this verb."""
    flags.DEFINE_string("workdir", None, "the run's folder")
    flags.DEFINE_string("checkpoint", "latest", "latest, best (on hold-out rows) or a step")
    flags.DEFINE_string("output", None, "the folder to write to; if not given, report/ in --workdir")
    run_data.define_flags()


def main(argv: Sequence[str]) -> None:
    """Reports what the flags describe."""
    if argv[1:]:
        raise ConfigError(f"{argv[1]!r}: is no flag; a flag starts with two dashes")
    if not FLAGS.workdir:
        raise ConfigError("--workdir is missing: name the folder of a run, such as --workdir=runs/default")
    from mnist_flax.analysis.report.write import report_workdir  # only now: --help need not wait for matplotlib

    folder = pathlib.Path(FLAGS.output) if FLAGS.output else None
    overrides = run_data.given_overrides()
    print(report_workdir(pathlib.Path(FLAGS.workdir), FLAGS.checkpoint, folder=folder, overrides=overrides))


if __name__ == "__main__":
    define_flags()
    cli.run(main)
