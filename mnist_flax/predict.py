"""Reads handwritten digits in your own pictures, of any size and colour (PNG, JPEG, TIFF and others).

    python -m mnist_flax.predict --workdir=runs/default PICTURE...

A PICTURE is a file (PNG, JPEG, GIF, BMP, WebP, TIFF), a folder (searched recursively), a pattern such as 'scans/*.png',
or - for standard input. A picture may contain several digits; they are read line by line, from left to right. A
question mark marks a doubtful digit: its probability is below one half, or lower than that of 99 % of the hold-out rows
(so 1 % of such digits are false alarms); it has much more ink than any hold-out digit; the edge of the picture cuts it
off; or it overlaps a printed line. With fewer than 100 hold-out rows, and at a checkpoint before the end of training, a
digit is doubtful below a probability of 0.95 (0.5 after training with label smoothing). The exit status is 1 if any
picture could not be read.

With --as_is, each picture is classified as it is: for 28x28 images that are not digits, such as Fashion-MNIST's.
"""

import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from absl import flags

from mnist_flax import cli
from mnist_flax.errors import ConfigError

_BATCH_SIZE = 128  # fixed, so that one compiled program serves any number of pictures


def main(argv: Sequence[str]) -> None:
    """Reads the digits in the pictures given on the command line."""
    if not argv[1:]:
        raise ConfigError("no picture is named: name files, folders or patterns, or - for standard input")
    workdir, save_to = cli.workdir(), cli.path_of("save_preprocessed")
    from mnist_flax.pictures import decode, files, parallel, segment

    found = list(files.find_files(argv[1:]))
    read = segment.read_as_is if flags.FLAGS.as_is else segment.read_digits
    with parallel.read_ahead(found, read) as outcomes:  # starts processes, so before JAX is imported
        failed = print_answers(found, outcomes, workdir, save_to)
    if failed:
        raise decode.PictureError(f"{failed} of {len(found)} pictures could not be read")


def print_answers(
    found: Sequence[str], outcomes: Iterable[tuple[str, Any]], workdir: pathlib.Path, save_to: pathlib.Path | None
) -> int:
    """Classifies the digits of the pictures and prints a line for each; returns how many pictures could not be read."""
    values = flags.FLAGS
    from mnist_flax.analysis.evaluation import answer, load_predictor
    from mnist_flax.data.registry import DATASETS
    from mnist_flax.pictures import files, reading
    from mnist_flax.run import compilation

    compilation.keep_programs()
    predictor, info = load_predictor(workdir, values.checkpoint)
    predictor = dataclasses.replace(predictor, batch_size=_BATCH_SIZE)
    class_names = DATASETS[info.config.data.name].class_names
    width = max(4, *map(len, found))
    if not values.json:  # at once, so that a reader who wants only this line ends the program early
        print(reading.table_header(width, class_names), flush=True)
    failed = 0
    results = reading.classify_all(outcomes, functools.partial(answer, predictor), _BATCH_SIZE)
    for number, (name, result) in enumerate(results, 1):
        if not isinstance(result, list):
            failed += 1
            if values.json:
                print(json.dumps({"file": name, "error": str(result)}), flush=True)
            else:
                print(f"{name}: {result}", file=sys.stderr, flush=True)
            continue
        line = reading.as_json(name, result, class_names)
        print(line if values.json else reading.as_table(name, result, width, class_names), flush=True)
        if save_to:
            files.save_images([digit.image for digit in result], save_to, number, name)
    return failed


if __name__ == "__main__":
    cli.define_run()
    flags.DEFINE_boolean("json", False, "print one JSON object per picture instead of a table")
    flags.DEFINE_boolean("as_is", False, "the pictures have 28x28 pixels, white on black: classify each as it is")
    flags.DEFINE_string("save_preprocessed", None, "a folder for the network's input images, as 28x28 PNG files")
    cli.run(main, takes_files=True)
