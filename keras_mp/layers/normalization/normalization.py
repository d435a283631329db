"""Normalization of each example by statistics of its own, in float32, from and to 16-bit tensors."""

import math
from typing import Any

import keras
import tensorflow as tf

from keras_mp._compat import keras_variables
from keras_mp.errors import ArgumentError
from keras_mp.ops import fusion

__all__ = ["GroupNormalization", "LayerNormalization", "RMSNormalization", "normalize_with_statistics"]


@keras.saving.register_keras_serializable(package="keras_mp")
class LayerNormalization(keras.layers.LayerNormalization):
    """Layer normalization that computes in float32 and keeps only its 16-bit input for the backward pass.

    A drop-in for `keras.layers.LayerNormalization`, with the same arguments and weights. The mean is subtracted before
    anything is scaled or squared, so large inputs that differ little keep their digits.

    Args:
        axis: int, or list or tuple of ints, the axes to normalize over. Defaults to -1.
        epsilon: float, added to the variance, in the squared unit of the input. Defaults to 1e-3.
        center, scale: bool, whether there is an offset `beta`, a factor `gamma`. Default to True.
        beta_initializer, gamma_initializer, beta_regularizer, gamma_regularizer, beta_constraint, gamma_constraint:
            as in Keras, for these weights.
        **kwargs: `rms_scaling` (deprecated by Keras), `name`, `dtype` and the other arguments of a Keras layer.

    Call arguments:
        inputs: tensor of any shape whose `axis` is static; float16, bfloat16, float32, float64 or integers.

    Returns:
        Tensor of the shape of `inputs`, in the layer's compute dtype.

    Raises:
        TypeError: if `axis` is neither an int nor a list or tuple.
        ValueError: if an axis is out of bounds.

    Example:
        >>> import keras_mp
        >>> import numpy as np
        >>> layer = keras_mp.layers.LayerNormalization(dtype="mixed_float16")
        >>> y = layer(np.array([[59968.0, 60000.0]], "float16"))
        >>> y.numpy().tolist(), y.dtype
        ([[-1.0, 1.0]], tf.float16)

    Ba, Kiros and Hinton, "Layer Normalization", 2016, https://arxiv.org/abs/1607.06450. With n the normalized input and
    h = g * gamma, the gradient to the input is (h - mean(h) - n * mean(h * n)) / sqrt(variance + epsilon): Ioffe and
    Szegedy, 2015, section 3, with the sums over `axis`.
    """

    def build(self, input_shape: Any) -> None:
        """Creates `gamma` and `beta`."""
        self.compute_output_shape(input_shape)  # Keras's words for an axis that is out of bounds
        super().build(input_shape)

    def call(self, inputs: Any) -> Any:
        """Normalizes `inputs`; see the class."""
        if self.rms_scaling:
            return super().call(tf.cast(inputs, _dtype(self, inputs)))
        axes = tuple(axis % len(inputs.shape) for axis in self.axis)
        # Keras reshapes the weights in this way, also where `axis` is not in the order of the input.
        return _normalize(self, inputs, {"gamma": self.gamma, "beta": self.beta}, axes=axes)


@keras.saving.register_keras_serializable(package="keras_mp")
class RMSNormalization(keras.layers.RMSNormalization):
    """Root mean square normalization that computes in float32 and keeps only its 16-bit input for the backward pass.

    A drop-in for `keras.layers.RMSNormalization`, with the same arguments and weights. The input is not cast to the
    compute dtype first, so float32 inputs above 65504 still count. `scale` lies along `axis` wherever that is; Keras's
    layer multiplies by it along the last axes, which fails, or scales the wrong axis where the sizes agree.

    Args:
        axis: int, or list or tuple of ints, the axes to normalize over. Defaults to -1.
        epsilon: float, added to the mean of the squares, in the squared unit of the input. Defaults to 1e-6.
        **kwargs: `name`, `dtype` and the other arguments of a Keras layer.

    Call arguments:
        inputs: tensor of any shape whose `axis` is static; float16, bfloat16, float32, float64 or integers.

    Returns:
        Tensor of the shape of `inputs`, in the layer's compute dtype.

    Raises:
        ValueError: if an axis is out of bounds.

    Example:
        >>> import keras_mp
        >>> import numpy as np
        >>> layer = keras_mp.layers.RMSNormalization(dtype="mixed_float16")
        >>> y = layer(np.array([[1e5, -1e5]], "float32"))  # float16 ends at 65504
        >>> y.numpy().tolist(), y.dtype
        ([[1.0, -1.0]], tf.float16)

    Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, https://arxiv.org/abs/1910.07467. The gradient is
    that of `LayerNormalization` without the mean of h.
    """

    axis: Any

    def __init__(self, axis: Any = -1, epsilon: float = 1e-6, **kwargs: Any) -> None:
        super().__init__(axis=axis, epsilon=epsilon, **kwargs)
        self.autocast = False  # a float32 input is not to be cast down before the float32 computation

    def build(self, input_shape: Any) -> None:
        """Creates `scale`."""
        self.compute_output_shape(input_shape)  # Keras's words for an axis that is out of bounds
        # As Keras's, but never rounded to half precision.
        self.axis = sorted(self.axis) if isinstance(self.axis, (list, tuple)) else [self.axis]
        shape = tuple(input_shape[axis] for axis in self.axis)
        self.scale = self.add_weight(name="scale", shape=shape, initializer="ones", autocast=False)
        self.built = True

    def call(self, x: Any) -> Any:
        """Normalizes `x`; see the class."""
        axes = tuple(axis % len(x.shape) for axis in self.axis)
        in_order = sorted(range(len(axes)), key=axes.__getitem__)
        scale = self.scale if in_order == list(range(len(axes))) else keras.ops.transpose(self.scale, in_order)
        return _normalize(self, x, {"gamma": scale}, axes=axes, centred=False)


@keras.saving.register_keras_serializable(package="keras_mp")
class GroupNormalization(keras.layers.GroupNormalization):
    """Group normalization that computes in float32 and keeps only its 16-bit input for the backward pass.

    A drop-in for `keras.layers.GroupNormalization`, with the same arguments and weights. The mean is subtracted before
    anything is scaled or squared, so large inputs that differ little keep their digits. Sums run over each channel
    first and over the channels of a group then, so that no tensor is transposed.

    Args:
        groups: int, how many groups the channels are divided into; 1 normalizes each example as a whole, -1 each
            channel on its own (instance normalization). Defaults to 32.
        axis: int, the axis of the channels, not that of the batch. Defaults to -1.
        epsilon: float, added to the variance, in the squared unit of the input. Defaults to 1e-3.
        center, scale: bool, whether there is an offset `beta`, a factor `gamma`. Default to True.
        beta_initializer, gamma_initializer, beta_regularizer, gamma_regularizer, beta_constraint, gamma_constraint:
            as in Keras, for these weights.
        **kwargs: `name`, `dtype` and the other arguments of a Keras layer.

    Call arguments:
        inputs: tensor of rank 2 or more whose `axis` is static; float16, bfloat16, float32, float64 or integers.

    Returns:
        Tensor of the shape of `inputs`, in the layer's compute dtype.

    Raises:
        ValueError: if `groups` is neither positive nor -1 or does not divide the channels, or `axis` is out of bounds
            or has no static size.
        keras_mp.errors.ArgumentError: if `axis` is that of the batch.

    Example:
        >>> import keras_mp
        >>> import numpy as np
        >>> layer = keras_mp.layers.GroupNormalization(groups=2, dtype="mixed_float16")
        >>> y = layer(np.array([[59968.0, 60000.0, 1.0, 3.0]], "float16"))
        >>> y.numpy().tolist(), y.dtype
        ([[-1.0, 1.0, -0.99951171875, 0.99951171875]], tf.float16)

    Wu and He, "Group Normalization", 2018, https://arxiv.org/abs/1803.08494. The gradient is that of
    `LayerNormalization`, with the means over all but the batch and the groups.
    """

    def __init__(self, groups: int = 32, *args: Any, **kwargs: Any) -> None:
        if not isinstance(groups, int) or (groups <= 0 and groups != -1):  # as Keras words it
            raise ValueError(
                "Received an invalid value for argument `groups`, expected a positive integer (or `-1` for instance "
                f"normalization). Received: groups={groups}"
            )
        super().__init__(groups, *args, **kwargs)
        self.autocast = False  # a float32 input is not to be cast down before the float32 computation

    def build(self, input_shape: Any) -> None:
        """Creates `gamma` and `beta`."""
        self.compute_output_shape(input_shape)  # Keras's words for an axis that is out of bounds
        if self.axis % len(input_shape) == 0:
            raise ArgumentError(
                f"`axis` must not be that of the batch. Received: axis={self.axis} for input shape "
                f"{tuple(input_shape)}. Type the axis of the channels, axis=-1 for the last one."
            )
        super().build(input_shape)

    def call(self, inputs: Any) -> Any:
        """Normalizes `inputs`; see the class."""
        rank = len(inputs.shape)
        channels = self.axis % rank
        axes = tuple(axis for axis in range(1, rank) if axis != channels)
        # Uncast, in a model and on its own.
        given = {"gamma": self.gamma, "beta": self.beta}
        weights = {name: keras_variables.uncast(weight) for name, weight in given.items() if weight is not None}
        return _normalize(self, inputs, weights, axes=axes, groups=(channels, self.groups))


def _dtype(layer: Any, inputs: Any) -> str:
    """The dtype to compute in."""
    return str(keras.backend.result_type(inputs.dtype, layer.compute_dtype, "float32"))


def normalize_with_statistics(layer: Any, inputs: Any, weights: dict[str, Any], **settings: Any) -> tuple[Any, ...]:
    """Calls the operation below with a layer's weights, each along the axes that it belongs to.

    Args:
        layer: what has the `epsilon` and the compute dtype.
        inputs: of any dtype.
        weights: `gamma`, `beta` or both; None counts as absent.
        **settings: of the operation: `axes`, `groups`, `centred`.

    Returns:
        The normalized input in the compute dtype, the variance, and the mean unless `centred` is False.
    """
    dtype = _dtype(layer, inputs)
    along = [settings["groups"][0]] if "groups" in settings else settings["axes"]
    shape = [size if axis in along else 1 for axis, size in enumerate(inputs.shape)]
    given = {
        name: tf.reshape(keras.ops.cast(weight, dtype), shape) for name, weight in weights.items() if weight is not None
    }
    answers: tuple[Any, ...] = _normalization(
        inputs if inputs.dtype.is_floating else tf.cast(inputs, dtype),
        *given.values(),
        weights=tuple(given),
        epsilon=layer.epsilon,
        dtype=dtype,
        output_dtype=layer.compute_dtype,
        **settings,
    )
    return answers


def _normalize(layer: Any, inputs: Any, weights: dict[str, Any], **settings: Any) -> Any:
    return normalize_with_statistics(layer, inputs, weights, **settings)[0]


def _mean(x: Any, axes: tuple[int, ...], groups: tuple[int, int] | None) -> Any:
    """The mean over `axes`, and over the channels of each group: of (axis of the channels, number of groups)."""
    mean = fusion.mean(x, axes)
    if groups is None or groups[1] == x.shape[groups[0]]:
        return mean
    # All that is left has one element a channel.
    return tf.reduce_mean(tf.reshape(mean, [-1, groups[1], x.shape[groups[0]] // groups[1]]), -1, keepdims=True)


def _along(x: Any, mean: Any, axes: tuple[int, ...], groups: tuple[int, int] | None) -> Any:
    """What `_mean` answered, for each channel, so that it broadcasts to `x`."""
    if groups is None or groups[1] == x.shape[groups[0]]:
        return mean
    sizes = keras.ops.shape(x)
    by_channel = tf.broadcast_to(mean, [sizes[0], groups[1], x.shape[groups[0]] // groups[1]])
    return tf.reshape(by_channel, [1 if axis in axes else size for axis, size in enumerate(sizes)])


def _normalization_forward(
    x: Any,
    *values: Any,
    weights: tuple[str, ...],
    axes: tuple[int, ...],
    epsilon: float,
    dtype: str,
    output_dtype: str,
    groups: tuple[int, int] | None = None,
    centred: bool = True,
) -> tuple[Any, ...]:
    given = dict(zip(weights, values, strict=True))
    y = tf.cast(x, dtype)
    means = [_mean(y, axes, groups)] if centred else []
    for mean in means:
        y -= _along(x, mean, axes, groups)
    variance = _mean(tf.square(y), axes, groups)
    y *= _along(x, tf.math.rsqrt(variance + epsilon), axes, groups)
    if "gamma" in given:
        y *= given["gamma"]
    if "beta" in given:
        y += given["beta"]
    return tf.cast(y, output_dtype), variance, *means


def _normalization_backward(
    x: Any,
    *values: Any,
    weights: tuple[str, ...],
    axes: tuple[int, ...],
    epsilon: float,
    dtype: str,
    output_dtype: str,
    groups: tuple[int, int] | None = None,
    centred: bool = True,
) -> Any:
    del output_dtype
    of_weights, (variance, *means), upstream = values[: len(weights)], values[len(weights) : -1], values[-1]
    given = dict(zip(weights, of_weights, strict=True))
    n = tf.cast(x, dtype)
    for mean in means:
        n -= _along(x, mean, axes, groups)
    inverse = _along(x, tf.math.rsqrt(variance + epsilon), axes, groups)
    n *= inverse
    g = tf.cast(upstream, dtype)
    h = g * given["gamma"] if "gamma" in given else g
    of_weight = {"gamma": g * n, "beta": g}
    along = (groups[0],) if groups else axes
    other_axes = tuple(axis for axis in range(len(x.shape)) if axis not in along)
    totals: dict[str, Any] = {}
    if groups and tuple(axes) == other_axes:
        # A channel's own statistics: what goes to its weights is what its elements are to be rid of.
        sizes = keras.ops.shape(x)
        totals = {name: fusion.total(each, other_axes) for name, each in of_weight.items()}
        share = given.get("gamma", 1.0) / tf.cast(math.prod(sizes[axis] for axis in axes), dtype)
        to_x = h - n * (totals["gamma"] * share)
        if centred:
            to_x -= totals["beta"] * share
    else:
        to_x = h - n * _along(x, _mean(h * n, axes, groups), axes, groups)
        if centred:
            to_x -= _along(x, _mean(h, axes, groups), axes, groups)
    return [
        tf.cast(inverse * to_x, x.dtype),
        *(totals[name] if name in totals else fusion.total(of_weight[name], other_axes) for name in given),
    ]


_normalization = fusion.operation(_normalization_forward, _normalization_backward, keeps_statistics=True)
