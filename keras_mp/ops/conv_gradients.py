"""Gradients to the kernels of convolutions of images, as products and small convolutions that are fast on a CPU.

oneDNN computes the gradient to a kernel by parts of rows, which it fills up to 32 pixels in bfloat16: of an image eight
pixels wide, three quarters of the work are zeros, and float32 is as fast. Where the image is small, a matrix product is
faster; where a depthwise kernel is larger than 3 x 3, several kernels of 3 x 3 are, for which alone there is fast code.

Images have shape (batch, height, width, channels) with sizes that are known, gradients to the outputs as well.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import tensorflow as tf

from keras_mp.ops import fusion

__all__ = ["by_offsets", "by_patches", "by_tiles", "convolved", "pointwise"]

# The size of the depthwise kernel that there is fast code for.
TILE = 3

# From inputs and the gradient to the outputs to the gradient to the kernel.
KernelGradient: TypeAlias = Callable[[tf.Tensor, tf.Tensor], tf.Tensor]


def convolved(
    convolve: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
    to_inputs: Callable[[tf.Tensor, tf.Tensor], tf.Tensor],
    to_kernel: KernelGradient,
    inputs: tf.Tensor,
    kernel: tf.Tensor,
) -> tf.Tensor:
    """A convolution with gradients of its own, which have gradients of TensorFlow's.

    Args:
        convolve: the convolution, of inputs and kernel.
        to_inputs: from the kernel and the gradient to the outputs to that to the inputs.
        to_kernel: from the inputs and the gradient to the outputs to that to the kernel.
        inputs: images.
        kernel: of the convolution.
    """

    @fusion.custom_gradient
    def run(inputs: tf.Tensor, kernel: tf.Tensor) -> Any:
        def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            return to_inputs(kernel, upstream), to_kernel(fusion.not_before(upstream, inputs), upstream)

        return convolve(inputs, kernel), gradient

    return run(inputs, kernel)


def pointwise(inputs: tf.Tensor, upstream: tf.Tensor, strides: tuple[int, int]) -> tf.Tensor:
    """The gradient to a kernel of one pixel: a product over all pixels that it was laid on.

    Args:
        inputs: images.
        upstream: gradient to the outputs.
        strides: of the kernel.
    """
    if strides != (1, 1):
        inputs = inputs[:, :: strides[0], :: strides[1], :]
    return _product(inputs, upstream)[None, None]


def by_offsets(inputs: tf.Tensor, upstream: tf.Tensor, size: tuple[int, int], padding: str) -> tf.Tensor:
    """The gradient to a kernel that moves by one pixel, as one product for each of its own.

    Args:
        inputs: images.
        upstream: gradient to the outputs.
        size: of the kernel.
        padding: "same" or "valid".
    """
    height, width = upstream.shape[1], upstream.shape[2]
    # Rows of pixels first: what is shifted by whole rows is then one piece of memory, which TensorFlow does not copy.
    inputs = tf.transpose(_padded(inputs, upstream, size, (1, 1), padding), [1, 0, 2, 3])
    upstream = tf.transpose(upstream, [1, 0, 2, 3])
    shifted = [inputs[:, :, x : x + width] for x in range(size[1])]
    return tf.stack(
        [tf.stack([_product(columns[y : y + height], upstream) for columns in shifted]) for y in range(size[0])]
    )


def by_patches(
    inputs: tf.Tensor, upstream: tf.Tensor, size: tuple[int, int], strides: tuple[int, int], padding: str
) -> tf.Tensor:
    """The gradient to a kernel as one product of all patches of the image.

    Args:
        inputs: images.
        upstream: gradient to the outputs.
        size: of the kernel.
        strides: of the kernel.
        padding: "same" or "valid".
    """
    patches = tf.image.extract_patches(inputs, [1, *size, 1], [1, *strides, 1], [1, 1, 1, 1], padding.upper())
    return tf.reshape(_product(patches, upstream), [*size, inputs.shape[-1], upstream.shape[-1]])


def by_tiles(
    inputs: tf.Tensor, upstream: tf.Tensor, kernel: tuple[int, ...], strides: tuple[int, int], padding: str
) -> tf.Tensor:
    """The gradient to a depthwise kernel, of 3 x 3 pixels at a time, or of 3 where it is one pixel high or wide.

    Args:
        inputs: images.
        upstream: gradient to the outputs.
        kernel: its shape, (height, width, channels, multiplier).
        strides: of the kernel.
        padding: "same" or "valid".
    """
    tile = [1 if size == 1 else TILE for size in kernel[:2]]
    height, width = (-(-size // part) * part for size, part in zip(kernel[:2], tile, strict=True))
    inputs = _padded(inputs, upstream, kernel[:2], strides, padding, (height, width))
    rows, columns = ((upstream.shape[1 + axis] - 1) * strides[axis] + tile[axis] for axis in (0, 1))

    def gradient(y: int, x: int) -> tf.Tensor:
        return tf.nn.depthwise_conv2d_backprop_filter(
            inputs[:, y : y + rows, x : x + columns, :], (*tile, *kernel[2:]), upstream, (1, *strides, 1), "VALID"
        )

    tiles = [tf.concat([gradient(y, x) for x in range(0, width, tile[1])], axis=1) for y in range(0, height, tile[0])]
    return tf.concat(tiles, axis=0)[: kernel[0], : kernel[1]]


def _product(inputs: tf.Tensor, upstream: tf.Tensor) -> tf.Tensor:
    """The sum over batch and pixels of the outer products of the channels."""
    return tf.matmul(
        tf.reshape(inputs, [-1, inputs.shape[-1]]), tf.reshape(upstream, [-1, upstream.shape[-1]]), transpose_a=True
    )


def _padded(
    inputs: tf.Tensor,
    upstream: tf.Tensor,
    size: tuple[int, ...],
    strides: tuple[int, int],
    padding: str,
    room: tuple[int, ...] = (),
) -> tf.Tensor:
    """The image with the zeros that TensorFlow's padding lays around it, and behind it those that `room` wants.

    Args:
        inputs: images.
        upstream: gradient to the outputs.
        size: of the kernel, in pixels.
        strides: of the kernel.
        padding: "same" or "valid".
        room: the size of a larger kernel, of the same first pixel, that has to fit in every place.
    """
    pads = [[0, 0]]
    for axis in (0, 1):
        there, last = inputs.shape[1 + axis], (upstream.shape[1 + axis] - 1) * strides[axis]
        before = max(last + size[axis] - there, 0) // 2 if padding == "same" else 0
        behind = max(last + (room or size)[axis] - before - there, 0)
        pads.append([before, behind])
    return tf.pad(inputs, [*pads, [0, 0]])
