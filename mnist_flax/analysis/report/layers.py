"""What happens inside the network: its layers, and what comes out of each."""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from mnist_flax.config import Config
from mnist_flax.step import Variables


class Layer(NamedTuple):
    """A layer that has weights.

    Attributes:
      name: of its module, such as `Conv_0`.
      kind: of its module, such as `Conv`.
      input_shape: of one example.
      output_shape: of one example; of a convolution after the max-pooling, where the two are one operation.
      parameters: how many numbers it has learned, running statistics not among them.
      multiply_adds: that its kernel costs for one example.
    """

    name: str
    kind: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    parameters: int
    multiply_adds: int


class Activation(NamedTuple):
    """What a stage of the network passes on: after its activation and pooling.

    Attributes:
      name: to be read, such as `convolution 1`.
      values: `f32[B,H,W,C]`, or `f32[B,D]`.
    """

    name: str
    values: np.ndarray


def layers(config: Config, variables: Variables) -> list[Layer]:
    """Lists the layers in the order of their work."""
    found: list[Layer] = []

    def note(next_function: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        output = next_function(*args, **kwargs)
        module = context.module
        if context.method_name == "__call__" and module.scope and len(module.scope.path) == 1:
            name = str(module.name)
            params = variables["params"].get(name, {})
            kernel = params.get("kernel")
            places = math.prod(output.shape[1:-1])
            if isinstance(module, nn.Conv):  # its output may be pooled already; its kernel works at every place before
                block = config.model.blocks()[sum(layer.kind == "Conv" for layer in found)]
                places = block.conv_size(args[0].shape[1]) ** 2
            found.append(
                Layer(
                    name=name,
                    kind=type(module).__name__,
                    input_shape=args[0].shape[1:],
                    output_shape=output.shape[1:],
                    parameters=sum(leaf.size for leaf in jax.tree.leaves(params)),
                    multiply_adds=0 if kernel is None else places * kernel.size,
                )
            )
        return output

    def run(variables: Variables, images: jax.Array) -> Any:
        with nn.intercept_methods(note):
            logits: Any = config.model.module(config.num_classes).apply(variables, images)
        return logits

    jax.eval_shape(run, variables, jax.ShapeDtypeStruct((1, 28, 28, 1), np.uint8))
    return found


def activations(config: Config, variables: Variables, images: np.ndarray) -> list[Activation]:
    """Looks at what each stage of the network passes on for some images `u8[B,28,28,1]`, and at the logits.

    The input of a layer is what the one before gave, after activation and pooling: nothing of the model is repeated.
    """

    def run(variables: Variables, images: jax.Array) -> list[jax.Array]:
        inputs: list[jax.Array] = []

        def note(next_function: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            if isinstance(context.module, nn.Conv | nn.Dense) and context.method_name == "__call__":
                inputs.append(args[0])
            return next_function(*args, **kwargs)

        with nn.intercept_methods(note):
            logits: Any = config.model.module(config.num_classes).apply(variables, images)
        return [*inputs, logits]

    values = [np.asarray(value) for value in jax.device_get(jax.jit(run)(variables, images))][1:]  # without the pixels
    blocks = config.model.blocks()
    size = images.shape[1]
    for block in blocks:
        size = block.output_size(size)
    if blocks:  # the last convolution's output arrives flat at the dense layer
        values[len(blocks) - 1] = values[len(blocks) - 1].reshape(len(images), size, size, blocks[-1].width)
    names = [f"convolution {i + 1}" for i in range(len(blocks))]
    names += [f"dense {i + 1}" for i in range(len(config.model.dense))]
    return [Activation(name, value) for name, value in zip([*names, "logits"], values, strict=True)]


def first_filters(variables: Variables) -> np.ndarray:
    """Returns the kernels that look at the pixels, `f32[W,k,k]`; for a perceptron those of its first dense layer."""
    params = variables["params"]
    if "Conv_0" in params:
        return np.moveaxis(np.asarray(params["Conv_0"]["kernel"])[:, :, 0, :], -1, 0)
    kernel = np.asarray(params["Dense_0"]["kernel"])
    side = math.isqrt(len(kernel))
    return kernel.T.reshape(-1, side, side)
