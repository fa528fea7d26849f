"""Convolution and pooling for CPUs equal lax's in value and gradient; other platforms use lax itself."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import export, lax
from nearness import assert_near, normal

from mnist_flax.ops import conv as ops
from mnist_flax.ops import winograd
from mnist_flax.ops.pool import avg_pool, max_pool
from mnist_flax.ops.window import Window

NHWC = ("NHWC", "HWIO", "NHWC")
Padding = str | list[tuple[int, int]]

# Derandomised: a failure is the same on every machine. Each example compiles two programs, so there are few examples.
few_examples = functools.partial(settings, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def conv(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Padding, pool: int = 1) -> jax.Array:
    return ops.conv_block(x, kernel, strides=strides, padding=padding, pool=pool)


def lax_conv(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], padding: Padding) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=NHWC)


def value_and_gradients(f: Callable[..., jax.Array], *args: jax.Array) -> tuple[jax.Array, ...]:
    """The value, and the gradients for a random cotangent, as one compiled program."""

    @jax.jit
    def both(dy: jax.Array, *args: jax.Array) -> tuple[jax.Array, ...]:
        y, vjp = jax.vjp(f, *args)
        return (y, *vjp(dy))

    y = jax.eval_shape(f, *args)
    return both(normal(9, *y.shape).astype(y.dtype), *args)


@st.composite
def convolutions(draw: st.DrawFn, winograd: bool) -> dict[str, Any]:
    sizes = st.integers(2 if winograd else 1, 7)
    kernel_size = draw(sizes), draw(sizes)
    pads = [(draw(st.integers(0, k - 1)), draw(st.integers(0, k - 1))) for k in kernel_size]
    return {
        "batch": draw(st.integers(1, 3)),
        "size": (draw(st.integers(7, 14)), draw(st.integers(7, 14))),
        "kernel_size": kernel_size,
        "strides": (1, 1) if winograd else draw(st.sampled_from([(1, 1), (2, 2), (1, 2), (3, 1)])),
        "padding": draw(st.sampled_from(["VALID", "SAME", pads])),
        "channels": draw(st.sampled_from([(4, 4), (5, 16), (17, 20)] if winograd else [(1, 4), (3, 16)])),
        "pool": draw(st.sampled_from([1, 1, 2, 3])),
    }


@few_examples(max_examples=9)
@pytest.mark.parametrize("winograd", [True, False])
@given(st.data())
def test_values_and_gradients_equal_lax(winograd: bool, data: st.DataObject) -> None:
    case = data.draw(convolutions(winograd))
    x = normal(0, case["batch"], *case["size"], case["channels"][0])
    kernel = normal(1, *case["kernel_size"], *case["channels"])

    def ours(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return conv(x, kernel, case["strides"], case["padding"], case["pool"])

    def theirs(x: jax.Array, kernel: jax.Array) -> jax.Array:
        y = lax_conv(x, kernel, case["strides"], case["padding"])
        window = (case["pool"], case["pool"])
        return nn.max_pool(y, window, window)

    for actual, expected in zip(
        value_and_gradients(ours, x, kernel), value_and_gradients(theirs, x, kernel), strict=True
    ):
        assert_near(actual, expected)


@pytest.mark.parametrize("kernel_size", range(2, 8))
@pytest.mark.parametrize("output_size", [1, 3, 8, 10, 11, 24, 28])
def test_winograd_matrices_are_exact(kernel_size: int, output_size: int) -> None:
    """In float64 the result equals the correlation up to rounding, for every number of tiles."""
    generator = np.random.default_rng(0)
    pad = kernel_size // 2
    size = max(output_size + kernel_size - 1 - 2 * pad, 1)
    output_size = size + 2 * pad - kernel_size + 1
    x, w = generator.normal(size=size), generator.normal(size=kernel_size)
    axis = winograd._winograd_axis(size, kernel_size, output_size, pad)
    y = axis.outputs @ ((axis.inputs @ x) * np.repeat(axis.kernel @ w, axis.tiles))
    np.testing.assert_allclose(y, np.correlate(np.pad(x, pad), w, "valid"), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("size", "points", "limit"), [(12, 7, 4e-6), (16, 9, 1e-5)])
def test_winograd_error_stays_small(size: int, points: int, limit: float) -> None:
    """The float32 error, relative to the result's scale, root mean square (measured: 2e-6 and 6.5e-6)."""
    x, kernel = jnp.maximum(normal(0, 4, size, size, 32), 0), normal(1, 3, 3, 32, 64)
    assert len(winograd._winograd_axis(size, 3, size - 2, 0).kernel) == points
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(x, np.float64), (3, 3), (1, 2))
    exact = np.einsum("bnmcij,ijcd->bnmd", windows, np.asarray(kernel, np.float64))
    actual = jax.jit(lambda x, kernel: conv(x, kernel, (1, 1), "VALID"))(x, kernel)
    error = np.asarray(actual, np.float64) - exact
    assert np.sqrt((error**2).mean()) / exact.std() < limit


def test_winograd_is_used_for_the_second_convolution_but_not_the_first() -> None:
    window = Window((1, 1), ((0, 0), (0, 0)), 2)
    assert winograd.is_faster((3, 3, 32, 64), window)
    assert not winograd.is_faster((3, 3, 1, 32), window)
    assert winograd._winograd_axis(13, 3, 10, 0).inputs.shape == (14, 13)  # two tiles of five outputs, seven points


@few_examples(max_examples=6)
@given(st.integers(1, 3), st.integers(2, 9), st.integers(2, 9), st.integers(1, 5), st.integers(1, 3))
def test_pooling_equals_lax(batch: int, height: int, width: int, channels: int, size: int) -> None:
    x = normal(0, batch, height, width, channels)
    window = (size, size)
    pairs: list[tuple[Callable[..., jax.Array], Callable[..., jax.Array], float]] = [
        (lambda x: max_pool(x, size), lambda x: nn.max_pool(x, window, window), 0),  # no arithmetic: exact
        (lambda x: avg_pool(x, size), lambda x: nn.avg_pool(x, window, window), 1e-6),
    ]
    for ours, theirs, tolerance in pairs:
        for actual, expected in zip(value_and_gradients(ours, x), value_and_gradients(theirs, x), strict=True):
            assert_near(actual, expected, tolerance)


def test_ties_share_the_gradient_and_the_rest_gets_none() -> None:
    x = jnp.array([[1.0, 1, 5, 0], [0, 1, 2, 3], [7, 7, 4, 4], [7, 7, 4, 9]]).reshape(1, 4, 4, 1)
    gradient = jax.jit(jax.grad(lambda x: max_pool(x, 2).sum()))(x)[0, :, :, 0]
    expected = [[1 / 3, 1 / 3, 1, 0], [0, 1 / 3, 0, 0], [1 / 4, 1 / 4, 0, 0], [1 / 4, 1 / 4, 0, 1]]
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


@pytest.mark.parametrize("channels", [1, 16])
def test_a_flat_picture_gets_lax_gradient_for_the_kernel(channels: int) -> None:
    """All entries of a window tie; their shares of the gradient add up to what lax gives to the first entry."""
    x, kernel = jnp.full((2, 10, 10, channels), -0.4), normal(1, 3, 3, channels, 16)

    def theirs(kernel: jax.Array) -> jax.Array:
        return nn.max_pool(lax_conv(x, kernel, (1, 1), "VALID"), (2, 2), (2, 2))

    actual = value_and_gradients(lambda kernel: conv(x, kernel, (1, 1), "VALID", 2), kernel)
    for a, b in zip(actual, value_and_gradients(theirs, kernel), strict=True):
        assert_near(a, b)


@pytest.mark.parametrize("channels", [1, 16])
def test_bfloat16_is_computed_in_float32(channels: int) -> None:
    x = normal(0, 2, 12, 12, channels).astype(jnp.bfloat16)
    kernel = normal(1, 3, 3, channels, 16).astype(jnp.bfloat16)

    def ours(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return conv(x, kernel, (1, 1), "SAME", 2)

    wide = value_and_gradients(ours, x.astype(jnp.float32), kernel.astype(jnp.float32))
    for actual, expected in zip(value_and_gradients(ours, x, kernel), wide, strict=True):
        assert actual.dtype == jnp.bfloat16
        assert_near(actual.astype(jnp.float32), expected, 2.0**-8)  # a single rounding to bfloat16


@pytest.mark.parametrize("channels", [1, 16])
@pytest.mark.parametrize("batch", [0, 1])
def test_empty_and_single_batches_equal_lax(channels: int, batch: int) -> None:
    x, kernel = normal(0, batch, 9, 9, channels), normal(1, 3, 3, channels, 16)

    @jax.jit
    def outputs(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, ...]:
        expected = nn.max_pool(lax_conv(x, kernel, (1, 1), "SAME"), (2, 2), (2, 2))
        return conv(x, kernel, (1, 1), "SAME", 2), expected, max_pool(x, 2), avg_pool(x, 2)

    ours, theirs, *pooled = outputs(x, kernel)
    assert_near(ours, theirs)
    assert [y.shape for y in pooled] == [(batch, 4, 4, channels)] * 2


@pytest.mark.parametrize("channels", [1, 4])
def test_inference_uses_lax_for_few_images(channels: int) -> None:
    x, kernel = normal(0, 2, 9, 9, channels), normal(1, 3, 3, channels, 6)
    expected = lax_conv(x, kernel, (1, 1), "SAME")
    assert (ops.conv_block(x, kernel, inference=True) == expected).all()
    pooled = ops.conv_block(x, kernel, pool=2, inference=True)
    assert (pooled == nn.max_pool(expected, (2, 2), (2, 2))).all()


@pytest.mark.parametrize(("batch", "products"), [(ops.SMALL_BATCH - 1, False), (ops.SMALL_BATCH, True), ("n", False)])
def test_inference_uses_products_for_many_images_but_not_for_a_symbolic_batch(batch: int | str, products: bool) -> None:
    (size,) = export.symbolic_shape(batch) if isinstance(batch, str) else (batch,)
    x, kernel = jax.ShapeDtypeStruct((size, 9, 9, 4), jnp.float32), normal(1, 3, 3, 4, 6)
    jaxpr = jax.make_jaxpr(lambda x: ops.conv_block(x, kernel, inference=True))(x)
    assert ("dot_general" in str(jaxpr)) is products


class Net(nn.Module):
    """One layer of each kind."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`f32[B,12,12,1] -> f32[B,16]`."""
        init = nn.initializers.lecun_normal()
        first, second = self.param("first", init, (3, 3, 1, 16)), self.param("second", init, (3, 3, 16, 16))
        x = ops.conv_block(x, first, self.param("bias", nn.initializers.zeros, 16), activation=nn.relu, pool=2)
        x = ops.conv_block(x, second, padding="VALID", activation=nn.relu)
        return avg_pool(max_pool(x, 2), 2).reshape(x.shape[0], -1)


@pytest.fixture(scope="module")
def net() -> tuple[Callable[..., jax.Array], Any, jax.Array]:
    x = normal(3, 8, 12, 12, 1)

    def apply(variables: Any, x: jax.Array) -> jax.Array:
        y = Net().apply(variables, x)
        assert isinstance(y, jax.Array)
        return y

    return apply, jax.jit(Net().init)(jax.random.key(0), x), x


def loss_gradient(apply: Callable[..., jax.Array]) -> Callable[..., Any]:
    return jax.grad(lambda variables, x: (apply(variables, x) ** 2).mean())


def test_no_leak_between_examples(net: tuple[Callable[..., jax.Array], Any, jax.Array]) -> None:
    """A row's output has the same bits whatever else is in its batch, and its gradient reaches no other row."""
    apply, variables, x = net
    forward = jax.jit(apply)
    mates = x.at[1:].set(100 * normal(5, 7, 12, 12, 1))
    assert (forward(variables, x)[0] == forward(variables, mates)[0]).all()
    touched = jax.jit(jax.grad(lambda x: apply(variables, x)[2].sum()))(x)
    assert touched[2].any()
    assert not touched[jnp.array([0, 1, 3, 4, 5, 6, 7])].any()


def test_vmap_and_map_agree_with_plain_calls(net: tuple[Callable[..., jax.Array], Any, jax.Array]) -> None:
    apply, variables, x = net
    members = jax.tree.map(lambda leaf: jnp.stack([leaf, -0.5 * leaf]), variables)
    gradient = loss_gradient(apply)
    together = jax.jit(jax.vmap(gradient, (0, None)))(members, x)
    for member in range(2):
        alone = jax.jit(gradient)(jax.tree.map(lambda leaf, m=member: leaf[m], members), x)
        jax.tree.map(lambda a, b, m=member: assert_near(a[m], b), together, alone)
    one_by_one = jax.jit(lambda: lax.map(lambda row: apply(variables, row[None])[0], x))()
    assert_near(one_by_one, jax.jit(apply)(variables, x))


def test_batch_split_over_devices_gives_the_same_gradient(net: tuple[Callable[..., jax.Array], Any, jax.Array]) -> None:
    """Splitting the batch over devices, by the compiler or by shard_map, gives the same mean gradient."""
    apply, variables, x = net
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    split = jax.device_put(x, jax.sharding.NamedSharding(mesh, spec("data")))
    gradient = loss_gradient(apply)
    alone = jax.jit(gradient)(variables, x)

    def local(variables: Any, x: jax.Array) -> Any:
        return lax.pmean(gradient(variables, x), "data")

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(spec(), spec("data")), out_specs=spec(), check_vma=False)
    jax.tree.map(assert_near, jax.jit(gradient)(variables, split), alone)
    jax.tree.map(assert_near, jax.jit(mapped)(variables, split), alone)


def test_each_platform_gets_its_form(net: tuple[Callable[..., jax.Array], Any, jax.Array]) -> None:
    """CPU programs contain no XLA convolution, no select-and-scatter and no branch; other platforms use XLA's own."""
    apply, variables, x = net
    traced = jax.jit(loss_gradient(apply)).trace(variables, x)
    text = {platform: traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("cpu", "cuda", "tpu")}
    assert "stablehlo.convolution" not in text["cpu"]
    assert "stablehlo.select_and_scatter" not in text["cpu"]
    assert "conditional" not in traced.lower().compile().as_text()
    for platform in ("cuda", "tpu"):
        assert text[platform].count("stablehlo.convolution") >= 5  # 2 forward, 3 backward: images need no gradient
        assert "stablehlo.select_and_scatter" in text[platform]


def test_network_can_be_exported_for_several_platforms(net: tuple[Callable[..., jax.Array], Any, jax.Array]) -> None:
    apply, variables, x = net
    exported = jax.export.export(jax.jit(apply), platforms=("cpu", "cuda"))(variables, x)
    assert_near(exported.call(variables, x), jax.jit(apply)(variables, x))
    assert jax.eval_shape(apply, variables, x).shape == (8, 16)
