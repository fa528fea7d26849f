"""Writes the report of a run into its folder: report/index.html, with its data and pictures beside it.

    python -m mnist_flax.report --workdir=runs/default [--checkpoint=latest|best|STEP] [--output=DIR]

Training writes a report when it finishes. Use this command to write it again, or for an unfinished run. The report of
another checkpoint goes to report-CHECKPOINT/.
"""

from collections.abc import Sequence

from mnist_flax import cli


def main(_: Sequence[str]) -> None:
    """Writes the report that the flags ask for, and prints its path."""
    workdir, overrides = cli.workdir(), cli.data_overrides()
    from mnist_flax.analysis.report.write import report_workdir  # imports JAX, which --help need not wait for
    from mnist_flax.run import compilation

    compilation.keep_programs()
    print(report_workdir(workdir, cli.FLAGS.checkpoint, folder=cli.output_folder(), overrides=overrides))


if __name__ == "__main__":
    cli.define_run("the run's folder", output="the folder to write to; default: report/ (or report-CHECKPOINT/)")
    cli.run(main)
