"""Exported graphs: every preset, family and operation gives the same numbers as JAX, in NumPy and in ONNX."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax import Array, lax
from strange_networks import Normalised, Numbered, Strange
from test_presets import PRESETS, load

from mnist_flax import rng
from mnist_flax.analysis.evaluation import Predictor, make_predictor, predict_logits
from mnist_flax.config import Config, replace
from mnist_flax.drivers import jit_init_state
from mnist_flax.exporting import numpy_program, onnx
from mnist_flax.exporting.graph import ExportError, Graph, Node, trace
from mnist_flax.exporting.inference import graph_of, in_float32
from mnist_flax.exporting.textbook import textbook_order
from mnist_flax.models import MODELS
from mnist_flax.models.layers import ACTIVATIONS
from mnist_flax.step import Variables

NHWC = ("NHWC", "HWIO", "NHWC")
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 28, 28, 1), dtype=np.uint8)


def variables(config: Config, seed: int = 0) -> Variables:
    """Weights as after training: no bias, mean or variance keeps its initial 0 or 1."""
    state = jax.device_get(jit_init_state(config.program, rng.root_key(seed)))
    generator = np.random.default_rng(seed)
    return {
        "params": jax.tree.map(lambda a: a + generator.normal(0, 0.05, a.shape).astype(np.float32), state.params),
        "batch_stats": jax.tree.map(
            lambda a: a + generator.uniform(0, 0.5, a.shape).astype(np.float32), state.batch_stats
        ),
    }


def predictor_of(config: Config, members: int = 1, temperature: float = 1.0) -> Predictor:
    config = replace(config, eval__batch_size=len(IMAGES))  # so that no batch is padded
    return make_predictor(config, *(variables(config, seed) for seed in range(members)), temperature=temperature)


def run_onnx(graph: Graph, folder: pathlib.Path, images: np.ndarray) -> dict[str, np.ndarray]:
    pytest.importorskip("onnxruntime")
    path = folder / "model.onnx"
    path.write_bytes(onnx.to_onnx(graph, {}))
    return onnx.load_onnx(path)(images)


def run_program(graph: Graph, folder: pathlib.Path, images: np.ndarray) -> dict[str, np.ndarray]:
    for suffix, content in numpy_program.to_numpy(graph).items():
        (folder / f"model{suffix}").write_bytes(content)
    return numpy_program.load_program(folder / "model.npz")(images)


def check(predictor: Predictor, folder: pathlib.Path) -> None:
    """Compares the NumPy and ONNX forms of a graph with the network; measured differences are below 1e-5."""
    graph = graph_of(predictor)
    expected = predict_logits(in_float32(predictor), IMAGES)
    for run in (run_program, run_onnx):
        outputs = run(graph, folder, IMAGES)
        np.testing.assert_allclose(outputs["logits"], expected, atol=2e-5, rtol=1e-5)
        np.testing.assert_allclose(outputs["probabilities"].sum(-1), 1, atol=1e-5)
        assert outputs["logits"].dtype == outputs["probabilities"].dtype == np.float32


def cnn(**fields: Any) -> Config:
    small = {"widths": (4, 6), "pools": (2,), "dense": (8,)}
    return replace(Config(), **{f"model__{name}": value for name, value in (small | fields).items()})


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_exported(name: str, tmp_path: pathlib.Path) -> None:
    check(predictor_of(load(name)[0], temperature=1.3), tmp_path)


@pytest.mark.parametrize("family", MODELS)
def test_every_family_is_exported(family: str, tmp_path: pathlib.Path) -> None:
    check(predictor_of(Config(model=MODELS[family]())), tmp_path)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_is_exported(activation: str, tmp_path: pathlib.Path) -> None:
    check(predictor_of(cnn(activation=activation)), tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        cnn(pooling="avg"),
        cnn(batch_norm=True, activation="gelu"),
        cnn(paddings=("SAME", "VALID"), strides=(2, 1)),
        cnn(stem="cosine"),
        cnn(widths=(), pools=(1,)),
        cnn(dtype="bfloat16", pixel_mean=0.13, pixel_std=0.3),
        replace(cnn(conv_dropout=0.1, dropout=0.5, batch_norm=True, pooling="avg"), eval__views=5),
    ],
)
def test_every_kind_of_layer_is_exported(config: Config, tmp_path: pathlib.Path) -> None:
    check(predictor_of(config), tmp_path)


@pytest.mark.parametrize("views", [1, 5])
def test_a_committee_is_exported(views: int, tmp_path: pathlib.Path) -> None:
    predictor = predictor_of(replace(cnn(), eval__views=views), members=3, temperature=0.8)
    check(predictor, tmp_path)
    layers = {node.layer for node in graph_of(predictor).nodes}
    assert {f"member_{i}/Conv_0" for i in range(3)} <= layers


def strange(module: Any) -> tuple[Graph, Array]:
    weights: Any = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))

    def logits(weights: Any, images: Array) -> Array:
        return module.apply(weights, images.astype(jnp.float32) / 255)

    return trace(logits, weights), jax.jit(logits)(weights, IMAGES)


@pytest.mark.parametrize("run", [run_program, run_onnx])
@pytest.mark.parametrize(
    ("module", "layers"),
    [(Strange(), {"Conv_0", "LayerNorm_0", "MultiHeadDotProductAttention_0/query"}), (Normalised(), {""})],
    ids=["strange", "normalised weights"],
)
def test_a_family_from_outside_is_exported(
    module: Any, layers: set[str], run: Callable[..., Any], tmp_path: pathlib.Path
) -> None:
    graph, expected = strange(module)
    np.testing.assert_allclose(run(graph, tmp_path, IMAGES)["logits"], expected, atol=1e-5)
    assert layers <= {node.layer for node in graph.nodes}


OPERATIONS: dict[str, Callable[[Array], Array]] = {
    "abs": jnp.abs,
    "ceil": lambda x: -jnp.floor(-x),
    "clip": lambda x: jnp.clip(x, -0.5, 0.5),
    "compare": lambda x: jnp.where((x > 0) & (x <= 1) | (x != x), x, -x),
    "concatenate": lambda x: jnp.concatenate([x, 2 * x], -1),
    "cos": jnp.cos,
    "cumulative": lambda x: x[..., ::2] + x[..., 1::2],
    "einsum": lambda x: jnp.einsum("nij,nkj->nik", x[..., 0], x[..., 1]),
    "erf": lambda x: nn.gelu(x, approximate=False),
    "erfc": lax.erfc,
    "expm1": jnp.expm1,
    "isfinite": lambda x: jnp.where(jnp.isfinite(1 / jnp.maximum(x, 0)), x, 0),
    "log1p": lambda x: jnp.log1p(jnp.abs(x)),
    "logsumexp": lambda x: jax.nn.logsumexp(x, axis=(1, 2)),
    "max_of_windows": lambda x: x.reshape(x.shape[0], 3, 2, 2, 3, 4).max((2, 4)),
    "mean_of_windows": lambda x: x.reshape(x.shape[0], 3, 2, 2, 3, 4).mean((2, 4)),
    "min": lambda x: x.min((1, 3)),
    "pad": lambda x: jnp.pad(x, ((0, 0), (1, 2), (0, 0), (0, 1)), constant_values=3.0),
    "pow": lambda x: jnp.abs(x) ** 1.7 + x**3 + (x + 1) ** -2.0,
    "rsqrt": lambda x: lax.rsqrt(jnp.abs(x) + 1),
    "sign": jnp.sign,
    "sin": jnp.sin,
    "softmax": nn.softmax,
    "square": jnp.square,
    "stack": lambda x: jnp.stack([x, -x], 2),
    "sum_of_windows": lambda x: lax.reduce_window(x, 0.0, lax.add, (1, 3, 2, 1), (1, 2, 1, 1), "SAME"),
    "transpose": lambda x: x.transpose(0, 3, 1, 2),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_gives_the_numbers_of_jax(name: str, tmp_path: pathlib.Path) -> None:
    scale = np.random.default_rng(1).normal(1, 1, (6, 6, 4)).astype(np.float32)

    def function(weights: Any, images: Array) -> Array:
        y = OPERATIONS[name](images[:, :6, :6].astype(jnp.float32) / 255 * weights["scale"][None])
        return y.reshape(y.shape[0], -1)

    graph = trace(function, {"scale": scale})
    expected = jax.jit(function)({"scale": scale}, IMAGES)
    for run in (run_program, run_onnx):
        with np.errstate(divide="ignore", invalid="ignore"):  # infinities are intended
            logits = run(graph, tmp_path, IMAGES)["logits"]
        np.testing.assert_allclose(logits, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("what", "network"),
    [
        ("div of int32", lambda x: lax.div(x.astype(jnp.int32), jnp.full_like(x, 3, jnp.int32))),
        ("and of int32", lambda x: x.astype(jnp.int32) & 5),
        ("not of int32", lambda x: ~x.astype(jnp.int32)),
        (
            "convolution with cropping",
            lambda x: lax.conv_general_dilated(
                x.astype(jnp.float32), jnp.ones((1, 1, 1, 1)), (1, 1), ((-1, 0), (0, 0)), dimension_numbers=NHWC
            ),
        ),
    ],
)
def test_an_operation_that_means_something_else_in_the_graph_is_refused(what: str, network: Any) -> None:
    with pytest.raises(ExportError, match=f"its operation '{what}' cannot be exported"):
        trace(lambda _, images: network(images).reshape(images.shape[0], -1)[:, :10].astype(jnp.float32), {})


def test_an_array_used_as_a_kernel_and_as_a_number_keeps_both(tmp_path: pathlib.Path) -> None:
    def network(variables: Any, images: Array) -> Array:
        x = images.astype(jnp.float32).sum((1, 2)) / 255
        return (x @ variables["w"] * variables["w"].reshape(())).repeat(10, 1)

    graph = trace(network, {"w": np.full((1, 1), 3, np.float32)})
    expected = 9 * np.repeat(IMAGES.astype(np.float32).sum((1, 2)) / 255, 10, 1)
    np.testing.assert_allclose(run_program(graph, tmp_path, IMAGES)["logits"], expected, rtol=1e-5)


def test_an_unknown_operation_is_named_with_its_layer() -> None:
    class Sorted(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            return jnp.sort(nn.Dense(4)(x))

    class Root(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            return Sorted()(x)

    module, x = Root(), jnp.zeros((1, 784))
    weights = module.init(jax.random.key(0), x)

    def logits(weights: Any, images: Array) -> Array:
        return module.apply(weights, images.reshape(-1, 784) / 255.0)  # type: ignore[return-value]

    with pytest.raises(ExportError, match=r"layer Sorted_0: its operation 'sort'.*stablehlo"):
        trace(logits, weights)


def only(graph: Graph, op: str) -> list[Node]:
    return [node for node in graph.nodes if node.op == op]


def test_a_graph_is_small_and_named_after_the_layers() -> None:
    graph = graph_of(predictor_of(cnn()))
    names = [node.name for node in graph.nodes if node.layer]
    blocks = [f"Conv_{i}/{op}" for i in (0, 1) for op in ("conv", "max_pool", "relu")]
    assert names == [*blocks, "Dense_0/dense", "Dense_1/dense"]
    first = only(graph, "conv")[0]
    assert first.inputs == ("div", "params/Conv_0/kernel", "params/Conv_0/bias")
    assert first.shape == (-1, 24, 24, 4)
    assert graph.constants["params/Conv_0/bias"].shape == (4,)


def test_average_pooling_is_one_operation_with_maps_of_rows_and_columns() -> None:
    (first, _) = only(graph_of(predictor_of(cnn(pooling="avg"))), "avg_pool")
    assert first.shape == (-1, 12, 12, 4)


def test_operations_on_weights_alone_are_folded_into_constants() -> None:
    graph = graph_of(predictor_of(cnn(batch_norm=True)))
    assert [node.op for node in graph.nodes if node.layer == "BatchNorm_0"][:3] == ["sub", "mul", "add"]
    assert not only(graph, "sqrt") + only(graph, "reshape")[1:]


def test_arrays_of_batch_norm_keep_the_shapes_of_the_weights() -> None:
    config = cnn(batch_norm=True)
    constants = graph_of(predictor_of(config)).constants
    wanted = traverse_util.flatten_dict(jax.device_get(variables(config)), sep="/")
    unchanged = {name: array for name, array in constants.items() if name in wanted}
    assert {"batch_stats/BatchNorm_0/mean", "params/BatchNorm_2/bias"} <= set(unchanged)
    for name, array in unchanged.items():
        np.testing.assert_array_equal(array, wanted[name], strict=True, err_msg=name)
    assert constants["BatchNorm_0/mul"].shape == (4,)


# Results that are used twice, once through an operation without effect, so that fusing one use would change the other.
SHARED: dict[str, Callable[[Variables, Array], Array]] = {
    "biased and not": lambda v, y: (y * 1.0 + v["bias"]) + jnp.tanh(y * 1.0),
    "biased and not, through one name": lambda v, y: (lambda a: (a + v["bias"]) + jnp.tanh(a))(y * 1.0),
    "reshaped there and back": lambda v, y: (
        lambda flat: (flat.reshape(y.shape) + v["bias"]) + jnp.tanh(flat).reshape(y.shape)
    )(y.reshape(len(y), 2, 5)),
    "a mean and a sum": lambda v, y: (lambda total: jnp.stack([total / 10, total * 2], 1))(y.sum(1) * 1.0),
    "a sum times zero": lambda v, y: (y.sum(1) * 0.0)[:, None] + y,
    "a bias that is also a factor": lambda v, y: (y + v["row"]) * v["row"].reshape(10, 1)[:, 0][None],
}


@pytest.mark.parametrize("name", SHARED)
def test_fusing_keeps_results_that_are_used_again(name: str, tmp_path: pathlib.Path) -> None:
    generator = np.random.default_rng(5)
    shapes = {"kernel": (784, 10), "bias": (1, 10), "row": (1, 10)}
    weights = {key: generator.normal(0, 0.1, shape).astype(np.float32) for key, shape in shapes.items()}

    def logits(weights: Variables, images: Array) -> Array:
        flat = images.reshape(images.shape[0], 784).astype(jnp.float32) / 255
        return SHARED[name](weights, flat @ weights["kernel"])

    expected = logits(weights, jnp.asarray(IMAGES))
    for run in (run_program, run_onnx):
        outputs = run(trace(logits, weights), tmp_path, IMAGES)
        np.testing.assert_allclose(outputs["logits"], expected, atol=2e-5, rtol=1e-5)


def test_textbook_order_keeps_a_constant_that_is_no_bias_after_the_pooling(tmp_path: pathlib.Path) -> None:
    weights = {"rows": np.random.default_rng(6).normal(size=(1, 1, 14, 1)).astype(np.float32)}

    def logits(weights: Variables, images: Array) -> Array:
        x = jnp.broadcast_to(images.astype(jnp.float32) / 255, (*images.shape[:3], 14))
        return jnp.tanh(nn.max_pool(x, (2, 2), (2, 2)) + weights["rows"]).sum((1, 2))

    graph = textbook_order(trace(logits, weights))
    outputs = run_program(graph, tmp_path, IMAGES)
    np.testing.assert_allclose(outputs["logits"], logits(weights, jnp.asarray(IMAGES)), rtol=1e-5)


def test_the_json_and_the_weights_hold_the_whole_graph(tmp_path: pathlib.Path) -> None:
    graph = graph_of(predictor_of(cnn(batch_norm=True)))
    content, weights = json.loads(graph.to_json()), graph.weights()
    constants = {
        name: np.frombuffer(weights, entry["dtype"], int(np.prod(entry["shape"])), entry["offset"]).reshape(
            entry["shape"]
        )
        for name, entry in content["constants"].items()
    }

    def restore(value: Any) -> Any:
        return tuple(map(restore, value)) if isinstance(value, list) else value

    nodes = tuple(
        Node(
            **{key: restore(value) for key, value in node.items() if key != "attrs"}, attrs=restore_attrs(node, restore)
        )
        for node in content["nodes"]
    )
    copy = Graph(nodes, constants, content["outputs"])
    first, second = (run_program(either, tmp_path, IMAGES)["logits"] for either in (copy, graph))
    np.testing.assert_array_equal(first, second, strict=True)


def restore_attrs(node: dict[str, Any], restore: Callable[[Any], Any]) -> dict[str, Any]:
    return {name: restore(value) for name, value in node["attrs"].items()}


def test_weights_keep_the_numbers_in_their_names() -> None:
    module: Any = Numbered()
    values = module.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))
    graph = trace(lambda v, images: module.apply(v, images / 255), values)
    names = {name: array.shape for name, array in graph.constants.items() if array.ndim == 2}
    assert names == {"params/w_1": (784, 16), "params/w_2": (16, 10)}
