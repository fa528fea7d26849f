"""Writes the report of a run into its folder: report/index.html and what belongs to it.

    python -m mnist_flax.report --workdir=runs/default [--checkpoint=latest|best|STEP]

Training does so itself at its end; this does it again, or for a run that is not finished, or for another checkpoint.
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from mnist_flax import cli
from mnist_flax.errors import ConfigError


def main(argv: Sequence[str]) -> None:
    """Reports what the flags describe."""
    if argv[1:]:
        raise ConfigError(f"{argv[1]!r}: is no flag; a flag starts with two dashes")
    if not flags.FLAGS.workdir:
        raise ConfigError("--workdir is missing: name the folder of a run, such as --workdir=runs/default")
    from mnist_flax.analysis.report.write import report_run  # only now: --help need not wait for JAX

    print(report_run(pathlib.Path(flags.FLAGS.workdir), flags.FLAGS.checkpoint))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "the run's folder")
    flags.DEFINE_string("checkpoint", "latest", "latest, best (on hold-out rows) or a step")
    cli.run(main)
