"""Gradients to the kernels of convolutions of images, as matmuls and small convolutions that are fast on a CPU.

oneDNN computes the gradient to a kernel by parts of rows, padded to 32 pixels in bfloat16. For an image eight pixels
wide, three quarters of the work are zeros, and float32 is as fast. Where the image is small, a matmul is faster. For a
depthwise kernel larger than 3 x 3, several kernels of 3 x 3 are: they alone have fast code.

Images and gradients to the outputs have shape (batch, height, width, channels) with known sizes.
"""

from collections.abc import Callable
from typing import TypeAlias

import tensorflow as tf

from keras_mp.ops import fusion

__all__ = ["by_offsets", "by_patches", "by_tiles", "convolved", "pointwise"]

# The size of the depthwise kernel that has fast code.
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
    """Returns a convolution with the gradients given. Second derivatives are TensorFlow's.

    Args:
        convolve: the convolution of inputs and kernel.
        to_inputs: function of the kernel and the gradient to the outputs. Returns the gradient to the inputs.
        to_kernel: function of the inputs and the gradient to the outputs. Returns the gradient to the kernel.
        inputs: images.
        kernel: kernel of the convolution.
    """

    @fusion.custom_gradient
    def run(inputs: tf.Tensor, kernel: tf.Tensor) -> tuple[tf.Tensor, fusion.Gradient]:
        def gradient(upstream: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            return to_inputs(kernel, upstream), to_kernel(fusion.not_before(upstream, inputs), upstream)

        return convolve(inputs, kernel), gradient

    return run(inputs, kernel)


def pointwise(inputs: tf.Tensor, upstream: tf.Tensor, strides: tuple[int, int]) -> tf.Tensor:
    """Returns the gradient to a kernel of one pixel: a matmul over all its positions.

    Args:
        inputs: images.
        upstream: gradient to the outputs.
        strides: strides of the kernel.
    """
    if strides != (1, 1):
        inputs = inputs[:, :: strides[0], :: strides[1], :]
    return _outer_sum(inputs, upstream)[None, None]


def by_offsets(inputs: tf.Tensor, upstream: tf.Tensor, size: tuple[int, int], padding: str) -> tf.Tensor:
    """Returns the gradient to a kernel that moves by one pixel, as one matmul for each pixel of the kernel.

    Args:
        inputs: images.
        upstream: gradient to the outputs.
        size: size of the kernel.
        padding: "same" or "valid".
    """
    height, width = upstream.shape[1], upstream.shape[2]
    # Rows of pixels first: an image shifted by whole rows is then one piece of memory. TensorFlow does not copy it.
    inputs = tf.transpose(_padded(inputs, upstream, size, (1, 1), padding), [1, 0, 2, 3])
    upstream = tf.transpose(upstream, [1, 0, 2, 3])
    shifted = [inputs[:, :, x : x + width] for x in range(size[1])]
    return tf.stack(
        [tf.stack([_outer_sum(columns[y : y + height], upstream) for columns in shifted]) for y in range(size[0])]
    )


def by_patches(
    inputs: tf.Tensor, upstream: tf.Tensor, size: tuple[int, int], strides: tuple[int, int], padding: str
) -> tf.Tensor:
    """Returns the gradient to a kernel as one matmul of all patches of the image.

    Args:
        inputs: images.
        upstream: gradient to the outputs.
        size: size of the kernel.
        strides: strides of the kernel.
        padding: "same" or "valid".
    """
    patches = tf.image.extract_patches(inputs, [1, *size, 1], [1, *strides, 1], [1, 1, 1, 1], padding.upper())
    return tf.reshape(_outer_sum(patches, upstream), [*size, inputs.shape[-1], upstream.shape[-1]])


def by_tiles(
    inputs: tf.Tensor, upstream: tf.Tensor, kernel: tuple[int, ...], strides: tuple[int, int], padding: str
) -> tf.Tensor:
    """Returns the gradient to a depthwise kernel, 3 x 3 pixels at a time, or 3 where it is one pixel high or wide.

    Args:
        inputs: images.
        upstream: gradient to the outputs.
        kernel: shape of the kernel, (height, width, channels, multiplier).
        strides: strides of the kernel.
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


def _outer_sum(inputs: tf.Tensor, upstream: tf.Tensor) -> tf.Tensor:
    """Returns the sum over batch and pixels of the outer products of the channels."""
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
    """Returns the image with the zeros of TensorFlow's padding around it, and more behind it for `room`.

    Args:
        inputs: images.
        upstream: gradient to the outputs.
        size: size of the kernel in pixels.
        strides: strides of the kernel.
        padding: "same" or "valid".
        room: size of a larger kernel with the same first pixel, which must fit at every position.
    """
    pads = [[0, 0]]
    for axis in (0, 1):
        there, last = inputs.shape[1 + axis], (upstream.shape[1 + axis] - 1) * strides[axis]
        before = max(last + size[axis] - there, 0) // 2 if padding == "same" else 0
        behind = max(last + (room or size)[axis] - before - there, 0)
        pads.append([before, behind])
    return tf.pad(inputs, [*pads, [0, 0]])
