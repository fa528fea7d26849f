"""The verb `export`: files are verified, refused if wrong, and load with the snippets of the model card."""

import dataclasses
import json
import pathlib
import re
import shutil
import sys
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import forked
import numpy as np
import pytest
import small_population
import tiny_run
from jax import Array

from mnist_flax import metrics, rng
from mnist_flax.analysis.evaluation import load_predictor, make_predictor, predict_logits
from mnist_flax.config import replace
from mnist_flax.errors import DataError, UserError
from mnist_flax.exporting import card, formats, inference, stablehlo
from mnist_flax.exporting.formats import FORMATS, export_workdir
from mnist_flax.exporting.graph import ExportError
from mnist_flax.models.base import ModelConfig
from mnist_flax.step import init_state
from mnist_flax.train import fit_population

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 28, 28, 1), dtype=np.uint8)


def needs(format_name: str) -> None:
    for package in FORMATS[format_name].packages:
        pytest.importorskip(package)


@pytest.fixture
def workdir(tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of a finished run."""
    return pathlib.Path(shutil.copytree(tiny_run.workdir(), tmp_path / "run"))


@pytest.fixture(scope="module")
def population(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("population")
    fit_population(replace(tiny_run.CONFIG, train__epochs=1), folder, seeds=2)
    return folder


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_run_is_exported_and_agrees_with_its_network(format_name: str, workdir: pathlib.Path) -> None:
    needs(format_name)
    exported = export_workdir(workdir, format_name)
    assert exported.paths[0] == workdir / "export" / f"model.{format_name}"
    assert exported.difference < 5e-5
    assert "over 360 test images of digits" in exported.line()
    outputs = FORMATS[format_name].load(exported.paths[0])(IMAGES)
    predictor, _ = load_predictor(workdir)
    assert predictor.temperature != 1  # so the export must contain it
    np.testing.assert_allclose(outputs["logits"], predict_logits(predictor, IMAGES), atol=5e-5)
    np.testing.assert_allclose(outputs["probabilities"].sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize("format_name", FORMATS)
def test_a_population_is_exported_as_a_committee(
    format_name: str, population: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    needs(format_name)
    exported = export_workdir(population, format_name, folder=tmp_path)
    assert [path.parent for path in exported.paths] == [tmp_path] * len(exported.paths)
    outputs = FORMATS[format_name].load(exported.paths[0])(IMAGES)
    predictor, _ = load_predictor(population)
    np.testing.assert_allclose(outputs["logits"], predict_logits(predictor, IMAGES), atol=5e-5)
    assert "| networks | 2, whose probabilities are averaged |" in (tmp_path / "MODEL_CARD.md").read_text()


def test_an_onnx_file_says_what_it_is(workdir: pathlib.Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    path = export_workdir(workdir, "onnx").paths[0]
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(properties["classes"]) == [str(digit) for digit in range(10)]
    assert properties["dataset"] == "digits"
    (images,) = model.graph.input
    assert [size.dim_param or size.dim_value for size in images.type.tensor_type.shape.dim] == ["N", 28, 28, 1]
    assert {output.name for output in model.graph.output} == {"logits", "probabilities"}
    assert {"Conv_0/conv", "Conv_1/conv", "Dense_1/dense"} <= {node.name for node in model.graph.node}


@pytest.mark.parametrize("error", [1e-3, np.nan])
def test_a_file_that_differs_is_refused(error: float, workdir: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = FORMATS["npz"]

    def load(path: pathlib.Path) -> Callable[[np.ndarray], Any]:
        run = right.load(path)
        return lambda images: {name: value + error for name, value in run(images).items()}

    monkeypatch.setitem(FORMATS, "npz", right._replace(load=load))
    with pytest.raises(ExportError, match=r"differs from the network by .*, more than the 1e-04 allowed"):
        export_workdir(workdir, "npz")
    assert not list((workdir / "export").glob("*"))


def test_probabilities_that_are_not_numbers_are_refused(workdir: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = FORMATS["npz"]

    def load(path: pathlib.Path) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
        run = right.load(path)
        return lambda images: {**run(images), "probabilities": np.full((len(images), 10), np.nan)}

    monkeypatch.setitem(FORMATS, "npz", right._replace(load=load))
    with pytest.raises(ExportError, match="differs from the network by nan"):
        export_workdir(workdir, "npz")


def test_what_a_library_does_not_support_gives_one_message(
    workdir: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise NotImplementedError("Max of int16\nin detail")

    message = r"^--format=npz: does not support this network \(NotImplementedError: Max of int16\); try another format$"
    right = FORMATS["npz"]
    for broken in (right._replace(write=refuse), right._replace(load=refuse)):  # type: ignore[arg-type]
        monkeypatch.setitem(FORMATS, "npz", broken)
        with pytest.raises(ExportError, match=message):
            export_workdir(workdir, "npz")
        assert not list((workdir / "export").glob("*"))


def test_an_export_is_verified_on_other_digits_without_the_runs_data(
    workdir: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def load_data(*_: Any) -> None:
        raise DataError("no data")

    monkeypatch.setattr(formats, "load_data", load_data)
    exported = export_workdir(workdir, "npz")
    assert "over 1,000 of scikit-learn's digits, because digits cannot be loaded here" in exported.line()
    assert "no data" in caplog.messages  # why
    with pytest.raises(DataError, match="no data"):  # not for data that the user has named
        export_workdir(workdir, "npz", overrides={"data.raw_dir": "/typo"})


def test_a_missing_package_is_named(workdir: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--format=onnx: .*pip install onnx onnxruntime"):
        export_workdir(workdir, "onnx")


def test_a_network_that_needs_the_batch_size_is_refused_with_a_reason() -> None:
    class Counting(nn.Module):
        @nn.compact
        def __call__(self, x: Array, mask: Array | None = None) -> Array:
            return nn.Dense(10)(x.reshape(len(x), -1))

    class CountingConfig(ModelConfig):
        def module(self, num_classes: int, *, train: bool = False) -> nn.Module:
            return Counting()

    program = dataclasses.replace(tiny_run.CONFIG.program, model=CountingConfig())
    weights = {"params": init_state(program, rng.root_key(0)).params}
    predictor = dataclasses.replace(make_predictor(tiny_run.CONFIG, weights), program=program)
    with pytest.raises(ExportError, match=r"any number of images .*use x.shape\[0\] rather than len"):
        stablehlo.to_stablehlo(predictor)


def test_any_error_while_a_network_is_traced_is_an_export_error(
    workdir: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise NotImplementedError("of a kind that nobody expects")

    monkeypatch.setattr(inference, "trace", fail)
    with pytest.raises(ExportError, match=r"cannot be exported \(NotImplementedError: of a kind that nobody expects\)"):
        inference.graph_of(load_predictor(workdir)[0])


@pytest.mark.parametrize("library", ["onnxruntime", "jax", "numpy", "torch"])
def test_a_snippet_of_the_model_card_runs(library: str, workdir: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    format_name = {"onnxruntime": "onnx", "jax": "stablehlo"}.get(library, "npz")
    needs(format_name)
    pytest.importorskip(library)
    folder = export_workdir(workdir, format_name).paths[0].parent
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    snippets = re.findall(r"```python\n(.*?)```", (folder / "MODEL_CARD.md").read_text(), re.DOTALL)
    space: dict[str, Any] = {}
    exec(snippets[["onnxruntime", "jax", "numpy", "torch"].index(library)], space)
    sys.modules.pop("model", None)
    if library == "torch":
        kernel = next(array for array in space["weights"].values() if array.ndim == 4)
        assert tuple(kernel.permute(3, 2, 0, 1).shape) == (4, 1, 3, 3)
        return
    logits = predict_logits(load_predictor(workdir)[0], np.zeros((2, 28, 28, 1), np.uint8))
    np.testing.assert_allclose(space["probabilities"], np.exp(metrics.log_probabilities(logits)), atol=1e-5)


def test_the_model_card_tells_what_is_known(workdir: pathlib.Path) -> None:
    export_workdir(workdir, "npz")
    text = (workdir / "export" / "MODEL_CARD.md").read_text()
    (step,) = load_predictor(workdir)[1].steps
    assert load_predictor(workdir, step)[1].steps == (step,)
    exported = export_workdir(workdir, "npz", checkpoint=str(step))
    assert exported.paths[0].parent.name.startswith("export-")  # the files of the latest checkpoint stay
    accuracy = json.loads((workdir / "summary.json").read_text())["test_accuracy"]
    assert f"| test accuracy | {accuracy:.2%} of 360 images (95 % interval " in text
    assert "| `config.optimizer.learning_rate` | `0.01` |" in text
    assert "| under corruptions | not measured; " in text
    assert "calibration error" not in text


TEST = {"ece": 0.0123, "brier": 0.4}
RESULTS: dict[str, tuple[dict[str, Any], str]] = {  # without the step, and what the card says
    "report/metrics.json": ({"dataset": "digits", "test": TEST}, "test set | 1.23% |"),
    "evaluation-test-digits.json": ({"dataset": "digits", "members": 1, **TEST}, "test set | 1.23% |"),
    "robustness.json": (
        {
            **{"dataset": "digits", "members": 1, "severity": "published", "mean_accuracy": 0.5},
            "corruptions": {"blur": {"accuracy": 0.25, "loss": 1.0, "ece": 0.1}},
        },
        "| blur | 25.00% |",
    ),
}


@pytest.mark.parametrize(
    ("name", "difference"),
    [
        *((name, difference) for name in RESULTS for difference in ({"step": 1}, {"dataset": "mnist"})),
        *((name, {"members": 2}) for name in RESULTS if name != "report/metrics.json"),
        ("robustness.json", {"severity": 2}),
    ],
)
def test_the_model_card_shows_results_of_the_same_network_and_data(
    name: str, difference: dict[str, Any], workdir: pathlib.Path
) -> None:
    predictor, info = load_predictor(workdir)
    content, shown = RESULTS[name]
    (workdir / "report").mkdir()
    for changed in ({}, difference):
        result = content | {"step": max(info.steps)} | changed
        result |= {"run": {"step": result["step"]}} if name.startswith("report") else {}
        (workdir / name).write_text(json.dumps(result))
        assert (shown in card.text(workdir, predictor, info)) == (not changed)


def test_the_model_card_of_a_population_names_all_seeds_and_its_rows() -> None:
    seeds, folds = (
        card.text(folder, *load_predictor(folder)) for folder in (small_population.seeds(), small_population.folds())
    )
    assert "| seed | 3, 4, 5 |" in seeds and "| rows trained on | 200 |" in seeds and "| rows held out | 20 |" in seeds
    assert "| seed | 3, 4, 5 |" in folds and "| rows trained on | 220, each network without its fold |" in folds
    assert "rows held out" not in folds


@pytest.mark.parametrize("name", ["summary.json", *RESULTS])
def test_the_model_card_leaves_out_what_is_damaged(name: str, workdir: pathlib.Path) -> None:
    predictor, info = load_predictor(workdir)
    (workdir / "report").mkdir()
    step = {"dataset": "digits", "members": 1, "step": max(info.steps), "severity": "published"}
    (workdir / name).write_text(json.dumps({"test_accuracy": 0.5, "test_examples": 360, "run": [], "ece": "x", **step}))
    text = card.text(workdir, predictor, info)
    assert "calibration error" not in text
    assert ("test accuracy" in text) == (name != "summary.json")


def test_the_verb_prints_one_line_and_knows_its_formats() -> None:
    folder = tiny_run.workdir()
    done = forked.run("-m", "mnist_flax.export", f"--workdir={folder}", "--format=npz")
    assert done.returncode == 0, done.stderr
    assert re.search(r"model.npz \(.*largest difference of a logit or probability .*e-0", done.stdout)
    wrong = forked.run("-m", "mnist_flax.export", f"--workdir={folder}", "--format=tflite")
    assert wrong.returncode == 2
    assert wrong.stderr == "error: --format=tflite: there is no such format; choose one of onnx, stablehlo, npz\n"


def test_the_snippet_of_the_document_reads_the_weights(workdir: pathlib.Path) -> None:
    page = pathlib.Path(__file__).resolve().parent.parent / "docs" / "export.md"
    (snippet,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    space: dict[str, Any] = {}
    exec(snippet.replace("runs/default", str(workdir)), space)
    assert space["kernel"].shape == (3, 3, 1, 4)
    assert space["config"]["model"]["name"] == "cnn"
