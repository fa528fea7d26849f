"""The demo page's JavaScript computes what Python does: framing, every layer, and the arithmetic of single values."""

import base64
import functools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from browser import browser
from demo_networks import CONFIGS
from test_export_graph import run_program

from mnist_flax.analysis.evaluation import make_predictor
from mnist_flax.config import Config, replace
from mnist_flax.data.framing import frame
from mnist_flax.drivers import jit_forward, jit_init_state
from mnist_flax.exporting import inference
from mnist_flax.exporting.demo import PAGE
from mnist_flax.exporting.graph import Graph, trace
from mnist_flax.exporting.textbook import textbook_order
from mnist_flax.models.cleaned import despeckled
from mnist_flax.step import crop, scale_pixels

GOLDEN = pathlib.Path(__file__).with_name("golden_framing.npz")
VIEWS = replace(Config(), eval__views=5)


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    """A blank page with those scripts of the demo that do not need its elements."""
    with browser() as chromium:
        page = chromium.new_page()
        for name in ("framing", "network", "inspect"):
            page.add_script_tag(path=PAGE / f"{name}.js")
        yield page


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Three images of sparse random pixels, `u8[3,28,28,1]`."""
    generator = np.random.default_rng(0)
    return (generator.integers(0, 256, (3, 28, 28, 1)) * (generator.random((3, 28, 28, 1)) < 0.3)).astype(np.uint8)


@functools.cache
def variables_of(config: Config) -> Any:
    """Random weights; biases and statistics, which start at 0 or 1, are changed too."""
    state = jax.device_get(jit_init_state(config.program, jax.random.key(0)))
    leaves, tree = jax.tree.flatten({"params": state.params, "batch_stats": state.batch_stats})
    generator = np.random.default_rng(1)
    noisy = [leaf * generator.uniform(0.8, 1.2, leaf.shape) + generator.normal(0, 0.02, leaf.shape) for leaf in leaves]
    return jax.tree.unflatten(tree, [np.asarray(leaf, np.float32) for leaf in noisy])


@functools.cache
def graph_of(config: Config) -> Graph:
    """The graph as the page gets it."""
    return textbook_order(inference.graph_of(make_predictor(config, variables_of(config))))


def load(page: Any, graph: Graph) -> None:
    """Sets the page's `network` to a graph."""
    weights = base64.b64encode(graph.weights()).decode()
    page.evaluate(
        """([graph, weights]) => {
          const bytes = Uint8Array.from(atob(weights), (letter) => letter.charCodeAt(0));
          window.network = new Network(JSON.parse(graph), bytes.buffer);
        }""",
        [graph.to_json(), weights],
    )


def layers_in_jax(config: Config, variables: Any, images: np.ndarray) -> dict[str, np.ndarray]:
    """The output of every module, by its path, and the logits."""
    module = config.program.model.module(config.num_classes)

    @jax.jit
    def run(images: jax.Array) -> dict[str, jax.Array]:
        found: dict[str, jax.Array] = {}

        def record(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            output = call(*args, **kwargs)
            if context.method_name == "__call__":
                found["/".join(context.module.path) or "logits"] = output
            return output

        with nn.intercept_methods(record):
            module.apply(variables, scale_pixels(config.program, crop(config.program, images)))
        return found

    return {name: np.asarray(values) for name, values in run(jnp.asarray(images)).items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_demo_layers_equal_jax(name: str, page: Any, images: np.ndarray) -> None:
    config = CONFIGS[name]
    variables = variables_of(config)
    load(page, graph_of(config))
    wanted = layers_in_jax(config, variables, images)
    for i, image in enumerate(images):
        found = page.evaluate(
            """(pixels) => {
              network.run(Uint8Array.from(pixels));
              const values = (name) => Array.from(network.values.get(name).data);
              const layers = { logits: values(network.outputs.logits) };
              for (const { name, layer } of network.nodes) if (layer) layers[layer] = values(name);
              return layers;
            }""",
            image.ravel().tolist(),
        )
        assert set(found) == set(wanted)
        for layer, values in wanted.items():
            np.testing.assert_allclose(found[layer], values[i].ravel(), atol=1e-5, err_msg=layer)


def test_demo_operations_equal_their_definitions(page: Any) -> None:
    """These are operations that no model family of the package uses."""
    generator = np.random.default_rng(2)
    shift = jnp.asarray(generator.normal(size=(5, 4, 3)), jnp.float32)

    def everything(variables: Any, images: jax.Array) -> jax.Array:
        x = images[:, 3:23:4, 2:26:6].astype(jnp.float32) / 255 + variables["shift"][None]
        x = jnp.pad(x, ((0, 0), (1, 2), (0, 1), (0, 0)), constant_values=0.5)
        x = jnp.concatenate([jnp.sin(x), jnp.where(x > 1, jnp.abs(x), jnp.floor(x)), -x], axis=3)
        attention = jnp.einsum("nhwc,nhvc->nhwv", x, jnp.cos(x))
        x = jnp.einsum("nhwv,nhvc->nchw", jax.nn.softmax(attention), x)
        x = jnp.minimum(x, 2.0) ** 2 + jax.lax.erf(x) + jnp.sqrt(jnp.abs(x)) + jnp.sign(x)
        whole = (4 * x).astype(jnp.int32)
        x = x + whole.astype(jnp.float32) + whole.astype(bool).astype(jnp.float32)
        return jnp.stack([x.max((1, 2, 3)), x.min((1, 2, 3)), x.sum((1, 2, 3)), x.mean((1, 2, 3))], 1)

    graph = trace(everything, {"shift": shift})
    image = generator.integers(0, 256, (1, 28, 28, 1), dtype=np.uint8)
    load(page, graph)
    logits = page.evaluate(
        """(pixels) => {
          network.run(Uint8Array.from(pixels));
          return Array.from(network.values.get(network.outputs.logits).data);
        }""",
        image.ravel().tolist(),
    )
    np.testing.assert_allclose(logits, jax.jit(everything)({"shift": shift}, image)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_textbook_order_keeps_the_logits(name: str, images: np.ndarray, tmp_path: pathlib.Path) -> None:
    config = CONFIGS[name]
    variables = variables_of(config)
    graph = graph_of(config)
    wanted = jit_forward(config.program, variables, images)
    np.testing.assert_allclose(run_program(graph, tmp_path, images)["logits"], wanted, atol=1e-5)


def test_textbook_order_shows_activations_before_pooling() -> None:
    graph = graph_of(Config())
    assert [node.op for node in graph.nodes if node.layer == "Conv_0"] == ["conv", "relu", "max_pool"]


def explained(page: Any, pixels: np.ndarray, title: str, place: dict[str, int]) -> Any:
    """How the page explains a value: products, their sum, the steps that follow, the value, and its receptive field."""
    return page.evaluate(
        """([pixels, title, place]) => {
          network.run(Uint8Array.from(pixels));
          const stage = findStages(network).find((stage) => stage.title === title);
          const { window: w, sum, lines } = explain(network, stage, place);
          const products = [];
          for (let k = 0; k < w.channels; k++) for (let i = 0; i < w.rows; i++) for (let j = 0; j < w.columns; j++)
            products.push(w.weight ? w.value(i, j, k) * w.weight(i, j, k) : w.value(i, j, k));
          const value = network.values.get(stage.node.name).data[indexOf(stage.node.shape, place)];
          return { products, sum, lines, value, field: receptiveField(network, stage.node, place) };
        }""",
        [pixels.ravel().tolist(), title, place],
    )


@pytest.mark.parametrize("config", [Config(), VIEWS])  # the maps are those of the first view, which is not shifted
def test_demo_explains_a_convolution(config: Config, page: Any, images: np.ndarray) -> None:
    variables = variables_of(config)
    load(page, graph_of(config))
    found = explained(page, images[0], "Convolution 1", {"y": 3, "x": 5, "channel": 7})
    kernel, bias = variables["params"]["Conv_0"]["kernel"][:, :, 0, 7], variables["params"]["Conv_0"]["bias"][7]
    products = images[0, 3:6, 5:8, 0] / 255 * kernel
    np.testing.assert_allclose(found["products"], products.ravel(), atol=1e-6)
    assert found["sum"] == pytest.approx(products.sum(), abs=1e-5)
    assert [line["value"] for line in found["lines"]] == pytest.approx(
        [products.sum() + bias, max(0, products.sum() + bias)], abs=1e-5
    )
    assert found["lines"][-1]["label"] == "ReLU"
    assert found["field"] == {"top": 3, "left": 5, "bottom": 6, "right": 8}


def test_demo_explains_pooling_and_dense_layers(page: Any, images: np.ndarray) -> None:
    load(page, graph_of(Config()))
    pooled = explained(page, images[0], "Max pooling", {"y": 2, "x": 4, "channel": 9})
    assert len(pooled["products"]) == 4
    assert max(pooled["products"]) == pooled["sum"] == pooled["value"]
    assert pooled["field"] == {"top": 4, "left": 8, "bottom": 8, "right": 12}
    dense = explained(page, images[0], "Logits", {"y": 0, "x": 0, "channel": 3})
    assert len(dense["products"]) == 64
    assert sum(dense["products"]) == pytest.approx(dense["sum"], abs=1e-5)
    assert dense["lines"][-1]["value"] == pytest.approx(dense["value"], abs=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_demo_explanations_end_with_the_shown_values(name: str, page: Any, images: np.ndarray) -> None:
    """In every stage of every family, the last line of an explanation is the value that the map shows."""
    load(page, graph_of(CONFIGS[name]))
    stages = page.evaluate(
        """(pixels) => {
          network.run(Uint8Array.from(pixels));
          return findStages(network).map((stage) => {
            const { height, width, channels } = mapSize(stage.node.shape);
            const place = { y: height >> 1, x: width >> 1, channel: channels - 1 };
            const { sum, lines, window: w } = explain(network, stage, place);
            let products = 0;
            for (let k = 0; k < w.channels; k++) products += w.weight ? contribution(w, k) : 0;
            const value = network.values.get(stage.node.name).data[indexOf(stage.node.shape, place)];
            const bias = network.values.get(stage.first.inputs[2])?.data[place.channel];
            return { title: stage.title, sum, bias, lines, value, products, weighted: w.weight !== null };
          });
        }""",
        images[1].ravel().tolist(),
    )
    assert stages[-1]["title"] == "Logits"
    assert len({stage["title"] for stage in stages if "pooling" not in stage["title"]}) >= 3
    for stage in stages:
        last = [stage["sum"], *(line["value"] for line in stage["lines"])][-1]
        assert last == pytest.approx(stage["value"], abs=1e-5), stage
        if stage["weighted"]:
            assert stage["products"] == pytest.approx(stage["sum"], abs=1e-5), stage
        if stage.get("bias") is not None:
            assert stage["sum"] + stage["bias"] == pytest.approx(stage["lines"][0]["value"], abs=1e-5), stage


def test_demo_shows_the_outputs_of_each_member_of_a_committee(page: Any, images: np.ndarray) -> None:
    """The mean of their probabilities belongs to no layer, so no layer is explained by it."""
    config = CONFIGS["mlp"]
    variables = [variables_of(config), jax.tree.map(lambda leaf: leaf * 0.9, variables_of(config))]
    predictor = make_predictor(config, *variables, temperature=0.5)
    load(page, textbook_order(inference.graph_of(predictor)))
    stages = page.evaluate(
        """(pixels) => {
          network.run(Uint8Array.from(pixels));
          return findStages(network).map(({ title, steps, node }) => ({
            title, steps: steps.length, values: Array.from(network.values.get(node.name).data),
          }));
        }""",
        images[0].ravel().tolist(),
    )
    layers = ["Dense layer 1", "Dense layer 2", "Dense layer 3"]
    assert [stage["title"] for stage in stages] == [f"Network {n}: {layer}" for n in (1, 2) for layer in layers]
    for stage, of_member in zip(stages[2::3], variables, strict=True):
        assert stage["steps"] == 0  # the bias belongs to the layer
        wanted = jit_forward(config.program, of_member, images[:1])[0]
        np.testing.assert_allclose(stage["values"], wanted, atol=1e-5)


def with_group_norm(variables: Any, images: jax.Array) -> jax.Array:
    """A network with normalisation by group, whose means are not those of maps."""
    x = jax.lax.conv_general_dilated(
        images / 255, variables["kernel"], (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x = x - x.mean(3)[..., None]
    groups = x.reshape(len(x), *x.shape[1:3], 2, -1)
    x = (groups - groups.mean((1, 2, 4))[:, None, None, :, None]).reshape(x.shape)
    return x.mean((1, 2)) @ variables["dense"]


def test_demo_shows_only_means_of_maps_as_pooling(page: Any) -> None:
    generator = np.random.default_rng(3)
    shapes = {"kernel": (3, 3, 1, 4), "dense": (4, 10)}
    load(page, trace(with_group_norm, {key: generator.normal(size=shape) for key, shape in shapes.items()}))
    stages = page.evaluate("findStages(network).map(({ title, node }) => [title, node.shape])")
    assert stages == [["Convolution 1", [1, 7, 7, 4]], ["Mean of each map", [1, 4]], ["Logits", [1, 10]]]


def despeckled_first(variables: Any, images: jax.Array) -> jax.Array:
    """A network whose convolution sees the images without specks: rows and columns at the border are repeated."""
    x = despeckled(images / 255)
    x = jax.lax.conv_general_dilated(x, variables["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return x.reshape(len(x), -1) @ variables["dense"]


@pytest.mark.parametrize("name", [*CONFIGS, "views", "despeckled"])
def test_demo_values_depend_on_their_receptive_fields_alone(name: str, page: Any, images: np.ndarray) -> None:
    if name == "despeckled":
        generator = np.random.default_rng(3)
        shapes = {"kernel": (3, 3, 1, 2), "dense": (28 * 28 * 2, 10)}
        weights = {key: generator.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}
        load(page, trace(despeckled_first, weights))
    else:
        load(page, graph_of(CONFIGS.get(name, VIEWS)))
    stages = page.evaluate(
        """([pixels, others]) => findStages(network).map(({ node, title }) => {
             const { height, width } = mapSize(node.shape);
             return [0, height >> 1, height - 1].map((y) => {
               const place = { y, x: width >> 1, channel: 0 };
               const { top, left, bottom, right } = receptiveField(network, node, place);
               const inside = (row, column) => row >= top && row < bottom && column >= left && column < right;
               const changed = pixels.map((pixel, i) => inside(Math.floor(i / 28), i % 28) ? pixel : others[i]);
               return [title, ...[pixels, changed].map((image) => {
                 network.run(Uint8Array.from(image));
                 return network.values.get(node.name).data[indexOf(node.shape, place)];
               })];
             });
           }).flat()""",
        [images[0].ravel().tolist(), images[1].ravel().tolist()],
    )
    assert len(stages) >= 6
    for title, value, with_other_pixels_outside in stages:
        assert value == with_other_pixels_outside, title


def test_demo_frames_as_python_does(page: Any) -> None:
    with np.load(GOLDEN) as file:
        golden = dict(file)
    for i in range(len(golden) // 2):
        drawing, framed = golden[f"drawing_{i}"], golden[f"framed_{i}"]
        np.testing.assert_array_equal(frame(drawing), framed, err_msg="Python")
        height, width = drawing.shape
        found = page.evaluate(
            "([pixels, width, height]) => Array.from(frame(Uint8Array.from(pixels), width, height))",
            [drawing.ravel().tolist(), width, height],
        )
        np.testing.assert_array_equal(np.reshape(found, (28, 28)), framed, err_msg="JavaScript")
    assert json.dumps(page.evaluate("Array.from(frame(new Uint8Array(12), 3, 4))")).count("0") == 784
