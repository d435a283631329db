"""Averages over windows and over whole axes, with sums in float32, from and to 16-bit tensors."""

import math
from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_mp.ops import fusion, windows

__all__ = [
    "AveragePooling1D",
    "AveragePooling2D",
    "AveragePooling3D",
    "GlobalAveragePooling1D",
    "GlobalAveragePooling2D",
    "GlobalAveragePooling3D",
]


class _AveragePooling(keras.layers.Layer):
    """What the three average poolings share."""

    def __init__(
        self,
        pool_size: Any,
        strides: Any = None,
        padding: str = "valid",
        data_format: str | None = None,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(padding, str) or padding.lower() not in ("valid", "same"):
            raise ValueError(f"Argument `padding` must be either 'valid' or 'same'. Received: {padding}")
        super().__init__(pool_size, strides, padding.lower(), data_format, name, **kwargs)
        if 0 in self.strides:  # Keras lets it pass and divides by it when called
            raise ValueError(f"The `strides` argument must be integers > 0. Received: strides={strides}")
        self.autocast = False  # a float32 input is not to be cast down before the float32 computation

    def compute_output_shape(self, input_shape: Any) -> Any:
        """Returns the shape of the means, or raises Keras's error for a window that does not fit."""
        spatial = input_shape[1:-1] if self.data_format == "channels_last" else input_shape[2:]
        fits = all(n is None or n >= window for n, window in zip(spatial, self.pool_size, strict=True))
        if self.padding == "valid" and not fits:
            raise ValueError(
                f"Computed output size would be zero or negative. Received: `inputs.shape={tuple(input_shape)}`, "
                f"`pool_size={self.pool_size}`, `strides={self.strides}`, `padding={self.padding}`."
            )
        return super().compute_output_shape(input_shape)

    def call(self, inputs: Any) -> Any:
        """Averages the windows of `inputs`; see the class."""
        self.compute_output_shape(inputs.shape)  # Keras's words for a window that does not fit
        # TensorFlow's kernels take the channels last on a CPU, and Keras transposes for the same reason.
        axes = list(range(len(inputs.shape)))
        first = self.data_format == "channels_first"
        x = tf.transpose(inputs, [0, *axes[2:], 1]) if first else inputs
        y = _windows(x, tuple(self.pool_size), tuple(self.strides), self.padding.upper(), self.compute_dtype)
        return tf.transpose(y, [0, axes[-1], *axes[1:-1]]) if first else y


@keras.saving.register_keras_serializable(package="keras_mp")
class AveragePooling1D(_AveragePooling, keras.layers.AveragePooling1D):
    """Average pooling over steps, with sums in float32; nothing of the input is kept for the backward pass.

    A drop-in for `keras.layers.AveragePooling1D`; `AveragePooling2D` has the details.

    Args:
        pool_size: int, steps in a window.
        strides: int, steps from one window to the next. Defaults to None, for `pool_size`.
        padding: "valid" or "same", in which case the padding counts in no mean. Defaults to "valid".
        data_format: "channels_last" or "channels_first". Defaults to `keras.config.image_data_format()`.
        **kwargs: `name`, `dtype` and the other arguments of a Keras layer.

    Call arguments:
        inputs: tensor of shape (batch, steps, channels), or (batch, channels, steps); float16, bfloat16, float32,
            float64 or integers.

    Returns:
        Tensor of rank 3 in the layer's compute dtype.

    Raises:
        ValueError: if an argument is none of those above, the input is not of rank 3 or is shorter than a window.

    Example:
        >>> import keras_mp
        >>> import numpy as np
        >>> layer = keras_mp.layers.AveragePooling1D(2, dtype="mixed_float16")
        >>> layer(np.array([[[60000.0], [60064.0]]], "float16")).numpy().tolist()
        [[[60032.0]]]
    """


@keras.saving.register_keras_serializable(package="keras_mp")
class AveragePooling2D(_AveragePooling, keras.layers.AveragePooling2D):
    """Average pooling over height and width, with sums in float32; nothing of the input is kept for the backward pass.

    A drop-in for `keras.layers.AveragePooling2D`. TensorFlow's kernel adds float16 in float16 on a CPU, so that a
    window of 64 by 64 values of 20 is inf; its bfloat16 kernel is used only where a trial finds sums in float32.

    Args:
        pool_size: int or 2 ints, height and width of a window.
        strides: int or 2 ints, from one window to the next. Defaults to None, for `pool_size`.
        padding: "valid" or "same", in which case the padding counts in no mean. Defaults to "valid".
        data_format: "channels_last" or "channels_first". Defaults to `keras.config.image_data_format()`.
        **kwargs: `name`, `dtype` and the other arguments of a Keras layer.

    Call arguments:
        inputs: tensor of shape (batch, height, width, channels), or (batch, channels, height, width); float16,
            bfloat16, float32, float64 or integers.

    Returns:
        Tensor of rank 4 in the layer's compute dtype.

    Raises:
        ValueError: if an argument is none of those above, the input is not of rank 4 or is smaller than a window.

    Example:
        >>> import keras_mp
        >>> import numpy as np
        >>> layer = keras_mp.layers.AveragePooling2D(64, dtype="mixed_float16")
        >>> layer(np.full((1, 64, 64, 1), 20, "float16")).numpy().tolist()
        [[[[20.0]]]]

    The gradient to an element is the sum, over the windows it is in, of their gradients over their sizes: Goodfellow,
    Bengio and Courville, "Deep Learning", 2016, section 9.3, differentiated.
    """


@keras.saving.register_keras_serializable(package="keras_mp")
class AveragePooling3D(_AveragePooling, keras.layers.AveragePooling3D):
    """Average pooling over depth, height and width, with sums in float32; nothing of the input is kept for backward.

    A drop-in for `keras.layers.AveragePooling3D`; `AveragePooling2D` has the details. The stock layer does not run in
    float16 on a CPU, where TensorFlow has no such kernel.

    Args:
        pool_size: int or 3 ints, the sizes of a window.
        strides: int or 3 ints, from one window to the next. Defaults to None, for `pool_size`.
        padding: "valid" or "same", in which case the padding counts in no mean. Defaults to "valid".
        data_format: "channels_last" or "channels_first". Defaults to `keras.config.image_data_format()`.
        **kwargs: `name`, `dtype` and the other arguments of a Keras layer.

    Call arguments:
        inputs: tensor of shape (batch, depth, height, width, channels), or (batch, channels, depth, height, width);
            float16, bfloat16, float32, float64 or integers.

    Returns:
        Tensor of rank 5 in the layer's compute dtype.

    Raises:
        ValueError: if an argument is none of those above, the input is not of rank 5 or is smaller than a window.

    Example:
        >>> import keras_mp
        >>> import numpy as np
        >>> layer = keras_mp.layers.AveragePooling3D(16, dtype="mixed_float16")
        >>> layer(np.full((1, 16, 16, 16, 1), 20, "float16")).numpy().ravel().tolist()
        [20.0]
    """


class _GlobalAveragePooling(keras.layers.Layer):
    """What the three global average poolings share."""

    def __init__(self, data_format: str | None = None, keepdims: bool = False, **kwargs: Any) -> None:
        super().__init__(data_format=data_format, keepdims=keepdims, **kwargs)
        self.autocast = False  # a float32 input is not to be cast down before the float32 computation

    def call(self, inputs: Any) -> Any:
        """Averages `inputs`; see the class."""
        return _mean(inputs, self._reduced_axes(inputs), self.keepdims, self.compute_dtype)

    def _reduced_axes(self, inputs: Any) -> tuple[int, ...]:
        rank = len(inputs.shape)
        return tuple(range(1, rank - 1) if self.data_format == "channels_last" else range(2, rank))


@keras.saving.register_keras_serializable(package="keras_mp")
class GlobalAveragePooling1D(_GlobalAveragePooling, keras.layers.GlobalAveragePooling1D):
    """Mean over the steps, those that a mask hides left out, with sums in float32.

    A drop-in for `keras.layers.GlobalAveragePooling1D`. A row that is masked altogether gives zeros, where the stock
    layer divides zero by zero and gives NaN in every dtype. What a masked step holds does not matter, be it NaN.

    Args:
        data_format: "channels_last" or "channels_first". Defaults to `keras.config.image_data_format()`.
        keepdims: bool, whether the steps stay as an axis of size 1. Defaults to False.
        **kwargs: `name`, `dtype` and the other arguments of a Keras layer.

    Call arguments:
        inputs: tensor of shape (batch, steps, channels), or (batch, channels, steps); float16, bfloat16, float32,
            float64 or integers.
        mask: bool or number of shape (batch, steps), True or not 0 for a step that counts. Defaults to None.

    Returns:
        Tensor of shape (batch, channels), or of rank 3 with `keepdims`, in the layer's compute dtype.

    Raises:
        ValueError: if `data_format` is none of the two, the input not of rank 3 or the mask not of its shape.
        TypeError: if the mask holds neither bools nor numbers.

    Example:
        >>> import keras_mp
        >>> import numpy as np
        >>> layer = keras_mp.layers.GlobalAveragePooling1D(dtype="mixed_float16")
        >>> steps = np.full((1, 4096, 1), 20, "float16")  # their sum is 81920, above the 65504 that float16 holds
        >>> layer(steps, mask=np.ones((1, 4096), bool)).numpy().tolist()
        [[20.0]]

    With n steps that count, each of them gets the gradient to the mean over n, the others zero.
    """

    def call(self, inputs: Any, mask: Any = None) -> Any:
        """Averages `inputs`; see the class."""
        if mask is None:
            return super().call(inputs)
        mask = tf.convert_to_tensor(mask)
        (axis,) = self._reduced_axes(inputs)
        _check_mask(mask, inputs, axis)
        return _masked_mean(inputs, tf.cast(mask, "bool"), axis, self.keepdims, self.compute_dtype)

    def compute_output_spec(self, inputs: Any, mask: Any = None) -> Any:
        """The shape and dtype of the mean, or the error for a mask that is not one of the steps."""
        if mask is not None:
            _check_mask(mask, inputs, *self._reduced_axes(inputs))
        return super().compute_output_spec(inputs)


@keras.saving.register_keras_serializable(package="keras_mp")
class GlobalAveragePooling2D(_GlobalAveragePooling, keras.layers.GlobalAveragePooling2D):
    """Mean over height and width, with sums in float32; nothing of the input is kept for the backward pass.

    A drop-in for `keras.layers.GlobalAveragePooling2D`, whose float32 copy of the input it does without.

    Args:
        data_format: "channels_last" or "channels_first". Defaults to `keras.config.image_data_format()`.
        keepdims: bool, whether height and width stay as axes of size 1. Defaults to False.
        **kwargs: `name`, `dtype` and the other arguments of a Keras layer.

    Call arguments:
        inputs: tensor of shape (batch, height, width, channels), or (batch, channels, height, width); float16,
            bfloat16, float32, float64 or integers.

    Returns:
        Tensor of shape (batch, channels), or of rank 4 with `keepdims`, in the layer's compute dtype.

    Raises:
        ValueError: if `data_format` is none of the two or the input is not of rank 4.

    Example:
        >>> import keras_mp
        >>> import numpy as np
        >>> layer = keras_mp.layers.GlobalAveragePooling2D(dtype="mixed_bfloat16")
        >>> layer(np.array([[[[300000.5], [-300000.0]]]], "float32")).numpy().tolist()  # bfloat16 would give 0
        [[0.25]]
    """


@keras.saving.register_keras_serializable(package="keras_mp")
class GlobalAveragePooling3D(_GlobalAveragePooling, keras.layers.GlobalAveragePooling3D):
    """Mean over depth, height and width, with sums in float32; nothing of the input is kept for the backward pass.

    A drop-in for `keras.layers.GlobalAveragePooling3D`, whose float32 copy of the input it does without.

    Args:
        data_format: "channels_last" or "channels_first". Defaults to `keras.config.image_data_format()`.
        keepdims: bool, whether the three axes stay, with size 1. Defaults to False.
        **kwargs: `name`, `dtype` and the other arguments of a Keras layer.

    Call arguments:
        inputs: tensor of shape (batch, depth, height, width, channels), or (batch, channels, depth, height, width);
            float16, bfloat16, float32, float64 or integers.

    Returns:
        Tensor of shape (batch, channels), or of rank 5 with `keepdims`, in the layer's compute dtype.

    Raises:
        ValueError: if `data_format` is none of the two or the input is not of rank 5.

    Example:
        >>> import keras_mp
        >>> import numpy as np
        >>> layer = keras_mp.layers.GlobalAveragePooling3D(dtype="mixed_float16")
        >>> layer(np.full((1, 16, 16, 16, 2), 20, "float16")).numpy().tolist()
        [[20.0, 20.0]]
    """


def _windows(x: Any, size: tuple[int, ...], strides: tuple[int, ...], padding: str, output_dtype: str) -> Any:
    """Means of windows of `x`, channels last."""
    accumulated = windows.wide(x, output_dtype)
    wide = "bfloat16" if windows.takes_16_bits(x, output_dtype, len(size)) else accumulated
    dtype, spatial = x.dtype if x.dtype.is_floating else tf.as_dtype(wide), x.shape[1:-1]
    # Each element is then in one window, and the gradient only has to be copied.
    tiled = size == strides and all(n is not None and n % window == 0 for n, window in zip(spatial, size, strict=True))
    fused = fusion.pays(x)

    @fusion.custom_gradient
    def run(x: Any) -> Any:
        shape = keras.ops.shape(x)

        def gradient(upstream: Any) -> Any:
            if tiled and wide == upstream.dtype.name == dtype.name:
                return windows.pool_gradient(upstream, shape, size, strides, padding)  # nothing to add up
            if tiled:
                return _shared_of(fused)(upstream, size=size, accumulated=accumulated, dtype=dtype)
            return tf.cast(windows.pool_gradient(tf.cast(upstream, accumulated), shape, size, strides, padding), dtype)

        y = windows.pool(tf.cast(x, wide), size, strides, padding)
        return tf.cast(y, output_dtype), gradient

    return run(tf.cast(x, dtype))


def _shared(upstream: Any, *, size: tuple[int, ...], accumulated: str, dtype: Any) -> Any:
    """The gradient of a mean to each element of its window."""
    return windows.repeated(tf.cast(tf.cast(upstream, accumulated) / math.prod(size), dtype), (1, *size, 1))


_shared_of = fusion.fusible(_shared)


def _mean(x: Any, axes: tuple[int, ...], keepdims: bool, output_dtype: str) -> Any:
    if not x.dtype.is_floating:
        x = tf.cast(x, windows.wide(x, output_dtype))
    known = all(n is not None for n in x.shape[1:])
    pooled = known and axes[0] == 1 and windows.takes_16_bits(x, output_dtype)
    fused = fusion.pays(x)
    dtype, wide = x.dtype, windows.wide(x, output_dtype)

    @fusion.custom_gradient
    def run(x: Any) -> Any:
        shape = keras.ops.shape(x)

        def gradient(upstream: Any) -> Any:
            count = tf.cast(math.prod(shape[axis] for axis in axes), wide)
            g = upstream if keepdims else _expanded(upstream, axes)
            return tf.broadcast_to(tf.cast(tf.cast(g, wide) / count, dtype), shape)

        if not pooled:
            return _mean_of(fused)(x, axes=axes, keepdims=keepdims, wide=wide, output_dtype=output_dtype), gradient
        *_, channels = x.shape
        steps = math.prod(x.shape[1:-1])
        y = tf.nn.avg_pool2d(tf.reshape(x, [-1, steps, 1, channels]), (steps, 1), 1, "VALID")
        return tf.reshape(y, [-1, *[1] * (len(axes) if keepdims else 0), channels]), gradient

    return run(x)


def _mean_forward(x: Any, *, axes: tuple[int, ...], keepdims: bool, wide: str, output_dtype: str) -> Any:
    y = fusion.mean(tf.cast(x, wide), axes)
    return tf.cast(y if keepdims else tf.squeeze(y, axes), output_dtype)


_mean_of = fusion.fusible(_mean_forward)


def _expanded(x: Any, axes: Sequence[int]) -> Any:
    for axis in axes:
        x = tf.expand_dims(x, axis)
    return x


def _check_mask(mask: Any, x: Any, axis: int) -> None:
    """Raises an error where a mask is not one of the steps of `x`."""
    dtype = tf.as_dtype(mask.dtype)
    if not (dtype.is_bool or dtype.is_floating or dtype.is_integer):
        raise TypeError(f"The `mask` must hold bools or numbers. Received: mask.dtype={dtype.name}")
    shape, batch, steps = tuple(mask.shape), x.shape[0], x.shape[axis]
    # One row may serve the whole batch.
    if len(shape) == 2 and shape[0] in (None, 1, batch or shape[0]) and shape[1] in (None, steps or shape[1]):
        return
    raise ValueError(
        f"The `mask` must be of shape (batch_size, steps), here {(batch, steps)}. "
        f"Received: inputs.shape={tuple(x.shape)}, mask.shape={shape}"
    )


def _masked_mean(x: Any, mask: Any, axis: int, keepdims: bool, output_dtype: str) -> Any:
    fused = fusion.pays(x, mask)
    wide = windows.wide(x, output_dtype)
    dtype = x.dtype if x.dtype.is_floating else tf.as_dtype(wide)

    @fusion.custom_gradient
    def run(x: Any, mask: Any) -> Any:
        settings = {"axis": axis, "keepdims": keepdims, "wide": wide}

        def gradient(upstream: Any) -> Any:
            return _masked_backward_of(fused)(mask, upstream, dtype=dtype, **settings), None

        return _masked_forward_of(fused)(mask, x, output_dtype=output_dtype, **settings), gradient

    return run(tf.cast(x, dtype), mask)


def _count(mask: Any, wide: str) -> Any:
    return tf.maximum(tf.reduce_sum(tf.cast(mask, wide), 1, keepdims=True), 1)  # 0 / 1 where all is masked


def _masked_forward(mask: Any, x: Any, *, axis: int, keepdims: bool, wide: str, output_dtype: str) -> Any:
    there = tf.where(tf.expand_dims(mask, 3 - axis), x, tf.zeros([], x.dtype))
    count = _count(mask, wide)
    y = fusion.total(tf.cast(there, wide), (axis,)) / tf.expand_dims(count, axis)
    return tf.cast(y if keepdims else tf.squeeze(y, axis), output_dtype)


def _masked_backward(mask: Any, upstream: Any, *, dtype: Any, axis: int, keepdims: bool, wide: str) -> Any:
    g = upstream if keepdims else tf.expand_dims(upstream, axis)
    g = tf.cast(tf.cast(g, wide) / tf.expand_dims(_count(mask, wide), 1), dtype)
    return tf.where(tf.expand_dims(mask, 3 - axis), g, tf.zeros([], dtype))


_masked_forward_of, _masked_backward_of = fusion.fusible(_masked_forward), fusion.fusible(_masked_backward)
