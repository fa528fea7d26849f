"""Evaluates a run, or a population as one network, beyond its test set: corrupted digits, pictures that are not digits.

    python -m mnist_flax.robustness --workdir=runs/default [--compare=runs/other] [--severity=1..5] [--json]

It writes robustness.json and robustness.html. For a population of folds, it also lists labels that may be wrong.
"""

import json
from collections.abc import Sequence

from absl import flags

from mnist_flax import cli
from mnist_flax.cli import FLAGS


def main(_: Sequence[str]) -> None:
    """Evaluates what the flags describe."""
    workdir = cli.workdir()
    from mnist_flax.analysis import robustness, robustness_page  # imports JAX, which --help need not wait for
    from mnist_flax.run import compilation

    compilation.keep_programs()
    folder = cli.output_folder() or workdir  # first: a mistake in --output must not cost the evaluation
    outcome = robustness.robustness_of_workdir(
        workdir,
        checkpoint=FLAGS.checkpoint,
        severity=FLAGS.severity,
        compare=cli.path_of("compare"),
        overrides=cli.data_overrides(),
    )
    print(json.dumps(outcome.facts, indent=1) if FLAGS.json else robustness.robustness_table(outcome.facts), flush=True)
    page = robustness_page.draw_page(outcome)
    robustness.save_robustness(outcome, page, folder)


if __name__ == "__main__":
    cli.define_run(output="the folder to write to; default: --workdir")
    flags.DEFINE_string(
        "compare",
        None,
        "another run or population, to compare with at its latest checkpoint, or its best with --checkpoint=best",
    )
    flags.DEFINE_integer("severity", 0, "of the corruptions, 1 to 5; 0: as in MNIST-C", lower_bound=0, upper_bound=5)
    flags.DEFINE_boolean("json", False, "print robustness.json instead of a table")
    cli.run(main)
