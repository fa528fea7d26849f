"""Trains a network, or continues a run.

    python -m mnist_flax.main --config=configs/default.py

Any field of the config can be overridden: --config.optimizer.learning_rate=0.05 --config.model.widths="(16,32,64)".
docs/config.md lists the fields. Repeating the command continues a run that was stopped, or reports that it is finished.
`--fork=DIR` starts a new run from the weights of the run in DIR.

With --distributed, several processes train one network: start the same command in each, on a shared file system. On
SLURM, Open MPI, GKE and Cloud TPU, JAX detects the processes. Elsewhere, add --coordinator=HOST:PORT --num_processes=2
and --process_index=0 in the first process, --process_index=1 in the second.
"""

from collections.abc import Sequence

from absl import flags

from mnist_flax import cli
from mnist_flax.cli import FLAGS
from mnist_flax.errors import ConfigError

CLUSTER = ("coordinator", "num_processes", "process_index")  # flags that need --distributed


def main(_: Sequence[str]) -> None:
    """Trains the run that the flags describe."""
    config = cli.config()
    for name in CLUSTER:
        if FLAGS[name].present and not FLAGS.distributed:
            raise ConfigError(f"--{name}: is used only with --distributed; add that, or leave it out")
    import jax  # here, because --help and flag errors need not wait for it

    from mnist_flax import train
    from mnist_flax.run import compilation, processes

    compilation.keep_programs()
    if FLAGS.distributed:
        processes.join(*(FLAGS[name].value for name in CLUSTER))
    fork = cli.path_of("fork")
    with processes.bound_together():
        train.fit(config, cli.training_workdir(), fork=fork)
    jax.distributed.shutdown()  # does nothing in a single process


if __name__ == "__main__":
    cli.define_config()
    flags.DEFINE_string("workdir", None, "the run's folder; default: runs/ and the config file's name")
    flags.DEFINE_string("fork", None, "start a new run in --workdir from the latest weights of the run in this folder")
    flags.DEFINE_boolean("distributed", False, "be one of several processes that train one network together")
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0; default: detected")
    flags.DEFINE_integer("num_processes", None, "the number of processes; default: detected", lower_bound=1)
    flags.DEFINE_integer("process_index", None, "the index of this process, from 0; default: detected", lower_bound=0)
    cli.run(main)
