"""A parser that checks the HTML of reports, and reports of untrained networks."""

import html.parser
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from mnist_flax import metrics
from mnist_flax.analysis.evaluation import Evaluation, make_predictor
from mnist_flax.analysis.report.facts import Reported
from mnist_flax.analysis.report.write import write_report
from mnist_flax.config import Config, replace
from mnist_flax.data.registry import DATASETS
from mnist_flax.data.splits import Examples, Splits
from mnist_flax.drivers import jit_init_state
from mnist_flax.models.base import ModelConfig
from mnist_flax.step import eval_variables

VOID = {"meta", "img", "br", "link", "hr", "input"}


class Page(html.parser.HTMLParser):
    """The elements of a page; a wrong or missing closing tag is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), f"{tag} has an attribute twice: {attrs}"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def values(self, attribute: str) -> list[str]:
        return [attrs[attribute] or "" for _, attrs in self.tags if attribute in attrs]


def made_up_split(num_classes: int, examples: int) -> tuple[np.ndarray, Examples]:
    """Logits that are often right, and examples: images of noise with labels."""
    generator = np.random.default_rng(0)
    label = np.arange(examples, dtype=np.int32) % num_classes
    logits = generator.normal(0, 1, (examples, num_classes)).astype(np.float32)
    logits[np.arange(examples), label] += 3
    return logits, Examples(generator.integers(0, 256, (examples, 28, 28, 1), dtype=np.uint8), label)


SMALLER = {"model__widths": (2, 3), "model__pools": (2,), "model__dense": (4,)}


def made_up(
    folder: pathlib.Path,
    dataset: str,
    *,
    examples: int = 10_000,
    records: Any = (),
    temperature: float = 1.0,
    model: ModelConfig | None = None,
    **fields: Any,
) -> tuple[dict[str, Any], str]:
    """The numbers and the page of an untrained network, with made-up logits that are often right."""
    logits, split = made_up_split(DATASETS[dataset].num_classes, examples)
    evaluation = Evaluation(
        loss=float(np.mean(metrics.negative_log_likelihood(logits, split.label))),
        accuracy=float(np.mean(logits.argmax(axis=-1) == split.label)),
        examples=examples,
        logits=logits,
        temperature=temperature,
    )
    config = Config(model=model) if model else replace(Config(), data__name=dataset, **{**SMALLER, **fields})
    folder.mkdir()
    predictor = make_predictor(config, eval_variables(jit_init_state(config.program, jax.random.key(0))))
    splits = Splits(dataset, split, split, "f" * 64, "made up")
    path = write_report(Reported(config, predictor, splits, evaluation, records, step=3, summary={}), folder)
    return json.loads(path.with_name("metrics.json").read_text()), path.read_text()


def gallery_items(numbers: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for gallery in numbers["galleries"].values():
        yield from gallery if isinstance(gallery, list) else ()
