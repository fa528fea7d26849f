"""Writes a page on which you draw a digit and watch the network read it: one file that needs no server and no network.

    python -m mnist_flax.demo --workdir=runs/default [--checkpoint=latest|best|STEP] [--output=FILE]

The page holds the weights; open it in any browser. It is written to demo.html in --workdir.
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
    flags.DEFINE_string("workdir", None, "the folder of a run or a population")
    flags.DEFINE_string("checkpoint", "latest", "latest, best (on hold-out rows) or a step")
    flags.DEFINE_string("output", None, "the file to write; if not given, demo.html in --workdir")
    run_data.define_data_flags()


def main(argv: Sequence[str]) -> None:
    """Writes the page that the flags describe."""
    if argv[1:]:
        raise ConfigError(f"{argv[1]!r}: is no flag; a flag starts with two dashes")
    if not FLAGS.workdir:
        raise ConfigError("--workdir is missing: name the folder of a run, such as --workdir=runs/default")
    from mnist_flax.exporting.demo import write_demo  # only now: --help need not wait for JAX

    output = pathlib.Path(FLAGS.output) if FLAGS.output else None
    overrides = run_data.given_overrides()
    print(write_demo(pathlib.Path(FLAGS.workdir), FLAGS.checkpoint, output=output, overrides=overrides))


if __name__ == "__main__":
    define_flags()
    cli.run(main)
