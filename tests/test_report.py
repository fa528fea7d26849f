"""The report: complete, self-contained and correct, with the same numbers in the page and in metrics.json."""

import dataclasses
import html.parser
import itertools
import json
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import forked
import jax
import numpy as np
import pytest
import tiny_run
from PIL import Image

from mnist_flax import metrics
from mnist_flax.analysis.evaluation import Evaluation, evaluate, load_predictor, make_predictor
from mnist_flax.analysis.report import facts, layers, page, pictures, plots, write
from mnist_flax.analysis.report.write import report_workdir, shown, write_report
from mnist_flax.config import Config, replace
from mnist_flax.data.load import load_splits
from mnist_flax.data.registry import DATASETS
from mnist_flax.data.splits import Examples, Splits
from mnist_flax.drivers import jit_forward, jit_init_state
from mnist_flax.errors import WorkdirError
from mnist_flax.models import MODELS
from mnist_flax.models.base import ModelConfig
from mnist_flax.step import eval_variables, init_state

VOID = {"meta", "img", "br", "link", "hr", "input"}
PIECES = {
    *(f"{name}.svg" for name in ("loss", "accuracy", "confusion_counts", "confusion_rates", "classes", "reliability")),
    *(f"{name}.png" for name in ("filters", "mistakes", "correct", "least_certain")),
    *("config.py", "metrics.json", "index.html"),
}


class Page(html.parser.HTMLParser):
    """The elements of a page; one that is closed wrongly is an error."""

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


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The report of the tiny run."""
    workdir = shutil.copytree(tiny_run.workdir(), tmp_path_factory.mktemp("report") / "run")
    shutil.rmtree(workdir / "report", ignore_errors=True)
    return report_workdir(workdir).parent


@pytest.fixture(scope="module")
def numbers(report: pathlib.Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((report / "metrics.json").read_text())
    return loaded


def made_up_split(num_classes: int, examples: int) -> tuple[np.ndarray, Examples]:
    """Logits that are often right, and noise with the labels."""
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
    """The numbers and the page of a network that knows nothing, but whose logits are often right."""
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
    path = write_report(
        config,
        make_predictor(config, eval_variables(jit_init_state(config.program, jax.random.key(0)))),
        records=records,
        splits=Splits(dataset, split, split, "f" * 64, "made up"),
        evaluation=evaluation,
        step=3,
        summary=None,
        workdir=folder,
    )
    return json.loads(path.with_name("metrics.json").read_text()), path.read_text()


def gallery_items(numbers: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for gallery in numbers["galleries"].values():
        yield from gallery if isinstance(gallery, list) else ()


def test_report_has_every_piece(report: pathlib.Path) -> None:
    assert {path.name for path in report.iterdir()} == PIECES


def test_page_needs_no_other_file(report: pathlib.Path) -> None:
    text = (report / "index.html").read_text()
    parsed = Page(text)
    assert "http:" not in text and "https:" not in text and "//" not in re.sub(r"base64,[^\"]*", "", text)
    assert all(source.startswith("data:image/png;base64,") for source in parsed.values("src"))
    ids = parsed.values("id")
    assert len(set(ids)) == len(ids)
    links = parsed.values("href") + parsed.values("xlink:href")
    links += ["#" + target for target in re.findall(r"url\(#([^)]*)\)", text)]
    assert links and set(links) <= {f"#{name}" for name in ids}
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in parsed.tags}
    assert "@import" not in text


def test_page_is_accessible(report: pathlib.Path) -> None:
    text = (report / "index.html").read_text()
    parsed = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    attributes = dict(parsed.tags[0][1])
    assert parsed.tags[0][0] == "html" and attributes["lang"] == "en"
    assert 'name="viewport" content="width=device-width, initial-scale=1"' in text
    assert all(attrs.get("alt") for tag, attrs in parsed.tags if tag == "img")
    assert all(attrs.get("aria-label") for tag, attrs in parsed.tags if tag == "svg")
    headings = [tag for tag, _ in parsed.tags if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == "h1" and headings.count("h1") == 1
    assert all(int(after[1]) - int(before[1]) <= 1 for before, after in itertools.pairwise(headings))


def test_page_links_every_section(report: pathlib.Path) -> None:
    parsed = Page((report / "index.html").read_text())
    sections = [attrs["id"] for tag, attrs in parsed.tags if tag == "section"]
    assert set(sections) == {"summary", *page.SECTIONS} - {"doubtful", "trained-on"}  # not MNIST, not augmented
    assert [href[1:] for href in parsed.values("href")] == sections[1:]


def test_page_shows_the_contents_of_metrics_json(report: pathlib.Path, numbers: dict[str, Any]) -> None:
    text = "".join(Page((report / "index.html").read_text()).text)
    test = numbers["test"]
    assert page.percent(test["accuracy"]) in text
    low, high = test["accuracy_interval"]
    assert f"{100 * low:.2f} – {100 * high:.2f}" in text  # noqa: RUF001
    assert f"{test['loss']:.4f}" in text and f"{test['brier']:.4f}" in text and page.percent(test["ece"]) in text
    assert numbers["dataset_fingerprint"] in text and numbers["command"] in text
    assert all(version in text for version in numbers["run"]["versions"].values())
    assert all(f"image {item['row']}" in text for item in gallery_items(numbers))
    assert all(f"{100 * row['f1']:.2f}" in text for row in test["per_class"])


def test_page_is_made_from_metrics_json_alone(
    report: pathlib.Path, numbers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures: dict[str, Any] = {}
    render = page.render_page

    def listen(given: Any, given_pictures: Any) -> str:
        pictures.update(given_pictures)
        return render(given, given_pictures)

    monkeypatch.setattr(page, "render_page", listen)
    path = report_workdir(report.parent)
    assert render(numbers, pictures) == path.read_text()
    assert {type(value) for name, value in pictures.items() if name != "title"} <= {dict, list, str}


def test_numbers_are_those_of_the_run(report: pathlib.Path, numbers: dict[str, Any]) -> None:
    summary = json.loads((report.parent / "summary.json").read_text())
    assert numbers["test"]["accuracy"] == summary["test_accuracy"]
    assert numbers["test"]["loss"] == summary["test_loss"]
    run = numbers["run"]
    assert run["finished"] and run["versions_of"] == "training" and numbers["test"]["evaluated_by"] == "report"
    assert run["parameters"] == summary["parameters"] and run["step"] == summary["steps"]
    assert run["versions"] == summary["versions"]
    assert np.sum(numbers["confusion"]) == 360 and np.trace(numbers["confusion"]) == numbers["test"]["correct"]
    assert sum(row["examples"] for row in numbers["calibration"]["bins"]) == 360
    assert sum(layer["parameters"] for layer in numbers["network"]) == summary["parameters"]
    records = [json.loads(line) for line in (report.parent / "metrics.jsonl").read_text().splitlines()]
    curves = numbers["curves"]
    assert [r["loss"] for r in curves["train"]] == [r["loss"] for r in records if r["split"] == "train"]
    assert len(curves["holdout"]) == 3 and len(curves["test"]) == 1


def test_config_file_repeats_the_run(report: pathlib.Path, numbers: dict[str, Any]) -> None:
    names: dict[str, Any] = {}
    exec((report / "config.py").read_text(), names)
    again = Config.from_dict(names["get_config"]().to_dict())
    assert again.to_dict() == tiny_run.CONFIG.to_dict()
    assert numbers["config_file"] == (report / "config.py").read_text()
    assert "run/report/config.py" in numbers["command"] and "--workdir=run-again" in numbers["command"]


def test_unfinished_run_can_be_reported(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workdir = shutil.copytree(tiny_run.workdir(), tmp_path / "run")
    (workdir / "summary.json").unlink()
    steps = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal())
    path = report_workdir(workdir, str(steps[0]))
    numbers = json.loads(path.with_name("metrics.json").read_text())
    assert not numbers["run"]["finished"] and numbers["run"]["versions_of"] == "report"
    assert numbers["run"]["step"] == steps[0]
    assert not numbers["curves"]["test"]
    assert max(record["step"] for record in numbers["curves"]["train"]) <= steps[0]
    assert "not the results of a finished run" in path.read_text()
    (workdir / "metrics.jsonl").unlink()  # then what the checkpoint remembers
    given: dict[str, Any] = {}
    monkeypatch.setattr(write, "write_report", lambda config, variables, **arguments: given.update(arguments))
    report_workdir(workdir, str(steps[0]))
    assert facts.log_curves(given["records"]) == numbers["curves"]


def test_report_of_training_evaluates_nothing_again(tmp_path: pathlib.Path) -> None:
    numbers, text = made_up(tmp_path / "run", "digits", examples=100)
    assert numbers["test"]["evaluated_by"] == "training" and 'class="notice"' in text
    assert "evaluated the test set" not in text
    assert "not MNIST" in text  # stamped on whatever is made of the embedded digits


def test_embedded_digits_are_stamped(report: pathlib.Path) -> None:
    assert "scikit-learn, not MNIST" in (report / "index.html").read_text()


def test_doubtful_labels_are_marked_on_mnist_only(tmp_path: pathlib.Path) -> None:
    numbers, text = made_up(tmp_path / "mnist", "mnist")
    assert [item["row"] for item in numbers["galleries"]["doubtful"]] == list(DATASETS["mnist"].doubtful_test_rows)
    for item in gallery_items(numbers):
        assert item["doubtful"] == (item["row"] in DATASETS["mnist"].doubtful_test_rows)
    marked = sum(item["doubtful"] for item in gallery_items(numbers))
    assert text.count("label doubtful") == text.count('<li class="doubtful">') == marked >= 15
    assert "Northcutt" in text
    other, text = made_up(tmp_path / "fashion", "fashion_mnist", examples=200)
    assert not any(item["doubtful"] for item in gallery_items(other)) and "Northcutt" not in text
    assert "Ankle boot" in text


def test_page_fits_many_classes(tmp_path: pathlib.Path) -> None:
    numbers, text = made_up(tmp_path / "run", "emnist/byclass")
    parsed = Page(text)
    assert numbers["class_names"][10] == "A" and len(numbers["test"]["per_class"]) == 62
    assert len(text) < 1_000_000
    assert parsed.values("class").count("scroll wide") == 1  # too wide for a phone, so it scrolls in its own box


@pytest.mark.parametrize(
    "fields",
    [
        {"model__widths": (), "model__pools": (1,), "model__dense": (20,), "model__activation": "tanh"},
        {"model__dense": (), "model__pooling": "avg", "model__batch_norm": True},
    ],
    ids=["perceptron", "batch norm"],
)
def test_report_of_other_networks_without_a_log(tmp_path: pathlib.Path, fields: dict[str, Any]) -> None:
    numbers, text = made_up(tmp_path / "run", "mnist", **fields)
    Page(text)
    assert 'id="curves"' not in text and not (tmp_path / "run" / "report" / "loss.svg").exists()
    assert numbers["activations"]["stages"][-1]["name"] == "logits"


def test_report_without_mistakes() -> None:
    label = np.arange(40, dtype=np.int32) % 10
    probs = np.full((40, 10), 0.001)
    probs[np.arange(40), label] = 0.991
    found = facts.galleries(probs, label, "digits")
    assert found["num_mistakes"] == 0 and not found["mistakes"] and len(found["correct"]) == 24
    assert facts.confused_pairs(np.diag([4] * 10), label, probs) == []
    text = plots.confusion(np.diag([4] * 10).tolist(), DATASETS["digits"].class_names)["confusion_counts"]
    assert text.count(">4</text>") >= 10


def test_galleries_are_sorted_and_pairs_counted() -> None:
    # Rows 0 to 4: right and sure, right but barely, wrong and sure, wrong but barely, wrong in another way.
    label = np.array([0, 0, 0, 0, 1])
    probs = np.array([[0.9, 0.1, 0.0], [0.4, 0.3, 0.3], [0.05, 0.95, 0.0], [0.4, 0.6, 0.0], [0.2, 0.1, 0.7]])
    found = facts.galleries(probs, label, "digits")
    assert [item["row"] for item in found["mistakes"]] == [2, 4, 3]
    assert [item["row"] for item in found["least_certain"]] == [1, 0]
    assert found["mistakes"][0] | {"top": []} == {
        "row": 2, "label": 0, "prediction": 1, "probability_of_label": 0.05, "top": [], "doubtful": False,
    }  # fmt: skip
    assert found["mistakes"][0]["top"] == [[1, 0.95], [0, 0.05], [2, 0.0]]
    pairs = facts.confused_pairs(metrics.confusion_matrix(label, probs.argmax(axis=-1), 3), label, probs)
    assert pairs[0] == {"label": 0, "prediction": 1, "count": 2, "share_of_label": 0.5, "rows": [2, 3]}
    assert [(pair["label"], pair["prediction"]) for pair in pairs] == [(0, 1), (1, 2)]


@pytest.mark.parametrize(("step", "finished"), [(3, False), (6, True)])
def test_earlier_checkpoint_does_not_count_as_finished(step: int, finished: bool) -> None:
    summary = {"steps": 6, "device": "a", "versions": {"python": "3"}, "git_commit": ""}
    run = facts.run_facts(Config(), [], [], step, summary)
    assert run["finished"] is finished and run["versions_of"] == "training"


def test_smoothing_by_hand() -> None:
    assert facts.smoothed([1.0, 2.0, 6.0, 4.0], 1) == [1.5, 3.0, 4.0, 5.0]
    assert facts.smoothed([1.0, 2.0], 0) == [1.0, 2.0]


def test_curves_of_a_long_log_keep_its_end() -> None:
    records = [{"step": i, "split": "train", "loss": float(i), "accuracy": 0.5, "examples": 9} for i in range(1, 4001)]
    curves = facts.log_curves(records)
    assert len(curves["train"]) == 1000 and curves["train"][-1]["step"] == 4000
    assert curves["smoothed_over"] == 401


def test_plots_take_their_colors_from_the_page(report: pathlib.Path) -> None:
    text = (report / "index.html").read_text()
    svgs = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(svgs) == 6
    for svg in svgs:
        assert not re.search(r"#[0-9a-f]{6}\b", svg), "a colour that dark mode does not know"
        assert set(re.findall(r"var\(--([a-z-]+)\)", svg)) <= set(plots.ROLES.values())
    for role in plots.ROLES.values():
        assert len(re.findall(rf"--{role}: #", text)) == 2  # in light and in dark
    assert "prefers-color-scheme: dark" in text


def test_plots_leave_matplotlib_unchanged() -> None:
    import matplotlib

    before = matplotlib.rcParams.copy()  # looking at single ones would choose a backend
    first, second = (plots.confusion([[3, 1], [0, 4]], "01") for _ in range(2))
    assert first == second  # the same for the same numbers, to the byte
    assert dict.__eq__(matplotlib.rcParams, before)
    assert "matplotlib.pyplot" not in sys.modules


def test_plots_beside_the_page_are_valid_files(report: pathlib.Path) -> None:
    import xml.etree.ElementTree as ElementTree

    for path in report.glob("*.svg"):
        root = ElementTree.fromstring(path.read_text())
        assert root.tag.endswith("svg") and "var(" not in path.read_text()
    for path in report.glob("*.png"):
        with Image.open(path) as image:
            image.load()


@pytest.mark.parametrize(
    "fields",
    [{}, {"model__widths": (), "model__pools": (1,)}, {"model__batch_norm": True, "model__pooling": "avg"}],
    ids=["default", "perceptron", "batch norm"],
)
def test_activations_equal_the_networks(fields: dict[str, Any]) -> None:
    config = replace(Config(), **{"model__widths": (4, 5, 6), "model__dense": (7,), **fields})
    model: Any = config.model
    state = jit_init_state(config.program, jax.random.key(0))
    variables = eval_variables(state)
    images = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 1), dtype=np.uint8)
    found = layers.layer_inputs(config.program, variables, images)
    np.testing.assert_allclose(found[-1].values, jit_forward(config.program, variables, images), rtol=1e-4, atol=1e-5)
    names = ["Conv_1", "Conv_2", "Dense_0"] * bool(model.widths) + ["Dense_1", "logits"]
    assert [stage.name for stage in found] == names
    if model.widths:
        side = 13 if model.batch_norm else 12  # without batch norm two rows and columns are cropped
        assert [stage.values.shape for stage in found[:3]] == [(3, side, side, 4), (3, 5, 5, 5), (3, 3, 3, 6)]
    assert all(stage.values.min() >= 0 for stage in found[:-1])  # after the ReLU
    # The last stage before the logits is what the last layer turns into them.
    last = variables["params"][f"Dense_{len(model.dense)}"]
    np.testing.assert_allclose(
        found[-2].values @ np.asarray(last["kernel"]) + np.asarray(last["bias"]), found[-1].values, rtol=1e-4, atol=1e-5
    )
    rows = layers.layers(config.program, variables)
    assert sum(row.parameters for row in rows) == sum(leaf.size for leaf in jax.tree.leaves(state.params))


class ToyBlock(nn.Module):
    """A residual block whose branch has a stride and whose shortcut is a projection of the same input."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.relu(nn.Conv(6, (3, 3), strides=2, padding="SAME")(x))
        y = nn.Conv(6, (3, 3), padding="SAME")(y)
        return nn.relu(y + nn.Conv(6, (1, 1), strides=2)(x))


class Toy(nn.Module):
    """A network of a family that the package does not know."""

    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        x = nn.relu(nn.Conv(4, (5, 5), padding="VALID")(x))
        x = ToyBlock()(x)
        return nn.Dense(self.num_classes)(x.mean((1, 2)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyConfig(ModelConfig):
    """The config of `Toy`."""

    def module(self, num_classes: int, *, train: bool = False) -> nn.Module:
        """Builds it."""
        return Toy(num_classes)


def test_network_of_an_unknown_family_is_shown(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "toy", ToyConfig)
    numbers, text = made_up(tmp_path / "run", "kmnist", examples=300, model=ToyConfig())
    Page(text)
    assert [(row["name"], tuple(row["output_shape"]), row["multiply_adds"]) for row in numbers["network"]] == [
        ("Conv_0", (24, 24, 4), 24 * 24 * 25 * 4),
        ("ToyBlock_0/Conv_0", (12, 12, 6), 12 * 12 * 9 * 4 * 6),
        ("ToyBlock_0/Conv_1", (12, 12, 6), 12 * 12 * 9 * 6 * 6),
        ("ToyBlock_0/Conv_2", (12, 12, 6), 12 * 12 * 4 * 6),
        ("Dense_0", (10,), 60),
    ]
    # The two convolutions that see the same are shown once.
    assert [(stage["name"], tuple(stage["shape"])) for stage in numbers["activations"]["stages"]] == [
        ("ToyBlock_0/Conv_0", (24, 24, 4)),
        ("ToyBlock_0/Conv_1", (12, 12, 6)),
        ("Dense_0", (6,)),
        ("logits", (10,)),
    ]
    with Image.open(tmp_path / "run" / "report" / "filters.png") as filters:
        assert filters.size == (12 * (4 * 5 + 3), 12 * 5)
    assert "default_config_dict('toy')" in numbers["config_file"]


def test_resnet_is_shown(tmp_path: pathlib.Path) -> None:
    config = Config(model=MODELS["resnet"]())
    variables = eval_variables(jit_init_state(config.program, jax.random.key(0)))
    rows = layers.layers(config.program, variables)
    assert sum(row.parameters for row in rows) == sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert {"Conv_0", "BatchNorm_0", "Dense_0"} <= {row.name for row in rows}
    filters = layers.first_filters(config.program, variables)
    assert filters is not None and filters.shape[1:] == (3, 3)


def test_training_images_are_shown_with_their_augmentation(tmp_path: pathlib.Path) -> None:
    numbers, text = made_up(tmp_path / "run", "kmnist", examples=300, augment__rotate=30.0, data__num_train=200)
    assert 'id="trained-on"' in text and len(numbers["augmented"]) == pictures.TRAINING_IMAGES
    with Image.open(tmp_path / "run" / "report" / "augmented.png") as image:
        drawn = np.asarray(image)[::2, ::2]
    first = drawn[:28, :28]
    assert drawn.shape == (10 * 30 - 2, 8 * 30 - 2)
    _, split = made_up_split(10, 300)
    np.testing.assert_array_equal(first, split.image[numbers["augmented"][0], :, :, 0])
    assert not np.array_equal(first, drawn[:28, 30:58])


def test_calibration_is_shown_with_and_without_temperature(tmp_path: pathlib.Path) -> None:
    numbers, text = made_up(tmp_path / "run", "kmnist", examples=2000, temperature=1.8)
    assert numbers["test"]["temperature"] == 1.8
    assert numbers["test"]["uncalibrated"]["loss"] != numbers["test"]["loss"]
    assert numbers["calibration"]["uncalibrated_bins"] != numbers["calibration"]["bins"]
    assert "without temperature" in text and "temperature of 1.800" in text


def test_layers_by_hand() -> None:
    config = Config()
    shapes = jax.eval_shape(lambda: init_state(config.program, jax.random.key(0)))  # all that is looked at
    rows = {row.name: row for row in layers.layers(config.program, eval_variables(shapes))}
    assert list(rows) == ["Conv_0", "Conv_1", "Conv_2", "Dense_0", "Dense_1"]
    assert rows["Conv_1"] == layers.Layer(
        "Conv_1", "Conv", (12, 12, 32), (5, 5, 64), 9 * 32 * 64 + 64, 10 * 10 * 9 * 32 * 64
    )
    assert rows["Dense_1"].multiply_adds == 640 and rows["Dense_1"].parameters == 650


def test_first_filters_are_the_weights() -> None:
    config = replace(Config(), model__widths=(), model__pools=(1,), model__dense=(5,))
    variables = eval_variables(jit_init_state(config.program, jax.random.key(0)))
    filters = layers.first_filters(config.program, variables)
    assert filters is not None and filters.shape == (5, 28, 28)
    assert filters[2, 1, 3] == variables["params"]["Dense_0"]["kernel"][28 + 3, 2]
    config = replace(Config(), model__widths=(4,), model__pools=(1,))
    variables = eval_variables(jit_init_state(config.program, jax.random.key(0)))
    filters = layers.first_filters(config.program, variables)
    assert filters is not None
    np.testing.assert_array_equal(filters[1], variables["params"]["Conv_0"]["kernel"][:, :, 0, 1])


def test_pictures_by_hand() -> None:
    painted = pictures.colors(np.array([1.0, -2.0, 0.0]), 2.0)
    assert painted.tolist() == [[*pictures.POSITIVE, 128], [*pictures.NEGATIVE, 255], [*pictures.POSITIVE, 0]]
    tiles = pictures.sheet(np.arange(1, 4)[:, None, None] * np.ones((1, 2, 2), int), 2)
    assert tiles.tolist() == [[1, 1, 0, 2, 2], [1, 1, 0, 2, 2], [0] * 5, [3, 3, 0, 0, 0], [3, 3, 0, 0, 0]]


def test_path_is_shown_without_its_place_on_this_machine(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert shown(pathlib.Path("runs/default")) == "runs/default"
    assert shown(pathlib.Path("/somewhere/else/runs/default")) == "default"


def test_folder_that_cannot_be_written_is_named(tmp_path: pathlib.Path) -> None:
    workdir = shutil.copytree(tiny_run.workdir(), tmp_path / "run")
    shutil.rmtree(workdir / "report", ignore_errors=True)
    (workdir / "report").write_text("a file where the folder should be")
    with pytest.raises(WorkdirError, match=r"report: cannot be written \(File exists\); .*--output"):
        report_workdir(workdir)


def test_command_reports_into_the_run_or_the_output(tmp_path: pathlib.Path) -> None:
    workdir = shutil.copytree(tiny_run.workdir(), tmp_path / "run")

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return forked.run("-m", "mnist_flax.report", *arguments)

    done = command(f"--workdir={workdir}", "--checkpoint=best")
    assert done.returncode == 0, done.stderr
    assert pathlib.Path(done.stdout.strip()) == workdir / "report" / "index.html"
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    done = command(f"--workdir={workdir}", f"--output={tmp_path / 'there'}")
    assert pathlib.Path(done.stdout.strip()) == tmp_path / "there" / "index.html"
    assert {path.name for path in (tmp_path / "there").iterdir()} == PIECES
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before
    for arguments, message in (
        (["--workdir=nowhere"], "--workdir=nowhere"),
        ([f"--workdir={workdir}", "--checkpoint=7"], "has no checkpoint '7'"),
    ):
        done = command(*arguments)
        assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1


def test_report_covers_the_whole_test_set(numbers: dict[str, Any]) -> None:
    test = load_splits(tiny_run.CONFIG).test
    predictor, _ = load_predictor(tiny_run.workdir())
    evaluation = evaluate(predictor, test)
    expected = metrics.confusion_matrix(test.label, evaluation.logits.argmax(axis=-1), 10)
    np.testing.assert_array_equal(numbers["confusion"], expected)
    for item in gallery_items(numbers):  # the row is that of the file
        assert item["label"] == test.label[item["row"]]
        assert item["prediction"] == evaluation.logits[item["row"]].argmax()
