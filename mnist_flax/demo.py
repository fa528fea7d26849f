"""Writes a page on which you draw a digit and watch the network read it: one file that works offline.

    python -m mnist_flax.demo --workdir=runs/default [--checkpoint=latest|best|STEP] [--output=FILE]

The page contains the weights; open it in any browser. The default file is demo.html in --workdir, or
demo-CHECKPOINT.html if the checkpoint is not the latest.
"""

from collections.abc import Sequence

from mnist_flax import cli


def main(_: Sequence[str]) -> None:
    """Writes the page that the flags describe."""
    workdir, overrides = cli.workdir(), cli.data_overrides()
    from mnist_flax.exporting.demo import write_demo  # imports JAX, which --help and flag errors need not wait for
    from mnist_flax.run import compilation

    compilation.keep_programs()
    print(write_demo(workdir, cli.FLAGS.checkpoint, output=cli.output_file(), overrides=overrides))


if __name__ == "__main__":
    cli.define_run(output="the file to write; default: demo.html in --workdir, or demo-CHECKPOINT.html")
    cli.run(main)
