"""Writes a trained run, or a population as a committee, to a file that runs without this package.

    python -m mnist_flax.export --workdir=runs/default --format=onnx|stablehlo|npz [--output=DIR]

The file goes to export/ in the workdir, or to export-CHECKPOINT/, with a model card. First, its outputs are compared
with the network's on 1,000 test images; if a logit or a probability differs by more than 1e-4, nothing is written and
the exit status is not 0.
"""

from collections.abc import Sequence

from absl import flags

from mnist_flax import cli
from mnist_flax.cli import FLAGS
from mnist_flax.errors import ConfigError


def main(_: Sequence[str]) -> None:
    """Exports what the flags describe."""
    workdir, overrides = cli.workdir(), cli.data_overrides()
    from mnist_flax.exporting.formats import FORMATS, export_workdir  # imports JAX, which --help need not wait for
    from mnist_flax.run import compilation

    compilation.keep_programs()
    if FLAGS.format not in FORMATS:
        given = f"--format={FLAGS.format}: there is no such format" if FLAGS.format else "--format is missing"
        raise ConfigError(f"{given}; choose one of {', '.join(FORMATS)}")
    folder = cli.output_folder()
    exported = export_workdir(workdir, FLAGS.format, checkpoint=FLAGS.checkpoint, folder=folder, overrides=overrides)
    print(exported.line())


if __name__ == "__main__":
    cli.define_run(output="the folder to write to; default: export/ (or export-CHECKPOINT/)")
    flags.DEFINE_string("format", None, "onnx, stablehlo, or npz (weights, and a program that needs NumPy alone)")
    cli.run(main)
