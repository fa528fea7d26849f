"""Trains many members of one config together, or compares two results.

    python -m mnist_flax.population --config=configs/tiny.py --seeds=10
    python -m mnist_flax.population --config=configs/one_conv_sgd.py --folds=5
    python -m mnist_flax.population --compare=runs/tiny-seeds10,runs/tiny-seeds20

A member is a run with a folder of its own in members/. The same command again goes on where it was stopped; a larger
--seeds adds members.
"""

import json
import pathlib
from collections.abc import Sequence

from absl import flags

from mnist_flax import cli
from mnist_flax.errors import ConfigError

FLAGS = flags.FLAGS


def main(argv: Sequence[str]) -> None:
    """Does what the flags describe."""
    del argv
    if FLAGS.compare:
        for name in ("config", "seeds", "folds", "workdir"):
            if FLAGS[name].present:
                raise ConfigError(f"--{name}: has no meaning with --compare; leave it out")
        if len(FLAGS.compare) != 2:
            raise ConfigError(f"--compare={','.join(FLAGS.compare)}: name two folders, such as --compare=runs/a,runs/b")
        from mnist_flax.analysis import comparison as compare  # only now: --help and a wrong flag need not wait for JAX

        comparison = compare.compare(*map(pathlib.Path, FLAGS.compare))
        print(json.dumps(comparison, indent=1) if FLAGS.json else compare.table(comparison))
        return
    if (FLAGS.seeds is None) == (FLAGS.folds is None):
        raise ConfigError("give one of --seeds=M and --folds=K, such as --seeds=10")
    config = cli.config()
    kind = f"seeds{FLAGS.seeds}" if FLAGS.seeds else f"folds{FLAGS.folds}"
    workdir = FLAGS.workdir or pathlib.Path("runs", f"{pathlib.Path(cli.config_file()).stem}-{kind}")
    from mnist_flax import train
    from mnist_flax.analysis import statistics
    from mnist_flax.run import compilation

    compilation.keep_programs()
    result = train.fit_population(config, pathlib.Path(workdir), seeds=FLAGS.seeds or 0, folds=FLAGS.folds or 0)
    print(json.dumps(result, indent=1) if FLAGS.json else statistics.table(result))


if __name__ == "__main__":
    cli.define_config()
    flags.DEFINE_string(
        "workdir",
        None,
        "the population's folder; if not given, runs/, the config's name, and -seeds<M> or -folds<K>",
    )
    flags.DEFINE_integer(
        "seeds", None, "train this many members: with the config's seed, and those that follow it", lower_bound=2
    )
    flags.DEFINE_integer(
        "folds", None, "divide the training rows into this many parts; each member holds out one", lower_bound=2
    )
    flags.DEFINE_list("compare", None, "two folders A,B of runs or populations: say whether B is better than A")
    flags.DEFINE_boolean("json", False, "print the result as JSON, as it is saved")
    cli.run(main)
