"""Evaluates a run, or a population as a committee, on a whole split; prints and saves the scores with 95 % intervals.

    python -m mnist_flax.evaluate --workdir=runs/default [--split=train|holdout|test] [--checkpoint=latest|best|STEP]

The scores are saved as evaluation-SPLIT-DATASET.json in the run's folder or --output; the checkpoint is added to the
name if it is not the latest. `--config.data.name=kmnist` evaluates on another dataset with as many classes; only
data.name, source, data_dir and raw_dir can be set.
"""

import json
from collections.abc import Sequence

from absl import flags

from mnist_flax import cli
from mnist_flax.cli import FLAGS


def main(_: Sequence[str]) -> None:
    """Evaluates what the flags describe."""
    workdir, overrides = cli.workdir(), cli.data_overrides()
    from mnist_flax.analysis import scores  # imports JAX, which --help and flag errors need not wait for
    from mnist_flax.run import compilation

    compilation.keep_programs()
    folder = cli.output_folder() or workdir  # first: a mistake in --output must not cost the evaluation
    result = scores.evaluate_workdir(workdir, checkpoint=FLAGS.checkpoint, split=FLAGS.split, overrides=overrides)
    print(json.dumps(result, indent=2) if FLAGS.json else scores.evaluation_table(result), flush=True)
    scores.save_evaluation(result, folder)


if __name__ == "__main__":
    cli.define_run(output="the folder to write to; default: --workdir")
    flags.DEFINE_enum("split", "test", ["train", "holdout", "test"], "the rows trained on, those held out, or test")
    flags.DEFINE_boolean("json", False, "print the result as JSON, as it is saved")
    cli.run(main)
