"""Trains a network, or goes on with a run.

    python -m mnist_flax.main --config=configs/default.py

Any field of the config can be overridden: --config.optimizer.learning_rate=0.05 --config.model.widths="(16,32)".
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from mnist_flax import cli


def main(argv: Sequence[str]) -> None:
    """Trains what the flags describe."""
    del argv
    config = cli.config()
    workdir = flags.FLAGS.workdir or pathlib.Path("runs", pathlib.Path(cli.config_file()).stem)
    from mnist_flax.train import fit  # only now: --help and a wrong flag need not wait for JAX

    fit(config, pathlib.Path(workdir))


if __name__ == "__main__":
    cli.define_config()
    flags.DEFINE_string("workdir", None, "the run's folder; if not given, runs/ and the config file's name")
    cli.run(main)
