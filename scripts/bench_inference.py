"""Measures inference: evaluating the test set, classifying one image or picture, and images/s by batch size.

    python scripts/bench_inference.py --config=configs/default.py

Everything is compiled and warm. `evaluate_seconds` is the time of `evaluation.evaluate`, including scores, on as many
images as the test set has. `one_image` is the time to compute the logits of one image; `picture` is the time to read
one picture, from the bytes of a PNG to the digit. The weights are untrained and the pixels random, because no speed
here depends on them. Prints one JSON line.
"""

import dataclasses
import functools
import io
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags
from bench_steps import random_examples

from mnist_flax import cli
from mnist_flax.config import Config
from mnist_flax.data.registry import DATASETS, IMAGE_SIZE


def seconds_of(function: Callable[[], Any], repeats: int) -> list[float]:
    """Calls a function once to warm up, then times `repeats` further calls, in seconds."""
    spans = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        function()
        spans.append(time.perf_counter() - began)
    return spans[1:]


def percentiles(spans: Sequence[float]) -> dict[str, float]:
    """Returns the median and the 99th percentile, in milliseconds."""
    import numpy as np

    middle, high = (1e3 * np.percentile(spans, (50, 99))).tolist()
    return {"p50_ms": round(middle, 3), "p99_ms": round(high, 3)}


def bench(config: Config, *, batch_sizes: Sequence[int], repeats: int, latencies: int) -> dict[str, Any]:
    """Measures the network of a config.

    Args:
      config: the config.
      batch_sizes: the batch sizes at which to measure images/s.
      repeats: how often to time each evaluation and each batch size.
      latencies: how often to time a single image and a single picture.
    """
    import numpy as np
    from PIL import Image

    from mnist_flax import rng
    from mnist_flax.analysis.evaluation import answer, evaluate, make_predictor, predict_logits
    from mnist_flax.drivers import jit_init_state
    from mnist_flax.pictures.reading import classify
    from mnist_flax.pictures.segment import read_digits
    from mnist_flax.step import eval_variables

    count = DATASETS[config.data.name].num_test
    examples = random_examples(count, config.num_classes)
    images = examples.image
    variables = eval_variables(jit_init_state(config.program, rng.root_key(config.seed)))
    predictor = make_predictor(config, variables)
    page = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    page[5:23, 12:16] = 255
    picture = io.BytesIO()
    Image.fromarray(page).save(picture, "PNG")

    def logits(batch_size: int, number: int) -> Callable[[], Any]:
        chosen = dataclasses.replace(predictor, batch_size=batch_size)
        return lambda: predict_logits(chosen, images[:number])

    print("evaluating ...", file=sys.stderr)
    evaluating = seconds_of(lambda: evaluate(predictor, examples), repeats)
    print("single images ...", file=sys.stderr)
    one_image = seconds_of(logits(1, 1), latencies)
    one_by_one = functools.partial(answer, dataclasses.replace(predictor, batch_size=1))
    reading = seconds_of(lambda: classify(read_digits(picture.getvalue()), one_by_one), latencies)
    speeds = {}
    for batch_size in batch_sizes:
        print(f"batches of {batch_size} ...", file=sys.stderr)
        number = min(count, 100 * batch_size)
        speeds[batch_size] = round(number / statistics.median(seconds_of(logits(batch_size, number), repeats)))
    return {
        "evaluate_examples": count,
        "evaluate_seconds_median": round(statistics.median(evaluating), 4),
        "evaluate_seconds": [round(span, 4) for span in evaluating],
        "one_image": percentiles(one_image),
        "picture": percentiles(reading),
        "images_per_second": speeds,
    }


def main(argv: Sequence[str]) -> None:
    """Runs the benchmark and prints the result."""
    del argv
    config = cli.config()
    from mnist_flax.run.provenance import provenance

    values = flags.FLAGS
    result = bench(
        config,
        batch_sizes=[int(size) for size in values.batch_sizes],
        repeats=values.repeats,
        latencies=values.latencies,
    )
    made = cli.config_facts() | provenance()
    print(json.dumps({**result, **made}))


if __name__ == "__main__":
    cli.define_config()
    cli.define_counts("batch_sizes", "1,16,64,250,500,1000", "for images/s")
    flags.DEFINE_integer("repeats", 9, "how often each evaluation and batch size is timed", lower_bound=1)
    flags.DEFINE_integer("latencies", 1000, "single images that are timed", lower_bound=1)
    cli.run(main)
