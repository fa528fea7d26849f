"""Trains a network, or goes on with a run.

    python -m mnist_flax.main --config=configs/default.py

Any field of the config can be overridden: --config.optimizer.learning_rate=0.05 --config.model.widths="(16,32)".
The same command again goes on with a run that was stopped, or says that it is finished. `--fork=DIR` starts a new run
with the weights of the one in DIR.
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
    from mnist_flax import compilation, train  # only now: --help and a wrong flag need not wait for JAX

    compilation.keep_programs()
    fork = pathlib.Path(flags.FLAGS.fork) if flags.FLAGS.fork else None
    train.fit(config, pathlib.Path(workdir), fork=fork)


if __name__ == "__main__":
    cli.define_config()
    flags.DEFINE_string("workdir", None, "the run's folder; if not given, runs/ and the config file's name")
    flags.DEFINE_string(
        "fork", None, "the folder of a run: start a new one in --workdir with that one's latest weights"
    )
    cli.run(main)
