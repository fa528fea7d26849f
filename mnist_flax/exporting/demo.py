"""The demo page: one HTML file in which a trained network reads what one draws, and shows how."""

import base64
import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mnist_flax.exporting import patterns
from mnist_flax.exporting.graph import Graph, Node

PAGE = pathlib.Path(__file__).with_name("page")
SCRIPTS = ("framing", "network", "inspect", "draw", "views", "inspector", "app")  # in the order that they need

EXAMPLES = 12  # of each kind


class Checkpoint(NamedTuple):
    """A network on the page: what it is called there, and its graph."""

    title: str
    graph: Graph


class Example(NamedTuple):
    """An image to step through.

    Attributes:
      kind: `right`, `mistake` or `corrupted`.
      title: such as `Test image 947`.
      label: the class that it shows.
      image: `u8[28,28]`.
    """

    kind: str
    title: str
    label: int
    image: np.ndarray


def render(
    checkpoints: Sequence[Checkpoint],
    examples: Sequence[Example],
    *,
    classes: Sequence[str],
    title: str,
    dataset: str,
    lead: str,
    note: str,
) -> str:
    """Returns the page.

    Args:
      checkpoints: the network that answers, and perhaps another one to compare it with.
      examples: the first one is shown when the page opens.
      classes: their names.
      title: of the page.
      dataset: what the network was trained on, for the reader.
      lead: the sentences below the heading.
      note: the sentences at the end.
    """
    import jinja2

    data = {
        "classes": list(classes),
        "checkpoints": [
            {"title": name, "graph": json.loads(graph.to_json()), "weights": _base64(graph.weights())}
            for name, graph in ((name, textbook_order(graph)) for name, graph in checkpoints)
        ],
        "examples": [{**example._asdict(), "image": _base64(example.image.tobytes())} for example in examples],
    }
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(_source("page.html.jinja")).render(
        title=title,
        dataset=dataset,
        lead=lead,
        note=note,
        classes=classes,
        checkpoints=checkpoints,
        css=_source("page.css"),
        script="\n".join(_source(f"{name}.js") for name in SCRIPTS),
        data=json.dumps(data).replace("<", "\\u003c"),  # so that no text in it can end the script element
    )


def _source(name: str) -> str:
    return (PAGE / name).read_text(encoding="utf-8")


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def textbook_order(graph: Graph) -> Graph:
    """Moves max pooling behind the bias and the activation that come after it.

    Models may pool first because that is faster. The values are the same: adding a number and every non-decreasing
    function commute with a maximum. On the page each convolution then shows its activations before they are pooled.
    """
    nodes = list(graph.nodes)
    users: dict[str, list[Node]] = {}
    for node in nodes:
        for name in node.inputs:
            users.setdefault(name, []).append(node)
    for i, pool in enumerate(nodes):
        if pool.op != "max_pool" or len(users.get(pool.name, ())) != 1:
            continue
        (after,) = users[pool.name]
        if not _commutes(graph, after) or pool.name in graph.outputs.values():
            continue
        shape = next((node.shape for node in nodes if node.name == pool.inputs[0]), None)
        if shape is None:
            continue
        # The two change places, and with them their names' users.
        before = dataclasses.replace(
            after, inputs=tuple(pool.inputs[0] if name == pool.name else name for name in after.inputs), shape=shape
        )
        pooled = dataclasses.replace(pool, inputs=(after.name,), layer=pool.layer)
        nodes[i], nodes[nodes.index(after)] = before, pooled
        renamed = [
            dataclasses.replace(node, inputs=tuple(pool.name if name == after.name else name for name in node.inputs))
            if node not in (before, pooled)
            else node
            for node in nodes
        ]
        return textbook_order(patterns.simplify(dataclasses.replace(graph, nodes=tuple(renamed))))
    return graph


def _commutes(graph: Graph, node: Node) -> bool:
    """Tells whether max pooling may as well come after this operation."""
    if node.op == "add":
        return any(name in graph.constants and graph.constants[name].size in (1, node.shape[-1]) for name in node.inputs)
    return node.op in ("relu", "tanh", "logistic")


def choose_examples(images: np.ndarray, labels: np.ndarray, probs: np.ndarray) -> list[Example]:
    """Picks test images to step through: right ones of every class, the worst mistakes, and corrupted ones.

    Args:
      images: `u8[N,28,28,1]`.
      labels: `i32[N]`.
      probs: `f32[N,C]`, what the network says of them.
    """
    prediction = probs.argmax(axis=-1)
    of_label = np.take_along_axis(probs, labels[:, None].astype(np.int64), axis=-1)[:, 0]
    right, wrong = np.flatnonzero(prediction == labels), np.flatnonzero(prediction != labels)
    first = [int(rows[0]) for label in np.unique(labels) if len(rows := right[labels[right] == label])][:EXAMPLES]
    worst = wrong[np.argsort(of_label[wrong], kind="stable")][:EXAMPLES]

    def example(kind: str, row: int) -> Example:
        return Example(kind, f"Test image {row}", int(labels[row]), images[row, :, :, 0])

    corrupted = [
        example("corrupted", row)._replace(title=f"Test image {row}, {name}", image=corrupt(images[row, :, :, 0]))
        for (name, corrupt), row in zip(CORRUPTIONS.items(), first[1:] + first, strict=False)
    ]
    return [*(example("right", row) for row in first), *(example("mistake", int(row)) for row in worst), *corrupted]


def _noise(image: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(0).normal(0, 60, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


def _blur(image: np.ndarray) -> np.ndarray:
    from scipy import ndimage

    return np.asarray(ndimage.gaussian_filter(image.astype(np.float32), 1.5)).astype(np.uint8)


def _rotate(image: np.ndarray) -> np.ndarray:
    from scipy import ndimage

    return np.clip(ndimage.rotate(image.astype(np.float32), 40, reshape=False, order=1), 0, 255).astype(np.uint8)


def _cover(image: np.ndarray) -> np.ndarray:
    covered = image.copy()
    covered[12:17] = 0
    return covered


CORRUPTIONS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "with noise": _noise,
    "blurred": _blur,
    "rotated": _rotate,
    "negative": lambda image: 255 - image,
    "partly covered": _cover,
    "shifted": lambda image: np.roll(image, (5, -5), (0, 1)),
    "faint": lambda image: (image // 6).astype(np.uint8),
}
