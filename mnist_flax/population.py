"""Trains many runs of one config together, as a population, or compares two runs or populations.

    python -m mnist_flax.population --config=configs/tiny.py --seeds=10
    python -m mnist_flax.population --config=configs/one_conv_sgd.py --folds=5
    python -m mnist_flax.population --compare=runs/a,runs/b

Each member is a run with its own folder in members/. Repeating the command resumes. A larger --seeds adds members if
--workdir names the same folder.
"""

import json
from collections.abc import Sequence

from absl import flags

from mnist_flax import cli
from mnist_flax.cli import FLAGS
from mnist_flax.errors import ConfigError


def main(_: Sequence[str]) -> None:
    """Trains a population or compares two folders, depending on the flags."""
    if FLAGS["compare"].present:
        print(comparison_text(FLAGS.compare))
        return
    if FLAGS["split"].present:
        raise ConfigError("--split: is used only with --compare; leave it out")
    config = cli.config()
    workdir = cli.training_workdir(f"-seeds{FLAGS.seeds}" if FLAGS.seeds else f"-folds{FLAGS.folds}")
    from mnist_flax import train
    from mnist_flax.analysis import statistics
    from mnist_flax.run import compilation, machine

    compilation.keep_programs()
    machine.allow_many_files()
    result = train.fit_population(config, workdir, seeds=FLAGS.seeds or 0, folds=FLAGS.folds or 0)
    print(json.dumps(result, indent=1) if FLAGS.json else statistics.population_table(result))


def comparison_text(folders: Sequence[str]) -> str:
    """Compares two folders of runs or populations; returns a table or JSON.

    Raises:
      ConfigError: the number of folders is not two, or a training flag is given.
    """
    for name in ("config", "seeds", "folds", "workdir"):
        if FLAGS[name].present:
            raise ConfigError(f"--{name}: cannot be combined with --compare; leave it out")
    if len(folders) != 2 or not all(folders):
        raise ConfigError(f"--compare={','.join(folders)}: name two folders, such as --compare=runs/a,runs/b")
    from mnist_flax.analysis import comparison
    from mnist_flax.analysis.run_data import check_overrides

    for override in FLAGS.override:
        if "=" not in override:
            raise ConfigError(f"--config.{override}: needs a value, such as --config.{override}=VALUE")
    overrides = dict(override.split("=", 1) for override in FLAGS.override)
    check_overrides(overrides)
    results = [comparison.load_result(cli.path(folder), overrides, FLAGS.split) for folder in folders]
    result = comparison.compare_results(*results)
    return json.dumps(result, indent=1) if FLAGS.json else comparison.comparison_table(result)


if __name__ == "__main__":
    cli.define_config()
    flags.DEFINE_string("workdir", None, "the population's folder; default: runs/<config>-seeds<M> or -folds<K>")
    flags.DEFINE_integer("seeds", None, "train M members, with consecutive seeds starting at config.seed", 2, 10_000)
    flags.DEFINE_integer("folds", None, "split the training rows in K parts; each member holds out one", lower_bound=2)
    flags.DEFINE_list("compare", None, "A,B: two folders of runs or populations; tests which is better")
    flags.DEFINE_enum("split", "test", ("test", "holdout"), "the rows on which --compare evaluates runs and seeds")
    flags.DEFINE_boolean("json", False, "print the result as JSON instead of a table")
    cli.run(main)
