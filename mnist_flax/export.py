"""Writes a trained run, or a population as a committee, to a file that runs without this package.

    python -m mnist_flax.export --workdir=runs/default --format=onnx|stablehlo|npz [--output=DIR]

The file goes to export/ in the workdir, with a model card. It is first compared with the network on 1,000 test images;
if a logit differs by more than 1e-4, nothing is written and the exit status is not 0.
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from mnist_flax import cli
from mnist_flax.analysis import run_data
from mnist_flax.errors import ConfigError
from mnist_flax.run import workdir as workdirs

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags of this verb."""
    flags.DEFINE_string("workdir", None, "the folder of a run or a population")
    flags.DEFINE_string("format", None, "onnx, stablehlo, or npz (weights, and a program that needs NumPy alone)")
    flags.DEFINE_string("checkpoint", "latest", "latest, best (on hold-out rows) or a step")
    flags.DEFINE_string("output", None, "the folder to write to; if not given, export/ in --workdir")
    run_data.define_data_flags()


def main(argv: Sequence[str]) -> None:
    """Exports what the flags describe."""
    if argv[1:]:
        raise ConfigError(f"{argv[1]!r}: is no flag; a flag starts with two dashes")
    if not FLAGS.workdir:
        raise ConfigError("--workdir is missing: name the folder of a run, such as --workdir=runs/default")
    from mnist_flax.exporting.formats import FORMATS, export_workdir  # only now: --help need not wait for JAX

    if FLAGS.format not in FORMATS:
        given = f"--format={FLAGS.format}: there is no such format" if FLAGS.format else "--format is missing"
        raise ConfigError(f"{given}; choose one of {', '.join(FORMATS)}")

    workdir = pathlib.Path(FLAGS.workdir)
    folder = workdirs.output_folder(workdir, FLAGS.output) if FLAGS.output else None
    exported = export_workdir(
        workdir,
        FLAGS.format,
        checkpoint=FLAGS.checkpoint,
        folder=folder,
        overrides=run_data.given_overrides(),
    )
    print(exported.line())


if __name__ == "__main__":
    define_flags()
    cli.run(main)
